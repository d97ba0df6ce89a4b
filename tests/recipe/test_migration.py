"""Configurations of other tools become recipes: nothing in silence, and what comes out is checked."""

import json
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
from support.foreign_configs import write_configs

from llmtune.errors import RecipeError
from llmtune.recipe.foreign_config import tables
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.migrated_yaml import write_migrated
from llmtune.recipe.migration import migrate


def test_configurations_of_seven_tools_become_recipes_that_pass_the_check_and_no_key_is_silent(tmp_path: Path):
    counts: dict[str, Counter] = {}
    configs = [*write_configs(tmp_path)]
    for tool, file in configs:
        out = tmp_path / "recipes" / f"{file.stem}.yaml"
        out.parent.mkdir(exist_ok=True)
        migration, loaded = migrate(file, out)
        assert migration.config.table is tables()[tool], file
        stated = set(migration.config.values)
        assert stated <= set(migration.moved), (file, stated - set(migration.moved))
        assert all(one.why or one.state != "refused" for one in migration.outcomes)
        out.write_text(text := write_migrated(migration), "utf-8")
        assert load_recipe(out).fingerprint == loaded.fingerprint, text
        assert "hf_secret" not in text
        counts.setdefault(tool, Counter(files=0)).update([one.state for one in migration.outcomes])
        counts[tool]["files"] += 1
    assert len(configs) >= 80
    assert len(counts) == 7
    pages = Path(__file__).parents[2] / "docs" / "migrate.md"
    for tool, count in counts.items():
        numbers = " | ".join(str(count[name]) for name in ("files", "carried", "renamed", "refused"))
        assert f"| {tables()[tool].tool} | {numbers} | 0 |" in pages.read_text("utf-8")


def test_every_key_of_transformers_and_trl_has_a_place_in_the_tables():
    from transformers import Seq2SeqTrainingArguments
    from trl import DPOConfig, KTOConfig, ModelConfig, RewardConfig, ScriptArguments, SFTConfig

    for kind in (Seq2SeqTrainingArguments, SFTConfig, DPOConfig, KTOConfig, RewardConfig, ModelConfig, ScriptArguments):
        unknown = [one.name for one in fields(kind) if one.init and tables()["trl"].find(one.name) is None]
        assert not [name for name in unknown if not name.startswith("_")], kind


@pytest.mark.parametrize("tool", tables())
@pytest.mark.parametrize("value", [True, None, 7, "words", ["a", "b"], {"a": 1}], ids=str)
def test_any_value_of_any_known_key_is_carried_renamed_or_refused(tmp_path: Path, tool: str, value: object):
    keys = [key for key in tables()[tool].rules if "*" not in key and not key.startswith("_")]
    for start in range(0, len(keys), 40):
        stated = dict.fromkeys(keys[start : start + 40], value)
        file = tmp_path / "config.yaml"
        file.write_text(json.dumps(stated), "utf-8")
        migration, _ = migrate(file, tmp_path / "recipe.yaml", tool)
        assert set(migration.config.values) <= set(migration.moved)


def config(tmp_path: Path, text: str, name: str = "config.yaml") -> Path:
    file = tmp_path / name
    file.write_text(text, "utf-8")
    return file


def test_a_file_of_no_known_tool_is_refused_with_the_tools_there_are(tmp_path: Path):
    with pytest.raises(RecipeError, match="no tool has such keys: colour") as caught:
        migrate(config(tmp_path, "colour: blue"), tmp_path / "out.yaml")
    assert "--tool autotrain | axolotl" in caught.value.problems[0].fix
    with pytest.raises(RecipeError, match="there is no tool 'axolot'"):
        migrate(config(tmp_path, "colour: blue"), tmp_path / "out.yaml", "axolot")
    with pytest.raises(RecipeError, match="neither a mapping of keys nor a command"):
        migrate(config(tmp_path, "just words", "train.sh"), tmp_path / "out.yaml")


def test_an_unknown_key_is_refused_by_name_with_the_nearest_one(tmp_path: Path):
    migration, _ = migrate(config(tmp_path, "base_model: a/b\nsequence_lenn: 512"), tmp_path / "out.yaml", "axolotl")
    moved = migration.moved["sequence_lenn"]
    assert moved.state == "refused"
    assert "Did you mean 'sequence_len'" in str(moved.why)


def test_a_value_that_a_recipe_refuses_is_refused_with_its_reason(tmp_path: Path):
    text = "model_name_or_path: a/b\ndataset_name: c/d\nuse_peft: true\nlora_r: 0\noptim: adamw_apex_fused"
    migration, loaded = migrate(config(tmp_path, text), tmp_path / "out.yaml")
    assert "It must be at least 1" in str(migration.moved["lora_r"].why)
    assert "Allowed: adamw_torch" in str(migration.moved["optim"].why)
    assert loaded.recipe.adapter.r == 16


def test_a_generated_answers_training_is_refused_as_a_whole(tmp_path: Path):
    with pytest.raises(RecipeError, match="`TRL grpo` is no training that a recipe can say"):
        migrate(config(tmp_path, "trl grpo --model_name_or_path a/b", "train.sh"), tmp_path / "out.yaml")


def test_options_lie_over_the_configuration_that_a_command_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config(tmp_path, "model_name_or_path: a/b\ndataset_name: c/d\nlearning_rate: 1.0e-5\nuse_peft: true")
    _, loaded = migrate(
        config(tmp_path, "trl sft --config config.yaml --learning_rate 3e-4", "train.sh"), tmp_path / "out.yaml"
    )
    assert loaded.recipe.train.learning_rate == 3e-4
    assert loaded.recipe.adapter.method == "lora"


def test_the_columns_of_a_local_file_decide_what_trl_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = "model_name_or_path: a/b\ndataset_name: rows.jsonl\nuse_peft: true"
    for row, task in (
        ({"messages": []}, "chat"),
        ({"prompt": "a", "completion": "b"}, "completion"),
        ({"chosen": ""}, "preference"),
    ):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row), "utf-8")
        _, loaded = migrate(config(tmp_path, text), tmp_path / "out.yaml")
        assert loaded.recipe.task == task
        assert loaded.recipe.data.train[0].path == str(tmp_path / "rows.jsonl")
