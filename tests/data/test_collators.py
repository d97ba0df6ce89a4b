"""Micro-batches: which position predicts which token, packed and padded."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmtune.data.collators import collate_packed, collate_padded, encoder_batch
from llmtune.data.example import Example


@st.composite
def examples(draw):
    """An example of 1 to 12 tokens with up to three spans that do not overlap."""
    ids = draw(st.lists(st.integers(1, 99), min_size=1, max_size=12))
    borders = sorted(draw(st.sets(st.integers(0, len(ids)), max_size=6)))
    return Example(ids, borders[: len(borders) // 2 * 2], target_bytes=1)


BATCHES = st.lists(examples(), min_size=1, max_size=5)


def predicted(batch):
    """All predictions as (row, predicting token, predicted token)."""
    flat = batch["input_ids"].reshape(-1)
    return list(
        zip(batch["rows_S"].tolist(), flat[batch["predict_S"]].tolist(), batch["targets_S"].tolist(), strict=True)
    )


def wanted(batch):
    """The same, computed from the spans token by token."""
    return [
        (row, example.input_ids[i - 1], example.input_ids[i])
        for row, example in enumerate(batch)
        for start, end in zip(example.spans[::2], example.spans[1::2], strict=True)
        for i in range(start, end)
        if i > 0
    ]


@pytest.mark.parametrize("collate", [collate_packed, collate_padded])
@given(batch=BATCHES)
def test_each_supervised_token_is_predicted_from_the_one_before_it(collate, batch):
    assert predicted(collate(batch, 0)) == wanted(batch)


@given(batch=BATCHES)
def test_packed_predictions_stay_within_their_document(batch):
    packed = collate_packed(batch)
    borders = packed["cu_seq_lens_q"].tolist()
    for row, position in zip(packed["rows_S"].tolist(), packed["predict_S"].tolist(), strict=True):
        assert borders[row] <= position < borders[row + 1] - 1


@given(batch=BATCHES)
def test_packed_documents_are_joined_with_positions_from_zero(batch):
    packed = collate_packed(batch)
    borders = packed["cu_seq_lens_q"].tolist()
    assert packed["input_ids"].shape == (1, borders[-1])
    for row, example in enumerate(batch):
        inside = slice(borders[row], borders[row + 1])
        assert packed["input_ids"][0, inside].tolist() == list(example.input_ids)
        assert packed["position_ids"][0, inside].tolist() == list(range(len(example.input_ids)))
    assert packed["max_length_q"] == packed["max_length_k"] == max(len(example.input_ids) for example in batch)
    assert torch.equal(packed["cu_seq_lens_q"], packed["cu_seq_lens_k"])
    assert "attention_mask" not in packed


@given(batch=BATCHES)
def test_rows_are_padded_on_the_right_and_only_padding_is_masked(batch):
    padded = collate_padded(batch, 0)
    for row, example in enumerate(batch):
        length = len(example.input_ids)
        assert padded["input_ids"][row, :length].tolist() == list(example.input_ids)
        assert not padded["input_ids"][row, length:].any()
        assert padded["attention_mask"][row].tolist() == [1] * length + [0] * (padded["input_ids"].shape[1] - length)
    assert "cu_seq_lens_q" not in padded


def test_the_first_token_of_a_document_is_not_predicted():
    two = [Example([5, 6], [0, 2], 1), Example([7, 8], [0, 1], 1)]
    assert predicted(collate_packed(two)) == [(0, 5, 6)]


def test_a_batch_without_a_supervised_token_predicts_nothing():
    batch = collate_packed([Example([5, 6], [], 0)])
    assert batch["predict_S"].tolist() == []
    assert batch["predict_S"].dtype == torch.int64


def test_padding_works_without_a_padding_token():
    assert collate_padded([Example([5, 6], [1, 2], 1), Example([7], [], 1)], None)["input_ids"].tolist() == [
        [5, 6],
        [7, 0],
    ]


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_packed_texts_are_joined_with_their_own_positions_and_token_types(lengths):
    examples = [
        Example([7 * i + j for j in range(n)], [], 0, token_type_ids=[i % 2] * n) for i, n in enumerate(lengths)
    ]
    batch, _ = encoder_batch(examples, 0, True)
    borders = batch["cu_seq_lens_q"].tolist()
    assert batch["n_rows"] == len(lengths)
    assert batch["input_ids"].shape == batch["token_type_ids"].shape == (1, sum(lengths))
    for example, start, end in zip(examples, borders[:-1], borders[1:], strict=True):
        assert batch["input_ids"][0, start:end].tolist() == example.input_ids
        assert batch["token_type_ids"][0, start:end].tolist() == example.token_type_ids
        assert batch["position_ids"][0, start:end].tolist() == list(range(end - start))
    assert "attention_mask" not in batch


def test_a_text_without_token_types_gets_zeros_next_to_pairs():
    batch, _ = encoder_batch([Example([5, 6], [], 0, token_type_ids=[0, 1]), Example([7, 8, 9], [], 0)], 0, True)
    assert batch["token_type_ids"].tolist() == [[0, 1, 0, 0, 0]]
    assert "token_type_ids" not in encoder_batch([Example([5, 6], [], 0)], 0, True)[0]
