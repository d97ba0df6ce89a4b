"""Start-up time of the command, and modules that it must not import."""

import gc
import subprocess
import sys
from pathlib import Path

from support.runs import ROWS, heavy_imports, write_colours, write_recipe, write_sums

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
