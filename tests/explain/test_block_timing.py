from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from support.explaining import explain, quiet
from support.models import build_gpt2

from llmtune.explain import block_timing as costs
from llmtune.explain.architecture import Architecture, describe_model
from llmtune.explain.block_timing import Measured, cost_of_block, measure_block
from llmtune.explain.flops import count_cost, value
from llmtune.explain.meta_device_model import MetaModel, build_meta_model
from llmtune.explain.target import open_target

invoke = partial(explain, "model")


def look(folder: Path) -> tuple[MetaModel, Architecture]:
    target = open_target(str(folder), quiet(), offline=True)
    meta = build_meta_model(target)
    return meta, describe_model(target, meta)


def measure(folder: Path, seconds: float = 1.0) -> Measured:
    found = measure_block(*look(folder), quiet(), budget_seconds=seconds)
    assert isinstance(found, Measured), found
    return found


def test_a_block_and_its_attention_are_timed_by_length(tiny_gpt2: Path):
    found = measure(tiny_gpt2, 4.0)
    assert (found.block, found.attention, found.stack) == ("transformer.h.1", "attn", "decoder")
    assert [point.tokens for point in found.points] == [64, 128, 256, 512]
    assert 0 < found.points[-1].attention_seconds < found.points[-1].block_seconds
    assert found.points[-1].block_seconds > 2 * found.points[0].block_seconds


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("bert", "attention"),
        ("modernbert", "attn"),
        ("t5", "layer.0.SelfAttention"),
        ("whisper", "self_attn"),
        ("wav2vec2", "attention"),
    ],
)
def test_blocks_of_every_family_run_by_themselves(built, monkeypatch, family, attention):
    monkeypatch.setattr(costs, "LONGEST", 64)
    found = measure(built(family), 0.2)
    assert found.attention == attention
    assert [point.tokens for point in found.points] == [64]


def test_measuring_ends_with_its_time(tiny_llama: Path):
    found = measure(tiny_llama, 0.02)
    assert 1 <= len(found.points) < 6
    assert "0.02 seconds" in found.stopped


def test_measuring_ends_before_memory_does(tiny_llama: Path, monkeypatch):
    monkeypatch.setattr(costs, "MOST_BYTES", 4 * 30_000)
    found = measure_block(*look(tiny_llama), quiet())
    assert isinstance(found, str)
    assert "parameters" in found
    monkeypatch.setattr(costs, "MOST_BYTES", 4 * 40_000)
    found = measure(tiny_llama)
    assert [point.tokens for point in found.points] == [64]
    assert "128 tokens" in found.stopped


def test_the_cost_of_a_block_is_what_torch_counts(tiny_llama: Path):
    from torch.utils.flop_counter import FlopCounterMode

    meta, architecture = look(tiny_llama)
    parts = cost_of_block(count_cost(meta, architecture), architecture.stacks[0])
    with open_target(str(tiny_llama), quiet(), offline=True).open_model("model") as model:
        with torch.no_grad(), FlopCounterMode(display=False, depth=10) as counter:
            model(input_ids=torch.ones((1, 50), dtype=torch.long))
        counts = counter.get_flop_counts()
    assert value(parts["block"], 50) == sum(counts["LlamaForCausalLM.model.layers.0"].values())
    assert value(parts["attention"], 50) == sum(counts["LlamaForCausalLM.model.layers.0.self_attn"].values())


def test_the_command_writes_page_drawings_and_numbers(tiny_gpt2: Path, tmp_path: Path):
    result = invoke(tiny_gpt2, "--out", tmp_path / "out", "--no-measure")
    assert result.exit_code == 0, result.stderr
    for name in ("model.html", "model.svg", "model-cost.svg", "model.json"):
        assert f"{name}" in result.stderr
        assert (tmp_path / "out" / name).stat().st_size > 500
    assert not (tmp_path / "out" / "model-time.svg").exists()
    for word in ("Masked self-attention", "c_attn", "64 → 192", "GELU", "a learned table", "160,064", "tokens"):
        assert word in result.stdout, word
    page = (tmp_path / "out" / "model.html").read_text()
    assert "default-src 'none'" in page
    assert "Not measured: --no-measure was given." in page
    assert not [address for address in page.split('"') if address.startswith("http")]
    for name in ("model.svg", "model-cost.svg"):
        ElementTree.parse(tmp_path / "out" / name)


def test_a_configuration_that_no_model_can_be_built_from_is_refused(tmp_path: Path):
    folder = build_gpt2(tmp_path / "gpt2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_head": 7}))
    result = invoke(folder, "--out", tmp_path / "out")
    assert result.exit_code == 4, result.exception
    assert "cannot be built from its configuration" in " ".join(result.stderr.split())


def test_a_folder_that_cannot_be_written_is_an_error(tiny_gpt2: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    result = invoke(tiny_gpt2, "--out", tmp_path / "file", "--no-measure")
    assert result.exit_code == 4, result.exception
    assert "--out" in result.stderr
