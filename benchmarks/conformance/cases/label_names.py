"""A trained classifier knows the names of its labels."""

import json

from conformance.case import Case, Finding
from conformance.cases.head_after_reload import ROWS


def judge(case, reference, results):
    [result] = results.values()
    if result.found.get("numbered"):
        return Finding("not offered", "labels are numbers")
    names = json.loads((result.model / "config.json").read_text()).get("id2label", {})
    known = sorted(names.values()) == sorted(row["label"] for row in ROWS)
    return Finding("right" if known else "silently wrong", "" if known else f"the saved names are {names}")


CASE = Case(
    title="The names of the labels",
    group="what ships",
    question="Labels are given as text. Does the saved configuration name them, so that a server answers `animal`, not"
    " LABEL_0?",
    threads=[
        "https://github.com/huggingface/transformers/issues/2487",
        "https://github.com/huggingface/transformers/issues/13298",
    ],
    rows=ROWS,
    settings={"kind": "classify", "method": "full", "batch_size": 2, "learning_rate": 0.1},
    judge=judge,
)
