"""Recordings as examples: language and task tokens, letters and their case, and recordings that cannot be used."""

import json
import string

import numpy as np
import pytest
import soundfile
import torch
from support.audio import make_tone, write_cut, write_silence, write_tone
from support.families import build_wav2vec2, build_whisper
from support.variants import CTC, WHISPER
from transformers import AutoConfig, AutoTokenizer, Wav2Vec2CTCTokenizer, Wav2Vec2ForCTC

from llmtune.errors import DataError, EnvironmentProblem, RecipeError
from llmtune.model.audio_models import count_frames, feature_extractor
from llmtune.recipe.schema import Recipe
from llmtune.tasks.recordings import read_windows, spell

TEXT = "The sky is blue."


@pytest.fixture(scope="session")
def whisper(tmp_path_factory):
    return build_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="session")
def english(tmp_path_factory):
    return build_whisper(tmp_path_factory.mktemp("english"), multilingual=False)


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    return build_wav2vec2(tmp_path_factory.mktemp("letters"))


def recipe_for(speech=None, **data):
    content = {"task": "speech", "data": {"train": "/none.jsonl", **data}, "model": {"name": "x/y"}}
    return Recipe.model_validate({**content, **({"speech": speech} if speech else {})})


FRENCH = {"language": "fr", "window_seconds": 2}


def row_of(path, text=TEXT):
    return {"audio": str(path), "content": "", "text": text}


def words(processor, ids):
    return processor.convert_ids_to_tokens(list(ids))


# Whisper


def test_language_and_task_are_given_and_the_transcript_with_its_end_is_supervised(whisper, tmp_path):
    processor = AutoTokenizer.from_pretrained(whisper)
    row = row_of(write_tone(tmp_path / "a.wav", 1.0, rate=8000), f" {TEXT} ")
    ((example,),) = WHISPER.encode([row], processor, recipe_for({**FRENCH, "task": "translate"}))
    start, end = example.target_spans
    assert words(processor, example.target_ids[:start]) == ["<|fr|>", "<|translate|>", "<|notimestamps|>"]
    learned = example.target_ids[start:end]
    assert end == len(example.target_ids)
    assert processor.decode(learned[:-1]) == f" {TEXT}"
    assert learned[-1] == processor.eos_token_id
    assert example.supervised == len(learned)
    assert example.target_bytes == len(TEXT)
    assert example.tokens == 100 + end  # two seconds are a hundred frames, whatever the recording's length
    assert len(example.audio) == 16_000
    processor.set_prefix_tokens(language="french", task="translate", predict_timestamps=False)
    assert processor(f" {TEXT}")["input_ids"][1:] == example.target_ids


def test_the_collator_gives_targets_and_transformers_features(whisper, tmp_path):
    processor, recipe = AutoTokenizer.from_pretrained(whisper), recipe_for(FRENCH)
    rows = [row_of(write_tone(tmp_path / f"{i}.wav", 0.5 + i), "a " * (i + 1)) for i in range(2)]
    examples = [example for (example,) in WHISPER.encode(rows, processor, recipe)]
    batch = WHISPER.collator(processor, recipe)(examples, 0)
    assert batch["input_features"].shape == (2, 80, 200)
    assert batch["labels"][batch["labels"] >= 0].tolist() == [i for e in examples for i in e.target_ids]
    learned = [i for e in examples for i in e.target_ids[3:]]
    assert batch["targets_S"].tolist() == batch["labels"].flatten()[batch["predict_S"]].tolist() == learned


@pytest.mark.parametrize("named", ["fr", "FR", "french", "French"])
def test_a_language_may_be_named_by_code_or_name(named, whisper):
    processor = AutoTokenizer.from_pretrained(whisper)
    WHISPER.prepare_processor(processor, recipe_for({"language": named}))
    assert words(processor, processor.prefix_tokens)[1:] == ["<|fr|>", "<|transcribe|>", "<|notimestamps|>"]


@pytest.mark.parametrize(("named", "nearest"), [("englisch", "english"), ("Frensh", "french")])
def test_an_unknown_language_is_refused_with_the_nearest(named, nearest, whisper):
    processor = AutoTokenizer.from_pretrained(whisper)
    with pytest.raises(RecipeError, match=f"Did you mean '{nearest}") as error:
        WHISPER.prepare_processor(processor, recipe_for({"language": named}))
    assert error.value.problems[0].where == "speech.language"


def test_a_multilingual_model_requires_a_language(whisper):
    with pytest.raises(RecipeError, match="the recipe names none"):
        WHISPER.prepare_processor(AutoTokenizer.from_pretrained(whisper), recipe_for())


