import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from support.browser import ParsedPage

from llmtune.records import Difference
from llmtune.report.report_page import write_report
from llmtune.report.verdict import verdict

SECTIONS = ("data", "model", "adapter", "train", "evaluation", "deploy")


def write(report, folder):
    write_report(report, folder)
    return {name: (folder / name).read_text() for name in ("report.html", "report.md", "report.json", "junit.xml")}


def test_the_page_says_the_verdict_first_and_has_every_section(report, tmp_path):
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


def test_the_example_marks_what_is_learned(report, tmp_path):
    text = write(report, tmp_path)["report.html"]
    assert "Late parcel&lt;|im_end|&gt;\n<mark>delivery&lt;|im_end|&gt;</mark>" in text


def test_the_keys_of_the_json_stay_what_programs_read(report, tmp_path):
    saved = json.loads(write(report, tmp_path)["report.json"])
    assert list(saved) == [
        *("llmtune", "name", "task", "recipe", "recipe_yaml", "fingerprint", "hardware", "steps", "data", "model"),
        *("adapter", "train", "evaluation", "gates", "power", "look", "deploy", "explanations", "date", "verdict"),
    ]
    assert sorted(saved["evaluation"]) == [
        *(
            "base",
            "baseline",
            "champion",
            "contamination",
            "details",
            "difference",
            "flips",
            "guessable",
            "rows",
            "samples",
            "seeds",
        ),
        *("signatures", "slices", "studies", "tuned"),
    ]
    change = {"value": -1.04, "interval": [-1.13, -0.95], "p": 0.001, "n": 148, "test": ""}
    assert saved["evaluation"]["difference"]["loss"] == change
    assert saved["gates"][1] == vars(report.gates[1])
    assert saved["steps"][0] == vars(report.steps[0])
    assert saved["verdict"] == {"word": "better", "reason": report.verdict.reason}


def test_numbers_that_json_cannot_hold_become_null_and_a_dash(report, tmp_path):
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
def test_a_run_that_stopped_on_the_way_has_a_report_of_what_it_reached(report, tmp_path, reached):
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
