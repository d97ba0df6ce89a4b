"""Task speech from recordings to a report: Whisper and models of letters, each way of tuning, reloaded by plain classes."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import jiwer
import numpy as np
import pytest
import torch
from rich.console import Console
from support.audio import write_cut, write_tone
from support.families import build_wav2vec2, build_whisper
from support.runs import llmtune, write_recipe
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForCTC,
    AutoTokenizer,
    WavLMConfig,
    WavLMForCTC,
)

from llmtune.adapter import inject
from llmtune.data import prepare_rows
from llmtune.data.audio import read_recording, to_float
from llmtune.data.examples import ExampleReader, encode_rows
from llmtune.errors import DataError, EnvironmentProblem, RecipeError
from llmtune.evaluate.transcribe import transcribe_ctc, transcribe_whisper
from llmtune.evaluate.transcripts import make_normaliser
from llmtune.finished import Models, answer_once, open_finished
from llmtune.model import load_model, load_processor, locate
from llmtune.model.losses import ctc_loss
from llmtune.pipeline import run_pipeline
from llmtune.recipe import load_recipe
from llmtune.tasks import choose_form
from llmtune.train.gradients import seed_micro_batch, step_gradients
from llmtune.train.training import set_up
from llmtune.work import Options

WORDS = ("one", "two", "three", "four", "five", "six")
TUNED = {
    "lora": {"adapter": {"method": "lora"}, "train": {"learning_rate": 1.0e-2}},
    "qlora": {"adapter": {"method": "qlora"}, "train": {"learning_rate": 1.0e-2}},
    "full": {"adapter": {"method": "full", "r": None, "lora_alpha": None}, "train": {"learning_rate": 2.0e-3}},
}
SPEECH = {
    "whisper": {"language": "fr", "window_seconds": 2, "normalizer": "whisper"},
    "letters": {"window_seconds": 2},
    "headless": {"window_seconds": 2},
}
FORMS = ("whisper", "letters", "headless")


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A folder with tones of several lengths, whose pitch is their word."""
    folder = tmp_path_factory.mktemp("clips")
    lines = ["file_name,text"]
    for i in range(30):
        number = i % len(WORDS)
        write_tone(folder / f"{i}.wav", 0.4 + 0.02 * i, pitch_hz=200.0 * (number + 1), seed=i)
        lines.append(f"{i}.wav,It's {WORDS[number]}.")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Whisper; wav2vec 2.0 with its letters; and without."""
    folder = tmp_path_factory.mktemp("speech")
    found = {"whisper": build_whisper(folder / "whisper"), "letters": build_wav2vec2(folder / "letters")}
    found["headless"] = build_wav2vec2(folder / "headless")
    AutoModelForCTC.from_pretrained(found["headless"]).wav2vec2.save_pretrained(found["headless"])
    return found


def recipe_file(folder, model, rows, speech, **sections):
    folder.mkdir(parents=True, exist_ok=True)
    sections = {"data": {}, "train": {}, **sections}
    sections["data"] = {"validation": 0.1, "test": 0.2, "max_length": 64, **sections["data"]}
    sections["train"] = {"num_train_epochs": 3, **sections["train"]}
    evaluate = {"metrics": ["loss", "wer", "cer"]}
    return write_recipe(
        folder / "recipe.yaml", model, rows, task="speech", speech=speech, evaluate=evaluate, **sections
    )


def run(folder, file, **options):
    return run_pipeline(load_recipe(str(file)), Options(out=folder / "run", **options), quiet())


@pytest.fixture(scope="session")
def finished(tmp_path_factory, models, clips):
    """Runs of each form in each way of tuning, made when asked for."""
    known = {}

    def get(form, method):
        if (form, method) not in known:
            folder = tmp_path_factory.mktemp(f"{form}-{method}")
            file = recipe_file(folder, models[form], clips, SPEECH[form], **TUNED[method])
            known[form, method] = folder, run(folder, file)
        return known[form, method]

    return get


def predictions(folder):
    return [json.loads(line) for line in (folder / "run/evaluation/predictions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", TUNED)
@pytest.mark.parametrize("form", FORMS)
def test_a_run_learns_and_reports_both_models(form, method, finished):
    folder, report = finished(form, method)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    evaluation = report["evaluation"]
    wanted = {"wer", "cer"} if form == "headless" else {"loss", "wer", "cer"}
    assert wanted <= evaluation["base"].keys()
    assert wanted <= evaluation["tuned"].keys()
    assert wanted == evaluation["difference"].keys()
    assert evaluation["tuned"]["loss"] < evaluation["base"].get("loss", np.inf)
    assert evaluation["baseline"] == ("an empty transcript" if form == "headless" else None)
    if form == "headless":
        assert evaluation["base"]["wer"] == 1


@pytest.mark.parametrize("form", FORMS)
def test_error_rates_are_those_of_jiwer_on_the_saved_predictions_after_the_named_normaliser(form, finished):
    folder, report = finished(form, "lora")
    rows = predictions(folder)
    name = SPEECH[form].get("normalizer", "basic")
    clean = make_normaliser(name, "fr")
    for side in ("base", "tuned"):
        wanted, said = ([clean(row[key]) for row in rows] for key in ("reference", side))
        assert report["evaluation"][side]["wer"] == pytest.approx(jiwer.wer(wanted, said), abs=1e-12)
        assert report["evaluation"][side]["cer"] == pytest.approx(jiwer.cer(wanted, said), abs=1e-12)
    assert f"normaliser {'whisper (basic)' if name == 'whisper' else name}" in report["evaluation"]["signatures"]["wer"]


def test_a_second_run_is_skipped_and_other_evaluation_settings_score_again(finished, models, clips):
    folder, report = finished("headless", "lora")
    file = folder / "recipe.yaml"
    before = (folder / "run" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    again = run(folder, file)
    assert all(step["skipped"] for step in again["steps"])
    assert again["evaluation"] == report["evaluation"]
    done = llmtune("evaluate", "run", "--set", "evaluate.metrics=[cer]", cwd=folder)
    assert done.returncode == 0, done.stderr
    scored = json.loads((folder / "run" / "report.json").read_text())["evaluation"]
    assert scored["tuned"] == {"cer": report["evaluation"]["tuned"]["cer"]}
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before
    run(folder, file)  # as it was, for the other tests


def open_tuned(folder):
    """The tuned model of a run, its tokenizer and recipe, as `llmtune generate` opens them."""
    work, place = open_finished(folder / "run", quiet(), True)
    return work, place, load_processor(place, work.recipe.model)


RELOAD = """
import json, sys, torch, soundfile
from peft import AutoPeftModel, PeftModel
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForCTC, AutoModelForSpeechSeq2Seq
folder, form, method, clip = sys.argv[1:]
extract = AutoFeatureExtractor.from_pretrained(folder)
sound, rate = soundfile.read(clip, dtype="float32")
inputs = dict(extract(sound, sampling_rate=rate, return_tensors="pt"))
if form == "whisper":
    inputs = {"input_features": inputs["input_features"], "decoder_input_ids": torch.tensor([[5, 6, 7]])}
