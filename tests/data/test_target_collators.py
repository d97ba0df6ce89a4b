"""Packed or padded, an encoder reads the same tokens and predicts the same of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import families
from transformers import AutoTokenizer

from llmtune.data.target_collators import (
    IGNORED,
    classes_collator,
    ends_collator,
    masked_collator,
    read_packed,
    tags_collator,
)
from llmtune.recipe import Recipe
from llmtune.records import Example

LENGTHS = [4, 9, 9, 6]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(families.build_bert(tmp_path_factory.mktemp("bert")))


def recipe_of(**sections):
    return Recipe.model_validate({"task": "classify", "data": {"train": "x"}, "model": {"name": "x/y"}, **sections})


def texts(**fields):
    """Texts of LENGTHS; of each field the part at the same place."""
    ids = iter(range(5, 200))
    return [
        Example([next(ids) for _ in range(length)], [], 0, **{name: parts[i] for name, parts in fields.items()})
        for i, length in enumerate(LENGTHS)
    ]


def both(collator, tokenizer, recipe, examples):
    return [collator(tokenizer, recipe, packs)(examples, 0) for packs in (True, False)]


def predicted(batch):
    flat = batch["input_ids"].flatten()[batch["predict_S"]].tolist()
    return list(zip(flat, batch["targets_S"].tolist(), batch["rows_S"].tolist(), strict=True))


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_packed_texts_stand_end_to_end_with_positions_and_kinds_of_their_own(lengths):
    examples = [Example([7 * i + j for j in range(n)], [], 0, third_ids=[i % 2] * n) for i, n in enumerate(lengths)]
    batch = read_packed(examples)
    borders = batch["cu_seq_lens_q"].tolist()
    assert batch["n_rows"] == len(lengths)
    assert batch["input_ids"].shape == batch["token_type_ids"].shape == (1, sum(lengths))
    for example, start, end in zip(examples, borders[:-1], borders[1:], strict=True):
        assert batch["input_ids"][0, start:end].tolist() == example.input_ids
        assert batch["token_type_ids"][0, start:end].tolist() == example.third_ids
        assert batch["position_ids"][0, start:end].tolist() == list(range(end - start))
    assert "attention_mask" not in batch


def test_a_text_without_kinds_is_all_of_the_first_kind_beside_pairs():
    batch = read_packed([Example([5, 6], [], 0, third_ids=[0, 1]), Example([7, 8, 9], [], 0)])
    assert batch["token_type_ids"].tolist() == [[0, 1, 0, 0, 0]]
    assert "token_type_ids" not in read_packed([Example([5, 6], [], 0)])


def test_tags_are_those_of_the_same_tokens(tokenizer):
    examples = texts(target_ids=[[IGNORED, *([i] * (length - 2)), IGNORED] for i, length in enumerate(LENGTHS)])
    packed, padded = both(tags_collator, tokenizer, recipe_of(), examples)
    assert predicted(packed) == predicted(padded)
    assert len(predicted(packed)) == sum(LENGTHS) - 2 * len(LENGTHS)


def test_the_same_tokens_are_hidden(tokenizer):
    examples = [Example(e.input_ids, [1, len(e.input_ids) - 1], 0, counted=2) for e in texts()]
    packed, padded = both(masked_collator, tokenizer, recipe_of(task="completion"), examples)
    assert predicted(packed) == predicted(padded)
    assert len(predicted(packed)) == 8
    rows = [row[:length] for row, length in zip(padded["input_ids"].tolist(), LENGTHS, strict=True)]
    assert packed["input_ids"].tolist() == [[token for row in rows for token in row]]
    whole = torch.tensor([token for example in examples for token in example.input_ids])
    assert torch.equal(whole[packed["predict_S"]], packed["targets_S"])


def test_classes_and_ends_are_counted_by_text(tokenizer):
    packed, padded = both(classes_collator, tokenizer, recipe_of(), texts(target_ids=[[2], [0], [1], [1]]))
    assert packed["classes_R"].tolist() == padded["classes_R"].tolist() == [2, 0, 1, 1]
    packed, padded = both(ends_collator, tokenizer, recipe_of(), texts(target_ids=[[1, 2], [3, 8], [0, 0], [2, 5]]))
    for name in ("first_R", "last_R"):
        assert torch.equal(packed[name], padded[name])
    assert packed["last_R"].tolist() == [2, 8, 0, 5]
