"""Two runs are compared on a row only if everything that its score depends on is equal, wherever rows are paired."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console
from support.families import build_bert
from support.pairs import recipe_of
from support.rows import write_jsonl
from support.runs import invoke

from llmtune.data.row_hash import hash_content
from llmtune.data.row_kind import hash_input
from llmtune.errors import RecipeError
from llmtune.evaluate.calibration import Chosen, measure_calibration
from llmtune.evaluate.champion import compare_with_champion
from llmtune.evaluate.decision import measure_decisions, measure_errors
from llmtune.evaluate.evaluated_task import Corpus, EvalPrediction
from llmtune.evaluate.metric import Measure, measure_right, own_interval, paired_difference
from llmtune.evaluate.opened_runs import ScoredRun, check_alike, pair_measures
from llmtune.evaluate.per_row_scores import PerRowScores, name_rows, pack_measures, unpack_measures
from llmtune.evaluate.suites.own_metrics import measure_own
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.recipe.schema import Recipe
from llmtune.store.score_records import Champion, Decision, Evaluation, Threshold
from llmtune.tasks.embed import Embed
from llmtune.tasks.rerank import Rerank

SILENT: dict[str, Any] = {"generation": {"max_new_tokens": None}}


def recipe(task: str, **sections: Any) -> Recipe:
    content = {"recipe_version": 1, "name": "tiny", "task": task, "data": {"train": "rows.jsonl"}}
    return Recipe.model_validate({**content, "model": {"name": "m"}, **sections})


def scored(
    name: str, task: str, names: Sequence[str], signatures: Mapping[str, str] = {}, **tuned: Measure
) -> ScoredRun:
    evaluation = Evaluation(
        {}, {metric: one.value for metric, one in tuned.items()}, {}, (), len(names), {**signatures}
    )
    return ScoredRun(name, recipe(task), evaluation, PerRowScores({}, tuned, tuple(names)))


def compare(champion: ScoredRun, own: ScoredRun) -> Champion:
    section = own.recipe.evaluate.model_copy(update={"champion": "champion"})
    named = own.recipe.model_copy(update={"evaluate": section})
    return compare_with_champion(champion, named, own.evaluation, own.measures)


# Rows are named by their content: all that a task reads of them


TURNS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "chat": ({"messages": TURNS}, {"messages": [{"role": "system", "content": "be kind"}, TURNS[1]]}),
    "chat-tools": ({"messages": TURNS, "tools": [{"name": "one"}]}, {"tools": [{"name": "two"}]}),
    "completion": ({"prompt": "a", "completion": "b"}, {"prompt": "c"}),
    "translate": ({"source": "a", "target": "b", "source_language": "en"}, {"source": "c"}),
    "translate-language": ({"source": "a", "target": "b", "source_language": "en"}, {"source_language": "de"}),
    "summarize": ({"document": "a", "summary": "b"}, {"document": "c"}),
    "qa": ({"question": "a", "context": "b c", "answers": [{"text": "b", "start": 0}]}, {"context": "b d"}),
    "classify": ({"text": "a", "pair": "b", "label": "x"}, {"pair": "c"}),
    "token-classify": ({"tokens": ["a", "b"], "tags": ["O", "O"]}, {"tokens": ["a", "c"]}),
    "speech": ({"audio": "1.wav", "content": "11", "text": "a"}, {"content": "22"}),
    "preference": ({"messages": TURNS, "chosen": "a", "rejected": "b"}, {"rejected": "c"}),
    "preference-thumb": ({"messages": TURNS, "answer": "a", "good": True}, {"good": False}),
    "embed": ({"query": "a", "passages": ["b"], "negatives": ["c"], "score": None}, {"negatives": ["d"]}),
    "rerank": ({"query": "a", "passages": ["b", "c"], "relevances": [1, 0]}, {"passages": ["b", "d"]}),
}


@pytest.mark.parametrize("task", CHANGES)
def test_a_row_whose_input_changed_has_another_name(task: str) -> None:
    row, change = CHANGES[task]
    assert hash_content(row) == hash_content(dict(reversed(row.items())))
    assert hash_content(row) != hash_content({**row, **change})


ANSWERED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "chat": (
        {"messages": [*TURNS, {"role": "assistant", "content": "yes"}]},
        {"messages": [*TURNS, {"role": "assistant", "content": "no"}]},
        {"messages": [TURNS[0], {"role": "user", "content": "ho"}, {"role": "assistant", "content": "yes"}]},
    ),
    "completion": ({"prompt": "a b", "completion": "c"}, {"completion": "d"}, {"prompt": "a c"}),
    "completion-text": ({"prompt": "", "completion": "c d"}, {"completion": "C  D"}, {"completion": "d"}),
    "translate": ({"source": "a", "target": "b", "source_language": "en"}, {"target": "c"}, {"source": "d"}),
    "summarize": ({"document": "a", "summary": "b"}, {"summary": "c"}, {"document": "d"}),
    "qa": (
        {"question": "a", "context": "b c", "answers": [{"text": "b", "start": 0}]},
        {"answers": [{"text": "c", "start": 2}]},
        {"question": "d"},
    ),
    "classify": ({"text": "a", "pair": None, "label": "x"}, {"text": "A ", "label": "y"}, {"text": "b"}),
    "classify-pair": ({"text": "a", "pair": "b", "label": "x"}, {"label": "y"}, {"pair": "c"}),
    "token-classify": ({"tokens": ["a", "b"], "tags": ["O", "O"]}, {"tags": ["B-X", "O"]}, {"tokens": ["a", "c"]}),
    "speech": ({"audio": "1.wav", "content": "11", "text": "a"}, {"text": "b"}, {"content": "22"}),
    "preference": (
        {"messages": TURNS, "chosen": "a", "rejected": "b"},
        {"chosen": "b", "rejected": "a"},
        {"messages": []},
    ),
    "preference-thumb": ({"messages": TURNS, "answer": "a", "good": True}, {"good": False}, {"messages": TURNS[:1]}),
    "embed": ({"query": "a", "passages": ["b"], "negatives": [], "score": None}, {"passages": ["c"]}, {"query": "d"}),
    "embed-score": (
        {"query": "a", "passages": ["b"], "negatives": [], "score": 0.5},
        {"score": 0.1},
        {"passages": ["c"]},
    ),
    "rerank": ({"query": "a", "passages": ["b"], "relevances": [1]}, {"relevances": [0]}, {"query": "c"}),
}


@pytest.mark.parametrize("task", ANSWERED)
def test_a_row_with_another_answer_has_the_same_input(task: str) -> None:
    row, answer, question = ANSWERED[task]
    assert hash_content(row) != hash_content({**row, **answer})
    assert hash_input(row) == hash_input({**row, **answer})
    assert hash_input(row) != hash_input({**row, **question})


# Rankings


def judged(query: str, *passages: tuple[str, float]) -> list[dict[str, Any]]:
    """Return a row per passage, as files with a relevance have them."""
    return [{"query": query, "passages": [text], "relevances": [relevance]} for text, relevance in passages]


def rank(rows: Sequence[dict[str, Any]], metric: str = "recall@1") -> Measure:
    """Return the measure of a model that scores a passage by its text."""
    predictions = [{"scores": [float(len(text)) for text in row["passages"]], "ranking": []} for row in rows]
    measured = Rerank().compute_metric(metric, EvalPrediction(predictions, rows), recipe("rerank"))
    assert measured is not None
    return measured


FULL = [
    row
    for i in range(8)
    for row in judged(f"q{i}", (f"right {i}", 1), (f"a longer one {i}", 0), (f"no {i}", 0), (f"not {i}", 0))
]
NAMES = [hash_content(row).hex() for row in FULL]


def without(text: str, until: int) -> list[dict[str, Any]]:
    """Drop a candidate of the first queries."""
    return [row for row in FULL if not any(row["passages"] == [f"{text} {i}"] for i in range(until))]


def run_of(name: str, rows: Sequence[dict[str, Any]]) -> ScoredRun:
    return scored(name, "rerank", [hash_content(row).hex() for row in rows], **{"recall@1": rank(rows)})


def test_the_same_weights_do_not_beat_a_champion_by_fewer_candidates() -> None:
    fewer = run_of("this run", without("a longer one", 8))
    assert (rank(FULL).value, fewer.evaluation.tuned["recall@1"]) == (0, 1)
    pairs, left_out = pair_measures(run_of("champion", FULL), fewer)
    assert "recall@1" not in pairs
    assert left_out["recall@1"] == "no row in common with the same candidates"


def test_queries_with_the_same_candidates_are_compared_in_any_order_and_others_are_counted() -> None:
    fewer = run_of("this run", without("a longer one", 3)[::-1])
    found = compare(run_of("champion", FULL), fewer)
    difference = found.difference["recall@1"]
    assert (difference.n, difference.value) == (5, 0)
    assert (found.scores["recall@1"], found.tuned["recall@1"]) == (0, 0)
    assert found.partial["recall@1"] == (
        "3 of 8 rows are left out, because the champion did not have the same candidates"
    )
    whole = run_of("this run", FULL[::-1])
    found = compare(run_of("champion", FULL), whole)
    assert (found.difference["recall@1"].n, found.partial) == (8, {})


def test_a_query_whose_judgements_changed_is_another_query() -> None:
    other = [{**row, "relevances": [1.0]} if row["passages"] == ["a longer one 0"] else row for row in FULL]
    pairs, _ = pair_measures(run_of("champion", FULL), run_of("this run", other))
    assert len(pairs["recall@1"][0].sums_NK) == 7


def test_a_comparison_of_runs_refuses_other_candidates_of_the_same_rows() -> None:
    first, second = run_of("one", FULL), run_of("two", without("a longer one", 3))
    same_rows = replace(second, measures=replace(second.measures, rows=first.measures.rows))
    with pytest.raises(RecipeError, match=r"recall@1 was measured on 8 rows, .* the candidates differ"):
        check_alike([first, same_rows])


def test_a_champions_earlier_file_without_candidates_is_not_compared() -> None:
    champion = run_of("champion", FULL)
    old = replace(champion.measures.tuned["recall@1"], names=())
    champion = replace(champion, measures=replace(champion.measures, tuned={"recall@1": old}))
    pairs, left_out = pair_measures(champion, run_of("this run", FULL))
    assert (pairs, left_out) == ({}, {"recall@1": "no row in common with the same candidates"})


def test_the_names_of_queries_survive_their_file_and_joining_more_rows(tmp_path: Path) -> None:
    scores = run_of("one", FULL).measures
    read = unpack_measures(pack_measures(scores), tmp_path, "")
    assert read.tuned["recall@1"].names == scores.tuned["recall@1"].names != ()
    more = run_of("two", judged("q9", ("right 9", 1), ("no 9", 0))).measures
    joined = scores.with_rows(more).tuned["recall@1"]
    assert joined.names == (*scores.tuned["recall@1"].names, *more.tuned["recall@1"].names)
    assert joined.take([8]).names == more.tuned["recall@1"].names
    unnamed = replace(more, tuned={"recall@1": replace(more.tuned["recall@1"], names=())})
    assert scores.with_rows(unnamed).tuned["recall@1"].names == scores.tuned["recall@1"].names


# Vectors


def embedded(rows: Sequence[dict[str, Any]], metric: str, corpus: Sequence[str] = ()) -> Measure:
    """Return the measure of a model whose vectors depend on the text alone."""

    def vector(text: str) -> list[float]:
        return np.random.default_rng([*text.encode()]).normal(size=8).tolist()  # type: ignore[no-any-return]

    vectors = [
        {
            name: vector(text)
            for name, text in zip(("query", "passage", "passage_2"), [row["query"], *row["passages"]], strict=False)
        }
        for row in rows
    ]
    known = Corpus(corpus, np.array([vector(text) for text in corpus], np.float32)) if corpus else None
    found = EvalPrediction(vectors, rows, corpus=known)
    measured = Embed().compute_metric(metric, found, recipe("embed"))
    assert measured is not None
    return replace(measured, at=measured.at or tuple(range(len(rows))))


def found_in(
    metric: str, rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], corpus: Sequence[str] = ()
) -> int:
    """Return how many rows of two runs are compared."""
    both = [
        scored(name, "embed", [f"{i}" for i in range(len(part))], **{metric: embedded(part, metric, corpus)})
        for name, part in (("champion", rows), ("this run", others))
    ]
    found = compare(*both)
    return found.difference[metric].n if metric in found.difference else 0


def embed_row(query: str, *passages: str, label: str | None = None) -> dict[str, Any]:
    return {"query": query, "passages": [*passages], "negatives": [], "score": None, "label": label}


def test_search_is_compared_only_in_the_same_passages_and_for_the_same_right_ones() -> None:
    rows = [embed_row(f"q{i}", f"p{i}") for i in range(6)]
    corpus = [f"p{i}" for i in range(6)] + ["more"]
    assert found_in("recall@1", rows, rows[::-1], corpus) == 6
    assert found_in("recall@1", rows, [*rows[:5], embed_row("q5", "other")]) == 0  # every query searches it
    assert found_in("recall@1", rows, [*rows[:5], embed_row("q5", "p5", "more")], corpus) == 5
    assert found_in("recall@1", [*rows, embed_row("q5", "more")], rows, corpus) == 5


def test_texts_are_compared_only_if_the_same_texts_have_their_label() -> None:
    rows = [embed_row(f"t{i}", label="ab"[i % 2]) for i in range(8)]
    assert found_in("recall@1", rows, rows) == 8
    changed = [*rows[:7], embed_row("t7", label="a")]
    assert found_in("recall@1", rows, changed) == 0  # each class lost or gained a text
    third = [embed_row(f"t{i}", label="abc"[i % 3]) for i in range(9)]
    assert found_in("recall@1", third, [*third[:8], embed_row("t8", label="a")]) == 3  # of the class b


@pytest.mark.parametrize("metric", ["random_cosine", "effective_rank"])
def test_the_spread_of_vectors_is_compared_only_among_the_same_texts(metric: str) -> None:
    rows = [embed_row(f"q{i}", f"p{i}") for i in range(6)]
    assert found_in(metric, rows, rows) == 6
    assert found_in(metric, rows, [*rows[:5], embed_row("q5", "other")]) == 0


# Decisions


def decided_run(name: str, *, decides_hard: bool) -> ScoredRun:
    """Return a run that is right on 240 rows, and decides another 60 wrongly or not at all."""
    n = np.arange(300)
    logits, hard = np.zeros((300, 3)), n >= 240
    logits[n, np.where(hard, n + 1, n) % 3] = np.where(hard & (not decides_hard), 0, 4)
    chosen = Chosen(LABELS, logits, np.eye(3, dtype=bool)[n % 3], tuple(n.tolist()))
    measures, _ = measure_decisions(Decision(LABELS, False, 9, 1, Threshold(0.1, 0.9, 0.6, 9, 9, 0)), chosen)
    return scored(name, "classify", [f"{i}" for i in n], **measures)


def test_each_model_keeps_its_own_decided_rows_in_a_comparison() -> None:
    champion, own = decided_run("champion", decides_hard=False), decided_run("this run", decides_hard=True)
    check_alike([champion, own])
    found = compare(champion, own)
    difference = found.difference["decided_error"]
    assert (found.scores["decided_error"], found.tuned["decided_error"]) == (0, pytest.approx(0.2))
    assert difference.n == 300
    assert difference.value == pytest.approx(0.2)
    assert 0.1 < difference.low < difference.high < 0.3
    assert found.difference["decided"].value == pytest.approx(0.2)
    assert own_interval(own.measures.tuned["decided_error"], 0).n == 300
    assert own_interval(champion.measures.tuned["decided_error"], 0).n == 240


def test_the_error_of_decided_rows_survives_its_file(tmp_path: Path) -> None:
    scores = decided_run("one", decides_hard=True).measures
    read = unpack_measures(pack_measures(scores), tmp_path, "").tuned["decided_error"]
    known = scores.tuned["decided_error"]
    assert (read.formula, read.bounds, read.value) == (known.formula, known.bounds, known.value)


@pytest.mark.slow
def test_equal_models_and_models_at_the_margin_rarely_pass_a_gate_on_the_error_of_decided_rows() -> None:
    draw, passed, at_margin = np.random.default_rng(0), 0, 0
    for seed in range(150):
        hard = draw.random(60) < 0.1

        def model(further: float, hard: NDArray[np.bool_] = hard) -> Measure:
            wrong = np.where(draw.random(60) < 0.5, hard, draw.random(60) < 0.1) | (draw.random(60) < further)
            return measure_errors(draw.random(60) < 0.7, wrong)

        base = model(0.0)
        passed += paired_difference(base, model(0.0), seed).high < 0
        at_margin += paired_difference(base, model(0.1), seed).high < 0.09  # worse by 0.1 of the 0.9 right rows
    assert passed <= 7
    assert at_margin <= 7


# Choices and the user's own metrics


LABELS = ("red", "green", "blue")
NOTE = "the most likely of 3 answers: ..., on {rows} of {rows} rows: {choices}{end}"


def chosen_run(name: str, metric: str, rows: int, choices: str, end: str = "") -> ScoredRun:
    draw = np.random.default_rng(0)
    chosen = Chosen(
        LABELS, draw.normal(size=(rows, 3)), np.eye(3, dtype=bool)[draw.integers(0, 3, rows)], tuple(range(rows))
    )
    record = Decision(LABELS, False, 9, 1, Threshold(0.1, 0.9, 0.4, 9, 9, 0), (0.2,) * 3, 0.9, false_alarms=0.1)
    one = (
        measure_calibration(metric, chosen)
        if metric in ("ece", "brier", "nll")
        else measure_right([True] * rows, metric)
        if metric == "choice_accuracy"
        else measure_decisions(record, chosen)[0][metric]
    )
    note = {"choice_accuracy.choices": NOTE.format(rows=rows, choices=choices, end=end)}
    one = replace(one, at=one.at or tuple(range(rows)))
    return scored(name, "chat", [f"{i}" for i in range(rows)], note, **{metric: one})


@pytest.mark.parametrize(
    "metric", ["choice_accuracy", "nll", "brier", "ece", "decided", "decided_error", "set_coverage", "set_size"]
)
def test_answers_by_likelihood_are_compared_only_among_the_same_choices(metric: str) -> None:
    champion = chosen_run("champion", metric, 30, "'red', 'green', 'blue'")
    for rows, choices, end, compared in (
        (30, "'red', 'green', 'blue'", "", True),
        (40, "'blue', 'red', 'green'", "; 3 references are not among them and count as wrong", True),
        (30, "'red', 'green', 'grey'", "", False),
    ):
        own = chosen_run("this run", metric, rows, choices, end)
        found = compare(champion, own)
        assert (metric in found.difference) is compared
        assert compared or "chooses among other answers" in found.left_out[metric]


def test_an_own_metric_is_compared_only_on_rows_with_the_same_columns(tmp_path: Path) -> None:
    (tmp_path / "metrics.py").write_text(
        "def fits(row: dict, answer: str) -> bool:\n    return answer == row['wanted']\n"
    )
    section = EvaluateSection.model_validate({"metrics": [f"{tmp_path}/metrics.py:fits"], "slices": ["wanted"]})
    measuring = recipe("completion").model_copy(update={"evaluate": section})

    def measured(name: str, wanted: Sequence[str]) -> ScoredRun:
        rows = [{"prompt": f"p{i}", "completion": "a", "wanted": one} for i, one in enumerate(wanted)]
        answers = dict.fromkeys(range(len(rows)), "a")
        own = measure_own(measuring, rows, [""] * len(rows), answers, {}, Console(file=io.StringIO()))
        run = scored(name, "completion", [f"p{i}" for i in range(len(rows))], **own)
        return replace(run, recipe=measuring)

    first, second = measured("champion", "aaaaaa"), measured("this run", "aaaabb")
    pairs, _ = pair_measures(first, second)
    assert len(pairs["fits"][0].sums_NK) == 4
    found = compare(first, second)
    assert found.partial["fits"] == "2 of 6 rows are left out, because the champion did not have the same columns"


def test_equal_names_are_numbered() -> None:
    assert name_rows(["a", "b", "a"]) == ("a-1", "b-1", "a-2")


@pytest.mark.slow
def test_a_reranker_with_the_same_weights_and_fewer_candidates_passes_no_gate_on_the_champion(tmp_path: Path) -> None:
    things, colours = ("cat", "dog", "bird", "fish", "fox"), ("red", "green", "blue")

    def rows(start: int, wrong: int) -> list[dict[str, Any]]:
        return [
            {"query": f"Which colour has {things[i % 5]} number {i}?", "passage": text, "relevance": relevance}
            for i in range(start, start + 40)
            for text, relevance in [
                (f"The {things[i % 5]} is {colours[i % 3]}.", 1),
                *((f"The {things[i % 5]} {k} is {colours[(i + k) % 3]}.", 0) for k in range(wrong)),
            ]
        ]

    files = [write_jsonl(tmp_path / f"{wrong}.jsonl", rows(1000, wrong)) for wrong in (4, 1)]
    sections = {"train": {"max_steps": 3, "num_train_epochs": None}, "evaluate": {"metrics": ["loss", "recall@1"]}}
    data = {"test": str(files[0]), "validation": 0.0, "max_length": 64}
    path = recipe_of(tmp_path, build_bert(tmp_path / "bert"), rows(0, 4), "rerank", data=data, **sections, **SILENT)
    assert invoke("run", path, "--out", tmp_path / "first", "--offline").exit_code == 0
    sets = [
        f"data.test={files[1]}",
        f"evaluate.champion={tmp_path / 'first'}",
        "evaluate.gates=['recall@1.low > champion']",
    ]
    done = invoke("run", path, "--out", tmp_path / "second", "--offline", *(w for s in sets for w in ("--set", s)))
    assert done.exit_code == 6, done.output
    report = json.loads((tmp_path / "second/report.json").read_text())
    assert report["verdict"]["word"] == "inconclusive"
    assert "the same candidates" in report["gates"][0]["got"]
    assert report["evaluation"]["champion"]["difference"]["loss"]["value"] == 0
    assert invoke("compare", tmp_path / "first", tmp_path / "second").exit_code == 3
