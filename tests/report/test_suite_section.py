"""What base and tuned model were asked beyond the test rows, in page, Markdown and terminal."""

from __future__ import annotations

import io
import math
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from llmtune.evaluate.gates import check_gates
from llmtune.evaluate.results import load_evaluation, save_evaluation
from llmtune.evaluate.score_table import print_scores
from llmtune.records import Difference, Evaluation, Study, StudyTable
from llmtune.report.assembly import difference_json
from llmtune.report.report_markdown import to_markdown
from llmtune.report.report_view import make_view
from llmtune.report.write import write_report

FORGOT = Study(
    title="Forgetting",
    base={"perplexity": 20.0, "accuracy": 0.6},
    tuned={"perplexity": 26.0, "accuracy": 0.61},
    difference={
        "perplexity": Difference(6.0, 4.0, 8.0, 0.0004, 40, "paired bootstrap"),
        "accuracy": Difference(0.01, -0.03, 0.05, 0.7, 90, "McNemar exact"),
    },
    meanings={"perplexity": "of general text", "accuracy": "of general questions"},
    better={"perplexity": -1, "accuracy": 1},
    signatures={"perplexity": "exp of the mean loss"},
    limits="A few pages of text cannot show all.",
    tables=(StudyTable("By genre", ("genre", "base"), (("<b>law</b>", "21"),)),),
)
EVALUATION = Evaluation({"loss": 2.0}, {"loss": 1.0}, {}, (), (), 60, studies={"forgetting": FORGOT})


@pytest.fixture
def asked(report):
    changes = {metric: difference_json(change) for metric, change in FORGOT.difference.items()}
    report["evaluation"]["studies"] = {"forgetting": asdict(FORGOT) | {"difference": changes}}
    return report


def test_a_score_is_shown_by_the_name_that_gates_use_with_its_better_side(asked, tmp_path):
    write_report(asked, tmp_path)
    (study,) = make_view(asked | {"verdict": {"word": "helped", "reason": ""}})["studies"]
    assert [row["kind"] for row in study["scores"]] == ["worse", "unsure"]
    page = (tmp_path / "report.html").read_text()
    assert 'href="#forgetting"' in page
    assert 'id="forgetting"' in page
    assert "forgetting.<wbr>perplexity" in page
    assert "lower is better" in page
    assert "A few pages of text cannot show all." in page
    assert "exp of the mean loss" in page
    assert "&lt;b&gt;law&lt;/b&gt;" in page


def test_the_summary_has_a_table_a_study(asked):
    text = to_markdown(asked | {"verdict": {"word": "helped", "reason": ""}})
    assert "## Forgetting" in text
    assert "| `forgetting.perplexity` | 20.00 | 26.00 | +6.000 | +4.000 to +8.000 |" in text


def test_the_terminal_shows_a_study_though_there_are_no_test_rows():
    out = io.StringIO()
    print_scores(Evaluation({}, {}, {}, (), (), 0, studies={"forgetting": FORGOT}), Console(file=out, width=100))
    assert "forgetting.perplexity" in out.getvalue()
    assert "none of the metrics" not in out.getvalue()


def test_gates_read_a_study_by_its_name():
    texts = [
        "forgetting.perplexity <= base * 1.05",
        "forgetting.perplexity <= base * 1.5",
        "forgetting.accuracy.low > base",
        "forgetting.accuracy > base - 0.1",
        "fairness.gap <= 0.1",
    ]
    found = check_gates(texts, EVALUATION)
    assert [gate.passed for gate in found] == [False, True, False, True, False]
    assert found[-1].got == "not measured"


def test_an_end_of_an_interval_that_there_is_none_of_does_not_pass():
    alone = replace(EVALUATION, studies={"forgetting": replace(FORGOT, difference={})})
    (gate,) = check_gates(["forgetting.accuracy.low > base"], alone)
    assert (gate.passed, gate.got) == (False, "no interval")


def test_a_study_comes_back_from_disk_as_it_was(tmp_path):
    odd = replace(FORGOT, tuned=FORGOT.tuned | {"perplexity": math.inf})
    save_evaluation(replace(EVALUATION, studies={"forgetting": FORGOT, "odd": odd}), tmp_path)
    loaded = load_evaluation(tmp_path)
    assert loaded is not None
    assert loaded.studies["forgetting"] == FORGOT
    assert not math.isfinite(loaded.studies["odd"].tuned["perplexity"])
