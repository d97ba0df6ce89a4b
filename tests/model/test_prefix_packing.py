"""A prefix that documents share is in a packed row once; losses and gradients are as if it were in each."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.adapting import build_family, documents, open_model, packed, recipe_with

from llmtune.data.examples import Example
from llmtune.model.causal_lm_loss import causal_loss
from llmtune.model.packed_attention import PREFIXES
from llmtune.model.prefix_packing import allow_shared_prefixes, share_prefixes, takes_shared_prefixes

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 25},
    "gemma2": {"attn_logit_softcapping": 2.0, "sliding_window": 25},
}
SYSTEM, OTHER = documents([20, 14], seed=5)


def examples() -> list[Example]:
    """Rows under two system prompts, and one without any."""
    rows = documents([9, 4, 40, 6, 12, 17], seed=1)
    begins = [SYSTEM, OTHER, SYSTEM, SYSTEM, OTHER, None]
    found = []
    for row, begin in zip(rows, begins, strict=True):
        before = [] if begin is None else begin.input_ids
        first, end = row.spans
        spans = [10, len(before), len(before) + first, len(before) + end] if before else row.spans
        found.append(Example([*before, *row.input_ids], spans, row.target_bytes))
    return found


def losses_and_gradients(model, batch, allowed: bool):
    allow_shared_prefixes(model, allowed)
    model.zero_grad()
    loss = causal_loss(model, batch, by_row=True)
    loss.sum.backward()
    return loss, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_equal_those_of_complete_documents(tmp_path, family):
    model = open_model(recipe_with(build_family(tmp_path, family, **FAMILIES[family]))).model
    assert takes_shared_prefixes(model.eval())
    batch = packed(examples())
    shared, gradients = losses_and_gradients(model, batch, True)
    apart, wanted = losses_and_gradients(model, batch, False)
    torch.testing.assert_close(shared.row_sums, apart.row_sums, rtol=1e-5, atol=1e-5)
    assert shared.count == apart.count
    assert gradients
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


def test_a_prefix_is_computed_once(tiny_llama):
    model = open_model(recipe_with(tiny_llama)).model
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    batch = packed(examples())
    causal_loss(model, batch)
    assert seen == [batch["input_ids"].numel() - 2 * 20 - 14]


def test_a_layer_with_dropout_gets_complete_documents(tiny_llama):
    model = open_model(recipe_with(tiny_llama)).model
    model.model.layers[0].mlp.add_module("dropout", torch.nn.Dropout(0.1))
    assert takes_shared_prefixes(model.eval())
    assert not takes_shared_prefixes(model.train())
    del model.model.layers[0].mlp.dropout
    assert takes_shared_prefixes(model)
    model.model.layers[1].self_attn.attention_dropout = 0.1
    assert not takes_shared_prefixes(model)


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=30), min_size=1, max_size=8))
def test_each_document_can_be_read_from_the_shortened_row(rows):
    batch = packed([Example(row, [0, len(row)], 1) for row in rows])
    shared = share_prefixes(batch)
    ids, positions = shared["input_ids"][0].tolist(), shared["position_ids"][0].tolist()
    borders = shared["cu_seq_lens_q"].tolist()
    prefixes = shared.get(PREFIXES, [(0, 0)] * (len(borders) - 1))
    parts = [
        [*range(*prefix), *range(start, end)]
        for prefix, start, end in zip(prefixes, borders[:-1], borders[1:], strict=True)
    ]
    read = [[ids[at] for at in part] for part in parts]
    assert all(row in read for row in rows)
    assert all([positions[at] for at in part] == [*range(len(part))] for part in parts)
    of_row = {at: part for part in parts for at in part[-1:]}
    assert len(of_row) == len(parts)
    before = batch["input_ids"][0][batch["predict_S"]]
    assert shared["input_ids"][0][shared["predict_S"]].tolist() == before.tolist()
    assert len(ids) <= batch["input_ids"].numel()
