from functools import cache

import pytest
import torch
from support import families
from support.models import build_llama
from support.plain_likelihoods import crows_pairs, decoder_log, masked_log, stereoset_word
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from llmtune.errors import EnvironmentProblem
from llmtune.evaluate.sentence_pairs import Pair, read_pairs
from llmtune.evaluate.sentence_scores import encode_pairs, score_pairs

BETWEEN = ("She is kind.", "He is cold.", "Bread is cheap.")


def stereoset(layout="within"):
    """Ten examples about three terms."""
    words = [("clever", "clumsy", "bread"), ("big red", "little", "seven"), ("kind", "cold", "a house")]
    found = []
    for i in range(10):
        if layout == "within":
            context = f"The {i} dogs were BLANK today."
            options = tuple(context.replace("BLANK", word) for word in words[i % 3])
        else:
            context, options = f"There are {i} dogs in the house.", tuple(f"{i} {text}" for text in BETWEEN)
        found.append(Pair(options, f"x:{i}", "x", f"domain {i % 2}", context, f"term {i % 3}"))
    return found


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = build_llama(tmp_path_factory.mktemp("decoder"))
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    @cache
    def build(family):
        folder = getattr(families, f"build_{family}")(tmp_path_factory.mktemp(family))
        return AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    return build


def scores(model, tokenizer, pairs, masked):
    encoded = encode_pairs(pairs, tokenizer, masked)
    with torch.inference_mode():
        return score_pairs(model, pairs, encoded, tokenizer.pad_token_id, "cpu", lambda rows: None)


def test_a_decoder_scores_the_own_set_as_one_forward_pass_a_sentence_does(decoder):
    model, tokenizer = decoder
    pairs = read_pairs(["own"])
    found = scores(*decoder, pairs, False)
    wanted = [[decoder_log(model, tokenizer, option)[0] for option in pair.options] for pair in pairs]
    assert found == [pytest.approx(one, rel=1e-5) for one in wanted]


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoder_scores_the_own_set_as_crows_pairs_defines_it(encoder, family):
    model, tokenizer = encoder(family)
    pairs = read_pairs(["own"])[::7]
    found = scores(model, tokenizer, pairs, True)
    assert found == [pytest.approx(crows_pairs(model, tokenizer, *pair.options), rel=1e-4) for pair in pairs]


def test_words_that_differ_are_seen_and_not_scored(encoder):
    _, tokenizer = encoder("bert")
    (asked,) = encode_pairs([Pair(("the red dog", "the big old dog"), "x:1", "x")], tokenizer, True)
    assert [[tokenizer.decode(text.target_ids) for text in option] for option in asked] == [["the", "dog"]] * 2
    masked = tokenizer.decode(asked[1][0].input_ids)
    assert masked.split()[1:-1] == ["[MASK]", "big", "old", "dog"]


def test_stereoset_is_scored_a_token_by_decoders(decoder):
    model, tokenizer = decoder
    for layout in ("within", "between"):
        pairs = stereoset(layout)
        for pair, found in zip(pairs, scores(*decoder, pairs, False), strict=True):
            context = pair.context if layout == "between" else ""
            wanted = [decoder_log(model, tokenizer, option, context) for option in pair.options]
            assert found == pytest.approx([total / count for total, count in wanted], rel=1e-5)


def test_stereoset_is_scored_at_the_blank_by_encoders_and_by_what_follows_a_context(encoder):
    model, tokenizer = encoder("bert")
    pairs = stereoset()
    for pair, found in zip(pairs, scores(model, tokenizer, pairs, True), strict=True):
        before, after = pair.context.split("BLANK")
        words = [option.removeprefix(before).removesuffix(after) for option in pair.options]
        assert found == pytest.approx(
            [stereoset_word(model, tokenizer, pair.context, word) for word in words], rel=1e-4
        )
    (pair,) = stereoset("between")[:1]
    (found,) = scores(model, tokenizer, [pair], True)
    for option, score in zip(pair.options, found, strict=True):
        read = tokenizer(pair.context, option)
        kinds = torch.tensor([read.token_type_ids])
        places = [i for i, part in enumerate(read.sequence_ids(0)) if part == 1]
        logs = [masked_log(model, tokenizer, read.input_ids, at, token_type_ids=kinds) for at in places]
        assert score == pytest.approx(sum(logs) / len(logs), rel=1e-4)


def test_a_tokenizer_without_a_mask_is_refused(decoder):
    with pytest.raises(EnvironmentProblem, match="no mask token"):
        encode_pairs(read_pairs(["own"]), decoder[1], True)
