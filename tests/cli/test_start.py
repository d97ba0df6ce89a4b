"""Start-up time of the command, and modules that it must not import."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import ROWS, heavy_imports, write_colours, write_recipe, write_sums
from typer.testing import CliRunner

from llmtune.cli.app import app, command_tree
from llmtune.launch.recipe_check import FEW_ROWS
from llmtune.store.process_environment import gc_paused

LIGHT = [
    *(("--help",), ("--version",), ("recipes", "list"), ("recipes", "schema")),
    *(("run", "no-such.yaml"), ("generate", "no-such-run", "hello"), ("chat", "no-such-run")),
]


def test_light_commands_and_missing_file_errors_import_nothing_heavy(tmp_path: Path) -> None:
    few = write_recipe(tmp_path / "few.yaml", tmp_path, write_colours(tmp_path / "few.jsonl"))
    many = write_recipe(tmp_path / "many.yaml", tmp_path, write_sums(tmp_path / "many.jsonl", FEW_ROWS + 1))
    found = heavy_imports(*LIGHT, ("recipes", "check", str(many)), ("recipes", "check", str(few)))
    assert list(found.values()) == [[] for _ in LIGHT] + [[], [*ROWS]]


def test_help_does_not_load_the_recipe_schema() -> None:
    code = (
        "import sys; sys.argv = ['llmtune', 'run', '--help']; from llmtune.cli import main\n"
        "try: main()\nexcept SystemExit: print([n for n in sys.modules if n.startswith('llmtune.recipe')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_check_loads_neither_the_terminal_library_nor_plugins(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path, write_sums(tmp_path / "rows.jsonl", FEW_ROWS + 1))
    code = (
        f"import sys; sys.argv = ['llmtune', 'recipes', 'check', {str(recipe)!r}]; from llmtune.cli import main\n"
        "try: main()\n"
        "finally:\n"
        "    from pydantic.plugin import _loader\n"
        "    print('rich.console' in sys.modules, _loader._plugins)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False None"


def test_ctrl_c_before_the_command_begins_prints_no_traceback() -> None:
    code = (
        "import os, signal, sys; sys.argv = ['llmtune', 'run']; from llmtune.cli import app\n"
        "app.command_tree = lambda words: os.kill(os.getpid(), signal.SIGINT)\n"
        "app.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted. Run the same command again.\n")


@pytest.mark.parametrize("words", [["--help"], ["-h"], []])
def test_the_help_of_the_program_needs_no_commands_of_groups(words: list[str]) -> None:
    tree = command_tree(words)
    assert not any(group.typer_instance.registered_commands for group in tree.registered_groups)
    assert all(group.typer_instance.registered_commands for group in app.registered_groups)
    assert CliRunner().invoke(tree, words).output == CliRunner().invoke(app, words).output


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
