"""The tiny models of the tests load offline with their Auto classes, and can tell one input from another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import families
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

ENCODERS = ("bert", "distilbert", "roberta", "deberta", "modernbert")
SEQ2SEQ = ("t5", "mt5", "bart", "mbart", "nllb", "marian")
SACREMOSES = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
TEXT = "The blue fox (10) has four legs."


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build a family once: `built("bert")` is its folder."""
    folders: dict[str, Path] = {}

    def build(family: str, **config: object) -> Path:
        key = f"{family}{sorted(config.items())}"
        if key not in folders:
            builder = getattr(families, f"build_{family}")
            folders[key] = builder(tmp_path_factory.mktemp("family") / family, **config)
        return folders[key]

    return build


@SACREMOSES
@pytest.mark.parametrize("family", [*ENCODERS, *SEQ2SEQ, "whisper"])
def test_text_comes_back_from_its_ids(built, family):
    tokenizer = AutoTokenizer.from_pretrained(built(family))
    ids = tokenizer(TEXT).input_ids
    assert len(ids) > 8
    assert tokenizer.unk_token_id not in ids[1:-1] or tokenizer.unk_token_id == tokenizer.eos_token_id
    read = tokenizer.decode(ids, skip_special_tokens=True)
    if family in ("bert", "distilbert"):
        assert read == "the blue fox ( 10 ) has four legs."
    else:
        assert read == TEXT
    assert len(tokenizer) == AutoConfig.from_pretrained(built(family)).vocab_size


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_looks_at_far_tokens(built, family):
    folder = built(family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    first, other = (tokenizer(f"the sky is blue and the fox is {word}", return_tensors="pt") for word in ("7", "8"))
    assert first.input_ids.shape == other.input_ids.shape
    with torch.no_grad():
        difference = model(**first).logits[0, 1] - model(**other).logits[0, 1]
    assert difference.abs().max() > 1e-2
    assert tokenizer.mask_token_id is not None


@SACREMOSES
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_an_encoder_decoder_listens_to_its_source(built, family):
    folder = built(family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    first, other = (
        tokenizer(f"the sky is {word}", text_target="le ciel est bleu", return_tensors="pt") for word in ("7", "8")
    )
    assert first.labels[0, -1] == tokenizer.eos_token_id
    with torch.no_grad():
        losses = [model(**batch).loss for batch in (first, other)]
        answer = model.generate(**{**first, "labels": None}, max_new_tokens=5)
    assert torch.isfinite(losses[0])
    assert abs(losses[0] - losses[1]) > 1e-4
    assert answer[0, 0] == model.config.decoder_start_token_id


@pytest.mark.parametrize("family", ["bert", "t5", "whisper"])
def test_a_seed_gives_the_same_weights_and_another_one_others(built, family, tmp_path):
    weights = (built(family) / "model.safetensors").read_bytes()
    builder = getattr(families, f"build_{family}")
    assert (builder(tmp_path / "same") / "model.safetensors").read_bytes() == weights
    assert (builder(tmp_path / "other", seed=1) / "model.safetensors").read_bytes() != weights
