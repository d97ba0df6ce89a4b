"""A loss that is not a number ends the run with an error."""

import torch
from conformance.case import Case, Finding
from conformance.conversations import row
from conformance.reference import read_weights


def judge(case, reference, results):
    [result] = results.values()
    if all(bool(torch.isfinite(weight).all()) for weight in read_weights(result.model).values()):
        return Finding("silently wrong", "trained on a loss that is not a number")
    return Finding("silently wrong", "weights that are not numbers are saved")


CASE = Case(
    title="A loss that is not a number",
    group="what is computed",
    question="The model overflows, so the loss is NaN from the first step on: does the run stop, or end as if all were"
    " well?",
    threads=["https://github.com/huggingface/trl/issues/6702", "https://github.com/MakazhanAlpamys/Soup/issues/532"],
    rows=[row(("user", "Which colour is the sky?"), ("assistant", "Blue."))],
    settings={"model": "qwen2.5-overflowing", "steps": 3, "learning_rate": 0.01},
    reason=r"\bnan\b|not (a )?finite|non-?finite|\binf\b|infinit|diverge",
    judge=judge,
)
