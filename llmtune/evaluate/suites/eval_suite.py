"""An evaluation suite: further questions to base and tuned model, and a study of the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import torch

from llmtune.data.byte_streams import open_bytes
from llmtune.data.file_readers import data_errors
from llmtune.errors import DataError, Problem
from llmtune.evaluate.eval_inputs import EvalContext
from llmtune.evaluate.inference import Answers, add_bar, context_limit, inference_on
from llmtune.evaluate.metric import Measure, PairedMeasures
from llmtune.evaluate.suites import Suite
from llmtune.records import Advance, Difference
from llmtune.store.score_records import Study, StudyTable

OWN_FILES = resources.files("llmtune.evaluate.suites")
"""Inputs that ship with llmtune: `general` and `groups`."""
MOST_SHOWN = 20
"""Problems listed; the rest are counted."""
T = TypeVar("T")
SuiteOutput = TypeVar("SuiteOutput")
Bar = Callable[[str, int], Advance]
"""Adds a progress bar with a label and a total; returns the function that advances it."""


class EvalSuite(Suite, Generic[SuiteOutput]):
    """A suite, or one part of it: runs on one model after the other, then compares their outputs.

    The constructor reads its inputs, before a model is loaded. A base model without a trained head is
    skipped: a trivial baseline replaces it.
    """

    metrics: ClassVar[Mapping[str, tuple[str, int]]] = {}
    """By metric, a short meaning, and 1 if more is better, -1 if less is, 0 if neither."""
    decoder_input: ClassVar[str] = ""
    """A need of the suite that only a decoder language model meets; empty if other models can run it."""
    runs_models: ClassVar[bool] = True
    """Whether it queries the models; otherwise it reads their answers to the test rows and the scores."""
    fewest_rows: ClassVar[int] = 0
    """Rows needed to give a difference an interval."""

    def __init__(self, context: EvalContext) -> None:
        self.context = context
        self.outputs: dict[str, SuiteOutput] = {}
        """By "base" and "tuned"."""
        self.row_answers: Mapping[str, Answers] = {}
        """Both models' answers to the test rows; known once both have run."""
        self.unmeasured = ""
        """Why its first metric cannot be measured, for the report."""

    def run(self, name: str, model: torch.nn.Module) -> None:
        """Run on the "base" or "tuned" model, already loaded on its device, and keep the output."""
        if not self.outputs:
            self.fit(context_limit(model))
        if not self.unmeasured:
            with inference_on(model, self.context) as bars:
                self.outputs[name] = self.ask(model, lambda what, total: add_bar(bars, f"{name}: {what}", total))

    def fit(self, limit: int) -> None:
        """Drop inputs that exceed the model's context; called before the first model runs."""

    def ask(self, model: torch.nn.Module, bar: Bar) -> SuiteOutput:
        """Return one model's output for the inputs."""
        raise NotImplementedError

    def measure(self, output: SuiteOutput) -> Iterable[Measure]:
        """Return the metrics of one model's output; their rows are the suite's own."""
        raise NotImplementedError

    def compare(self, rows: PairedMeasures) -> Study:
        """Turn both outputs into scores, differences and tables; `rows` are the measures of the test rows."""
        base, tuned = (
            {one.metric: replace(one, at=tuple(range(len(one.sums_NK)))) for one in self.measure(self.outputs[name])}
            if name in self.outputs and not self.unmeasured
            else {}
            for name in ("base", "tuned")
        )
        measured = PairedMeasures(base, tuned)
        difference = measured.differences(self.context.recipe.seed, self.fewest_rows)
        signatures = {metric: one.signature for metric, one in tuned.items()}
        limits, tables = (self.limits(), self.tables(measured)) if tuned else ("", ())
        return self.study(*measured.scores(), difference, signatures, limits, tables)

    def study(
        self,
        base: dict[str, float],
        tuned: dict[str, float],
        difference: dict[str, Difference],
        signatures: dict[str, str],
        limits: str = "",
        tables: Iterable[StudyTable] = (),
    ) -> Study:
        """Return a study with the meaning of each metric, or the reason why the first was not measured."""
        meanings = {metric: self.metrics[metric][0] for metric in tuned}
        better = {metric: self.metrics[metric][1] for metric in tuned}
        signatures = {next(iter(self.metrics)): self.unmeasured} if self.unmeasured else signatures
        return Study("", base, tuned, difference, meanings, better, signatures, limits, tuple(tables))

    def limits(self) -> str:
        """Return, in plain words, what the numbers can and cannot show."""
        return ""

    def tables(self, measured: PairedMeasures) -> Iterable[StudyTable]:
        """Return tables to show with the scores."""
        return ()


def join_studies(title: str, order: Iterable[str], parts: Sequence[Study]) -> Study:
    """Join the parts of a suite into one study; metrics follow `order`, the rest come last."""

    def join(field: str) -> dict[str, object]:
        values = {metric: value for part in parts for metric, value in getattr(part, field).items()}
        return {metric: values[metric] for metric in dict.fromkeys((*order, *values)) if metric in values}

    joined = {field: join(field) for field in ("base", "tuned", "difference", "meanings", "better", "intervals")}
    return Study(
        title=title,
        **joined,  # type: ignore[arg-type]  # same types as in the parts
        signatures={metric: text for part in parts for metric, text in part.signatures.items()},
        limits=" ".join(part.limits for part in parts if part.limits),
        tables=tuple(table for part in parts for table in part.tables),
        verdict=" ".join(part.verdict for part in parts if part.verdict),
    )


def read_sources(sources: Sequence[str], read: Callable[[str], Sequence[T | Problem]], kind: str, fix: str) -> list[T]:
    """Read items of a `kind` from all sources; `read` returns a source's items, and a Problem for each bad one.

    Raises DataError for sources that cannot be read, have a bad item, or are empty.
    """
    items: list[T] = []
    problems: list[Problem] = []
    for source in sources:
        try:
            parts = read(source)
        except DataError as error:
            problems += error.problems
            continue
        bad = [part for part in parts if isinstance(part, Problem)]
        items += [part for part in parts if not isinstance(part, Problem)]
        problems += bad if parts else [Problem(f"no {kind} found", source, fix)]
    if len(problems) > MOST_SHOWN:
        problems[MOST_SHOWN:] = [Problem(f"{len(problems) - MOST_SHOWN} more problems like these")]
    DataError.collect(problems)
    return items


def read_utf8(path: Path, fix: str) -> str:
    """Read a text file, which may be compressed. Raises DataError if it is missing or not UTF-8."""
    if not path.is_file():
        raise DataError.of("file not found", str(path), fix)
    with data_errors(str(path)), open_bytes(path) as stream:
        content = stream.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"not UTF-8: byte {content[error.start]:#04x}"
        raise DataError.of(what, f"{path}:{line}", "Save the file as UTF-8.") from error
