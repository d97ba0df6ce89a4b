"""The evaluation on disk: scores in `evaluation.json`, every row's answers in `predictions.jsonl` and `base.json`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmtune.evaluate.eval_inputs import Plan
from llmtune.evaluate.inference import Answers, TokenSums
from llmtune.records import Contamination, Difference, Evaluation, Flips, GateResult, Slice, Study, StudyTable
from llmtune.store.atomic_files import explained, plain, read_json, write_json, write_text

EVALUATION, PREDICTIONS, BASE = "evaluation.json", "predictions.jsonl", "base.json"


@dataclass(frozen=True)
class BaseAnswers:
    """What the base model said, for runs that ask it the same."""

    inputs: str
    """Hash of all that these answers depend on."""
    answers: Answers | None = None
    """None where they are not known yet."""


def save_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write `evaluation.json`, in one step."""
    with explained(folder):
        write_json(folder / EVALUATION, asdict(evaluation))


def load_evaluation(folder: Path) -> Evaluation | None:
    """Read `evaluation.json`; None if there is none or it was damaged."""
    saved = read_json(folder / EVALUATION)
    if saved is None:
        return None
    return Evaluation(
        base=numbers(saved["base"]),
        tuned=numbers(saved["tuned"]),
        difference=differences(saved["difference"]),
        gates=tuple(GateResult(**gate) for gate in saved["gates"]),
        samples=tuple(saved["samples"]),
        rows=saved["rows"],
        signatures=saved["signatures"],
        baseline=saved.get("baseline"),
        details=saved.get("details", {}),
        flips={metric: load_flips(one) for metric, one in saved.get("flips", {}).items()},
        slices={column: tuple(map(load_slice, parts)) for column, parts in saved.get("slices", {}).items()},
        studies={name: load_study(one) for name, one in saved.get("studies", {}).items()},
        contamination=load_contamination(saved["contamination"]) if saved.get("contamination") else None,
    )


def differences(saved: dict[str, dict[str, Any]]) -> dict[str, Difference]:
    """Read differences by metric."""
    return {metric: Difference(**numbers(value)) for metric, value in saved.items()}


def load_flips(saved: dict[str, Any]) -> Flips:
    """Read the flips of one metric."""
    return Flips(**saved | {name: tuple(saved[name]) for name in ("gained_rows", "lost_rows")})


def load_slice(saved: dict[str, Any]) -> Slice:
    """Read one slice."""
    scores = {side: numbers(saved[side]) for side in ("base", "tuned")}
    return Slice(**saved | scores | {"difference": differences(saved["difference"])})


def load_study(saved: dict[str, Any]) -> Study:
    """Read one study."""
    tables = tuple(
        StudyTable(one["title"], tuple(one["heads"]), tuple(map(tuple, one["rows"]))) for one in saved["tables"]
    )
    scores = {side: numbers(saved[side]) for side in ("base", "tuned")}
    return Study(**saved | scores | {"difference": differences(saved["difference"]), "tables": tables})


def load_contamination(saved: dict[str, Any]) -> Contamination:
    """Read how test rows overlap with training rows."""
    return Contamination(
        **saved | {"examples": tuple(saved["examples"]), "scores": tuple(map(load_slice, saved["scores"]))}
    )


def numbers(values: dict[str, Any]) -> dict[str, Any]:
    """Put NaN back where JSON has null."""
    return {key: math.nan if value is None else value for key, value in values.items()}


def save_predictions(folder: Path, plan: Plan, base: Answers, tuned: Answers) -> None:
    """Write a line a test row: where it stands, prompt, reference, and what either model made of it."""
    sides = {"base": base, "tuned": tuned}
    # Nothing is redacted: these are the user's own rows, whole, beside the copy in `data/`; a report is passed on.
    lines = [json.dumps(plain(describe_row(i, plan, sides)), ensure_ascii=False) for i in range(len(plan.rows))]
    with explained(folder):
        write_text(folder / PREDICTIONS, "".join(line + "\n" for line in lines))


def save_base(folder: Path, answers: Answers, inputs: str) -> None:
    """Write all that the base model said to `base.json`, with the hash of what that depends on."""
    sums = answers.sums and {name: values.tolist() for name, values in vars(answers.sums).items()}
    told = {name: list(getattr(answers, name).items()) for name in ("texts", "scores", "predictions")}
    with explained(folder):
        write_text(folder / BASE, json.dumps({"inputs": inputs, "sums": sums, **told}, ensure_ascii=False))


def load_base(folder: Path, inputs: str) -> BaseAnswers:
    """Read `base.json`; without answers where there are none, or none from these inputs."""
    saved = read_json(folder / BASE)
    if not isinstance(saved, dict) or saved.get("inputs") != inputs:
        return BaseAnswers(inputs)
    sums = saved["sums"] and TokenSums(**{name: np.asarray(values) for name, values in saved["sums"].items()})
    texts, scores, predictions = (dict(saved[name]) for name in ("texts", "scores", "predictions"))
    return BaseAnswers(inputs, Answers(sums or None, texts, scores, predictions))


def describe_row(i: int, plan: Plan, sides: dict[str, Answers]) -> dict[str, Any]:
    """Return one row's line; what was not asked of the models is absent."""
    reference = plan.references[i]
    line: dict[str, Any] = {"origin": plan.origins[i], "prompt": plan.prompts[i], "reference": reference}
    for name, answers in sides.items():
        if answers.sums is not None:
            line[f"{name}_nats"] = float(answers.sums.nats[i])
            line["tokens"] = int(answers.sums.tokens[i])
        if i in answers.texts:
            line[name] = answers.texts[i]
            line[f"{name}_right"] = answers.texts[i].strip() == reference.strip()
        if i in answers.predictions and answers.predictions[i] != answers.texts.get(i):
            line[f"{name}_prediction"] = answers.predictions[i]
        if i in answers.scores:
            choice = answers.choice(i, plan.choices)
            line[f"{name}_choice"] = choice
            line[f"{name}_choice_right"] = choice == reference
    return line
