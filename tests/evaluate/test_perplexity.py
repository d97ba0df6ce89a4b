"""General text in windows: each token is scored once, and counts for its paragraph."""

from collections import Counter
from itertools import accumulate

import pytest
from support.models import train_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer

from llmtune.errors import DataError
from llmtune.evaluate.forgetting import make_passages, make_text, read_texts

OFFSETS = "offset_mapping"


def test_the_tokens_of_a_text_are_scored_once_and_count_for_their_paragraph(bench):
    texts = [
        make_text("a", "One two.\n\n \nÄ three four.\r\n\r\nfive"),
        make_text("b", "x" * 5000),
        *read_texts(["own"]),
    ]
    found = make_passages(texts, bench.processor, 40)
    places = [place for window in found.paragraphs for place in window]
    assert Counter(places) == {i: n for i, n in enumerate(found.tokens.astype(int).tolist()) if n}
    assert places == sorted(places)
    assert found.text_of[:6] == (0, 0, 0, 1, 1, 1)
    for number, text in enumerate(texts):
        ids = bench.processor("".join(text.paragraphs), add_special_tokens=False)["input_ids"]
        counts = [found.tokens[i] for i, own in enumerate(found.text_of) if own == number]
        assert sum(counts) == len(ids) - 1
        begins = [left for left, _ in bench.processor("".join(text.paragraphs), return_offsets_mapping=True)[OFFSETS]]
        ends = list(accumulate(map(len, text.paragraphs)))
        for begin, end, count in zip([1, *ends], ends, counts, strict=False):
            assert sum(begin <= left < end for left in begins) == count
    assert all(len(window.input_ids) <= 40 for window in found.windows)
    firsts = [window.spans[0] for window in found.windows if len(window.input_ids) == 40]
    assert all(first >= 20 for first in firsts if first != 1)


def test_windows_begin_with_the_start_token_where_the_tokenizer_puts_one():
    tokenizer = train_tokenizer()
    start = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", start)]
    )
    text = make_text("a", "The quick brown fox jumps over the lazy dog. " * 20)
    found = make_passages([text], tokenizer, 33)
    ids = tokenizer("".join(text.paragraphs), add_special_tokens=False)["input_ids"]
    assert all(window.input_ids[0] == start and start not in window.input_ids[1:] for window in found.windows)
    assert sum(found.tokens) == len(ids)
    assert found.sizes.sum() == len("".join(text.paragraphs))


def test_a_tokenizer_without_offsets_reads_each_paragraph():
    text = make_text("a", "One.\n\nTwo, three.")
    found = make_passages([text], ByT5Tokenizer(), None)
    assert found.tokens.tolist() == [5, 11]
    assert found.sizes.tolist() == [5, 11]


def test_the_texts_that_come_with_llmtune_are_of_several_kinds():
    texts = read_texts(["own"])
    assert [text.name for text in texts] == ["dictionary", "everyday", "novel", "play", "report"]
    assert all(2000 < sum(map(len, text.paragraphs)) < 4000 for text in texts)
    assert sum(len(text.paragraphs) for text in texts) > 60


def test_texts_that_cannot_be_read_are_told_all_at_once(tmp_path):
    (tmp_path / "latin.txt").write_bytes("one\ntwo\ncafé".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(DataError) as found:
        read_texts([str(tmp_path / name) for name in ("latin.txt", "empty.txt", "missing.txt")])
    told = str(found.value)
    assert "latin.txt:3" in told
    assert "0xe9" in told
    assert "there is no text in it" in told
    assert "missing.txt: there is no such file" in told
