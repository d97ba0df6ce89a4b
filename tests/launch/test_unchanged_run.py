"""A command that may be skipped: what its hash covers besides the lock and the steps."""

import json
from pathlib import Path

from llmtune.launch.unchanged_run import _hash_command
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_folder import Manifest, RunFolder


def test_a_changed_candidate_is_noticed_though_the_lock_has_only_the_chosen_one(tmp_path: Path) -> None:
    for name in ("base", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    recipe = {"task": "embed", "model": {"candidates": ["./base", "./other"]}, "data": {"train": "rows.jsonl"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    run = RunFolder(tmp_path / "run", Manifest(fingerprint="", steps={}, findings={}))

    def command() -> str:
        return _hash_command(load_recipe(tmp_path / "recipe.yaml"), run, "run")

    before = command()
    assert command() == before
    (tmp_path / "other" / "config.json").write_text("changed")
    assert command() != before
