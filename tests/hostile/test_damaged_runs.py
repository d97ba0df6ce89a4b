"""Run folders with damaged files: every command names the file, or continues; none ends in a traceback."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import typer.main
from support.hostile import attempt
from support.runs import finish_run, invoke

from llmtune.cli.app import app
from llmtune.store.json_shapes import read_curve

COMMAND = typer.main.get_command(app)
RUN = Path("runs/victim")
LIGHT: dict[str, tuple[str, ...]] = {
    "verify": ("verify", str(RUN)),
    "publish": ("deploy", "publish", str(RUN), "--dry-run", "--to", "published"),
    "publish merged": ("deploy", "publish", str(RUN), "--dry-run", "--to", "published", "--merged"),
    "release": ("release", str(RUN), "--out", "release.json"),
    "runs": ("runs",),
}
HEAVY: dict[str, tuple[str, ...]] = {
    "merge": ("deploy", "merge", str(RUN)),
    "gguf": ("deploy", "gguf", str(RUN)),
    "generate": ("generate", str(RUN), "--prompt", "x"),
    "evaluate": ("evaluate", str(RUN)),
    "train again": ("run", "tiny.yaml", "--out", str(RUN)),
    "reproduce": ("reproduce", str(RUN), "--out", "again", "--fresh"),
    "explain": ("explain", "adapter", str(RUN), "--out", "explained"),
    "compare": ("compare", str(RUN), "runs/tiny", "--out", "compared"),
}
CONTENTS: dict[str, bytes | None] = {
    "missing": None,
    "empty": b"",
    "not UTF-8": b"\xff\xfe\x00\x80" * 50,
    "list": b"[]",
    "object": b"{}",
    "null": b"null",
    "number": b"1e400",
    "nested": b"[" * 20_000,
    "nested and closed": b"[" * 700 + b"]" * 700,
    "digits": b"9" * 5000,
}
DAMAGES = (*CONTENTS, "cut", "folder", "pipe")
WRONG: tuple[object, ...] = (None, "x", 5, -1, 1e308, [], {}, True, 10**400, ["x"], {"x": 1})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The parent folder of a complete run, which is the working folder of these tests."""
    place = tmp_path_factory.mktemp("damaged")
    run = finish_run(place, tiny_llama, evaluate={"gates": ["loss < base + 9"]})
    assert invoke("deploy", "merge", run).exit_code == 0
    return place