def test_a_language_that_this_vocabulary_lacks_is_refused(whisper, tmp_path):
    """Cantonese came with version 3; transformers counts from the start token, whatever is there."""
    processor = AutoTokenizer.from_pretrained(whisper)
    processor.save_pretrained(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text("utf-8").replace("<|yue|>", "<|older|>")
    (tmp_path / "tokenizer.json").write_text(text, "utf-8")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    written = json.dumps(config).replace("<|yue|>", "<|older|>")
    (tmp_path / "tokenizer_config.json").write_text(written, "utf-8")
    older = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="no token for 'cantonese'"):
        WHISPER.prepare_processor(older, recipe_for({"language": "cantonese"}))


def test_an_english_only_model_starts_without_a_language_and_refuses_others(english):
    processor = AutoTokenizer.from_pretrained(english)
    for speech in (None, {"language": "en"}, {"language": "English"}):
        WHISPER.prepare_processor(processor, recipe_for(speech))
        assert words(processor, processor.prefix_tokens) == ["<|startoftranscript|>", "<|notimestamps|>"]
    for speech in ({"language": "fr"}, {"language": "en", "task": "translate"}):
        with pytest.raises(RecipeError, match="only transcribes English"):
            WHISPER.prepare_processor(processor, recipe_for(speech))


def test_the_language_in_the_tokenizers_files_is_ignored(english, whisper):
    for folder, wanted in ((english, []), (whisper, ["<|de|>", "<|transcribe|>"])):
        processor = AutoTokenizer.from_pretrained(folder, language="french", task="translate")
        WHISPER.prepare_processor(processor, recipe_for({"language": "en" if folder == english else "de"}))
        expected = ["<|startoftranscript|>", *wanted, "<|notimestamps|>"]
        assert words(processor, processor.prefix_tokens) == expected


def test_a_recording_longer_than_a_window_cannot_be_trained_on(whisper, letters, tmp_path):
    row = row_of(write_tone(tmp_path / "a.wav", 2.5))
    for folder, encode, speech in ((whisper, WHISPER.encode, {"language": "fr"}), (letters, CTC.encode, FRENCH)):
        (said,) = encode([row], AutoTokenizer.from_pretrained(folder), recipe_for(speech))
        assert said.startswith("too long: 2.5 s, but the limit is 2 s")


def test_a_window_too_long_for_whisper_is_refused(whisper, tmp_path):
    row = row_of(write_tone(tmp_path / "a.wav"))
    recipe = recipe_for({"language": "fr", "window_seconds": 60})
    with pytest.raises(RecipeError, match="takes 2 s at once") as error:
        WHISPER.encode([row], AutoTokenizer.from_pretrained(whisper), recipe)
    assert error.value.problems[0].where == "speech.window_seconds"


def test_a_transcript_with_too_many_tokens_is_too_long(whisper, tmp_path):
    row = row_of(write_tone(tmp_path / "a.wav"), "a b c d e f g h")
    (said,) = WHISPER.encode([row], AutoTokenizer.from_pretrained(whisper), recipe_for(FRENCH, max_length=8))
    assert said.startswith("too long")


def test_a_missing_feature_extractor_is_reported(whisper, tmp_path):
    AutoTokenizer.from_pretrained(whisper).save_pretrained(tmp_path)
    with pytest.raises(EnvironmentProblem, match="the feature extractor cannot be read"):
        WHISPER.encode([], AutoTokenizer.from_pretrained(tmp_path), recipe_for(FRENCH))


# Letters


def test_a_transcript_is_spelt_in_the_vocabularys_case_without_punctuation(letters):
    processor = AutoTokenizer.from_pretrained(letters)
    ids = spell(" It's “blue” – isn't it? ", processor)
    assert "".join(words(processor, ids)).replace("|", " ").split() == ["IT'S", "BLUE", "ISN'T", "IT"]
    assert spell("isn't", processor) == spell("ISN'T", processor)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("20 cats", "does not know: '2'"),
        ("5 %", "does not know: '5'"),
        ("a %", "does not know: '%'"),
        ("café", "does not know: 'é'"),
        ("cafe\u0301", "does not know: 'é'"),
        ("कि", "does not know"),
        ("a </s> b", "does not know: '<'"),
        ("...", "has no letters"),
    ],
)
def test_an_unknown_letter_is_named(text, reason, letters):
    assert reason in spell(text, AutoTokenizer.from_pretrained(letters))


