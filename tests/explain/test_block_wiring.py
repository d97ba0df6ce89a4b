from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from llmtune.explain.block_wiring import Recording, UnknownWiringError, Wiring, read_wiring, record
from llmtune.explain.meta_device_model import MetaModel

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
    "pad_token_id": 0,
}


def wire(recording: Recording, block: str, *, crosses: bool = False) -> Wiring:
    call = next(call for call in recording.calls if call.name == block)
    return read_wiring(call, recording, crosses=crosses)


def wire_family(kind: Any, family: str, block: str, **config: Any) -> Wiring:
    settings = AutoConfig.for_model(family, **{**SMALL, **config})
    with torch.device("meta"):
        model = kind.from_config(settings, attn_implementation="eager").eval()
    return wire(MetaModel(model, lambda: model).recording, block, crosses=kind is AutoModelForSeq2SeqLM)


def spell(wiring: Wiring) -> list[str]:
    """A line a sublayer: norms in brackets, `|` between branches side by side, `>` before norms on the path."""
    lines = []
    for sublayer in wiring.sublayers:
        branches = []
        for branch in sublayer.branches:
            before, after = ("".join(f"[{norm.kind}]" for norm in norms) for norms in (branch.before, branch.after))
            branches.append(f"{before}{branch.kind}{after}")
        behind = "".join(f"[{norm.kind}]" for norm in sublayer.behind)
        lines.append(" | ".join(branches) + (f" > {behind}" if behind else ""))
    return lines


AUTO = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "seq2seq": AutoModelForSeq2SeqLM}
WIRED = """
causal llama model.layers.0: [RMSNorm]attention, [RMSNorm]feed-forward
causal gpt2 transformer.h.0: [LayerNorm]attention, [LayerNorm]feed-forward
masked bert bert.encoder.layer.0: attention > [LayerNorm], feed-forward > [LayerNorm]
causal gemma2 model.layers.0: [RMSNorm]attention[RMSNorm], [RMSNorm]feed-forward[RMSNorm]
causal olmo2 model.layers.0: attention[RMSNorm], feed-forward[RMSNorm]
causal gpt_neox gpt_neox.layers.0: [LayerNorm]attention | [LayerNorm]feed-forward
causal opt model.decoder.layers.0: [LayerNorm]attention, [LayerNorm]feed-forward
seq2seq t5 decoder.block.0: [RMSNorm]attention, [RMSNorm]cross-attention, [RMSNorm]feed-forward
seq2seq bart model.decoder.layers.0: attention > [LayerNorm], cross-attention > [LayerNorm], feed-forward > [LayerNorm]
seq2seq mbart model.encoder.layers.0: [LayerNorm]attention, [LayerNorm]feed-forward
"""


@pytest.mark.parametrize("line", WIRED.strip().splitlines())
def test_norms_stand_where_the_papers_put_them(line):
    model, _, expected = line.partition(":")
    kind, family, block = model.split()
    assert spell(wire_family(AUTO[kind], family, block)) == expected.strip().split(", ")


def test_parts_name_their_modules_heads_and_activation():
    attention, forward = (
        sublayer.branches[0] for sublayer in wire_family(AutoModelForCausalLM, "qwen3", "model.layers.0").sublayers
    )
    assert attention.modules == tuple(f"self_attn.{name}_proj" for name in "qkvo")
    assert [norm.module for norm in attention.inner] == ["self_attn.q_norm", "self_attn.k_norm"]
    assert (attention.heads, attention.head_size) == (4, 8)
    assert forward.modules == ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert (forward.activation, forward.gated) == ("SiLU", True)
    plain = wire_family(AutoModelForCausalLM, "gpt2", "transformer.h.0").sublayers[1].branches[0]
    assert (plain.activation, plain.gated) == ("GELU", False)


class Block(nn.Module):
    """A block of two matrices whose forward is given."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.way = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.way(self, x)


class Model(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)


def wire_block(forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> Wiring:
    return wire(record(Model(Block(forward)), {"x": torch.randn(1, 3, 8, requires_grad=True) + 0}), "layers.0")


def test_a_sum_is_residual_only_where_weights_stand_between():
    wiring = wire_block(lambda block, x: x + block.second(torch.tanh(block.first(block.norm(x)))))
    assert spell(wiring) == ["[LayerNorm]feed-forward"]
    (branch,) = wiring.sublayers[0].branches
    assert branch.modules == ("first", "second")  # the sum within an activation is none of the path
    gelu = wire_block(lambda block, x: x + block.second(nn.functional.gelu(block.first(x), approximate="tanh")))
    assert len(gelu.sublayers) == 1


def test_a_block_without_a_residual_path_is_not_guessed():
    with pytest.raises(UnknownWiringError, match="no residual path was found: second"):
        wire_block(lambda block, x: block.second(block.first(x)))


def test_weights_beside_the_path_are_not_hidden():
    with pytest.raises(UnknownWiringError, match="second stands in the way"):
        wire_block(lambda block, x: block.second(x + block.first(x)))


def test_two_paths_are_not_drawn_as_one():
    with pytest.raises(UnknownWiringError, match="more than one path"):
        wire_block(lambda block, x: torch.cat([x + block.first(x), 2 * x + block.second(x)]))


def test_a_norm_on_the_path_is_told_from_one_beside_it():
    behind = wire_block(lambda block, x: block.norm(x + block.second(block.first(x))))
    assert spell(behind) == ["feed-forward > [LayerNorm]"]
    entry = wire_block(lambda block, x: (normal := block.norm(x)) + block.second(block.first(normal)))
    assert spell(entry) == ["feed-forward"]
    assert [norm.module for norm in entry.entry] == ["norm"]
