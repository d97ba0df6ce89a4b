"""A model reference is a folder, a packaged model or a hub name; each way of not finding it says what to do."""

from __future__ import annotations

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants
from support.adapting import quiet, recipe_with

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


def test_a_folder_that_is_not_there_names_the_nearest_one(tiny_llama, tmp_path):
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
    assert "not in the hub's local cache" in str(caught.value)
    assert "Did you mean HuggingFaceTB/SmolLM2-135M?" in str(caught.value)


@pytest.mark.parametrize("name", ["two words", "a//b", "a/b/c", "naïve/..", ""])
def test_a_name_that_can_be_nothing_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((EnvironmentProblem, RecipeError)):
        resolve_model(name, recipe_with("x").model, quiet(), offline=True)


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub's API that a download needs."""

    files: dict[str, bytes]
    requests: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.requests.append(self.path)
        files = dict(self.files)
        if "pickled" in self.path:
            del files["model.safetensors"]
        if "cut" in self.path:
            index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
            files["model.safetensors.index.json"] = json.dumps(index).encode()
        _, *parts = self.path.split("?")[0].split("/")
        refusals = {"gated": (403, "GatedRepo"), "nothing": (404, "RepoNotFound")}
        refusals |= {"no-such-branch": (404, "RevisionNotFound"), "broken": (500, "Oops")}
        for word, (status, code) in refusals.items():
            if word in self.path:
                return self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": "no"})
        if parts[:2] == ["api", "models"] and "tree" in parts:
            tree = [{"type": "file", "path": name, "size": len(body), "oid": "0" * 40} for name, body in files.items()]
            return self.answer(200, json.dumps(tree).encode())
        if parts[:2] == ["api", "models"]:
            siblings = [{"rfilename": name} for name in files]
            body = {"id": "/".join(parts[2:4]), "modelId": "x/y", "sha": COMMIT, "siblings": siblings, "tags": []}
            return self.answer(200, json.dumps(body).encode())
        name = "/".join(parts[4:])
        if parts[2:3] != ["resolve"] or name not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        return self.answer(200, files[name], {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def hub(tiny_llama):
    """A hub on this machine."""
    files = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
    files |= {"pytorch_model.bin": b"pickle", "modeling_x.py": b"raise SystemExit", "onnx/model.safetensors": b"x"}
    kind = type("Served", (Hub,), {"files": files, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    kind.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield kind
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def connect(tmp_path, monkeypatch):
    """Let the hub library speak to an address, with a cache of the test's own, or with its own switch to no network."""

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


def test_a_download_pins_the_commit_and_leaves_pickles_and_code_there(hub, connect):
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


def test_the_hub_librarys_own_switch_takes_the_local_cache_and_sends_nothing(hub, connect, tiny_llama, tmp_path):
    cache = tmp_path / "hub" / "models--owner--model"
    shutil.copytree(tiny_llama, cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    hub.requests.clear()
    connect(hub.url, offline=True)
    assert resolve_hub("owner/model").revision == COMMIT
    with pytest.raises(EnvironmentProblem) as caught:
        resolve_hub("owner/other")
    assert "not in the hub's local cache" in str(caught.value)
    assert "HF_HUB_OFFLINE" in str(caught.value)
    assert hub.requests == []
