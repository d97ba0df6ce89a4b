"""Base and tuned model are measured in the same precision."""

from conformance.case import Case, Finding
from conformance.cases.evaluation_loss import TESTED, TRAINED
from conformance.conversations import row


def judge(case, reference, results):
    [result] = results.values()
    before, after = result.found["losses"][0], result.found["losses"][-1]
    far = abs(after - before) / before
    if far < 1e-4:
        return Finding("right", "", far)
    return Finding("silently wrong", f"{before:.4f} before, {after:.4f} after a step that changes nothing", far)


CASE = Case(
    title="Base and tuned model in one precision",
    group="what is measured",
    question="QLoRA with a learning rate of 1e-9: is the loss before training that after it, or is the base measured "
    "unquantised?",
    threads=[
        "https://github.com/unslothai/unsloth-zoo/pull/810",
        "https://github.com/hiyouga/LlamaFactory/issues/2658",
    ],
    rows=[row(*TRAINED)],
    settings={"test_rows": [row(*TESTED)], "method": "qlora", "learning_rate": 1e-9, "ask": {"losses": True}},
    judge=judge,
)
