"""Long texts, cut in characters before they are tokenized, have the tokens that their first characters have."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.families import build_bert, build_roberta
from support.models import build_llama
from transformers import AutoTokenizer

from llmtune.data.long_texts import MOST_CHARACTERS, count_tokens, start_of, tokenize_columns, tokenize_pairs

BUILDERS = (build_bert, build_roberta, build_llama)
TEXTS = {
    "short": "Which colour has the cat?",
    "long": "Which colour has the cat? " * 4000,
    "white space": " " * 5000 + "the red cat " * 300,
    "one word": "redcat" * 20_000,
    "no spaces": "猫は赤い。" * 3000,
    "other marks": "é\u0301\N{ZERO WIDTH JOINER}\t\r\n" * 3000,
}


@pytest.fixture(scope="module", params=BUILDERS)
def processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    build: Callable[[Path], Path] = request.param
    return AutoTokenizer.from_pretrained(build(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("limit", [8, 31, 64])
@pytest.mark.parametrize("text", TEXTS)
def test_a_cut_text_has_the_first_tokens_of_the_complete_one(text: str, limit: int, processor: Any) -> None:
    expected = processor(TEXTS[text], truncation=True, max_length=limit)["input_ids"]
    [(ids, _)] = tokenize_columns([[TEXTS[text]]], processor, limit)
    assert ids == expected
    complete = len(processor(TEXTS[text], verbose=False)["input_ids"])
    count = count_tokens(TEXTS[text], processor, limit)
    assert count == complete or limit < count < complete


@pytest.mark.parametrize("limit", [16, 31, 400])
def test_pairs_have_the_tokens_of_the_processor_though_each_text_is_tokenized_once(limit: int, processor: Any) -> None:
    """Of two long texts, the longer one has the odd token: which it is, is known only once both are read."""
    names = [(one, other) for one in TEXTS for other in TEXTS if "short" in (one, other)]
    pairs = [(TEXTS[one], TEXTS[other]) for one, other in names]
    tokenized = processor(*map(list, zip(*pairs, strict=True)), truncation=True, max_length=limit)
    types = tokenized.get("token_type_ids") or [[]] * len(pairs)
    expected = list(zip(tokenized["input_ids"], types, strict=True))
    ours = tokenize_pairs(pairs, processor, limit)
    assert dict(zip(names, ours, strict=True)) == dict(zip(names, expected, strict=True))


def test_a_long_text_is_read_no_further_than_its_first_tokens(processor: Any) -> None:
    assert len(start_of("the red cat " * 100_000, processor, 64)) == 64 * 16
    assert start_of(TEXTS["short"], processor, 64) == TEXTS["short"]


def test_a_long_query_costs_little_with_each_of_many_passages(processor: Any) -> None:
    began = time.process_time()
    for number in range(50):  # as a server asks, a few at a time
        tokenize_pairs([("the red cat " * 1000, f"{number} the red cat " * 100) for _ in range(4)], processor, 64)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("letter", ["a", " "])
def test_of_a_word_of_a_million_letters_a_bounded_start_is_read_and_the_text_counts_as_cut(
    letter: str, processor: Any
) -> None:
    text = letter * 1_900_000
    assert len(start_of(text, processor, 64)) <= MOST_CHARACTERS
    assert count_tokens(text, processor, 64) > 64
