"""Hub names against a small hub on this machine: what is fetched, what is left there, how refusals read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "a" * 40
CODE = """
import sys
from rich.console import Console
from llmtune.errors import LlmtuneError
from llmtune.model import resolve_model
from llmtune.recipe import ModelSection
try:
    section = ModelSection.model_validate_json(sys.argv[2])
    place = resolve_model(sys.argv[1], section, Console(stderr=True), sys.argv[3] == "1")
    print("OK", place.revision, place.path, *sorted(path.name for path in place.path.iterdir()))
except LlmtuneError as error:
    print(type(error).__name__, error)
"""


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub's API that a download needs."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.asked.append(self.path)
        _, *parts = self.path.split("?")[0].split("/")
        if "gated" in self.path:
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"})
        if "nothing" in self.path:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if "no-such-branch" in self.path:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if "broken" in self.path:
            return self.answer(500, b"oops")
        if parts[:2] == ["api", "models"] and "tree" in parts:
            tree = [
                {"type": "file", "path": name, "size": len(body), "oid": "0" * 40} for name, body in self.files.items()
            ]
            return self.answer(200, json.dumps(tree).encode())
        if parts[:2] == ["api", "models"]:
            siblings = [{"rfilename": name} for name in self.files]
            body = {"id": "/".join(parts[2:4]), "modelId": "x/y", "sha": COMMIT, "siblings": siblings, "tags": []}
            return self.answer(200, json.dumps(body).encode())
        name = "/".join(parts[4:])
        if parts[2:3] != ["resolve"] or name not in self.files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        tag = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        return self.answer(200, self.files[name], tag)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tiny_llama) -> Iterator[type[Hub]]:
    files = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
    files |= {"pytorch_model.bin": b"pickle", "modeling_x.py": b"raise SystemExit", "onnx/model.safetensors": b"x"}
    kind = type("Served", (Hub,), {"files": files, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    kind.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield kind
    server.shutdown()
    server.server_close()
    thread.join()


def ask(hub_url: str, home: Path, name: str, offline: bool = False, switch: str = "", **model: object) -> str:
    """Run in a process of its own: the hub library reads its address when it is imported."""
    environment = {key: value for key, value in os.environ.items() if "OFFLINE" not in key}
    environment |= {"HF_ENDPOINT": hub_url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    if switch:
        environment["HF_HUB_OFFLINE"] = switch
    words = [sys.executable, "-c", CODE, name, json.dumps({"name": name, **model}), str(int(offline))]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout


def test_a_download_pins_the_commit_and_leaves_pickles_and_code_there(hub, tmp_path):
    said = ask(hub.url, tmp_path, "owner/model").split()
    assert said[:2] == ["OK", COMMIT]
    names = said[3:]
    assert "model.safetensors" in names
    assert "chat_template.jinja" in names
    assert not {"pytorch_model.bin", "modeling_x.py", "onnx"} & set(names)
    for offline in (True, False):  # forbidden, and not there
        assert ask("http://127.0.0.1:9", tmp_path, "owner/model", offline=offline).split() == said


@pytest.mark.parametrize(
    ("name", "model", "wanted"),
    [
        ("owner/gated", {}, ["EnvironmentProblem", "is gated", "hf auth login"]),
        ("owner/nothing", {}, ["EnvironmentProblem", "no public hub model 'owner/nothing'"]),
        ("owner/model", {"revision": "no-such-branch"}, ["RecipeError", "model.revision", "no-such-branch"]),
        ("owner/broken", {}, ["EnvironmentProblem", "status 500"]),
    ],
)
def test_a_refusal_is_explained(hub, tmp_path, name, model, wanted):
    said = ask(hub.url, tmp_path, name, **model)
    assert [part for part in wanted if part not in said] == [], said


def test_a_hub_that_cannot_be_reached_is_explained(tmp_path):
    said = ask("http://127.0.0.1:9", tmp_path, "owner/model")
    assert said.startswith("EnvironmentProblem")
    assert "cannot be reached" in said


def test_pickled_weights_alone_are_refused_before_anything_is_fetched(hub, tmp_path):
    del hub.files["model.safetensors"]
    said = ask(hub.url, tmp_path, "owner/model")
    assert said.startswith("RecipeError")
    assert "model.use_safetensors: false" in said
    assert not [path for path in hub.asked if "/resolve/" in path]


def test_a_shard_that_the_hub_lacks_is_named(hub, tmp_path):
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    said = ask(hub.url, tmp_path, "owner/model")
    assert said.startswith("EnvironmentProblem")
    assert "model-00002-of-00002.safetensors" in said


def test_the_hub_librarys_own_switch_takes_the_local_cache_and_asks_nobody(hub, tiny_llama, tmp_path):
    cache = tmp_path / "hub" / "models--owner--model"
    shutil.copytree(tiny_llama, cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    assert ask(hub.url, tmp_path, "owner/model", switch="1").split()[:2] == ["OK", COMMIT]
    said = ask(hub.url, tmp_path, "owner/other", switch="1")
    assert said.startswith("EnvironmentProblem")
    assert "not in the hub's local cache" in said
    assert "HF_HUB_OFFLINE" in said
    assert hub.asked == []
