"""Shapes: H heads, Q queries, T keys."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmtune.errors import EnvironmentProblem
from llmtune.explain.attention_maps import (
    CROSS,
    MASKED,
    SELF,
    Attended,
    AttentionMaps,
    TextLines,
    attend,
    merge_stretches,
    most_telling_layer,
    roll,
    shape_of,
)
from llmtune.explain.explainer import family_of
from llmtune.explain.inputs import AttentionRequest
from llmtune.explain.token_text import Token, TokenLine
from llmtune.model.loading import load_plain
from llmtune.recipe.model_section import ModelSection
from llmtune.records import ModelRef

FAMILIES = ("bert", "gpt2", "llama", "t5", "bart", "whisper", "deberta", "wav2vec2")
KINDS = {"encoder": {SELF}, "decoder": {MASKED}, "encoder-decoder": {SELF, MASKED, CROSS}}


@pytest.fixture(scope="module")
def load(built: Callable[[str], Path]) -> Callable[[str], Any]:
    """Loads a family's model as `explain` does."""

    def load(name: str) -> Any:
        folder = built(name)
        place, settings = ModelRef(name, folder, None, ""), ModelSection(name=str(folder))
        config = AutoConfig.from_pretrained(str(folder))
        return load_plain(place, config, settings, dtype=torch.float32, device="cpu")

    return load


def inputs_for(name: str) -> dict[str, torch.Tensor]:
    ids_1T = torch.tensor([[10, 40, 41, 12, 60, 33, 20]])
    generator = torch.Generator().manual_seed(0)
    if name == "whisper":
        return {"input_features": torch.randn((1, 80, 200), generator=generator), "decoder_input_ids": ids_1T}
    if name == "wav2vec2":
        return {"input_values": torch.randn((1, 8000), generator=generator)}
    text = {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)}
    return text | ({"decoder_input_ids": ids_1T[:, :5]} if name in ("t5", "bart") else {})


def see(model: Any, name: str) -> list[Attended]:
    seen: list[Attended] = []
    attend(model, inputs_for(name), family_of(model.config), seen.append)
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_equal_the_models_own_output(load, name):
    model = load(name)
    seen, family = see(model, name), family_of(model.config)
    with torch.inference_mode():
        output = model(**inputs_for(name), output_attentions=True)
    halves = {SELF: "encoder_attentions", MASKED: "decoder_attentions", CROSS: "cross_attentions"}
    assert {one.kind for one in seen} == KINDS[family]
    for kind, (layers, heads) in shape_of(model.config, family).items():
        wanted = getattr(output, halves[kind] if family == "encoder-decoder" else "attentions")
        own = [one for one in seen if one.kind == kind]
        assert [one.layer for one in own] == list(range(layers)) == [0, 1]
        for one, whole_1HQT in zip(own, wanted, strict=True):
            assert one.weights.shape[0] == heads
            assert torch.equal(one.weights, whole_1HQT[0])


def test_an_encoder_with_local_attention_is_not_masked(load):
    model = load("modernbert")
    seen: list[Attended] = []
    attend(model, {"input_ids": torch.arange(10, 40)[None]}, "encoder", seen.append)
    assert [one.kind for one in seen] == [SELF] * 3
    assert seen[0].weights.tril(-9).any()
    assert not seen[1].weights.tril(-9).any()
    assert not seen[1].weights.triu(9).any()


def test_a_layers_weights_are_freed_before_the_next_layer(load):
    model = load("llama")
    alive: list[int] = []

    def look(seen: Attended) -> None:
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
        alive.append(len({t.untyped_storage().data_ptr() for t in tensors if t.shape[-3:] == (4, 7, 7)}))

    attend(model, inputs_for("llama"), "decoder", look)
    assert alive == [1, 1]


def test_a_failing_callback_leaves_transformers_unchanged(load):
    def fail(seen: Attended) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attend(load("bert"), inputs_for("bert"), "encoder", fail)
    assert "eager" not in ALL_ATTENTION_FUNCTIONS
    assert len(see(load("bert"), "bert")) == 2


def test_a_model_without_attention_weights_is_an_error(load):
    model = load("bert")
    model.set_attn_implementation("sdpa")
    with pytest.raises(EnvironmentProblem, match="does not show its attention"):
        attend(model, inputs_for("bert"), "encoder", lambda seen: None)


# Kept weights


def line(*sizes: int) -> TokenLine:
    return TokenLine(tuple(Token(i, f"w{i}", special=False, continues=False) for i in range(len(sizes))), sizes)


def test_grouped_rows_average_and_grouped_columns_add_so_rows_sum_to_one():
    weights_TT = np.random.default_rng(0).dirichlet(np.ones(6), size=6).astype(np.float32)
    merged = merge_stretches(weights_TT, line(1, 2, 3), line(2, 4))
    assert merged.shape == (3, 2)
    assert np.allclose(merged.sum(-1), 1)
    assert merged[1, 1] == pytest.approx((weights_TT[1, 2:].sum() + weights_TT[2, 2:].sum()) / 2, rel=1e-5)


def test_rollout_is_the_product_of_halved_attention_and_halved_identity():
    first, second = np.random.default_rng(0).dirichlet(np.ones(4), size=(2, 4)).astype(np.float32)
    rolled = roll(roll(None, first), second)
    wanted = (0.5 * second + 0.5 * np.eye(4)) @ (0.5 * first + 0.5 * np.eye(4))
    assert np.allclose(rolled, wanted, atol=1e-6)
    assert np.allclose(rolled.sum(-1), 1, atol=1e-6)


def test_a_decoder_keeps_heads_mean_and_rollout_of_means(load):
    maps = AttentionMaps(("model",), TextLines(line(*[1] * 7)), {MASKED: (2, 4)}, AttentionRequest(layer=1))
    model, seen = load("llama"), see(load("llama"), "llama")
    attend(model, inputs_for("llama"), "decoder", partial(maps.add, "model"))
    first, second = maps.kept["model"][MASKED].values()
    assert np.allclose([second[head] for head in range(4)], seen[1].weights.numpy())
    assert np.allclose(second["mean"], seen[1].weights.mean(0).numpy(), atol=1e-6)
    assert np.allclose(second["rollout"], roll(roll(None, first["mean"]), second["mean"]), atol=1e-6)
    assert not np.triu(second["rollout"], 1).any()


def test_attention_of_all_words_to_one_word_does_not_make_a_layer_telling():
    telling = TextLines(line(1, 1, 1, 1)).among_words(SELF)
    sink = np.full((4, 4), [0.3, 0.1, 0.5, 0.1], dtype=np.float32)
    pairs = np.array([[0.7, 0.1, 0.1, 0.1], [0.6, 0, 0.4, 0], [0.6, 0, 0, 0.4], [0.6, 0.4, 0, 0]], dtype=np.float32)
    means = {0: sink, 1: pairs, 2: sink}
    assert most_telling_layer(means, None, telling) == 1
    assert most_telling_layer({**means, 2: pairs}, means, telling) == 2
