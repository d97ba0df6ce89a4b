from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from llmtune.explain.position_encodings import (
    REACH,
    find_schemes,
    similarity_by_distance,
    sinusoidal_scheme,
)


def load(folder: Any) -> Any:
    return AutoModel.from_pretrained(folder, attn_implementation="eager").eval()


@given(st.integers(1, 40), st.integers(1, 20), st.floats(1.5, 1e6))
def test_the_encoding_matches_the_papers_formula(length, pairs, base):
    table = sinusoidal_scheme(length, 2 * pairs, base).values
    for k in (0, length // 2, length - 1):
        for i in range(pairs):
            angle = k / base ** (2 * i / (2 * pairs))
            assert table[k, 2 * i] == pytest.approx(math.sin(angle), abs=1e-9)
            assert table[k, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-9)


TABLES = {
    "bert": ("embeddings.position_embeddings", ["learned"]),
    "roberta": ("embeddings.position_embeddings", ["learned"]),
    "bart": ("encoder.embed_positions", ["learned", "learned"]),
    "whisper": ("", ["sinusoidal", "learned"]),
    "marian": ("encoder.embed_positions", ["sinusoidal"]),
    "nllb": ("encoder.embed_positions", ["sinusoidal"]),
}
"""By family the module that adds the first table, and the kinds of all."""


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
@pytest.mark.parametrize("family", TABLES)
def test_the_first_row_of_a_table_is_added_at_the_first_token(built, family):
    model, (module, kinds) = load(built(family)), TABLES[family]
    found = find_schemes(model)
    assert [scheme.kind for scheme in found] == kinds
    if len(kinds) > 1:
        assert [scheme.title.rpartition(" ")[2] for scheme in found] == ["encoder", "decoder"]
    if module:
        seen = []
        model.get_submodule(module).register_forward_hook(lambda module, args, output: seen.append(output))
        ids = torch.tensor([[7, 9, 11]])
        more = {"decoder_input_ids": ids[:, :1]} if model.config.is_encoder_decoder else {}
        with torch.inference_mode():
            model(input_ids=ids, **more)
        added = seen[0].reshape(-1, seen[0].shape[-1])[-3:].numpy()
        np.testing.assert_allclose(found[0].values[:3], added, atol=1e-6)


def test_rotary_cosines_equal_the_models(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    (scheme,) = find_schemes(model)
    places = torch.arange(50)[None]
    cosines, _ = model.model.rotary_emb(torch.zeros(1, 50, 64), places)
    half = cosines.shape[-1] // 2
    np.testing.assert_allclose(scheme.table(50), cosines[0, :, :half].numpy(), atol=1e-5)
    assert scheme.facts["rotated"] == "16 of 16 dimensions a head"
    assert similarity_by_distance(scheme, 50)[0] == 1


def test_a_scaled_rotation_is_shown_as_the_model_computes_it():
    stretched = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    (plain,) = find_schemes(LlamaForCausalLM(LlamaConfig(vocab_size=16, **shape)))
    (longer,) = find_schemes(LlamaForCausalLM(LlamaConfig(vocab_size=16, rope_parameters=stretched, **shape)))
    np.testing.assert_allclose(longer.values, plain.values / 4, rtol=1e-6)
    assert (longer.facts["type"], longer.facts["stretched by"]) == ("linear", "4")


def test_each_kind_of_layer_has_its_own_rotation_in_modernbert(built):
    found = find_schemes(load(built("modernbert")))
    assert [scheme.kind for scheme in found] == ["rotary", "rotary"]
    assert all("attention" in scheme.name for scheme in found)


def test_t5s_bias_equals_the_one_added_by_its_attention(built):
    model = load(built("t5"))
    encoder, decoder = find_schemes(model)
    attention = model.encoder.block[0].layer[0].SelfAttention
    bias = attention.compute_bias(40, 40)[0].detach().numpy()
    for distance in (-20, -3, 0, 5, 19):
        column = encoder.distances.index(distance)
        np.testing.assert_allclose(encoder.values[:, column], bias[:, 20, 20 + distance], atol=1e-6)
    assert (encoder.distances[0], encoder.distances[-1]) == (-REACH, REACH)
    assert decoder.distances[-1] == 0
    assert len(encoder.values) == model.config.num_heads


def test_bloom_has_slopes_and_a_state_space_model_has_no_encoding():
    shape = BloomConfig(vocab_size=16, hidden_size=32, n_layer=1, n_head=8)
    (scheme,) = find_schemes(BloomForCausalLM(shape))
    assert scheme.kind == "slopes"
    assert scheme.values.tolist() == pytest.approx([2.0**-i for i in range(1, 9)])
    assert find_schemes(MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1))) == []
