"""The benchmarks: the same rows for all tools, real tokens, ratios within a turn."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
OWN = {file.stem for file in BENCHMARKS.glob("*.py")}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a benchmark file as if it were run, and unload it afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in OWN & set(sys.modules):
        del sys.modules[name]


def run(script: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def test_the_same_seed_gives_the_same_rows_and_a_longer_list_starts_with_them(load: Any, tmp_path: Path) -> None:
    workload: ModuleType = load("workload")
    rows = list(workload.chat_rows(50, seed=3))
    assert rows == list(workload.chat_rows(80, seed=3))[:50]
    assert rows != list(workload.chat_rows(50, seed=4))
    written = workload.write_rows(tmp_path / "rows.jsonl", 50, 3).read_text().splitlines()
    assert [json.loads(line) for line in written] == rows


def test_rows_are_question_and_answer_with_alpacas_lengths(load: Any) -> None:
    rows = [row["messages"] for row in load("workload").chat_rows(3000, seed=0)]
    assert all([message["role"] for message in row] == ["user", "assistant"] for row in rows)
    answers = sorted(len(row[1]["content"].split()) for row in rows)
    assert 40 <= answers[len(answers) // 2] <= 52
    assert 0.005 < sum(words > 380 for words in answers) / len(answers) < 0.03  # 500 tokens
    assert len({row[1]["content"] for row in rows}) > 0.99 * len(rows)


def test_padding_never_counts_as_a_real_token(load: Any) -> None:
    real_tokens = load("watch").real_tokens
    ids = torch.zeros(2, 5, dtype=torch.long)
    assert real_tokens({"input_ids": ids}) == 10
    lengths = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert real_tokens({"input_ids": ids, "attention_mask": lengths}) == 8
    seen = torch.tril(torch.ones(2, 1, 5, 5, dtype=torch.bool)) & lengths.bool()[:, None, None, :]
    assert real_tokens({"input_ids": ids, "attention_mask": seen}) == 8
    added = torch.zeros(2, 1, 5, 5).masked_fill(~seen, torch.finfo(torch.float32).min)
    assert real_tokens({"input_ids": ids, "attention_mask": added}) == 8


def test_a_step_ends_with_the_optimiser_and_the_first_one_is_not_timed(load: Any) -> None:
    clock = load("clock").Clock(sums=True)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight])
    clock.loaded(torch.nn.ParameterList([weight]))
    for rehearsed, tokens in ((True, 7), (False, 100), (False, 20), (False, 30)):
        clock.count(tokens, 4, torch.tensor(8.0))
        weight.grad = torch.ones(3)
        optimizer.step()
        if rehearsed:
            clock.restart()
    clock.stop()
    optimizer.step()
    found = clock.found()
    assert [step["tokens"] for step in found["steps"]] == [100, 20, 30]
    assert {step["loss"] for step in found["steps"]} == {2.0}
    seconds = sum(step["wall_seconds"] for step in found["steps"][1:])
    assert found["tokens_per_second"] == pytest.approx(50 / seconds)
    assert found["trainable"] == 3
    assert found["peak_training_bytes"] >= found["above_loaded_bytes"] + found["loaded_bytes"]


def test_ratios_are_taken_within_each_turn(load: Any) -> None:
    against = load("results").against
    runs = {"llmtune": [{"rate": 30.0}, {"rate": 8.0}], "other": [{"rate": 10.0}, {"rate": 2.0}]}
    assert against(runs, "other", "rate") == "3.50x (3.00–4.00)"
    assert against(runs, "llmtune", "rate") == ""


def test_the_page_shows_results_of_unknown_benchmarks(load: Any) -> None:
    runs = {"ours": [{"rows": 3}, {"rows": 5}], "theirs": [{"rows": 1}, {"rows": 1}]}
    machine = {"llmtune": "0.2.0", "date": "2026-12-01", "processor": "EPYC", "instructions": "AVX2"}
    reading = {"runs": runs, "note": {"of": "files"}, "machine": machine}
    page = load("results").write_page({"reading": reading, "other": {"speed": 2.5, "machine": machine}})
    assert "## Reading\n\nllmtune 0.2.0 on 2026-12-01, EPYC, AVX2.\n" in page
    assert "| ours | 4 (3–5) |" in page
    assert "- note, of: files" in page
    assert "- speed: 2.5" in page


@pytest.mark.slow
def test_tools_train_in_turns_and_a_page_is_written(tiny_llama: Path, tmp_path: Path) -> None:
    tools = ["llmtune", "trl-packed", "trl-padded", "trainer"]
    measured, picture = tmp_path / "found" / "training.json", tmp_path / "losses.svg"
    done = run(
        *("training.py", "--model", tiny_llama, "--dtype", "float32", "--pairs", 1, "--steps", 2, "--tokens", 1024),
        *("--pack", 512, "--padded-rows", 2, "--tools", *tools, "--json", measured, "--losses", picture),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(measured.read_text())
    assert list(found["runs"]) == tools
    first = {tool: runs[0] for tool, runs in found["runs"].items()}
    assert len({run["trainable"] for run in first.values()}) == 1
    for tool, one in first.items():
        assert len(one["steps"]) == 3
        assert one["tokens_per_cpu_second"] > 0
        assert all(100 < step["tokens"] <= 2048 for step in one["steps"]), tool
        assert all(5 < step["loss"] < 8 for step in one["steps"]), tool
    limit = first["llmtune"]["limit"]
    assert first["llmtune"]["tokens_per_cpu_second"] < limit["tokens_per_second"]
    assert set(limit["microseconds_a_token"]) == {"frozen layers", "adapters", "head", "attention"}
    assert picture.read_text().count("<polyline") == len(tools)
    page = run("results.py", measured.parent, cwd=tmp_path).stdout
    assert "| TRL, packed |" in page
    assert str(tmp_path) not in page


def test_simulated_efficiency_depends_on_the_ring_and_falls_with_uneven_steps(load: Any) -> None:
    scale: ModuleType = load("scale")
    even = scale.simulate([2.0], 1e9, 1e-3, 1e9)
    for count, share in zip(scale.MACHINES, even, strict=True):
        ring = 2 * (count - 1) / count * 1.0 + 2 * (count - 1) * 1e-3
        assert share == pytest.approx(2 / (2 + ring))
    uneven = scale.simulate([1.0, 2.0, 3.0], 1e9, 1e-3, 1e9)
    assert all(one < other for one, other in zip(uneven[1:], even[1:], strict=True))
    assert uneven == sorted(uneven, reverse=True)


@pytest.mark.slow
def test_the_scale_pages_tables_match_the_script(load: Any) -> None:
    scale: ModuleType = load("scale")
    for name, page in scale.PAGES.items():
        table = "\n".join(scale.lines_of(getattr(scale, f"{name}_table")()))
        assert table in page.read_text(encoding="utf-8"), name


def test_operations_per_token_match_torchs_count(load: Any, tmp_path: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    scale: ModuleType = load("scale")
    scale.MODELS["tiny"] = scale.llama(64, 2, 8, 256)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(scale.MODELS["tiny"], attn_implementation="eager")
        with FlopCounterMode(display=False) as counter:
            model(input_ids=torch.zeros((1, scale.TOKENS), dtype=torch.long))
    attention = 2 * 2 * 64 * scale.TOKENS  # eager attention computes the full square; the count has half of it
    assert scale.shape("tiny", "lora").forward == pytest.approx(counter.get_total_flops() / scale.TOKENS - attention)
