"""Scripts that lie beside the recipes, as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType

from llmtune.recipe.builtin import recipes_folder


def load_script(name: str) -> ModuleType:
    """Import a script by its path below the folder of recipes; its `main` does not run."""
    path = recipes_folder() / name
    spec = importlib.util.spec_from_file_location(Path(name).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
