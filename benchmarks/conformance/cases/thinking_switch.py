"""A template's switch that was set for training is still set in the saved folder."""

from conformance.case import Case, Finding
from conformance.cases.evaluation_loss import TRAINED
from conformance.conversations import row
from conformance.reference import read_weights
from transformers import AutoTokenizer

EMPTY = "<think>\n\n</think>\n\n"


def judge(case, reference, results):
    [result] = results.values()
    assert read_weights(result.model)
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    prompt = tokenizer.apply_chat_template(case.rows[0]["messages"][:-1], tokenize=False, add_generation_prompt=True)
    if prompt.endswith(EMPTY):
        return Finding("right", "the saved template has the switch set")
    return Finding("silently wrong", "the saved template asks the model to think")


CASE = Case(
    title="The template's switch is saved",
    group="what ships",
    question="Qwen 3 is trained with `enable_thinking: false`. Does the saved folder prompt it as it was trained, or "
    "must every server be told again?",
    threads=[
        "https://github.com/hiyouga/LlamaFactory/issues/9765",
        "https://github.com/hiyouga/LlamaFactory/issues/9092",
    ],
    rows=[row(*TRAINED)],
    settings={"model": "qwen3", "extra": {"thinking": False}},
    judge=judge,
)
