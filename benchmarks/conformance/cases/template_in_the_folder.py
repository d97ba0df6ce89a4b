"""The saved folder writes a conversation as the model learned it."""

from conformance.case import Case, Finding
from conformance.conversations import row
from conformance.shipped import closest_piece
from transformers import AutoTokenizer

TURNS = [("system", "You are brief."), ("user", "Which colour is the sky?"), ("assistant", "Blue.")]


def judge(case, reference, results):
    [result] = results.values()
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    if not tokenizer.chat_template:
        return Finding("silently wrong", "no chat template in the folder")
    text = tokenizer.apply_chat_template(case.rows[0]["messages"], tokenize=False)
    far = closest_piece(reference, text, reference.step_taken(result.model, result.job["learning_rate"]))
    if far < 1e-3:
        return Finding("right", "", far)
    return Finding("silently wrong", f"the folder writes {text!r}, which is not what was learned", far)


CASE = Case(
    title="The chat template that was learned is saved",
    group="what ships",
    question="A model without a chat template is trained on a conversation. Does the template in the saved folder "
    "write the text that was learned?",
    threads=[
        "https://github.com/hiyouga/LlamaFactory/issues/5904",
        "https://github.com/modelscope/ms-swift/issues/2831",
    ],
    rows=[row(*TURNS)],
    settings={"model": "qwen2.5-plain"},
    reason=r"template.{0,40}\b(not|no|missing)\b|\b(not|no|without|missing)\b.{0,40}template",
    judge=judge,
)
