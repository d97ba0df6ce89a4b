"""Every row's part in every score comes back from disk as it was, and is told from another's by the row's content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmtune.data.answer_parser import ParsedAnswer
from llmtune.data.chat_rows import ToolCall
from llmtune.errors import EnvironmentProblem
from llmtune.evaluate.classification_metrics import CLASS_METRICS, Kind, measure_classes
from llmtune.evaluate.metric import Measure, compare
from llmtune.evaluate.ner_metrics import measure_entities
from llmtune.evaluate.per_row_scores import MEASURES, PerRowScores, load_measures, name_rows, reorder, save_measures
from llmtune.evaluate.text_metrics import TEXT_MEASURES, TOKEN_METRICS, measure_tokens
from llmtune.evaluate.tool_metrics import ToolTurn, measure_tools
from llmtune.evaluate.wer import measure_cer, measure_wer
from llmtune.recipe import TASK_FACTS, PreferenceSection
from llmtune.recipe.task_facts import TOOL_METRICS
from llmtune.tasks.preference_metrics import measure_preferences

ROWS = 12
random = np.random.default_rng(3)
TEXTS = ["a red fox", "the blue bird", "no", "a house by the river"] * 3
SAID = ["a red fox", "a blue bird", "yes", "the river"] * 3
LABELS = ("red", "green", "blue")


def classes(kind: Kind, labels: tuple[str, ...]) -> list[Measure]:
    scores = random.random((ROWS, 1 if kind == "regression" else len(labels)))
    single = [labels[i % len(labels)] for i in range(ROWS)]
    references = {"single": single, "multi": [[one] for one in single], "regression": [i % 5 for i in range(ROWS)]}
    return [measure_classes(metric, kind, scores, references[kind], labels) for metric in CLASS_METRICS[kind]]  # type: ignore[arg-type]


def tokens() -> list[Measure]:
    nats, correct, counts = random.random(ROWS), random.integers(0, 2, ROWS), random.integers(2, 9, ROWS)
    return [measure_tokens(metric, nats, correct * 1.0, counts * 1.0, counts * 4.0) for metric in TOKEN_METRICS]


def entities() -> list[Measure]:
    right, found = [["B-X", "I-X", "O"]] * ROWS, [["B-X", "O", "O"], ["B-X", "I-X", "O"]] * (ROWS // 2)
    return [measure_entities(metric, found, right) for metric in ("accuracy", "precision", "recall", "f1")]


def preferences() -> list[Measure]:
    said = [
        {"chosen": -i * 0.1, "rejected": -1.0, "chosen_tokens": 3, "rejected_tokens": 2, "kl": 0.1} for i in range(ROWS)
    ]
    base = [{**one, "chosen": -0.5} for one in said]
    dpo, kto = PreferenceSection(), PreferenceSection(loss="kto")
    names = ("accuracy", "margin", "likelihood_accuracy", "kl", "loss")
    found = [measure_preferences(metric, said, [], dpo, base) for metric in names]
    answers = [{"answer": -i * 0.1} for i in range(ROWS)]
    thumbs = [i % 2 == 0 for i in range(ROWS)]
    found.append(measure_preferences("margin", answers, thumbs, kto, [{"answer": -0.5}] * ROWS))
    assert None not in found
    return [one for one in found if one is not None]


def tools() -> list[Measure]:
    call: ToolCall = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    answers = [[ParsedAnswer("", tool_calls=(call,) * (i % 2))] * 2 for i in range(ROWS)]
    turns = [[ToolTurn({"tools": []}, [call]), ToolTurn({"tools": []}, [])]] * ROWS
    return [measure_tools(metric, dict(enumerate(answers)), dict(enumerate(turns))) for metric in TOOL_METRICS]


GROUPS: dict[str, Callable[[], list[Measure]]] = {
    "tokens": tokens,
    "texts": lambda: [build(SAID, TEXTS) for build in TEXT_MEASURES.values()],
    "one label": lambda: classes("single", LABELS),
    "two labels": lambda: classes("single", LABELS[:2]),
    "many labels": lambda: classes("multi", LABELS[:2]),
    "numbers": lambda: classes("regression", LABELS),
    "entities": entities,
    "transcripts": lambda: [measure_wer(SAID, TEXTS, "none"), measure_cer(SAID, TEXTS, "none")],
    "preferences": preferences,
    "tools": tools,
}


@pytest.mark.parametrize("group", GROUPS)
def test_a_measure_comes_back_as_it_was(tmp_path: Path, group: str) -> None:
    at = tuple(range(1, ROWS + 1))
    rows = name_rows([f"row {i}" for i in range(ROWS + 1)])
    drawn = random.multinomial(ROWS, np.full(ROWS, 1 / ROWS), size=5).astype(float)
    for was in GROUPS[group]():
        was = Measure(was.metric, was.sums_NK, was.formula, was.right_wrong, was.signature, was.weighted, at)
        save_measures(tmp_path, PerRowScores({}, {was.metric: was}, rows))
        found = load_measures(tmp_path)
        now = found.tuned[was.metric]
        assert (found.rows, found.base) == (rows, {})
        assert (now.at, now.right_wrong, now.signature) == (at, was.right_wrong, was.signature)
        np.testing.assert_array_equal(now.resampled(drawn), was.resampled(drawn), err_msg=was.metric)
        turned = reorder(now, list(range(ROWS))[::-1], at)
        np.testing.assert_allclose(turned.resampled(drawn[:, ::-1]), was.resampled(drawn), err_msg=was.metric)
        assert compare(now, was, 1).value == 0


def test_every_metric_of_every_task_is_among_those_that_come_back() -> None:
    tried = {one.metric for group in GROUPS.values() for one in group()}
    known = {metric for facts in TASK_FACTS.values() for metric in facts.metrics}
    assert known - tried <= {"choice_accuracy", "answers_cut"}  # means, as exact_match and rouge are


def test_the_same_measures_give_the_same_bytes(tmp_path: Path) -> None:
    found = {one.metric: one for one in tokens()}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_measures(tmp_path / name, PerRowScores(found, found, name_rows(["x"] * ROWS)))
    assert (tmp_path / "a" / MEASURES).read_bytes() == (tmp_path / "b" / MEASURES).read_bytes()


@pytest.mark.parametrize("damage", [b"", b"PK not a zip", None])
def test_scores_that_are_damaged_or_gone_are_an_error_with_what_to_do(tmp_path: Path, damage: bytes | None) -> None:
    save_measures(tmp_path, PerRowScores(rows=("a-1",)))
    if damage is None:
        (tmp_path / MEASURES).unlink()
    else:
        (tmp_path / MEASURES).write_bytes(damage)
    with pytest.raises(EnvironmentProblem, match="llmtune evaluate"):
        load_measures(tmp_path)


def test_scores_that_were_cut_short_are_an_error(tmp_path: Path) -> None:
    found = {one.metric: one for one in tokens()}
    save_measures(tmp_path, PerRowScores(found, found, name_rows(["x"] * ROWS)))
    whole = (tmp_path / MEASURES).read_bytes()
    for size in (10, len(whole) // 2, len(whole) - 5):
        (tmp_path / MEASURES).write_bytes(whole[:size])
        with pytest.raises(EnvironmentProblem, match="damaged"):
            load_measures(tmp_path)
