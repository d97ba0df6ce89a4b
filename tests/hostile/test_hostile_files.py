"""Misleading recipes, locks, run folders and names are refused in time, by name."""

from __future__ import annotations

import io
import itertools
import json
import os
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from support.hostile import attempt
from support.runs import write_recipe

from llmtune.cli.output_streams import print_json
from llmtune.errors import STEERING, EnvironmentProblem
from llmtune.serve.server import bind_socket
from llmtune.store.run_folder import open_run

SPECIAL = ["fifo", "link", "/dev/zero", "/dev/random", "/proc/kmsg", "."]

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{name}: &{name} [{f'*{before},' * 9}]" for before, name in itertools.pairwise("abcdefgh")
)


@pytest.fixture
def recipe(here: Path, chat_rows: Path) -> Path:
    os.mkfifo(here / "fifo")
    (here / "link").symlink_to("/dev/zero")
    return write_recipe(here / "good.yaml", "none", chat_rows)


@pytest.mark.parametrize("name", SPECIAL)
def test_a_recipe_or_lock_that_is_a_pipe_or_a_device_is_refused(recipe: Path, name: str) -> None:
    assert "not a readable llmtune.lock" in attempt("prepare", recipe, "--lock", name, "--out", "run", code=2)
    assert name in attempt("recipes", "check", name, code=2)
    recipe.write_text(f"{recipe.read_text()}extends: {name}\n")
    attempt("recipes", "check", recipe, code=2)


@pytest.mark.parametrize("name", ["fifo", "link", "/dev/zero", "socket"])
def test_init_on_anything_but_a_regular_file_is_refused(recipe: Path, name: str) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
        assert f"{name}: not a regular file -> Copy its rows into a file" in attempt("init", name, code=2)


@pytest.mark.parametrize("content", ["{}", "5", '{"model": 5, "data": {}}', '{"model": {}, "data": {}}', "[" * 9000])
def test_a_lock_of_another_program_is_refused(recipe: Path, content: str) -> None:
    Path("odd.lock").write_text(content)
    assert "odd.lock" in attempt("prepare", recipe, "--lock", "odd.lock", "--out", "run", code=2)


@pytest.mark.parametrize(
    "content",
    [
        *("{}", "[]", "5", '"x"', "null", "[" * 9000, '{"fingerprint": 5, "steps": {}, "findings": {}}'),
        *('{"fingerprint": "x", "steps": [], "findings": {}}', '{"fingerprint": "x", "steps": {"train": 5}}'),
    ],
)
def test_a_run_json_of_another_program_is_refused_by_every_command(recipe: Path, content: str) -> None:
    Path("run").mkdir()
    Path("run/run.json").write_text(content)
    for command in (["prepare", recipe, "--out"], ["verify"], ["evaluate"], ["generate", "--prompt", "x"]):
        assert "run" in attempt(*command, "run", code=2)
    assert Path("run/run.json").read_text() == content


def test_a_folder_whose_run_json_is_a_pipe_is_not_a_run(recipe: Path) -> None:
    Path("run").mkdir()
    os.mkfifo("run/run.json")
    for command in (["prepare", recipe, "--out"], ["verify"]):
        assert "run.json" in attempt(*command, "run", code=2)


@pytest.mark.parametrize("option", [["--set", "\ud800=1"], ["--out", "\udcff"], ["--lock", "\udcff"]])
def test_arguments_that_are_not_utf8_are_refused(recipe: Path, option: list[str]) -> None:
    assert "it is not UTF-8" in attempt("prepare", recipe, *option, code=2)


def test_a_working_folder_that_is_deleted_or_not_utf8_is_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkdir(b"\xff")
    monkeypatch.chdir(os.fsdecode(b"\xff"))
    assert "the working folder" in attempt("recipes", "check", recipe, code=2)
    os.rmdir(recipe.parent / os.fsdecode(b"\xff"))
    assert "it is gone" in attempt("recipes", "check", recipe, code=4)


@pytest.mark.parametrize(
    "line",
    [
        "a: !!python/object:os.system x",
        "a: &a [*a]",
        "a: " + "[" * 600,
        BOMB,
        "\n".join(f"k{number}: &a{number} 1" for number in range(10_100)),
    ],
)
def test_yaml_with_objects_deep_nesting_or_alias_bombs_is_refused(recipe: Path, line: str) -> None:
    recipe.write_text(line)
    assert "good.yaml" in attempt("recipes", "check", recipe, code=2)


@pytest.mark.parametrize("letter", ["\\x1b", "\\x9b", "\\u202e", "\\x07"])
def test_escape_codes_in_a_recipe_do_not_reach_the_terminal(recipe: Path, letter: str) -> None:
    recipe.write_text(f'"{letter}[31mkey": 1\ntask: "{letter}[31mchat"\n{recipe.read_text()}')
    attempt("recipes", "check", recipe, code=2)
    attempt("recipes", "check", recipe, "--json", code=2)


@pytest.mark.parametrize("option", ["--memory", "--length"])
def test_a_number_of_400_digits_is_refused(option: str) -> None:
    given = {"--memory": "24GB", option: "9" * 400 + ("GB" if option == "--memory" else "")}
    attempt("models", "fits", *(word for pair in given.items() for word in pair), code=2)


def test_leftovers_of_a_killed_near_duplicate_search_are_removed(here: Path) -> None:
    (here / "run/data/.keys-abc").mkdir(parents=True)
    (here / "run/data/.keys-abc/keys.npy").write_bytes(b"x" * 100)
    with open_run(here / "run", "aa"):
        assert list((here / "run/data").iterdir()) == []


def test_a_server_that_may_open_64_files_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(64, 64)]
    monkeypatch.setattr("resource.getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr("resource.setrlimit", lambda kind, pair: limits.append(pair))
    with pytest.raises(EnvironmentProblem, match="only 64 files may be open at once") as refused:
        bind_socket("127.0.0.1", 0)
    assert "ulimit -n" in str(refused.value)


SERVER = """
import asyncio, os, signal, socket, sys, threading
from types import SimpleNamespace
from llmtune.serve.server import bind_socket, run_server

async def app(scope, receive, send):
    os.kill(os.getpid(), signal.SIGINT)
    asyncio.get_running_loop().call_later(0.5, os.kill, os.getpid(), signal.SIGINT)
    await asyncio.sleep(60)

def ask():
    connection = socket.create_connection(bound.getsockname())
    connection.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    connection.recv(1)

bound = bind_socket("127.0.0.1", 0)
engine = SimpleNamespace(stop=lambda grace: None, close=lambda seconds: None)
try:
    run_server(app, engine, bound, 30, threading.Thread(target=ask, daemon=True).start)
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_server_that_is_answering_without_a_traceback() -> None:
    done = subprocess.run([sys.executable, "-c", SERVER], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "stopped\n", done.stderr
    assert "Traceback" not in done.stderr, done.stderr


def test_json_output_has_the_text_without_control_characters(recipe: Path) -> None:
    value = {"row": "\x1b[31m \x9b \u202e \ud800"}
    with redirect_stdout(io.StringIO()) as out:
        print_json(value)
    assert json.loads(out.getvalue()) == value
    assert not STEERING.search(out.getvalue())