plain = AutoModelForSpeechSeq2Seq if form == "whisper" else AutoModelForCTC
if method == "full":
    model = plain.from_pretrained(folder)
elif form == "headless":  # its head is new, so the class is named by hand and the configuration lies beside the adapter
    base = json.load(open(folder + "/adapter_config.json"))["base_model_name_or_path"]
    model = PeftModel.from_pretrained(plain.from_pretrained(base, config=AutoConfig.from_pretrained(folder)), folder)
else:
    model = AutoPeftModel.from_pretrained(folder)
with torch.no_grad():
    torch.save(model.eval()(**inputs).logits, sys.argv[1] + "/../logits.pt")
print("llmtune" in sys.modules)
"""


@pytest.mark.parametrize(("form", "method"), [("whisper", "lora"), ("whisper", "full"), *((f, "lora") for f in FORMS[1:])])
def test_what_was_tuned_reloads_with_plain_classes_and_hears_the_same(form, method, finished, clips):
    folder, _ = finished(form, method)
    trained = folder / "run" / ("weights" if method == "full" else "adapter")
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, trained, form, method, clips / "3.wav"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False"]
    assert not [line for line in done.stderr.splitlines() if "newly initialized" in line and "lm_head" not in line]
    work, place, processor = open_tuned(folder)
    with Models(work, place, processor).tuned() as model, torch.no_grad():
        extract = AutoFeatureExtractor.from_pretrained(trained)
        sound = to_float(read_recording(clips / "3.wav", 16_000))
        inputs = dict(extract(sound, sampling_rate=16_000, return_tensors="pt"))
        if form == "whisper":
            inputs = {"input_features": inputs["input_features"], "decoder_input_ids": torch.tensor([[5, 6, 7]])}
        wanted = model(**inputs).logits
    torch.testing.assert_close(torch.load(folder / "run" / "logits.pt"), wanted, rtol=1e-4, atol=1e-4)