def test_a_lower_case_vocabulary_lowers_letters_and_a_mixed_one_keeps_the_case(tmp_path):
    for alphabet, spelt in ((string.ascii_lowercase, "ab|c"), (string.ascii_letters, "aB|C")):
        vocabulary = ["<pad>", "<s>", "</s>", "<unk>", "|", *alphabet]
        (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
        processor = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
        assert "".join(words(processor, spell("aB C", processor))) == spelt


def test_a_text_longer_than_its_frames_is_refused_and_equal_letters_take_a_frame_more(letters, tmp_path):
    processor = AutoTokenizer.from_pretrained(letters)
    path = write_tone(tmp_path / "a.wav", 0.24)
    frames = count_frames(round(0.24 * 16_000), AutoConfig.from_pretrained(letters))
    fits, doubled = ("AB" * frames)[:frames], ("AB" * frames)[: frames - 2] + "CC"
    kept, one_more, twice = CTC.encode([row_of(path, t) for t in (fits, fits + "C", doubled)], processor, recipe_for())
    assert len(kept[0].letters) == frames == kept[0].tokens
    assert one_more == f"its text needs {frames + 1} frames, but the recording has {frames}"
    assert twice == one_more


@pytest.mark.parametrize("adapter", [False, True])
def test_counted_frames_match_the_model(adapter, tmp_path):
    folder = build_wav2vec2(tmp_path, add_adapter=adapter)
    model, config = Wav2Vec2ForCTC.from_pretrained(folder).eval(), AutoConfig.from_pretrained(folder)
    for samples in (700, 4_000, 12_345):
        with torch.no_grad():
            made = model(torch.zeros(1, samples)).logits.shape[1]
        assert count_frames(samples, config) == made > 0
    assert count_frames(0, config) == 0


def test_a_recording_with_fewer_frames_than_are_hidden_at_once_is_refused(tmp_path):
    """transformers raises on such a batch in the middle of training."""
    folder = build_wav2vec2(tmp_path / "model", mask_time_prob=0.05, mask_time_length=10)
    processor = AutoTokenizer.from_pretrained(folder)
    rows = [row_of(write_tone(tmp_path / f"{s}.wav", s), "ab") for s in (0.15, 0.25)]
    short, kept = CTC.encode(rows, processor, recipe_for())
    assert short == "the recording has 7 frames, but config.json masks 10 at once (mask_time_length)"
    assert kept[0].tokens == 12


def test_each_wave_is_normalised_separately_before_padding(letters, tmp_path):
    processor, recipe = AutoTokenizer.from_pretrained(letters), recipe_for()
    rows = [row_of(write_tone(tmp_path / f"{i}.wav", 0.5 + i, pitch_hz=200 + 50 * i), "ab") for i in range(2)]
    examples = [example for (example,) in CTC.encode(rows, processor, recipe)]
    collate = CTC.collator(processor, recipe)
    batch, alone = collate(examples, 0), collate(examples[:1], 0)
    assert batch["samples_R"].tolist() == batch["attention_mask"].sum(-1).tolist() == [8_000, 24_000]
    torch.testing.assert_close(batch["input_values"][0, :8_000], alone["input_values"][0])
    assert not batch["input_values"][0, 8_000:].any()


@pytest.mark.parametrize("encode", [WHISPER.encode, CTC.encode])
def test_a_decoding_error_is_the_reason_of_its_row_only(encode, whisper, letters, tmp_path):
    folder = whisper if encode == WHISPER.encode else letters
    soundfile.write(tmp_path / "nan.wav", np.full(9_000, np.nan, np.float32), 16_000, "FLOAT")
    paths = [write_cut(tmp_path / "cut.flac"), tmp_path / "nan.wav", tmp_path / "gone.wav"]
    rows = [row_of(path, "ab") for path in (*paths, write_silence(tmp_path / "silence.wav"))]
    *bad, good = encode(rows, AutoTokenizer.from_pretrained(folder), recipe_for(FRENCH))
    for path, reason in zip(paths, bad, strict=True):
        assert reason.startswith("audio ")
        assert path.name in reason
    assert len(good[0].audio) == 8_000


UNUSABLE = {
    "beyond full scale": (lambda tone: 4 * tone, "audio beyond full scale"),
    "opposite channels": (lambda tone: np.stack([tone, -tone], axis=1), "audio channels cancel out"),
}


@pytest.mark.parametrize("name", UNUSABLE)
@pytest.mark.parametrize("encode", [WHISPER.encode, CTC.encode])
def test_a_recording_that_would_change_is_refused_in_training_and_in_answers(encode, name, whisper, letters, tmp_path):
    change, reason = UNUSABLE[name]
    soundfile.write(tmp_path / "a.wav", change(make_tone()), 16_000, "FLOAT")
    row = row_of(tmp_path / "a.wav", "ab")
    processor = AutoTokenizer.from_pretrained(whisper if encode == WHISPER.encode else letters)
    (refused,) = encode([row], processor, recipe_for(FRENCH))
    assert refused.startswith(reason)
    with pytest.raises(DataError, match=reason):  # evaluate, generate and serve read windows
        read_windows([row], feature_extractor(processor), recipe_for(FRENCH))
