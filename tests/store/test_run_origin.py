"""Run folders of others: what they execute is named, and they send no key before the user trusts them."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest
from support.hostile import attempt
from support.judging import ScriptedJudge
from support.runs import FAST, finish_run

from llmtune.store.run_origin import ORIGIN, SECRET, is_own, mark_own, save_recipe

KEY = "Zm9vYmFy-none-of-your-business-42"
METRIC = "def mine(row: dict, answer: str) -> bool:\n    return bool(answer)\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_folder_is_this_users_until_its_recipe_changes(cache: Path, tmp_path: Path) -> None:
    save_recipe(tmp_path, "task: chat\n")
    assert is_own(tmp_path)
    assert stat.S_IMODE((cache / SECRET).stat().st_mode) == 0o600
    shutil.copytree(tmp_path, tmp_path.with_name("copy"), dirs_exist_ok=True)
    assert is_own(tmp_path.with_name("copy"))
    (tmp_path / "recipe.yaml").write_text("task: chat\nmodel: {trust_remote_code: true}\n")
    assert not is_own(tmp_path)
    mark_own(tmp_path)
    assert is_own(tmp_path)
    save_recipe(tmp_path, "task: qa\n", mark=False)
    assert not is_own(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"0" * 64, b"\xff", b"x" * 5000])
def test_a_mark_of_others_does_not_count(cache: Path, tmp_path: Path, content: bytes | None) -> None:
    save_recipe(tmp_path, "task: chat\n")
    (tmp_path / ORIGIN).unlink()
    if content is not None:
        (tmp_path / ORIGIN).write_bytes(content)
    assert not is_own(tmp_path)


def test_without_a_cache_no_folder_is_this_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "file" / "cache"))
    save_recipe(tmp_path, "task: chat\n")
    assert not is_own(tmp_path)


@pytest.fixture
def foreign(here: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run with an own metric, made with another cache; its recipe allows code of the model."""
    (here / "made").mkdir()
    (here / "made" / "metrics.py").write_text(METRIC)
    evaluate = {"metrics": ["loss", "metrics.py:mine"]}
    model = {"trust_remote_code": True}
    run = finish_run(here / "made", tiny_llama, train=FAST, evaluate=evaluate, model=model)
    monkeypatch.setenv("LLMTUNE_CACHE", str(here / "other"))
    return run


@pytest.mark.slow
def test_every_command_names_the_code_that_a_run_of_others_executes(foreign: Path) -> None:
    commands = {
        "generate": ("generate", foreign, "--prompt", "x"),
        "merge": ("deploy", "merge", foreign),
        "explain": ("explain", "adapter", foreign, "--out", "explained"),
        "reproduce": ("reproduce", foreign, "--out", "again"),
        "evaluate": ("evaluate", foreign),
    }
    outputs = {name: attempt(*words, code=0, seconds=200) for name, words in commands.items()}
    for name, output in outputs.items():
        assert "was not made by you on this machine, and runs the code of" in output, name
        assert "(model.trust_remote_code)" in output, name
        assert ("metrics.py:mine (evaluate.metrics)" in output) == (name in ("evaluate", "reproduce")), name
    assert not is_own(foreign)  # evaluate wrote its recipe again
    attempt("verify", foreign, "--trust", code=0)
    for name, words in commands.items():
        if name != "reproduce":
            assert "was not made by you" not in attempt(*words, code=0, seconds=200), name


@pytest.mark.slow
def test_a_run_of_others_sends_no_key_before_it_is_trusted(
    here: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMTUNE_JUDGE_KEY", KEY)
    judge = ScriptedJudge()
    with judge.serving() as url:
        section = {"endpoint": url, "model": "m"}
        run = finish_run(here / "made", tiny_llama, train=FAST, evaluate={"metrics": ["loss"], "judge": section})
        (run / "judge.jsonl").unlink(missing_ok=True)
        asked = len(judge.requests)
        monkeypatch.setenv("LLMTUNE_CACHE", str(here / "other"))
        for words in (("evaluate", run), ("reproduce", run, "--out", "again")):
            output = attempt(*words, code=2, seconds=100)
            assert "would send the key in LLMTUNE_JUDGE_KEY to 127.0.0.1" in output
        assert len(judge.requests) == asked
        attempt("evaluate", run, "--set", "evaluate.judge=null", code=0, seconds=100)
        assert len(judge.requests) == asked
