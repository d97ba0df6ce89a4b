"""Answers on disk (`predictions.jsonl`, `base.json`), and sample answers for the report.

Shapes: N rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict
from typing_extensions import TypedDict

from llmtune.data.answer_parser import ParsedAnswer
from llmtune.data.data_report import thumbnail
from llmtune.evaluate.eval_inputs import EvalInputs
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.evaluate.inference import Answers, TokenSums
from llmtune.evaluate.metric import Measure, PairedMeasures
from llmtune.evaluate.shared_prefix import find_choice
from llmtune.evaluate.token_batches import cut_evenly
from llmtune.store.atomic_files import explained, hash_recording, hash_value, plain, read_json, write_json, write_text
from llmtune.store.json_shapes import find_misfit
from llmtune.store.run_folder import THUMBNAILS
from llmtune.store.score_records import Evaluation, Flips

PREDICTIONS, BASE, TUNED = "predictions.jsonl", "base.json", "tuned.json"
VECTORS = ".npy"
BY_ROW = ("texts", "scores", "predictions", "parts", "cut", "logits")
"""Row-wise fields of `Answers`, as named in `base.json`."""


class SavedPart(TypedDict):
    """A `ParsedAnswer` in base.json."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    text: str
    reasoning: str | None
    tool_calls: list[dict[str, object]]
    complete: bool
    error: str | None
    sampled: str


class SavedAnswers(TypedDict):
    """Contents of base.json or tuned.json; each row's part has the row's index."""

    inputs: str
    sums: dict[str, list[float | None]] | None
    """Fields of `TokenSums`."""
    texts: list[tuple[int, str]]
    scores: list[tuple[int, list[float | None]]]
    predictions: list[tuple[int, object]]
    parts: list[tuple[int, list[SavedPart]]]
    cut: list[tuple[int, float]]
    logits: list[tuple[int, list[list[float | None]]]]
    corpus: str
    """Hash of the file next to it with the vectors of a corpus; empty without any."""
    note: str
    hash: str
    """Of all other keys."""


@dataclass(frozen=True)
class BaseAnswers:
    """Answers of the base (or tuned) model or of a baseline, reused by later evaluations with the same inputs."""

    inputs: str
    """Hash of everything that these answers depend on."""
    answers: Answers | None = None
    """None until they are known."""
    note: str = ""
    """How a simple baseline was fitted."""


def save_predictions(folder: Path, inputs: EvalInputs, models: Mapping[str, Answers]) -> None:
    """Write a line for each test row: origin, prompt, reference, and the answers of the models by name."""
    # Nothing is redacted: these are the user's own rows, next to the copy in `data/`. Only shared reports are redacted.
    lines = [json.dumps(plain(prediction_row(i, inputs, models)), ensure_ascii=False) for i in range(len(inputs.rows))]
    with explained(folder):
        write_text(folder / PREDICTIONS, "".join(line + "\n" for line in lines))


def prediction_row(i: int, inputs: EvalInputs, models: Mapping[str, Answers]) -> dict[str, object]:
    """Return one row's line, without keys for what was not evaluated."""
    reference = inputs.references[i]
    line: dict[str, object] = {"origin": inputs.origins[i], "prompt": inputs.prompts[i], "reference": reference}
    for name, answers in models.items():
        if answers.sums is not None:
            line[f"{name}_nats"] = float(answers.sums.nats[i])
            line["tokens"] = int(answers.sums.tokens[i])
        if i in answers.texts:
            line[name] = answers.texts[i]
            line[f"{name}_right"] = answers.texts[i].strip() == reference.strip()
        if i in answers.parts:
            line[f"{name}_parts"] = [asdict(answer) for answer in answers.parts[i]]
        if i in answers.predictions and answers.predictions[i] != answers.texts.get(i):
            line[f"{name}_prediction"] = answers.predictions[i]
        if i in answers.scores:
            choice = answers.choice(i, inputs.choices)
            line[f"{name}_choice"] = choice
            line[f"{name}_choice_right"] = choice == find_choice(reference, inputs.choices)
    return line


def save_base(folder: Path, answers: Answers, inputs: str, name: str = BASE, note: str = "") -> None:
    """Write the base model's answers to `base.json` (or the file `name`), with the hash of their inputs and a note.

    Vectors of a corpus are in a file of that name that ends in `.npy`.
    """
    sums = answers.sums and {name: values.tolist() for name, values in vars(answers.sums).items()}
    by_row = {name: list(getattr(answers, name).items()) for name in BY_ROW}
    by_row["parts"] = [(i, [asdict(answer) for answer in parsed]) for i, parsed in answers.parts.items()]
    with explained(folder):
        if answers.corpus is not None:
            np.save((folder / name).with_suffix(VECTORS), answers.corpus)
        searched = "" if answers.corpus is None else hash_recording((folder / name).with_suffix(VECTORS))
        saved = {"inputs": inputs, "sums": sums, **by_row, "corpus": searched, "note": note}
        write_text(folder / name, json.dumps({**saved, "hash": hash_value(saved)}, ensure_ascii=False))


