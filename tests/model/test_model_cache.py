"""What is built once stands in the cache whole or not at all."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmtune.errors import EnvironmentProblem
from llmtune.model.model_cache import build_once, find_cache


def test_the_cache_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.delenv("LLMTUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert find_cache() == Path.home() / ".cache" / "llmtune"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert find_cache() == tmp_path / "xdg" / "llmtune"
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "own"))
    assert find_cache() == tmp_path / "own"


def test_a_build_that_fails_leaves_nothing_to_be_taken_for_whole(tmp_path):
    def half(part: Path) -> None:
        (part / "a").write_text("1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "made", half)
    assert [path.name for path in tmp_path.iterdir()] == ["made.lock"]
    assert build_once(tmp_path / "made", lambda part: part.joinpath("a").touch()).joinpath("a").exists()


def test_what_a_killed_build_left_is_swept_away(tmp_path):
    left = tmp_path / "made.part-killed"
    left.mkdir()
    build_once(tmp_path / "made", lambda part: None)
    assert not left.exists()


def test_a_full_disk_is_told_with_the_way_out(tmp_path):
    def fill(part: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(EnvironmentProblem, match="No space left on device"):
        build_once(tmp_path / "made", fill)


def test_two_processes_build_once(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom llmtune.model.model_cache import build_once\n"
        "def build(part):\n    time.sleep(1)\n    (part / 'by').write_text(sys.argv[2])\n"
        "print((build_once(Path(sys.argv[1]), build) / 'by').read_text())"
    )
    started = time.monotonic()
    processes = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path / "made", str(i)], stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    said = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(said) == 1
    assert time.monotonic() - started < 120
