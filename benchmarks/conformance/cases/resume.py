"""A run that is stopped and resumed gives the weights of one that was not."""

from conformance.case import Case, Finding
from conformance.cases.accumulation import ROWS
from conformance.conversations import row
from conformance.reference import distance, read_weights


def judge(case, reference, results):
    straight, resumed = (read_weights(results[name].model) for name in ("straight", "resumed"))
    start = {name: weight for name, weight in reference.start.items() if name in straight}
    moved = {name: straight[name] - start[name] for name in start}
    again = {name: resumed[name] - start[name] for name in start}
    far = distance(again, moved)
    return Finding(
        "right" if far < 1e-4 else "silently wrong", "" if far < 1e-4 else "other weights after resuming", far
    )


CASE = Case(
    title="Resume equals no stop",
    group="what is computed",
    question="Three rows, seven steps of AdamW: are the weights the same after a stop within the second epoch?",
    threads=[
        "https://github.com/modelscope/ms-swift/issues/10050",
        "https://github.com/huggingface/accelerate/pull/4071",
    ],
    rows=[row(*turns) for turns in ROWS[:3]],
    settings={"steps": 7, "save_steps": 4, "optim": "adamw_torch", "learning_rate": 0.01},
    jobs={"straight": {}, "resumed": {"resume_from": "straight"}},
    judge=judge,
)
