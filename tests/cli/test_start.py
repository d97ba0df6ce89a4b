"""Start-up time of the command, and modules that it must not import."""

import gc
import subprocess
import sys
import time
from pathlib import Path

from support.runs import ROWS, heavy_imports, llmtune, write_colours, write_recipe

from llmtune.store.process_environment import gc_paused

LIGHT = [
    *(("--help",), ("--version",), ("recipes", "list"), ("recipes", "schema")),
    *(("run", "no-such.yaml"), ("generate", "no-such-run", "hello"), ("chat", "no-such-run")),
]


def test_light_commands_and_missing_file_errors_import_nothing_heavy(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", tmp_path, write_colours(tmp_path / "rows.jsonl"))
    check = ("recipes", "check", str(recipe))
    found = heavy_imports(*LIGHT, check)
    assert found == {" ".join(command): [] for command in LIGHT} | {" ".join(check): [*ROWS]}


def test_help_does_not_load_the_recipe_schema() -> None:
    code = (
        "import sys; sys.argv = ['llmtune', 'run', '--help']; from llmtune.cli import main\n"
        "try: main()\nexcept SystemExit: print([n for n in sys.modules if n.startswith('llmtune.recipe')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_fast_imports_restore_the_garbage_collector() -> None:
    frozen = gc.get_freeze_count()
    with gc_paused():
        assert not gc.isenabled()
        kept = [[] for _ in range(10)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + len(kept)
    gc.unfreeze()
    gc.disable()
    with gc_paused():
        pass
    assert not gc.isenabled()
    gc.enable()
    gc.unfreeze()


def best_seconds(cwd: Path, *arguments: object) -> float:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert llmtune(*arguments, cwd=cwd).returncode == 0
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def test_help_is_fast(tmp_path: Path) -> None:
    assert best_seconds(tmp_path, "--help") < 0.3 * SLACK


def test_checking_a_recipe_is_fast(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", tmp_path, write_colours(tmp_path / "rows.jsonl"))
    assert best_seconds(tmp_path, "recipes", "check", recipe) < 0.7 * SLACK


SLACK = 2.0
"""The best of three on a quiet machine is well below the promise; a busy one must not fail the suite."""
