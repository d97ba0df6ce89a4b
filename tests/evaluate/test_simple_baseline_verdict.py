"""The tuned model against a simple baseline: in the report, and in the verdict."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from llmtune.display.blocks import Page
from llmtune.display.console import print_sections
from llmtune.evaluate.verdict import simple_title, weigh_simple_baselines
from llmtune.records import Difference
from llmtune.report.evaluation_sections import score_sections
from llmtune.report.render_html import to_html
from llmtune.report.render_markdown import to_markdown
from llmtune.store.report_record import Verdict
from llmtune.store.score_records import Champion, Evaluation, SimpleBaseline

TITLE, NOTE = "TF-IDF with logistic regression", "logistic regression on words; 944 training rows, C 10"
FOUND = Verdict("better", "Better in accuracy.")


def scored(low: float, high: float, *, rows: int = 100, tuned: float = 0.702, baseline: str | None = "the majority"):
    """Return an evaluation whose model has 0.702 against 0.723 of TF-IDF, with this interval of the difference."""
    change = Difference(tuned - 0.723, low, high, 0.04, rows)
    simple = SimpleBaseline("tfidf", TITLE, {"accuracy": 0.723}, {"accuracy": change}, {"accuracy": tuned}, NOTE)
    return Evaluation(
        {"accuracy": 0.2}, {"accuracy": tuned}, {}, (), rows, baseline=baseline, simple_baselines={"tfidf": simple}
    )


@pytest.mark.parametrize(
    ("evaluation", "word", "sentence"),
    [
        (
            scored(-0.05, 0.01),
            "inconclusive",
            f"Not better than {TITLE}: accuracy 0.7020 against 0.7230 (−0.0500 to +0.0100).",
        ),
        (scored(-0.05, -0.01), "mixed", f"Worse than {TITLE}: accuracy 0.7020 against 0.7230 (−0.0500 to −0.0100)."),
        (
            scored(-0.01, 0.05, tuned=0.743),
            "inconclusive",
            f"Not clearly better than {TITLE}: accuracy 0.7430 against 0.7230 (−0.0100 to +0.0500).",
        ),
        (scored(0.01, 0.05, tuned=0.753), "better", ""),
        (scored(-0.5, 0.3, rows=9), "better", ""),
        (scored(-0.05, -0.01, baseline=None), "better", "Worse than"),
    ],
)
def test_the_verdict_names_a_baseline_that_is_not_beaten(evaluation, word, sentence):
    found = weigh_simple_baselines(FOUND, evaluation)
    assert found.word == word
    assert found.reason.startswith(FOUND.reason)
    assert sentence in found.reason
    assert bool(sentence) == (found.reason != FOUND.reason)


@pytest.mark.parametrize(
    ("evaluation", "title"),
    [
        (scored(-0.05, 0.01), ("inconclusive", TITLE)),
        (scored(-0.05, -0.01), ("worse", TITLE)),
        (scored(0.01, 0.05, tuned=0.753), None),
        (scored(-0.05, 0.01, baseline=None), None),
    ],
)
def test_the_title_names_the_baseline_that_decided(evaluation, title):
    found = weigh_simple_baselines(FOUND, evaluation)
    assert simple_title(found.word, evaluation) == title


def test_every_unbeaten_baseline_is_named_and_the_best_decides():
    both = scored(-0.05, 0.01)
    title = "the frozen base with logistic regression"
    change = {"accuracy": Difference(-0.1, -0.15, -0.05, 0.01, 100)}
    frozen = replace(both.simple_baselines["tfidf"], name="frozen", title=title, difference=change)
    evaluation = replace(both, simple_baselines={**both.simple_baselines, "frozen": frozen})
    found = weigh_simple_baselines(FOUND, evaluation)
    assert found.word == "mixed"
    assert found.reason.index(f"Worse than {title}") < found.reason.index(f"Not better than {TITLE}")
    assert simple_title(found.word, evaluation) == ("worse", title)


def test_a_verdict_on_the_champion_keeps_its_word():
    champion = Champion("runs/best", {}, {}, {})
    found = weigh_simple_baselines(FOUND, replace(scored(-0.05, -0.01), champion=champion))
    assert found.word == "better"
    assert "Worse than" in found.reason


def test_a_baseline_that_replaces_the_base_is_not_named_twice():
    evaluation = replace(scored(-0.05, 0.01), base={"accuracy": 0.723})
    assert weigh_simple_baselines(FOUND, evaluation) == FOUND
    assert TITLE not in to_markdown(Page("p", score_sections(evaluation, "classify")))


def test_the_report_has_the_baseline_with_its_interval_and_how_it_was_fitted():
    sections = score_sections(scored(-0.05, 0.01), "classify")
    console = Console(file=io.StringIO(), width=130)
    print_sections(sections, console)
    shown = " ".join(console.file.getvalue().split())
    for text in (to_html(Page("p", sections)), to_markdown(Page("p", sections)), shown):
        assert f"Against {TITLE}" in text
        assert "−0.0500 to +0.0100" in text
        assert NOTE in text
    assert "| metric | tfidf | tuned |" in to_markdown(Page("p", sections))
