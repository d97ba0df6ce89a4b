"""The guard of speed fails on a planted slowdown, and published figures name a version that is not old."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune import __version__
from llmtune.model.device import resolve_dtype

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
CONDITIONS = re.compile(r"llmtune (\d+)\.(\d+)\.\d+ \(?(?:on |commit \w+, )\d{4}-\d\d-\d\d")
ALWAYS_32 = {
    "condition": resolve_dtype("auto", "cpu") is torch.float32,
    "reason": "dtype: auto is float32 on this processor",
}
SLEEP_PER_ROW = """
def _sleep(self, batch, encode=_BatchEncoder.__call__):
    __import__("time").sleep(0.0002 * len(batch.rows))
    return encode(self, batch)
_BatchEncoder.__call__ = _sleep
"""
FLOAT32_HEAD = """
def linear(x, weight, bias=None, product=linear):
    return product(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
"""


@pytest.fixture(scope="module")
def guard(load_benchmark: Callable[[str], Any]) -> Any:
    return load_benchmark("guard")


def test_a_ratio_more_than_ten_percent_below_the_committed_one_is_listed(guard: Any) -> None:
    committed = {"training": {"cpu_seconds": 3.0, "seconds": 3.0}}

    assert not guard.list_losses({"training": {"cpu_seconds": 2.71, "seconds": 9.0}}, committed)
    assert guard.list_losses({"training": {"cpu_seconds": 2.69, "seconds": 3.0}}, committed) == [
        "training became slower: 2.690 of its peer's speed in cpu seconds, was 3.000"
    ]


def test_a_ratio_is_that_of_the_fastest_turns(guard: Any) -> None:
    turns = [({"seconds": 2.0}, {"seconds": 9.0}), ({"seconds": 4.0}, {"seconds": 3.0})]

    assert guard.compute_ratios(turns) == {"seconds": 1.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "start-up"], "has no ratios of start-up for"),
        (["--update", "--only", "start-up"], "Add to --only: training"),
    ],
)
def test_no_case_is_skipped_or_lost(
    guard: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    ratios = tmp_path / "ratios.json"
    kinds = json.loads((BENCHMARKS / "ratios.json").read_text())
    machine = guard.describe_machine()
    monkeypatch.setattr(guard, "describe_machine", lambda: {**machine, "processor": "any", "instructions": "avx0"})
    ratios.write_text(json.dumps({"avx0": {"ratios": {"training": next(iter(kinds.values()))["ratios"]["training"]}}}))
    monkeypatch.setattr(sys, "argv", ["guard.py", *options, "--ratios", str(ratios)])

    assert guard.main() == 1
    assert message in capsys.readouterr().out
    assert list(json.loads(ratios.read_text())["avx0"]["ratios"]) == ["training"]


def test_results_state_the_version_and_the_date_of_every_section() -> None:
    text = (BENCHMARKS / "RESULTS.md").read_text()

    for section in text.split("\n## ")[1:]:
        assert CONDITIONS.search(section), f"no version and date: {section.splitlines()[0]}"


def test_figures_of_speed_in_the_readme_are_not_older_than_the_last_minor_version() -> None:
    section = (ROOT / "README.md").read_text().split("\n## Speed\n")[1].split("\n## ")[0]
    paragraphs = [part for part in section.split("\n\n") if re.search(r"\d", part) and not part.startswith("|")]
    major, minor = (int(part) for part in __version__.split(".")[:2])

    assert len(paragraphs) >= 2, "the ratios, and preparation of many rows"
    for paragraph in paragraphs:
        stated = CONDITIONS.search(paragraph)
        assert stated, f"no version and date: {paragraph[:60]}"
        assert (int(stated[1]), int(stated[2])) >= (major, minor), f"measured with an old version: {paragraph[:60]}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "module", "planted"),
    [
        ("preparation", "data/examples.py", SLEEP_PER_ROW),
        pytest.param("training", "model/chunked_cross_entropy.py", FLOAT32_HEAD, marks=pytest.mark.skipif(**ALWAYS_32)),
    ],
)
def test_a_planted_slowdown_fails_the_guard(tmp_path: Path, case: str, module: str, planted: str) -> None:
    tree, ratios = tmp_path / "tree", tmp_path / "ratios.json"
    for part in ("llmtune", "benchmarks", "recipes"):
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    assert run_guard(tree, ratios, case, "--update").returncode == 0
    with (tree / "llmtune" / module).open("a") as file:
        file.write(planted)

    done = run_guard(tree, ratios, case)

    assert done.returncode == 1
    assert f"{case} became slower" in done.stdout
    assert "Commits since" in done.stdout


def run_guard(tree: Path, ratios: Path, case: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the guard of a tree on one case; git is that of this repository."""
    command = [sys.executable, str(tree / "benchmarks" / "guard.py"), "--only", case, "--turns", "2"]
    variables = {**os.environ, "PYTHONPATH": str(tree), "GIT_DIR": str(ROOT / ".git"), "GIT_WORK_TREE": str(ROOT)}
    return subprocess.run(
        [*command, "--ratios", str(ratios), *options], env=variables, capture_output=True, text=True, check=False
    )
