from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import families
from support.adapting import quiet
from torch.utils.flop_counter import FlopCounterMode

from llmtune.explain.architecture import describe_model
from llmtune.explain.flops import Cost, UncountableError, choose_lengths, count_cost, fit, value
from llmtune.explain.meta_device_model import build_meta_model, make_inputs
from llmtune.explain.target import open_target

FAMILIES = ("llama", "gpt2", "bert", "deberta", "modernbert", "t5", "bart", "whisper", "wav2vec2")


def count(folder: Path) -> Cost:
    target = open_target(str(folder), quiet(), offline=True)
    meta = build_meta_model(target)
    return count_cost(meta, describe_model(target, meta))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_formula_is_what_torch_counts_at_other_lengths(built: Callable[[str], Path], family: str):
    folder = built(family)
    cost = count(folder)
    with open_target(str(folder), quiet(), offline=True).open_model("model") as model:
        for tokens in (1, 13, 77):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(**make_inputs(model, tokens))
            assert value(cost.sum(), tokens) == counter.get_total_flops()


def test_a_decoder_costs_two_a_weight_and_four_a_pair_and_width(tiny_llama: Path):
    """2 x weights of all products a token, and 4 L d a layer: queries with keys, weights with values."""
    cost = count(tiny_llama)
    projections = 64 * 64 + 2 * 64 * 32 + 64 * 64
    assert cost.parts == {
        "decoder": {
            "projections": (0, 2 * 2 * projections, 0),
            "attention": (0, 0, 2 * 4 * 64),
            "feed-forward": (0, 2 * 2 * 3 * 64 * 128, 0),
            "head": (0, 2 * 64 * 425, 0),
        }
    }
    assert cost.sum(pairs=True) == (0, 0, 512)


def test_self_and_cross_attention_are_told_apart(built: Callable[[str], Path]):
    cost = count(built("t5"))
    assert cost.parts["decoder"]["attention"] == cost.parts["decoder"]["cross-attention"] == (0, 0, 512)
    assert "cross-attention" not in cost.parts["encoder"]
    whisper = count(built("whisper"))
    assert whisper.parts["encoder"]["attention"] == (2 * 4 * 100 * 100 * 64, 0, 0)  # its window, whatever is said
    assert whisper.parts["decoder"]["cross-attention"] == (0, 2 * 4 * 100 * 64, 0)


def test_the_crossing_is_the_first_length_at_which_attention_costs_more(tiny_llama: Path):
    cost = count(tiny_llama)
    crossing = cost.crossing()
    assert crossing is not None
    pairs, others = cost.sum(pairs=True), cost.sum(pairs=False)
    assert value(pairs, crossing) >= value(others, crossing)
    assert value(pairs, crossing - 1) < value(others, crossing - 1)
    assert Cost({"x": {"head": (0, 2, 0)}}).crossing() is None


def test_a_polynomial_goes_through_three_counts():
    assert fit((1, 2, 4), [6, 11, 27]) == (3, 2, 1)
    assert fit((1, 2, 4), [0, 1, 2]) is None


def test_attention_over_blocks_of_a_fixed_size_is_not_given_a_formula(tmp_path: Path):
    from transformers import LongT5Config, LongT5ForConditionalGeneration

    folder = families.build_t5(tmp_path / "long")
    config = LongT5Config(vocab_size=350, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, local_radius=7)
    LongT5ForConditionalGeneration(config).save_pretrained(folder)
    with pytest.raises(UncountableError, match="attention is no polynomial"):
        count(folder)


def test_facts_hold_numbers_at_lengths(tiny_llama: Path):
    cost = count(tiny_llama)
    facts = cost.to_json([64, 128])
    assert facts["total"] == list(cost.sum())
    assert [row["flops"] for row in facts["at"]] == [value(cost.sum(), 64), value(cost.sum(), 128)]
    assert facts["at"][1]["attention_share"] == pytest.approx(512 * 128 * 128 / value(cost.sum(), 128))


def test_lengths_end_at_the_context():
    assert choose_lengths(512) == [64, 128, 256, 512]
    assert choose_lengths(40) == [40]
    assert choose_lengths(None)[-1] == 8192
