"""The packaged models, converted for real: right answers, right tokens, the same files each time."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import jiwer
import pytest
import soundfile
import torch
from support.adapting import open_model, quiet, recipe_with
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
)

from llmtune.adapter import inject, merge
from llmtune.model import resolve_model
from llmtune.model.builtin_models import PACKAGED

NAME = "builtin:smollm2-135m-instruct"
MINILM = "builtin:minilm-l6-v2"
WHISPER = "builtin:whisper-tiny.en"
SPEECH = Path("/usr/share/pocketsphinx/test/data/librivox")
"""Where Debian's pocketsphinx-testdata puts five clips and what is said in them."""


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(PACKAGED[name.removeprefix("builtin:")].distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not is_installed(name), reason=f"the package of {name} is not installed")


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def unpack(tmp_path_factory):
    """Find a packaged model in a cache of these tests' own: `unpack(name)` is its folder."""
    folder = tmp_path_factory.mktemp("unpacked")

    def find(name: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LLMTUNE_CACHE", str(folder))
            return resolve_model(name, recipe_with(name).model, quiet(), offline=True).path

    return find


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache of its own, filled once by two processes at the same time."""
    folder = tmp_path_factory.mktemp("cache")
    code = (
        "from rich.console import Console\nfrom llmtune.model import resolve_model\n"
        "from llmtune.recipe import ModelSection\n"
        f"print(resolve_model('{NAME}', ModelSection(name='{NAME}'), Console(stderr=True), True).content_hash)"
    )
    environment = {"LLMTUNE_CACHE": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = {process.communicate(timeout=300)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(said) == 1
    assert len([path for path in (folder / "models").iterdir() if path.is_dir()]) == 1
    return folder


@pytest.fixture
def selected(cache, monkeypatch):
    monkeypatch.setenv("LLMTUNE_CACHE", str(cache))
    return open_model(recipe_with(NAME), training=False)


@needs(NAME)
def test_it_answers(selected):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    tokenizer = selected.processor
    text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt").input_ids
    out = selected.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(out[0, ids.shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")


@needs(NAME)
def test_digits_stand_alone_as_in_the_original_tokenizer(selected):
    assert selected.processor.tokenize("in 1999:  42") == ["in", "Ġ", "1", "9", "9", "9", ":", "ĠĠ", "4", "2"]
    text = "Naïve  café\n\t42 — 你好"
    assert selected.processor.decode(selected.processor(text).input_ids) == text


@needs(NAME)
def test_the_cached_folder_is_small_plain_and_readable(cache, selected):
    files = {path.name: path.stat() for path in selected.model_ref.path.iterdir()}
    assert 260e6 < files["model.safetensors"].st_size < 280e6
    assert files["model.safetensors"].st_mode & 0o044 == files["config.json"].st_mode & 0o044
    config = json.loads((selected.model_ref.path / "config.json").read_text())
    assert (config["dtype"], config["model_type"]) == ("bfloat16", "llama")
    assert "quantization_config" not in config


@needs(NAME)
def test_a_cached_model_is_found_without_the_weights_being_read_again(cache, monkeypatch):
    monkeypatch.setenv("LLMTUNE_CACHE", str(cache))
    console = quiet()
    resolve_model(NAME, recipe_with(NAME).model, console, offline=True)
    assert "Converting" not in console.file.getvalue()


@needs(NAME)
def test_in_four_bits_it_needs_less_than_half_and_takes_an_adapter(cache, monkeypatch):
    monkeypatch.setenv("LLMTUNE_CACHE", str(cache))
    recipe = recipe_with(NAME, model={"dtype": "bfloat16"}, adapter={"method": "qlora", "r": 4})
    adapted = inject(open_model(recipe), recipe, quiet())
    size = sum(p.numel() * p.element_size() for p in adapted.model.get_base_model().parameters() if not p.requires_grad)
    assert size < 0.5 * 269e6
    assert len(adapted.matched_modules) == 210
    assert type(merge(adapted)).__name__ == "LlamaForCausalLM"


@needs(MINILM)
def test_minilm_puts_sentences_of_one_meaning_side_by_side(unpack):
    folder = unpack(MINILM)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(
        ["A cat sleeps on the sofa.", "A kitten naps on a couch.", "Shares fell sharply today."],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        hidden_BTD = model(**batch).last_hidden_state
    mask_BT1 = batch.attention_mask[..., None]
    vectors_BD = torch.nn.functional.normalize((hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1))
    alike_BB = vectors_BD @ vectors_BD.T
    assert alike_BB[0, 1] > 0.5 > 0.2 > alike_BB[0, 2]


@needs(MINILM)
def test_minilm_takes_a_head_and_its_tokenizer_neither_cuts_nor_pads(unpack):
    folder = unpack(MINILM)
    content = json.loads((folder / "tokenizer.json").read_text())
    assert (content["truncation"], content["padding"]) == (None, None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer("word " * 200).input_ids) == 202
    assert tokenizer.model_max_length == 512
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert model(**tokenizer("fine", return_tensors="pt")).logits.shape == (1, 3)
    assert model.bert.pooler.dense.weight.std() > 0


@needs(WHISPER)
def test_whisper_has_the_ids_of_openais_tiny_en(unpack):
    folder = unpack(WHISPER)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = {
        "<|endoftext|>": 50256,
        "<|startoftranscript|>": 50257,
        "<|en|>": 50258,
        "<|transcribe|>": 50358,
        "<|startofprev|>": 50360,
        "<|notimestamps|>": 50362,
        "<|0.00|>": 50363,
        "<|30.00|>": 51863,
    }
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in known} == known
    assert tokenizer("Hello there").input_ids == [50257, 50362, 15496, 612, 50256]
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer) == 51864
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    assert (extractor.feature_size, extractor.sampling_rate, extractor.nb_max_frames) == (80, 16_000, 3_000)


@needs(WHISPER)
@pytest.mark.skipif(not SPEECH.is_dir(), reason="pocketsphinx-testdata is not installed")
def test_whisper_writes_what_is_said(unpack):
    folder = unpack(WHISPER)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval()
    said, heard = [], []
    for text, clip in re.findall(r"<s> (.*?) </s> \((.*)\)", (SPEECH / "transcription").read_text()):
        samples, rate = soundfile.read(SPEECH / f"{clip}.wav")
        ids = model.generate(**processor(samples, sampling_rate=rate, return_tensors="pt"))
        written = processor.tokenizer.decode(ids[0], skip_special_tokens=True).lower().replace("mr.", "mister")
        said.append(text)
        heard.append(" ".join(re.sub(r"[^a-z']", " ", written).split()))
    assert len(said) == 5
    assert jiwer.wer(said, heard) < 0.08