def load_base(folder: Path | None, inputs: str, name: str = BASE) -> BaseAnswers:
    """Read `base.json` (or the file `name`); without answers if it has none for these inputs."""
    saved = read_json(folder / name) if folder else None
    if saved is None or find_misfit(saved, SavedAnswers) or saved["inputs"] != inputs:
        return BaseAnswers(inputs)
    if saved.pop("hash") != hash_value(saved):
        return BaseAnswers(inputs)
    if saved["sums"] and saved["sums"].keys() != {one.name for one in fields(TokenSums)}:
        return BaseAnswers(inputs)
    sums = saved["sums"] and TokenSums(**{name: np.asarray(values) for name, values in saved["sums"].items()})
    by_row: dict[str, Any] = {name: dict(saved[name]) for name in BY_ROW}
    by_row["parts"] = {i: [ParsedAnswer(**answer) for answer in parsed] for i, parsed in by_row["parts"].items()}
    corpus = None
    if folder is not None and saved["corpus"]:
        vectors = (folder / name).with_suffix(VECTORS)
        if not vectors.is_file() or hash_recording(vectors) != saved["corpus"]:
            return BaseAnswers(inputs)
        corpus = np.load(vectors)
    return BaseAnswers(inputs, Answers(sums or None, **by_row, corpus=corpus), saved["note"])


def load_first(folders: Sequence[Path | None], inputs: str, name: str = BASE) -> BaseAnswers:
    """Read the answers to these inputs from the first folder that has them, as `load_base` does."""
    read = (load_base(folder, inputs, name) for folder in folders)
    return next((one for one in read if one.answers is not None), BaseAnswers(inputs))


MOST_THUMBNAILS = 64
"""Pictures of test rows on a page, about 5 kB each."""


def save_thumbnails(folder: Path, inputs: EvalInputs, task: EvaluatedTask, evaluation: Evaluation) -> None:
    """Write small copies of the pictures of the rows that reports show, by the row's number; nothing without any."""
    flips = [row for one in evaluation.flips.values() for row in (*one.gained_rows, *one.lost_rows)]
    numbers = {int(row["row"]) for row in (*evaluation.samples, *flips) if "row" in row}
    shown = [i for i, number in enumerate(inputs.rows) if number in numbers]
    pictures = [(inputs.rows[i], one) for i in shown for one in task.list_pictures(inputs.questions[i])]
    thumbnails: dict[str, list[str]] = {}
    for number, picture in pictures[:MOST_THUMBNAILS]:
        thumbnails.setdefault(str(number), []).append(thumbnail(picture))
    if thumbnails:
        write_json(folder / Path(THUMBNAILS).name, thumbnails)


SAMPLE = (
    *("origin", "prompt", "reference", "row"),
    *(f"{model}{part}" for part in ("", "_choice") for model in ("base", "tuned", "blind")),
)
"""Keys of a sample row."""
MOST_SHOWN = 5
HALF = 0.5
"""Value of a tie."""


def pick_samples(inputs: EvalInputs, models: Mapping[str, Answers], count: int) -> tuple[dict[str, str], ...]:
    """Return sample rows, spread evenly over the answered ones; never chosen by how the answers look."""
    shown = list(models["base"].texts or models["base"].scores)
    return tuple(sample_row(shown[at], inputs, models) for at in cut_evenly(len(shown), count))


def sample_row(i: int, inputs: EvalInputs, models: Mapping[str, Answers]) -> dict[str, str]:
    """Return row `i` with the answers of the models; missing answers are absent. With pictures it has its number."""
    line = prediction_row(i, inputs, models) | ({"row": inputs.rows[i]} if i in inputs.pictured else {})
    return {key: str(line[key]) for key in SAMPLE if key in line}


def find_flips(
    measures: PairedMeasures, inputs: EvalInputs, models: Mapping[str, Answers], count: int
) -> dict[str, Flips]:
    """Return the rows that only one of base and tuned model got right, by right-or-wrong metric.

    A tie, half right, is no flip. Metrics whose base is all ties (rewards against the base itself) are skipped. At
    most `count` rows per direction, and never more than five, are shown, spread evenly over all flips.
    """
    flips = {}
    for metric, after in measures.tuned.items():
        before = measures.base.get(metric)
        if not after.right_wrong or before is None or (before.sums_NK[:, 0] == HALF).all():
            continue
        gained, lost = flipped_rows(before, after)
        gained_rows, lost_rows = (
            tuple(sample_row(way[at], inputs, models) for at in cut_evenly(len(way), min(count, MOST_SHOWN)))
            for way in (gained, lost)
        )
        flips[metric] = Flips(len(gained), len(lost), len(after.at), gained_rows, lost_rows)
    return flips


def flipped_rows(before: Measure, after: Measure) -> tuple[list[int], list[int]]:
    """Return the indexes of the rows that became right, and of those that became wrong."""
    assert before.at == after.at
    moved_N = after.sums_NK[:, 0] - before.sums_NK[:, 0]
    at_N = np.asarray(after.at)
    return at_N[moved_N > HALF].tolist(), at_N[moved_N < -HALF].tolist()
