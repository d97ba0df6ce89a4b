"""The page and the picture of a comparison, from numbers alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from llmtune.compare.compare_page import describe_costs, describe_pair
from llmtune.compare.compare_plot import draw_comparison, shown_metrics
from llmtune.compare.comparison import Comparison, RunSummary, Setting
from llmtune.compare.run_comparison import finish, write_comparison
from llmtune.compare.run_pairs import Pair
from llmtune.records import Difference
from llmtune.report.report_record import Verdict

SECRET = "hf_" + "s3cret" * 6


def run(name: str, match: float, seconds: float) -> RunSummary:
    change = Difference(match, match - 0.1, match + 0.1, 0.0002, 120, "paired bootstrap")
    loss = Difference(-1.5, -1.7, -1.2, 0.0002, 120, "paired bootstrap")
    return RunSummary(
        name=name,
        folder=f"runs/{SECRET}/{name}",
        method=name,
        model="m",
        seed=1,
        learning_rate=1e-4,
        batch=8,
        steps=10,
        tokens=1000,
        train_seconds=seconds,
        run_seconds=2 * seconds,
        peak_bytes=2_000_000_000,
        trainable=1000,
        parameters=4000,
        share=0.25,
        disk_bytes=5_000_000,
        baseline=None,
        base={"exact_match": 0.0, "loss": 3.0},
        tuned={"exact_match": match, "loss": 1.5, "length_ratio": 1.0},
        difference={"exact_match": change, "loss": loss},
        verdict=Verdict("helped", ""),
        rate="the recipe's",
        gates=(),
    )


@pytest.fixture
def made() -> Comparison:
    verdict = Verdict("worse", "Worse in exact match, and better in nothing that was measured.")
    change = Difference(-0.2, -0.3, -0.1, 0.001, 120, "McNemar exact")
    return Comparison(
        llmtune="1",
        task="chat",
        rows=120,
        runs=[run("full", 0.9, 100.0), run("lora", 0.7, 40.0)],
        pairs=[Pair("full", "lora", {"exact_match": change}, {"loss": "other units"}, verdict)],
        settings=[Setting("adapter.method", ["full", "lora"]), Setting("data.train", ["x" * 400, None])],
        notes=["a | note"],
        kind="methods",
        name="<b>tickets</b>",
    )


def test_what_a_method_costs_is_told_beside_the_first(made: Comparison) -> None:
    assert describe_pair(made.pairs[0]).startswith("lora is worse than full. Worse in exact match, and better in")
    (told,) = describe_costs(made.runs)
    assert told.startswith("Beside full, lora takes 40 % of the training time, 100 % of the peak memory")


def test_a_number_that_is_not_there_is_a_dash_and_not_an_error(made: Comparison, tmp_path: Path) -> None:
    bare = replace(made.runs[1], train_seconds=None, peak_bytes=None, trainable=None, share=None, difference={})
    made = replace(made, runs=[made.runs[0], bare])
    write_comparison(made, tmp_path)
    assert shown_metrics(made.runs) == []
    assert "| training | 1 min 40 s | – |" in (tmp_path / "compare.md").read_text()


def test_names_stay_text_and_the_files_hold_all_of_it(made: Comparison, tmp_path: Path) -> None:
    write_comparison(made, tmp_path)
    page, text = (tmp_path / "compare.html").read_text(), (tmp_path / "compare.md").read_text()
    assert "<b>tickets" not in page
    assert r"a \| note" in text
    assert "## lora minus full: worse" in text
    assert "loss is left out: other units." in text
    saved = json.loads((tmp_path / "compare.json").read_text())
    assert saved["pairs"][0]["difference"]["exact_match"]["interval"] == [-0.3, -0.1]
    assert saved["runs"][0]["rate"] == "the recipe's"


def test_secrets_are_taken_out(made: Comparison, tmp_path: Path, console: Console) -> None:
    finish(made, tmp_path, console)
    for name in ("compare.html", "compare.md", "compare.json", "compare.svg"):
        assert SECRET not in (tmp_path / name).read_text()


def test_the_picture_is_the_same_bytes_again(made: Comparison, tmp_path: Path) -> None:
    pictures = []
    for name in ("a", "b"):
        draw_comparison(tmp_path / name, made.runs)
        pictures.append([(tmp_path / name).with_suffix(kind).read_bytes() for kind in (".svg", ".png")])
    assert pictures[0] == pictures[1]
