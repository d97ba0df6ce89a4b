"""The page and the picture of a comparison, from numbers alone: whole in themselves and readable on a phone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.browser import PHONE_WIDTH, asked_of_the_network, browse, browser, on_a_phone

from llmtune.compare.compare_files import write_comparison
from llmtune.compare.compare_plot import shown_metrics
from llmtune.compare.compare_view import make_view

POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
SECRET = "hf_" + "s3cret" * 6


def run(name: str, match: float, seconds: float) -> dict[str, Any]:
    change = {"value": match, "interval": [match - 0.1, match + 0.1], "p": 0.0002, "n": 120, "test": "paired bootstrap"}
    loss = {"value": -1.5, "interval": [-1.7, -1.2], "p": 0.0002, "n": 120, "test": "paired bootstrap"}
    scores = {"difference": {"exact_match": change, "loss": loss}, "base": {"exact_match": 0.0, "loss": 3.0}}
    sizes = {"peak_bytes": 2e9, "trainable": 1000, "parameters": 4000, "share": 0.25, "disk_bytes": 5e6}
    about = {"name": name, "folder": f"runs/{SECRET}/{name}", "method": name, "model": "m", "gates": []}
    times = {"train_seconds": seconds, "run_seconds": 2 * seconds}
    return {**about, **sizes, **times, **scores, "tuned": {"exact_match": match, "loss": 1.5, "length_ratio": 1.0}}


@pytest.fixture
def made() -> dict[str, Any]:
    change = {"value": -0.2, "interval": [-0.3, -0.1], "p": 0.001, "n": 120, "test": "McNemar exact"}
    pair = {
        "first": "full",
        "second": "lora",
        "difference": {"exact_match": change},
        "left_out": {"loss": "other units"},
    }
    verdict = {"word": "worse", "reason": "Worse in exact match, and better in nothing that was measured."}
    settings = [
        {"key": "adapter.method", "values": ["full", "lora"]},
        {"key": "data.train", "values": ["x" * 400, None]},
    ]
    about = {"llmtune": "1", "kind": "methods", "name": "<b>tickets</b>", "task": "chat", "rows": 120}
    runs = [run("full", 0.9, 100.0), run("lora", 0.7, 40.0)]
    return {**about, "runs": runs, "pairs": [{**pair, "verdict": verdict}], "settings": settings, "notes": ["a | note"]}


def test_what_a_method_costs_is_told_beside_the_first(made: dict[str, Any]) -> None:
    told = make_view(made)["told"]
    assert told[0] == "lora is worse than full. Worse in exact match, and better in nothing that was measured."
    assert told[1].startswith("Beside full, lora takes 40 % of the training time, 100 % of the peak memory")


def test_a_number_that_is_not_there_is_a_dash_and_not_an_error(made: dict[str, Any], tmp_path: Path) -> None:
    for name in ("train_seconds", "peak_bytes", "trainable", "share"):
        made["runs"][1][name] = None
    made["runs"][1]["difference"] = {}
    write_comparison(made, tmp_path)
    assert shown_metrics(made["runs"]) == []
    assert "| training | 1 min 40 s | – |" in (tmp_path / "compare.md").read_text()


def test_names_stay_text_and_secrets_are_taken_out(made: dict[str, Any], tmp_path: Path) -> None:
    write_comparison(made, tmp_path)
    for name in ("compare.html", "compare.md", "compare.json", "compare.svg"):
        assert SECRET not in (tmp_path / name).read_text()
    assert "<b>tickets" not in (tmp_path / "compare.html").read_text()
    assert r"a \| note" in (tmp_path / "compare.md").read_text()


def test_the_picture_is_the_same_bytes_again(made: dict[str, Any], tmp_path: Path) -> None:
    pictures = []
    for name in ("a", "b"):
        write_comparison(made, tmp_path / name)
        pictures.append([(tmp_path / name / f"compare.{kind}").read_bytes() for kind in ("svg", "png")])
    assert pictures[0] == pictures[1]


@browser
def test_no_request_leaves_the_page(made: dict[str, Any], tmp_path: Path) -> None:
    write_comparison(made, tmp_path)
    log = tmp_path / "net.json"
    assert "lora against full" in browse(tmp_path / "compare.html", log)
    assert asked_of_the_network(log) == set()


@browser
def test_nothing_stands_out_of_a_phone(made: dict[str, Any], tmp_path: Path) -> None:
    write_comparison(made, tmp_path)
    page = tmp_path / "compare.html"
    page.write_text(POLICY.sub("", page.read_text("utf-8")), "utf-8")
    look = """
    const pre = document.createElement("pre");
    pre.id = "measured";
    pre.textContent = JSON.stringify([frame.clientWidth, page.documentElement.scrollWidth]);
    document.documentElement.append(pre);
    """
    found = re.search(r'<pre id="measured">([^<]*)</pre>', browse(on_a_phone(page, look)))
    assert found is not None
    width, needed = json.loads(found[1])
    assert needed <= width == PHONE_WIDTH
