"""Answers of a model with a tuned prompt are those of the forward pass that was trained."""

import torch
from conformance.case import Case, Finding
from conformance.cases.batched_answers import LENGTH, TESTED
from conformance.cases.evaluation_loss import TRAINED
from conformance.conversations import row
from peft import PeftModel
from transformers import AutoModelForCausalLM


def answer(model, tokenizer, turns):
    """Return the most likely continuation, token by token, without padding or a cache."""
    messages = [{"role": role, "content": text} for role, text in turns[:-1]]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    given = len(ids)
    while len(ids) < given + LENGTH and ids[-1] != tokenizer.eos_token_id:
        logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits
        ids = [*ids, int(logits[0, -1].argmax())]
    return tokenizer.decode(ids[given:], skip_special_tokens=True)


def judge(case, reference, results):
    [result] = results.values()
    base = AutoModelForCausalLM.from_pretrained(reference.folder, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, result.model).eval()
    with torch.no_grad():
        exact = [answer(model, reference.tokenizer, turns) for turns in TESTED]
    pairs = zip(result.found["answers"], exact, strict=True)
    other = [f"{text!r} instead of {wanted!r}" for text, wanted in pairs if text.strip() != wanted.strip()]
    return Finding("silently wrong", f"other answers: {'; '.join(other)}") if other else Finding("right", "")


CASE = Case(
    title="Answers of a tuned prompt",
    group="what is measured",
    question="The model is trained by prompt tuning. Are its answers those of the forward pass that was trained, or of "
    "another one?",
    threads=["https://github.com/huggingface/peft/issues/2131", "https://github.com/huggingface/peft/pull/543"],
    added="2026-11-30",
    failed="three of three answers were those of another forward pass",
    passed="2026-11-30, commit 67f4e30975ef",
    rows=[row(*TRAINED)],
    settings={
        "test_rows": [row(*turns) for turns in TESTED],
        "method": "prompt_tuning",
        "learning_rate": 1.0,
        "steps": 3,
        "extra": {"virtual_tokens": 8},
        "ask": {"answers": LENGTH},
    },
    judge=judge,
)
