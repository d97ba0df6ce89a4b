"""Packed or padded, an encoder reads the same tokens and predicts the same of them."""

from hypothesis import given
from hypothesis import strategies as st

from llmtune.data.encoder_batches import encoder_batch
from llmtune.records import Example


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_packed_texts_stand_end_to_end_with_positions_and_kinds_of_their_own(lengths):
    examples = [Example([7 * i + j for j in range(n)], [], 0, third_ids=[i % 2] * n) for i, n in enumerate(lengths)]
    batch, _ = encoder_batch(examples, 0, True)
    borders = batch["cu_seq_lens_q"].tolist()
    assert batch["n_rows"] == len(lengths)
    assert batch["input_ids"].shape == batch["token_type_ids"].shape == (1, sum(lengths))
    for example, start, end in zip(examples, borders[:-1], borders[1:], strict=True):
        assert batch["input_ids"][0, start:end].tolist() == example.input_ids
        assert batch["token_type_ids"][0, start:end].tolist() == example.third_ids
        assert batch["position_ids"][0, start:end].tolist() == list(range(end - start))
    assert "attention_mask" not in batch


def test_a_text_without_kinds_is_all_of_the_first_kind_beside_pairs():
    batch, _ = encoder_batch([Example([5, 6], [], 0, third_ids=[0, 1]), Example([7, 8, 9], [], 0)], 0, True)
    assert batch["token_type_ids"].tolist() == [[0, 1, 0, 0, 0]]
    assert "token_type_ids" not in encoder_batch([Example([5, 6], [], 0)], 0, True)[0]
