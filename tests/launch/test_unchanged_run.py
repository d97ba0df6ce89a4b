"""A command that may be skipped: what its hash covers besides the lock and the steps."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmtune.launch.unchanged_run import _hash_command
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_folder import Manifest, RunFolder

MINED = {"model": {"name": "./base"}, "data": {"negatives": {"mine": 2, "model": "./other"}}}
CHOSEN = {"model": {"candidates": ["./base", "./other"]}}


@pytest.mark.parametrize(("section", "file"), [(MINED, "other/model.safetensors"), (CHOSEN, "other/config.json")])
def test_a_changed_file_that_only_the_recipe_names_is_noticed(
    tmp_path: Path, section: dict[str, Any], file: str
) -> None:
    for name in ("base", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    recipe = {"task": "embed", **section, "data": {"train": "rows.jsonl", **section.get("data", {})}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    run = RunFolder(tmp_path / "run", Manifest(fingerprint="", steps={}, findings={}))

    def command() -> str:
        return _hash_command(load_recipe(tmp_path / "recipe.yaml"), run, "run")

    before = command()
    assert command() == before
    (tmp_path / file).write_text("changed")
    assert command() != before
