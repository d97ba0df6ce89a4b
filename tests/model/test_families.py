"""The tiny models of the tests load offline with their Auto classes, and can tell one input from another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from support import audio, families
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForCTC,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
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


def test_an_untied_t5_has_an_output_of_its_own(built):
    tied, untied = (
        AutoModelForSeq2SeqLM.from_pretrained(built("t5", **config))
        for config in ({}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})
    )
    assert tied.lm_head.weight is tied.shared.weight
    for model in (untied, AutoModelForSeq2SeqLM.from_pretrained(built("mt5"))):
        assert not torch.equal(model.lm_head.weight, model.shared.weight)
    assert hasattr(untied.encoder.block[0].layer[1].DenseReluDense, "wi_1")


@pytest.mark.parametrize(("family", "languages"), [("nllb", ("deu_Latn", "fra_Latn")), ("mbart", ("de_DE", "fr_XX"))])
def test_languages_stand_before_source_and_target(built, family, languages):
    tokenizer = AutoTokenizer.from_pretrained(built(family), src_lang=languages[0], tgt_lang=languages[1])
    ids = tokenizer("der Himmel", text_target="le ciel")
    source, target = (tokenizer.convert_tokens_to_ids(language) for language in languages)
    assert (ids.input_ids[0], ids.labels[0]) == (source, target)
    assert source != target
    assert tokenizer.unk_token_id not in (source, target)


def test_whisper_takes_language_and_task(built):
    tokenizer = AutoTokenizer.from_pretrained(built("whisper"))
    for language, task in (("en", "transcribe"), ("fr", "translate")):
        tokenizer.set_prefix_tokens(language=language, task=task)
        prefix = ["<|startoftranscript|>", f"<|{language}|>", f"<|{task}|>", "<|notimestamps|>"]
        assert tokenizer.convert_ids_to_tokens(tokenizer("hello").input_ids)[:4] == prefix
    assert tokenizer.decode(tokenizer("hello").input_ids, skip_special_tokens=True) == "hello"
    assert tokenizer.timestamp_ids()[0] == tokenizer.convert_tokens_to_ids("<|notimestamps|>") + 1


@pytest.mark.parametrize("multilingual", [True, False])
def test_whisper_hears(built, multilingual):
    folder = built("whisper", multilingual=multilingual)
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval()
    low, high = (
        extractor(audio.make_tone(pitch_hz=pitch), sampling_rate=16_000, return_tensors="pt") for pitch in (200, 2_000)
    )
    assert low.input_features.shape == (1, 80, 200)
    ids = torch.tensor([[model.config.decoder_start_token_id, 5, 6]])
    with torch.no_grad():
        difference = model(**low, decoder_input_ids=ids).logits - model(**high, decoder_input_ids=ids).logits
        named = {"language": "fr", "task": "translate"} if multilingual else {}
        heard = model.generate(**low, **named, max_new_tokens=5)
    assert difference.abs().max() > 1e-2
    assert heard.shape[0] == 1


def test_wav2vec2_hears_and_padding_can_be_masked_away(built):
    folder = built("wav2vec2")
    extractor, tokenizer = AutoFeatureExtractor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCTC.from_pretrained(folder).eval()
    short, long = audio.make_tone(0.5, pitch_hz=300), audio.make_tone(1.0, pitch_hz=900)
    alone = extractor(short, sampling_rate=16_000, return_tensors="pt")
    both = extractor([short, long], sampling_rate=16_000, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits, beside = model(**alone).logits[0], model(**both).logits
    frames = len(logits)
    assert 20 <= frames <= 25
    torch.testing.assert_close(beside[0, :frames], logits, atol=1e-4, rtol=1e-4)
    assert (beside[1, :frames] - logits).abs().max() > 1e-2
    assert tokenizer.decode(tokenizer("IT'S BLUE").input_ids, group_tokens=False) == "IT'S BLUE"


@pytest.mark.parametrize("family", ["bert", "t5", "whisper"])
def test_a_seed_gives_the_same_weights_and_another_one_others(built, family, tmp_path):
    weights = (built(family) / "model.safetensors").read_bytes()
    builder = getattr(families, f"build_{family}")
    assert (builder(tmp_path / "same") / "model.safetensors").read_bytes() == weights
    assert (builder(tmp_path / "other", seed=1) / "model.safetensors").read_bytes() != weights


@pytest.mark.parametrize("kind", audio.FORMATS)
def test_tones_are_written_in_each_format(kind, tmp_path):
    path = audio.write_tone(tmp_path / f"tone.{kind}", seconds=0.5, rate=44_100, channels=2)
    samples_NC, rate = soundfile.read(path)
    assert rate == 44_100
    assert samples_NC.shape[1] == 2
    assert abs(len(samples_NC) / rate - 0.5) < 0.1
    loudness = np.sqrt((samples_NC**2).mean(axis=0))
    assert loudness[0] == pytest.approx(0.28, abs=0.05)
    assert loudness[1] == pytest.approx(loudness[0] / 2, rel=0.1)


@pytest.mark.parametrize("break_it", [audio.write_no_audio, audio.write_empty])
def test_what_is_no_audio_cannot_be_read(break_it, tmp_path):
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.read(break_it(tmp_path / "broken.wav"))


def test_a_file_of_no_samples_is_whole(tmp_path):
    assert len(soundfile.read(audio.write_no_samples(tmp_path / "none.wav"))[0]) == 0
    assert len(soundfile.read(audio.write_silence(tmp_path / "still.wav"))[0]) == 8_000


@pytest.mark.parametrize("kind", audio.FORMATS)
def test_a_cut_file_gives_fewer_samples_or_an_error(kind, tmp_path):
    path = audio.write_cut(tmp_path / f"cut.{kind}")
    try:
        samples, _ = soundfile.read(path)
    except soundfile.LibsndfileError:
        return
    assert len(samples) < 8_000
