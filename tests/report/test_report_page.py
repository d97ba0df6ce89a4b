import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from support.browser import ParsedPage

from llmtune.evaluate.verdict import verdict
from llmtune.records import Difference
from llmtune.report.report_page import (
    explain_section,
    explanation_link,
    find_explanations,
    link_explanations,
    verdict_card,
    write_report,
)
from llmtune.store.report_record import Verdict
from llmtune.store.score_records import Evaluation

SECTIONS = ("data", "model", "adapter", "train", "evaluation", "deploy")


def write(report, folder):
    write_report(report, folder)
    return {name: (folder / name).read_text() for name in ("report.html", "report.md", "report.json", "junit.xml")}


def test_the_page_starts_with_the_verdict_and_has_every_section(report, tmp_path):
    page = ParsedPage(write(report, tmp_path)["report.html"])
    sections = "verdict gates scores samples inside training data model adapter steps method recipe"
    assert page.ids == sections.split()
    words = ("Better than the base model", "1 of 2 gates failed", "Scores on held-out")
    assert sorted(words, key=page.text.index) == [*words]
    facts = ("choice_accuracy", "+0.1900 to +0.3600", "near duplicate", "1,290", "4,884,480 of 139,399,488")
    assert [fact for fact in (*facts, "2 min 23 s", "538 MB") if fact not in page.text] == []
    assert sum(tag == "svg" for tag, _ in page.tags) == 3 + 3 + 1  # intervals, curves, lengths
    assert "tickets.jsonl:118" in page.text
    assert "/home/ada" not in page.text


def test_the_example_marks_learned_tokens(report, tmp_path):
    text = write(report, tmp_path)["report.html"]
    assert "Late parcel&lt;|im_end|&gt;\n<mark>delivery&lt;|im_end|&gt;</mark>" in text


def test_the_json_keys_are_stable(report, tmp_path):
    saved = json.loads(write(report, tmp_path)["report.json"])
    assert list(saved) == [
        *("llmtune", "name", "task", "recipe", "recipe_yaml", "fingerprint", "hardware", "steps", "data", "model"),
        *(
            "adapter",
            "train",
            "evaluation",
            "gates",
            "doubts",
            "power",
            "look",
            "suspects",
            "deploy",
            "release",
            "explanations",
            "date",
            "verdict",
            "properties",
        ),
    ]
    assert sorted(saved["evaluation"]) == [
        *(
            "base",
            "baseline",
            "baseline_reason",
            "champion",
            "contamination",
            "control_run",
            "controls",
            "decided",
            "details",
            "difference",
            "exports",
            "failed",
            "flips",
            "guessable",
            "intervals",
            "pictured",
            "reliability",
            "rows",
            "samples",
            "seeds",
        ),
        *("signatures", "simple_baselines", "slices", "studies", "teacher", "tuned"),
    ]
    change = {"value": -1.04, "interval": [-1.13, -0.95], "p": 0.001, "n": 148, "test": ""}
    assert saved["evaluation"]["difference"]["loss"] == change
    assert saved["gates"][1] == vars(report.gates[1])
    assert saved["steps"][0] == vars(report.steps[0])
    assert saved["verdict"] == {"word": "better", "reason": report.verdict.reason}


def test_numbers_not_allowed_in_json_become_null_and_a_dash(report, tmp_path):
    unknown = Difference(math.nan, math.nan, math.inf, math.nan, 148)
    evaluation = replace(
        report.evaluation,
        tuned={**report.evaluation.tuned, "loss": math.nan},
        difference={**report.evaluation.difference, "loss": unknown},
    )
    report.train["curve"][3]["loss"] = math.inf
    report.train["validation_loss"] = math.nan
    texts = write(replace(report, evaluation=evaluation), tmp_path)
    saved = json.loads(texts["report.json"], parse_constant=pytest.fail)
    null = {"value": None, "interval": [None, None], "p": None, "n": 148, "test": ""}
    assert saved["evaluation"]["difference"]["loss"] == null
    for text in texts.values():
        assert not {"nan", "inf", "Infinity", "NaN"} & set(re.split(r"\W", text))


