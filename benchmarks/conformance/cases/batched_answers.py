"""Answers that are generated in a padded batch are those of one prompt at a time."""

import torch
from conformance.case import Case, Finding
from conformance.cases.evaluation_loss import TRAINED
from conformance.conversations import row
from conformance.shipped import loaded, tuned_weights

LENGTH = 8
QUESTIONS = [
    "Red?",
    "Which colour has the sky on a day without clouds, if nobody looks at it?",
    "How many legs has a cat?",
]
TESTED = [[("system", "You are brief."), ("user", question), ("assistant", "No.")] for question in QUESTIONS]


def answer(reference, turns):
    """Return the most likely continuation, token by token, without padding or a cache."""
    messages = [{"role": role, "content": text} for role, text in turns[:-1]]
    ids = reference.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    given = len(ids)
    while len(ids) < given + LENGTH and ids[-1] != reference.tokenizer.eos_token_id:
        ids = [*ids, int(reference.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return reference.tokenizer.decode(ids[given:], skip_special_tokens=True)


def judge(case, reference, results):
    [result] = results.values()
    with loaded(reference, tuned_weights(reference, result.model)), torch.no_grad():
        exact = [answer(reference, turns) for turns in TESTED]
    found = result.found["answers"]
    other = [
        f"{got!r} instead of {wanted!r}"
        for got, wanted in zip(found, exact, strict=True)
        if got.strip() != wanted.strip()
    ]
    return Finding("silently wrong" if other else "right", "; ".join(other))


CASE = Case(
    title="Answers in a padded batch",
    group="what is measured",
    question="Three prompts of unequal length are answered in one batch: are the answers those of each prompt alone?",
    threads=[
        "https://github.com/huggingface/transformers/issues/26569",
        "https://github.com/unslothai/unsloth/issues/3699",
    ],
    rows=[row(*TRAINED)],
    settings={"test_rows": [row(*turns) for turns in TESTED], "learning_rate": 0.01, "ask": {"answers": LENGTH}},
    judge=judge,
)
