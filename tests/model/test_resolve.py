"""A model reference is a folder, a packaged model or a hub name; each failure to find it comes with a fix."""

import json
import shutil
from dataclasses import dataclass, field
from typing import Any

import pytest
from huggingface_hub import constants
from support.adapting import quiet, recipe_with
from support.http_server import Headers, answering, read_repository

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.model.resolve import resolve_model
from llmtune.recipe.model_section import ModelSection

COMMIT = "a" * 40
NOWHERE = "http://127.0.0.1:9"


def resolve(name: str):
    return resolve_model(name, recipe_with(name).model, quiet(), offline=True)


def test_a_folder_is_found_by_relative_and_absolute_path(tiny_llama, monkeypatch):
    monkeypatch.chdir(tiny_llama.parent)
    for name in (str(tiny_llama), f"./{tiny_llama.name}", tiny_llama.name):
        assert (resolve(name).path, resolve(name).name) == (tiny_llama, name)


def test_a_missing_folder_suggests_the_nearest_one(tiny_llama, tmp_path):
    with pytest.raises(EnvironmentProblem) as caught:
        resolve(str(tiny_llama.with_name("tiny-lama")))
    assert f"Did you mean {tiny_llama}?" in str(caught.value)
    with pytest.raises(EnvironmentProblem, match="does not exist either"):
        resolve(str(tmp_path / "no" / "model"))
    with pytest.raises(RecipeError, match="is a file"):
        resolve(str(tiny_llama / "config.json"))


def test_a_hub_name_without_network_is_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "HuggingFaceTB" / "SmolLM2-135M").mkdir(parents=True)
    with pytest.raises(EnvironmentProblem) as caught:
        resolve("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert "nor in the hub's local cache" in str(caught.value)
    assert "Did you mean HuggingFaceTB/SmolLM2-135M?" in str(caught.value)


@pytest.mark.parametrize("name", ["two words", "a//b", "a/b/c", "naïve/..", ""])
def test_an_impossible_name_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((EnvironmentProblem, RecipeError)):
        resolve_model(name, recipe_with("x").model, quiet(), offline=True)


REFUSALS = {
    "gated": (403, "GatedRepo"),
    "nothing": (404, "RepoNotFound"),
    "no-such-branch": (404, "RevisionNotFound"),
    "broken": (500, "Oops"),
}


@dataclass
class Hub:
    """A hub whose models differ by the words in their names."""

    files: dict[str, bytes]
    url: str = ""
    requests: list[str] = field(default_factory=list)

    def answer(self, verb: str, path: str, headers: Headers, body: bytes) -> tuple[int, Any, Headers]:
        self.requests.append(path)
        for word, (status, code) in REFUSALS.items():
            if word in path:
                return status, b"{}", {"X-Error-Code": code, "X-Error-Message": "no"}
        files = dict(self.files)
        if "pickled" in path:
            del files["model.safetensors"]
        if "cut" in path:
            index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
            files["model.safetensors.index.json"] = json.dumps(index).encode()
        return read_repository(path, body, files, COMMIT)


@pytest.fixture(scope="module")
def hub(tiny_llama):
    """A hub on this machine."""
    files = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
    files |= {"pytorch_model.bin": b"pickle", "modeling_x.py": b"raise SystemExit", "onnx/model.safetensors": b"x"}
    found = Hub(files)
    with answering(found.answer) as found.url:
        yield found


@pytest.fixture
def connect(tmp_path, monkeypatch):
    """Point the hub library to an address, with a separate cache, or with its own offline switch."""

    def set_address(url: str, offline: bool = False) -> None:
        for name, value in {
            "ENDPOINT": url,
            "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": offline,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(constants, name, value)

    return set_address


def resolve_hub(name: str, offline: bool = False, **section: object):
    return resolve_model(name, ModelSection(name=name, **section), quiet(), offline)


def test_a_download_pins_the_commit_and_skips_pickles_and_code(hub, connect):
    connect(hub.url)
    ref = resolve_hub("owner/model")
    assert ref.revision == COMMIT
    names = {path.name for path in ref.path.iterdir()}
    assert {"model.safetensors", "chat_template.jinja"} <= names
    assert not {"pytorch_model.bin", "modeling_x.py", "onnx"} & names
    connect(NOWHERE)
    assert resolve_hub("owner/model", offline=True) == resolve_hub("owner/model") == ref
    with pytest.raises(EnvironmentProblem, match="cannot be reached"):
        resolve_hub("owner/other")


@pytest.mark.parametrize(
    ("name", "section", "error", "parts"),
    [
        ("owner/gated", {}, EnvironmentProblem, ["is gated", "hf auth login"]),
        ("owner/nothing", {}, EnvironmentProblem, ["no public hub model 'owner/nothing'"]),
        ("owner/model", {"revision": "no-such-branch"}, RecipeError, ["model.revision", "no-such-branch"]),
        ("owner/broken", {}, EnvironmentProblem, ["status 500"]),
        ("owner/pickled", {}, RecipeError, ["model.use_safetensors: false"]),
        ("owner/cut", {}, EnvironmentProblem, ["model-00002-of-00002.safetensors"]),
    ],
)
def test_each_refusal_of_the_hub_is_explained(hub, connect, name, section, error, parts):
    connect(hub.url)
    with pytest.raises(error) as caught:
        resolve_hub(name, **section)
    assert [part for part in parts if part not in str(caught.value)] == []
    assert not [path for path in hub.requests if "pickled/resolve/" in path], "nothing of it was fetched"


def test_the_hub_librarys_own_switch_uses_the_local_cache_and_sends_nothing(hub, connect, tiny_llama, tmp_path):
    cache = tmp_path / "hub" / "models--owner--model"
    shutil.copytree(tiny_llama, cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    hub.requests.clear()
    connect(hub.url, offline=True)
    assert resolve_hub("owner/model").revision == COMMIT
    with pytest.raises(EnvironmentProblem) as caught:
        resolve_hub("owner/other")
    assert "nor in the hub's local cache" in str(caught.value)
    assert "HF_HUB_OFFLINE" in str(caught.value)
    assert hub.requests == []
