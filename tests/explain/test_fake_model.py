from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support import families
from support.explaining import explain, open_quietly, quiet
from support.models import build_gpt2
from torch.utils.flop_counter import FlopCounterMode

from llmtune.explain import fake_model
from llmtune.explain.architecture import describe_architecture
from llmtune.explain.fake_model import (
    Cost,
    MeasuredBlock,
    UntraceableError,
    build_fake_model,
    count_cost,
    evaluate_cost,
    measure_block,
    shape_inputs,
)
from llmtune.model.memory_plan import context_length

FAMILIES = ("llama", "gpt2", "bert", "deberta", "modernbert", "t5", "bart", "whisper", "wav2vec2")
invoke = partial(explain, "model")


def count(folder: Path) -> Cost:
    target = open_quietly(folder)
    return count_cost(build_fake_model(target), context_length(target.config))


def measure(folder: Path, seconds: float = 1.0) -> MeasuredBlock | str:
    target = open_quietly(folder)
    fake = build_fake_model(target)
    name = describe_architecture(target, fake).stacks[-1].blocks[-1].names()[-1]
    return measure_block(fake, name, context_length(target.config), quiet(), budget_seconds=seconds)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_formula_matches_torchs_count_at_other_lengths(built: Callable[[str], Path], family: str):
    cost = count(built(family))
    with open_quietly(built(family)).open_model("model") as model:
        for tokens in (1, 77):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(**shape_inputs(model, tokens))
            assert evaluate_cost(cost.total, tokens) == counter.get_total_flops()


def test_a_decoder_costs_two_per_weight_and_four_per_pair_and_width(tiny_llama: Path):
    """2 x weights of all products a token, and 4 L d a layer: queries with keys, weights with values."""
    cost = count(tiny_llama)
    weights = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128) + 64 * 425
    assert (list(cost.attention), list(cost.others)) == ([0, 0, 2 * 4 * 64], [0, 2 * weights, 0])
    assert cost.at(128)["attention_share"] == pytest.approx(512 * 128 * 128 / evaluate_cost(cost.total, 128))


def test_speech_in_a_fixed_window_costs_the_same_for_any_length(built: Callable[[str], Path]):
    encoder, crossing, decoder = 2 * 4 * 100 * 100 * 64, 2 * 4 * 100 * 64, 2 * 4 * 64
    assert list(count(built("whisper")).attention) == [encoder, crossing, decoder]


def test_the_crossing_is_the_first_length_at_which_attention_costs_more(tiny_llama: Path):
    cost = count(tiny_llama)
    crossing = cost.crossing()
    assert crossing is not None
    assert evaluate_cost(cost.attention, crossing) >= evaluate_cost(cost.others, crossing)
    assert evaluate_cost(cost.attention, crossing - 1) < evaluate_cost(cost.others, crossing - 1)
    assert Cost(np.array([0, 2, 0]), np.array([0, 0, 0])).crossing() is None


def test_attention_over_fixed_size_blocks_gets_no_formula(tmp_path: Path):
    from transformers import LongT5Config, LongT5ForConditionalGeneration

    folder = families.build_t5(tmp_path / "long")
    config = LongT5Config(vocab_size=350, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, local_radius=7)
    LongT5ForConditionalGeneration(config).save_pretrained(folder)
    with pytest.raises(UntraceableError, match="is no polynomial"):
        count(folder)


def test_a_block_and_its_attention_are_timed_by_length(tiny_gpt2: Path):
    found = measure(tiny_gpt2, 60.0)
    assert isinstance(found, MeasuredBlock), found
    assert found.attention == "attn"
    assert [point.tokens for point in found.points] == [64, 128, 256, 512]
    assert all(0 < seconds < 60 for point in found.points for seconds in (point.block_seconds, point.attention_seconds))


@pytest.mark.slow  # seconds on the clock, which other load changes
def test_attention_takes_less_time_than_its_block_and_a_long_text_more_than_a_short_one(tiny_gpt2: Path):
    block = measure(tiny_gpt2, 60.0)
    assert isinstance(block, MeasuredBlock), block
    assert block.points[-1].attention_seconds < block.points[-1].block_seconds
    assert block.points[-1].block_seconds > 2 * block.points[0].block_seconds


@pytest.mark.parametrize("family", ["bert", "modernbert", "t5", "whisper", "wav2vec2"])
def test_blocks_of_every_family_run_alone(built, monkeypatch, family):
    monkeypatch.setattr(fake_model, "LONGEST", 64)
    found = measure(built(family), 0.2)
    assert isinstance(found, MeasuredBlock), found
    assert [point.tokens for point in found.points] == [64]


def test_measuring_stops_at_its_time_limit_and_skips_a_large_block(tiny_llama: Path, monkeypatch):
    found = measure(tiny_llama, 0.02)
    assert 1 <= len(found.points) < 6
    monkeypatch.setattr(fake_model, "MOST_BYTES", 4 * 30_000)
    assert "parameters" in measure(tiny_llama)


def test_without_measuring_the_page_has_parts_and_costs_but_no_times(tiny_gpt2: Path, tmp_path: Path):
    result = invoke(tiny_gpt2, "--out", tmp_path, "--no-measure")
    for word in ("Masked self-attention", "c_attn", "64 → 192", "gelu", "a learned table", "160,064", "tokens"):
        assert word in result.stdout, word
    assert "Not measured: --no-measure was given." in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"model.html", "model.svg", "model-cost.svg"}


def test_an_invalid_configuration_is_refused(tmp_path: Path):
    folder = build_gpt2(tmp_path / "gpt2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_head": 7}))
    result = invoke(folder, "--out", tmp_path / "out")
    assert result.exit_code == 4, result.exception
    assert "cannot be built from its configuration" in " ".join(result.stderr.split())