@pytest.fixture
def place(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(finished)
    return finished


def restore() -> None:
    """Recreate the victim; its files are hard links, so a test must replace a file to damage it."""
    shutil.rmtree(RUN, ignore_errors=True)
    shutil.copytree("runs/tiny", RUN, copy_function=os.link)


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif (other := CONTENTS[how]) is not None:
        file.write_bytes(other)


def keys(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every key of a JSON document; only the first item of a list."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, item in pairs:
        yield (*path, key)
        yield from keys(item, (*path, key))


def change(file: Path, path: tuple[Any, ...], value: object) -> None:
    """Put another value at a key; `...` removes it."""
    content = json.loads(file.read_text())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    file.unlink()
    file.write_text(json.dumps(content))


def traceback_of(words: tuple[str, ...], file: str) -> str | None:
    """Run a command in this process; return the end of its traceback, or an error that does not name the file."""
    said = io.StringIO()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(said):
            COMMAND(list(words))
    except SystemExit as end:
        code = int(end.code or 0)
        if code in (0, 6, 7):
            return None
        return None if code in (2, 3, 4) and RUN.name in said.getvalue() else f"exit {code}: {said.getvalue()[:300]}"
    except Exception as error:  # noqa: BLE001 - any traceback is what is looked for
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/llmtune/" in frame.filename]
        return f"{type(error).__name__} {str(error)[:80]} at {own[-1].filename.rpartition('/')[2]}:{own[-1].lineno}"
    return None


def try_all(commands: dict[str, tuple[str, ...]], damages: Iterator[tuple[str, str, Callable[[], None]]]) -> list[str]:
    """Damage a fresh victim for each command; return what failed."""
    failed = []
    for file, told, hurt in damages:
        for name, words in commands.items():
            restore()
            hurt()
            if found := traceback_of(words, file):
                failed.append(f"{name}: {file} {told}: {found}")
    return failed


def whole_files(names: list[str], hows: tuple[str, ...]) -> Iterator[tuple[str, str, Callable[[], None]]]:
    for name in names:
        for how in hows:
            yield name, how, lambda name=name, how=how: damage(RUN / name, how)  # type: ignore[misc]


def wrong_values(name: str, each: int, share: float) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """Yield wrong values for (a share of) the keys of a JSON file, and the removal of each key."""
    draw = random.Random(7)
    for path in keys(json.loads(Path("runs/tiny", name).read_text())):
        if draw.random() < share:
            for value in (..., *draw.sample(WRONG, each)):
                told = f"{'.'.join(map(str, path))} = {str(value)[:20]}"
                yield name, told, lambda path=path, value=value: change(RUN / name, path, value)  # type: ignore[misc]


FILES = [
    *("run.json", "recipe.yaml", "llmtune.lock", "report.json", "metrics.jsonl"),
    *("data/rows/rows.json", "data/rows/test.rows.arrow", "evaluation/evaluation.json", "evaluation/measures.npz"),
    *("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/tokenizer.json"),
    *("merged/certificate.json", "merged/config.json"),
]
READ_BY_MODELS = [
    *("run.json", "recipe.yaml", "llmtune.lock", "data/rows/rows.json", "data/rows/train.rows.arrow"),
    *("data/examples/examples.json", "data/examples/train.arrow", "evaluation/base.json", "row_losses.npz"),
    *("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/tokenizer_config.json"),
    *("checkpoints/step-6/state.json", "checkpoints/step-6/optimizer.pt", "metrics.jsonl"),
]


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("hows", [("cut", "list"), pytest.param(DAMAGES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_commands_name_the_damaged_file_of_a_run(hows: tuple[str, ...]) -> None:
    assert try_all(LIGHT, whole_files(FILES, hows)) == []


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("name", ["run.json", "report.json", "llmtune.lock", "merged/certificate.json"])
@pytest.mark.parametrize(("each", "share"), [(1, 0.01), pytest.param(4, 1.0, marks=pytest.mark.slow)])
def test_commands_name_the_run_file_with_a_wrong_value(name: str, each: int, share: float) -> None:
    assert try_all(LIGHT, wrong_values(name, each, share)) == []


@pytest.mark.slow
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("command", HEAVY)
def test_commands_that_load_the_model_name_the_damaged_file(command: str) -> None:
    hows = ("missing", "cut", "not UTF-8", "list", "object", "folder")
    assert try_all({command: HEAVY[command]}, whole_files(READ_BY_MODELS, hows)) == []


BOMB = "x:\n" + "".join(f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 1}]\n" for i in range(12))
HOSTILE_YAML = {
    "alias bomb": BOMB,
    "timestamp": "x: !!timestamp soon\n",
    "number": "x: !!int ''\n",
    "object": "x: !!python/object/apply:os.system ['true']\n",
    "set": "x: !!set {a, b}\n",
    "deep": f"x: {'[' * 400}{']' * 400}\n",
    "date": "x: 2020-01-01\n2020-01-01: 1\n",
}


def append(name: str, text: str) -> None:
    content = (RUN / name).read_text()
    (RUN / name).unlink()
    (RUN / name).write_text(content + text)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("kind", HOSTILE_YAML)
@pytest.mark.parametrize("command", [*LIGHT, *(pytest.param(name, marks=pytest.mark.slow) for name in HEAVY)])
def test_hostile_yaml_in_the_recipe_of_a_run_is_refused_in_time(command: str, kind: str) -> None:
    restore()
    shutil.rmtree("again", ignore_errors=True)
    append("recipe.yaml", HOSTILE_YAML[kind])
    words = (LIGHT | HEAVY)[command]
    code = 0 if command in ("runs", "train again") else (2, 6) if command == "verify" else 2  # these two do not read it
    attempt(*words, code=code, seconds=60 if command == "train again" else 5)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "line",
    ["[]", "{", '{"step": "x"}', '{"validation_loss": 1}', '{"step": 2, "loss": "x"}', '{"step": 2, "loss": 1e308}'],
)
def test_damaged_lines_of_a_curve_are_skipped(line: str) -> None:
    Path("metrics.jsonl").write_text('{"step": 1, "validation_loss": 2.5}\n' + line + "\n")
    assert [line["validation_loss"] for line in read_curve(Path())] == [2.5]