@pytest.mark.parametrize("reached", range(len(SECTIONS)))
def test_a_stopped_run_has_a_report_of_its_finished_steps(report, tmp_path, reached):
    report = replace(report, **dict.fromkeys(SECTIONS[reached:]), gates=report.gates if reached > 4 else ())
    texts = write(replace(report, verdict=verdict(report.evaluation)), tmp_path)
    page = ParsedPage(texts["report.html"])
    assert ("data" in page.ids, "training" in page.ids, "scores" in page.ids) == (reached > 0, reached > 3, reached > 4)
    if reached <= 4:
        assert "Nothing was measured" in texts["report.md"]


def test_a_long_curve_does_not_make_a_large_page(report, tmp_path):
    report.train["curve"] = [
        {"step": i, "loss": 1.0 + i % 7, "grad_norm": 1.0, "learning_rate": 1e-4} for i in range(100_000)
    ]
    assert len(write(report, tmp_path)["report.html"]) < 80_000


def test_nothing_but_the_four_files_is_left(report, tmp_path):
    write(report, tmp_path)
    write(report, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["junit.xml", "report.html", "report.json", "report.md"]


def test_the_report_needs_neither_torch_nor_transformers_nor_numpy():
    heavy = {"torch", "transformers", "numpy", "matplotlib"}
    script = f"import sys, llmtune.report.report_page; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


LINKS = re.compile(r'<a href="(explain/[^"]*)">([^<]*)</a>')


@pytest.fixture
def run(report, tmp_path):
    """A run folder with a report and the names given as pages."""

    def build(*names):
        write_report(report, tmp_path)
        (tmp_path / "explain").mkdir(exist_ok=True)
        for name in names:
            (tmp_path / "explain" / name).write_text("<!doctype html>")
        return tmp_path

    return build


def test_pages_are_linked_in_a_fixed_order(run):
    folder = run("positions.html", "zebra.html", "generation-why.html", "attention.html", "attention.png", ".new.html")
    assert find_explanations(folder) == ["attention", "generation-why", "positions", "zebra"]
    assert link_explanations(folder)
    assert LINKS.findall((folder / "report.html").read_text()) == [
        ("explain/attention.html", "Attention"),
        ("explain/generation-why.html", "Generation: why"),
        ("explain/positions.html", "Positions"),
        ("explain/zebra.html", "zebra"),
    ]


def test_linking_changes_nothing_else_and_can_be_done_again(run, report):
    folder = run("attention.html")
    before = json.loads((folder / "report.json").read_text())
    texts = {name: (folder / name).read_text() for name in ("report.md", "junit.xml")}
    for _ in range(2):
        assert link_explanations(folder)
        assert json.loads((folder / "report.json").read_text()) == {**before, "explanations": ["attention"]}
        assert {name: (folder / name).read_text() for name in texts} == texts
    (folder / "explain" / "attention.html").unlink()
    link_explanations(folder)
    assert LINKS.findall((folder / "report.html").read_text()) == []


def test_a_trained_run_without_pages_shows_the_command(run, report):
    text = (run() / "report.html").read_text()
    assert "llmtune explain generation RUN --prompt TEXT" in text
    assert 'href="#inside"' in text
    assert explain_section([], None).blocks == []
    for task, command in {"rerank": "attention RUN --text TEXT", "speech": "generation RUN --audio FILE"}.items():
        assert f"llmtune explain {command}`" in str(explain_section([], task).blocks)


@pytest.mark.parametrize("content", [None, "{", "[1]", b"\xff\xfe"])
def test_without_a_readable_report_nothing_is_written(tmp_path, content):
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "report.json").write_bytes(data)
    before = sorted(tmp_path.iterdir())
    assert not link_explanations(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_the_name_of_a_page_cannot_lead_elsewhere():
    assert explanation_link('x" onclick="alert(1)')[0] == "explain/x%22%20onclick%3D%22alert%281%29.html"
    assert explanation_link("javascript:alert(1)")[0] == "explain/javascript%3Aalert%281%29.html"


def test_the_title_of_a_gain_that_may_be_memory_does_not_call_it_too_small(report):
    gain = {"rougeL": Difference(0.1, 0.05, 0.15, 0.001, 100)}
    scores = Evaluation({"rougeL": 0.12}, {"rougeL": 0.99}, gain, (), 100)
    doubted = replace(report, evaluation=scores, verdict=Verdict("inconclusive", "But 77% of the test rows overlap."))
    assert verdict_card(doubted).title == "No clear difference from the base model"
