"""Test the migration of other tools' configurations: every key is reported, and the recipe is valid."""

import csv
import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from support.runs import invoke

from llmtune.errors import RecipeError
from llmtune.recipe.foreign_config import read_first_row, tables
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.migration import migrate_config, write_migrated
from llmtune.recipe.source_map import walk


def write_configs(folder: Path) -> Iterator[tuple[str, Path]]:
    """Write the configurations of `foreign_configs.yaml`; yield the tool and file of each."""
    tools = YAML(typ="safe").load(Path(__file__).with_name("foreign_configs.yaml"))
    commands = tools.pop("commands")
    for tool, configs in tools.items():
        for name, change in configs["changes"].items():
            yield tool, config(folder, json.dumps({**configs["base"], **change}), f"{tool}-{name}.yaml")
    for name, command in commands.items():
        yield name.split("-")[0], config(folder, f"#!/bin/bash\n# how we train\n{command}", f"{name}.sh")


def test_configurations_of_three_tools_migrate_to_valid_recipes_and_report_every_key(tmp_path: Path):
    counts: dict[str, Counter] = {}
    configs = [*write_configs(tmp_path)]
    for tool, file in configs:
        out = tmp_path / "recipes" / f"{file.stem}.yaml"
        out.parent.mkdir(exist_ok=True)
        migration, loaded = migrate_config(file, out)
        assert migration.config.table is tables()[tool], file
        stated = set(migration.config.values)
        assert stated <= set(migration.moved), (file, stated - set(migration.moved))
        assert all(one.why or one.state != "refused" for one in migration.outcomes)
        out.write_text(text := write_migrated(migration), "utf-8")
        assert load_recipe(out).fingerprint == loaded.fingerprint, text
        assert "hf_secret" not in text
        counts.setdefault(tool, Counter(files=0)).update([one.state for one in migration.outcomes])
        counts[tool]["files"] += 1
    assert len(configs) >= 40
    assert len(counts) == 3
    page = Path(__file__).parents[2] / "docs" / "migrate-evidence.md"
    for tool, count in counts.items():
        numbers = " | ".join(str(count[name]) for name in ("files", "carried", "renamed", "not needed", "refused"))
        assert f"| {tables()[tool].tool} | {numbers} | 0 |" in page.read_text("utf-8")


def test_the_tables_cover_every_key_of_transformers_and_trl():
    from transformers import Seq2SeqTrainingArguments
    from trl import DPOConfig, KTOConfig, ModelConfig, RewardConfig, ScriptArguments, SFTConfig

    for kind in (Seq2SeqTrainingArguments, SFTConfig, DPOConfig, KTOConfig, RewardConfig, ModelConfig, ScriptArguments):
        unknown = [one.name for one in fields(kind) if one.init and tables()["trl"].find(one.name) is None]
        assert not [name for name in unknown if not name.startswith("_")], kind


@pytest.mark.parametrize("tool", tables())
@pytest.mark.parametrize("value", [True, None, 7, "words", ["a", "b"], [["a"], {}], {"a": 1}], ids=str)
def test_any_value_of_any_known_key_is_carried_renamed_or_refused(tmp_path: Path, tool: str, value: object):
    keys = [key for key in tables()[tool].rules if "*" not in key and not key.startswith("_")]
    for start in range(0, len(keys), 40):
        stated = dict.fromkeys(keys[start : start + 40], value)
        file = tmp_path / "config.yaml"
        file.write_text(json.dumps(stated), "utf-8")
        migration, _ = migrate_config(file, tmp_path / "recipe.yaml", tool)
        assert set(migration.config.values) <= set(migration.moved)


def config(tmp_path: Path, text: str, name: str = "config.yaml") -> Path:
    file = tmp_path / name
    file.write_text(text, "utf-8")
    return file


def test_a_file_of_an_unknown_tool_is_refused_with_the_known_tools(tmp_path: Path):
    with pytest.raises(RecipeError, match="no known tool has these keys: colour") as caught:
        migrate_config(config(tmp_path, "colour: blue"), tmp_path / "out.yaml")
    assert "--tool axolotl | llamafactory | trl" in caught.value.problems[0].fix
    with pytest.raises(RecipeError, match="unknown tool 'axolot'"):
        migrate_config(config(tmp_path, "colour: blue"), tmp_path / "out.yaml", "axolot")
    with pytest.raises(RecipeError, match="neither a mapping of keys nor a command"):
        migrate_config(config(tmp_path, "just words", "train.sh"), tmp_path / "out.yaml")


def test_an_unknown_key_is_refused_with_the_nearest_key(tmp_path: Path):
    migration, _ = migrate_config(
        config(tmp_path, "base_model: a/b\nsequence_lenn: 512"), tmp_path / "out.yaml", "axolotl"
    )
    moved = migration.moved["sequence_lenn"]
    assert moved.state == "refused"
    assert "Did you mean 'sequence_len'" in str(moved.why)


def test_a_value_that_the_recipe_refuses_is_refused_with_its_reason(tmp_path: Path):
    text = "model_name_or_path: a/b\ndataset_name: c/d\nuse_peft: true\nlora_r: 0\noptim: adamw_apex_fused"
    migration, loaded = migrate_config(config(tmp_path, text), tmp_path / "out.yaml")
    assert "It must be at least 1" in str(migration.moved["lora_r"].why)
    assert "Allowed: adamw_torch" in str(migration.moved["optim"].why)
    assert loaded.recipe.adapter.r == 16


def test_online_training_is_refused_completely(tmp_path: Path):
    with pytest.raises(RecipeError, match="a recipe cannot express `TRL grpo`"):
        migrate_config(config(tmp_path, "trl grpo --model_name_or_path a/b", "train.sh"), tmp_path / "out.yaml")


def test_options_override_the_configuration_file_of_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config(tmp_path, "model_name_or_path: a/b\ndataset_name: c/d\nlearning_rate: 1.0e-5\nuse_peft: true")
    _, loaded = migrate_config(
        config(tmp_path, "trl sft --config config.yaml --learning_rate 3e-4", "train.sh"), tmp_path / "out.yaml"
    )
    assert loaded.recipe.train.learning_rate == 3e-4
    assert loaded.recipe.adapter.method == "lora"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "base_model: a/b\nadapter: lora\npeft_use_rslora: {}\ndatasets: [{{path: c/d, type: alpaca}}]"),
        ("l.yaml", "model_name_or_path: a/b\nstage: sft\nfinetuning_type: lora\ndataset: c/d\nuse_rslora: {}"),
        ("t.yaml", "model_name_or_path: a/b\ndataset_name: c/d\nuse_peft: true\nlora_r: 8\nuse_rslora: {}"),
        ("t.sh", "trl sft --model_name_or_path a/b --dataset_name c/d --use_peft --use_rslora {}"),
        ("l.sh", "llamafactory-cli train model_name_or_path=a/b stage=sft dataset=c/d use_rslora={}"),
    ],
)
@pytest.mark.parametrize(("word", "value"), [("yes", True), ("no", False), ("on", True), ("Off", False)])
def test_yes_and_no_are_booleans_as_those_tools_read_them(tmp_path: Path, name: str, text: str, word: str, value: bool):
    migration, loaded = migrate_config(config(tmp_path, text.format(word), name), tmp_path / "out.yaml")
    assert loaded.recipe.adapter.use_rslora is value
    assert not [one for one in migration.outcomes if one.state == "refused"]


@pytest.mark.parametrize("repeated", ["--learning_rate=3e-4", "--learning_rate 3e-4", "--learning-rate 3e-4"])
def test_the_last_of_repeated_options_wins(tmp_path: Path, repeated: str):
    line = f"trl sft --model_name_or_path a/b --dataset_name c/d --learning_rate 1e-4 --use_peft {repeated}"
    _, loaded = migrate_config(config(tmp_path, line, "train.sh"), tmp_path / "out.yaml")
    assert loaded.recipe.train.learning_rate == 3e-4


def test_the_columns_of_a_local_file_decide_what_trl_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = "model_name_or_path: a/b\ndataset_name: rows.jsonl\nuse_peft: true"
    for row, task in (
        ({"messages": []}, "chat"),
        ({"prompt": "a", "completion": "b"}, "completion"),
        ({"chosen": ""}, "preference"),
    ):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row), "utf-8")
        _, loaded = migrate_config(config(tmp_path, text), tmp_path / "out.yaml")
        assert loaded.recipe.task == task
        assert loaded.recipe.data.train[0].path == str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("start", "mark"), [("", b""), ("", b"\xef\xbb\xbf"), ("\n", b""), ("[", b"\xef\xbb\xbf")], ids=str
)
def test_the_first_row_is_found_after_a_byte_order_mark_and_in_a_long_array(tmp_path: Path, start: str, mark: bytes):
    row = json.dumps({"messages": []})
    (tmp_path / "rows.json").write_bytes(mark + f"{start}{row},{'x' * (17 << 20 if start == '[' else 1)}".encode())
    assert read_first_row(tmp_path / "rows.json") == {"messages": []}


def test_a_csv_without_line_breaks_is_read_up_to_a_limit(tmp_path: Path):
    with (tmp_path / "rows.csv").open("w") as file:
        for _ in range(64):
            file.write("text," * 200_000)
    tracemalloc.start()
    try:
        assert read_first_row(tmp_path / "rows.csv") == {}
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


@pytest.fixture
def usual_csv_limit() -> Iterator[None]:
    limit = csv.field_size_limit(131_072)  # reading rows raises it
    yield
    csv.field_size_limit(limit)


@pytest.mark.usefixtures("usual_csv_limit")
def test_an_unreadable_first_row_decides_nothing(tmp_path: Path):
    for name, text in (("a.csv", f'"{"x" * 200_000}"'), ("a.json", "[" * 100_000), ("a.json", '{"a": '), ("a.csv", "")):
        assert read_first_row(config(tmp_path, text, name)) == {}


@pytest.mark.parametrize("order", [1, -1], ids=["share first", "rows first"])
@pytest.mark.parametrize(
    ("tool", "share", "rows"),
    [
        ("axolotl", "val_set_size: 0.0", "test_datasets: [{path: v.jsonl}]"),
        ("llamafactory", "val_size: 0.1", "eval_dataset: c/v"),
    ],
)
def test_named_validation_rows_override_a_share(tmp_path: Path, tool: str, share: str, rows: str, order: int):
    file = config(tmp_path, "\n".join(["learning_rate: 1.0e-4", *[share, rows][::order]]))
    migration, loaded = migrate_config(file, tmp_path / "out.yaml", tool)
    assert len(loaded.recipe.data.validation) == 1
    moved = migration.moved[share.split(":")[0]]
    assert moved.state == "refused"
    assert "names the rows" in str(moved.why)


MEANINGS: dict[str, list[tuple[str, dict[str, object]]]] = {
    "axolotl": [
        ("warmup_ratio: 0", {"train.warmup_steps": 0}),
        ("warmup_steps: 0", {"train.warmup_steps": 0}),
        ("", {"train.warmup_steps": 0.03}),
        ("noisy_embedding_alpha: 5", {"train.neftune_noise_alpha": 5}),
        ("sample_packing: true", {"train.batch_tokens": 512}),
        ("sample_packing: true\nrl: dpo", {"train.batch_tokens": None}),
        ("sample_packing: false\nmicro_batch_size: 2", {"train.batch_tokens": None, "train.batch_size": 2}),
        (
            "sample_packing: true\nmicro_batch_size: 2\ngradient_accumulation_steps: 4\nsequence_len: 2048",
            {"train.batch_tokens": 2 * 4 * 2048},
        ),
        *(
            (f"adapter: lora\n{targets}", {"adapter.target_modules": found})
            for targets, found in (
                ("lora_target_modules: [q_proj]\nlora_target_linear: true", "all-linear"),
                ("lora_target_linear: true\nlora_target_modules: [q_proj]", "all-linear"),
                ("lora_target_linear: false\nlora_target_modules: [q_proj]", ("q_proj",)),
            )
        ),
    ],
    "llamafactory": [
        ("warmup_ratio: 0.1\nwarmup_steps: 20", {"train.warmup_steps": 20}),
        ("warmup_steps: 20\nwarmup_ratio: 0.1", {"train.warmup_steps": 20}),
        ("use_dft_loss: true", {"train.loss_type": "dft"}),
        ("packing: true", {"train.batch_tokens": 8 * 2048}),
        ("stage: pt", {"train.batch_tokens": 8 * 2048, "data.on_overlong": "split", "data.packing": True}),
        ("stage: dpo\npacking: true", {"train.batch_tokens": None}),
        ("stage: pt\npacking: false", {"train.batch_tokens": None}),
        (
            "stage: sft\nneat_packing: true\nper_device_train_batch_size: 2\ngradient_accumulation_steps: 4",
            {"train.batch_tokens": 2 * 4 * 2048},
        ),
        *(
            (f"stage: sft\n{stated}", {"adapter.lora_alpha": alpha})
            for stated, alpha in (
                ("", 16),
                ("lora_rank: 64", 128),
                ("lora_rank: 64\nlora_alpha: null", 128),
                ("lora_rank: 64\nlora_alpha: 16", 16),
                ("lora_rank: null", 16),
            )
        ),
    ],
    "trl": [
        ("warmup_steps: 0\nwarmup_ratio: 0.1", {"train.warmup_steps": 0.1}),
        ("warmup_ratio: 0.1\nwarmup_steps: 0", {"train.warmup_steps": 0.1}),
        ("truncation_mode: keep_end", {"data.on_overlong": "truncate"}),
        ("packing_strategy: bfd_split", {"data.on_overlong": "split"}),
        ("loss_type: dft", {"train.loss_type": "dft"}),
        ("eval_strategy: steps\ndataset_name: c/d", {"data.validation.0.split": "test"}),
        (
            "eval_strategy: steps\ndataset_test_split: dev\ndataset_name: c/d",
            {"data.validation.0.split": "dev"},
        ),
        ("packing: true", {"train.batch_tokens": 8 * 1024}),
        ("padding_free: true", {"train.batch_tokens": None}),
        (
            "packing: true\nper_device_train_batch_size: 2\ngradient_accumulation_steps: 4\nmax_length: 2048",
            {"train.batch_tokens": 2 * 4 * 2048},
        ),
        *(
            (f"use_peft: true\n{stated}", {"train.learning_rate": rate, "adapter.lora_dropout": dropout})
            for stated, rate, dropout in (
                ("", 2e-5, 0.05),
                ("beta: 0.1", 1e-6, 0.0),
                ("beta: 0.1\nlora_dropout: 0.2", 1e-6, 0.0),
                ("beta: 0.1\nlora_dropout: 0.2\ndisable_dropout: false", 1e-6, 0.2),
                ("center_rewards_coefficient: 0.1", 1e-4, 0.0),
            )
        ),
    ],
}
"""By tool: a configuration, and the values of its recipe; defaults are the tool's."""


@pytest.mark.parametrize(
    ("tool", "stated", "ours"), [(tool, *case) for tool, cases in MEANINGS.items() for case in cases]
)
def test_a_migrated_recipe_has_the_meaning_of_the_configuration(
    tmp_path: Path, tool: str, stated: str, ours: dict[str, object]
):
    migration, loaded = migrate_config(config(tmp_path, f"output_dir: x\n{stated}"), tmp_path / "out.yaml", tool)
    values = dict(walk(loaded.recipe))
    assert {key: values[key] for key in ours} == ours
    refused = {one.key for one in migration.outcomes if one.state == "refused"}
    assert refused <= {"lora_target_modules", "warmup_ratio"}  # another key overrides each
    if ours.get("train.batch_tokens") and "gradient_accumulation_steps" in stated:
        assert migration.moved["gradient_accumulation_steps"].to == ("train.batch_tokens",)
    if "lora_dropout" in stated and not ours["adapter.lora_dropout"]:
        assert migration.moved["lora_dropout"].state == "not needed"


def test_an_unreadable_length_of_packed_rows_is_refused(tmp_path: Path):
    file = config(tmp_path, "packing: true\nmax_length: words")
    migration, loaded = migrate_config(file, tmp_path / "out.yaml", "trl")
    assert loaded.recipe.train.batch_tokens is None
    assert migration.moved["max_length"].state == "refused"


def test_a_command_may_have_negative_numbers_windows_line_ends_and_shell_variables(tmp_path: Path):
    script = "export NAME=a\r\nMODEL=${NAME}/b\r\nN=$(nproc)\r\ntrl sft --model_name_or_path $MODEL \\\r\n"
    script += " --max_steps -1 --dataset_name $ROWS --gradient_accumulation_steps $(expr 16 / 4) --lora_r $N --use_peft"
    script += f" --lora_alpha {'9' * 5000}"
    migration, loaded = migrate_config(config(tmp_path, script, "train.sh"), tmp_path / "out.yaml")
    assert loaded.recipe.model.name == "a/b"
    assert migration.moved["max_steps"].why == "epochs decide"
    for key in ("dataset_name", "gradient_accumulation_steps", "lora_r"):
        assert "a variable" in str(migration.moved[key].why), key
    assert migration.unset == ["task", "data.train.0.path"]


@pytest.mark.parametrize(
    ("line", "tool", "task"),
    [
        ("accelerate launch trl/scripts/dpo.py --model_name_or_path a/b --dataset_name c/d", "TRL", "preference"),
        ("pip install trl\ncd trl && trl dpo --model_name_or_path a/b --dataset_name c/d", "TRL", "preference"),
        ("accelerate launch -m axolotl.cli.train axolotl.yml", "axolotl", "completion"),
        ("X=1 deepspeed --num_gpus 8 src/train.py --stage pt --dataset one", "LLaMA-Factory", "completion"),
    ],
)
def test_a_tool_is_recognised_by_its_module_or_script(tmp_path: Path, line: str, tool: str, task: str):
    config(tmp_path, "base_model: a/b\ndatasets: [{path: c/d, type: completion}]", "axolotl.yml")
    migration, loaded = migrate_config(config(tmp_path, line, "train.sh"), tmp_path / "out.yaml")
    assert (migration.config.table.tool, loaded.recipe.task) == (tool, task)
    assert loaded.recipe.model.name == "a/b" or tool == "LLaMA-Factory"


def test_an_accelerate_configuration_is_not_a_tool_configuration(tmp_path: Path):
    with pytest.raises(RecipeError, match="no known tool has these keys: compute_environment"):
        migrate_config(
            config(tmp_path, "compute_environment: LOCAL_MACHINE\nmixed_precision: bf16"), tmp_path / "out.yaml"
        )


@pytest.mark.parametrize(
    "info", ["{", "[1]", '{"one": {"file_name": "a.json", "tags": null, "columns": null}}', '{"one": 7}'], ids=str
)
@pytest.mark.parametrize("names", ["one, two,", ["one", {"a": 1}], None, 7], ids=str)
def test_any_list_of_data_sets_gives_a_recipe_or_a_user_error(tmp_path: Path, info: str, names: object):
    config(tmp_path, info, "dataset_info.json")
    stated = {"stage": "sft", "model_name_or_path": "a/b", "dataset_dir": ".", "dataset": names}
    with (
        pytest.raises(RecipeError, match=r"dataset_info\.json")
        if info == "{" and isinstance(names, str | int)
        else nullcontext()
    ):
        migration, _ = migrate_config(config(tmp_path, json.dumps(stated)), tmp_path / "out.yaml")
        assert "dataset" in migration.moved


def test_columns_of_a_listed_data_set_are_mapped_or_refused(tmp_path: Path):
    file = {"file_name": "a.json"}
    listed = {
        "text": file | {"columns": {"prompt": "body"}},
        "thumbs": file
        | {"columns": {"kto_tag": "good", "images": "pictures"}, "tags": {"role_tag": "who", "content_tag": "body"}},
    }
    config(tmp_path, json.dumps(listed), "dataset_info.json")
    stated = {"stage": "pt", "model_name_or_path": "a/b", "dataset_dir": ".", "dataset": "text"}
    _, loaded = migrate_config(config(tmp_path, json.dumps(stated)), tmp_path / "out.yaml")
    assert loaded.recipe.data.train[0].columns == {"text": "body"}
    stated |= {"stage": "kto", "dataset": "thumbs"}
    migration, loaded = migrate_config(config(tmp_path, json.dumps(stated)), tmp_path / "out.yaml")
    assert loaded.recipe.data.train[0].columns == {"label": "good"}
    refused = [one.key for one in migration.outcomes if one.state == "refused"]
    assert refused == ["dataset[0].columns.images", "dataset[0].tags.role_tag"]


def test_roles_of_listed_data_sets_are_mapped(tmp_path: Path):
    tags = {"role_tag": "speaker", "content_tag": "text", "user_tag": "customer"}
    listed = {
        "calls": {"file_name": "a.json", "formatting": "sharegpt", "tags": tags | {"assistant_tag": "agent"}},
        "mails": {"file_name": "b.json", "formatting": "sharegpt", "tags": tags | {"assistant_tag": "desk"}},
    }
    config(tmp_path, json.dumps(listed), "dataset_info.json")
    stated = {"stage": "sft", "model_name_or_path": "a/b", "dataset_dir": ".", "dataset": "calls,mails"}
    migration, loaded = migrate_config(config(tmp_path, json.dumps(stated)), tmp_path / "out.yaml")
    roles = {role: [*names] for role, names in loaded.recipe.data.roles.items()}
    assert roles == {"user": ["customer"], "assistant": ["agent", "desk"]}
    assert "refused" not in {one.state for one in migration.outcomes if one.key.endswith("_tag")}


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        ("trl", 1),
        ("accelerate launch --config_file a.yaml --num_processes 4 --main_process_port 29501 trl", 4),
        ("torchrun --nnodes 2 --nproc-per-node=4 trl", 8),
        ("NPROC_PER_NODE=2 trl", 2),
    ],
)
def test_a_step_has_the_rows_of_all_processes(tmp_path: Path, launcher: str, processes: int):
    command = "sft --model_name_or_path a/b --dataset_name c/d --per_device_train_batch_size 4"
    migration, loaded = migrate_config(config(tmp_path, f"{launcher} {command}", "train.sh"), tmp_path / "out.yaml")
    assert loaded.recipe.train.batch_size == 4 * processes
    assert not [one.key for one in migration.outcomes if one.state == "refused"]


def test_lines_to_check_are_about_unstated_keys_of_the_recipe(tmp_path: Path):
    sft, lora = "trl sft --model_name_or_path a/b --dataset_name c/d", "--use_peft --lora_target_modules all-linear"
    kto = f"trl kto --model_name_or_path a/b --dataset_name c/d {lora}"
    cases = (
        (sft, ["messages"]),
        (f"{sft} --use_peft", ["messages", "PEFT"]),
        (f"{sft} {lora}", ["messages"]),
        (kto, []),
    )
    for command, words in cases:
        migration, _ = migrate_config(config(tmp_path, command, "train.sh"), tmp_path / "out.yaml")
        lines = [line for line in migration.looks if "keeps the start" not in line]
        assert len(lines) == len(words), lines
        assert all(word in line for word, line in zip(words, lines, strict=True))


def test_each_file_becomes_a_source_with_its_format_and_a_url_stays_one_source(tmp_path: Path):
    text = """
base_model: a/b
datasets:
  - {path: json, data_files: [a.jsonl, s3://rows/b.jsonl], type: alpaca}
  - {path: ~/c.jsonl, type: sharegpt}
  - {path: d/e, data_files: {train: f.jsonl}}
"""
    migration, loaded = migrate_config(config(tmp_path, text), tmp_path / "out.yaml")
    assert [(one.path, one.format) for one in loaded.recipe.data.train] == [
        (str(Path("a.jsonl").absolute()), "alpaca"),
        ("s3://rows/b.jsonl", "alpaca"),
        (str(Path("~/c.jsonl").expanduser()), "sharegpt"),
        ("hub:d/e", None),
    ]
    assert migration.moved["datasets[2].data_files"].state == "refused"


RETIRED = {
    "torchtune": {"model": {"_component_": "torchtune.models.llama3_2.lora_llama3_2_1b"}, "seed": 1, "batch_size": 4},
    "Unsloth": {"model": "a/b", "data": {"dataset": "c/d"}, "training": {"training_type": "lora", "max_seq_length": 9}},
    "ms-swift": {"model": "a/b", "tuner_type": "lora", "dataset": "c/d#500", "lora_rank": 8, "model_author": "me"},
    "AutoTrain": {"task": "llm-sft", "base_model": "a/b", "project_name": "x", "backend": "local"},
}
COMMANDS = {
    "torchtune": "tune run lora_finetune_single_device --config llama3_2/1B_lora epochs=2",
    "Unsloth": "unsloth train --model a/b --dataset c/d",
    "ms-swift": "NPROC_PER_NODE=2 swift sft --model a/b --dataset 'c/d#500'",
    "AutoTrain": "autotrain llm --train --model a/b --data-path c/d",
}


@pytest.mark.parametrize("name", RETIRED)
def test_files_and_commands_of_a_retired_tool_are_refused_with_a_fix(tmp_path: Path, name: str):
    files = config(tmp_path, json.dumps(RETIRED[name])), config(tmp_path, COMMANDS[name], "train.sh")
    for file in files:
        with pytest.raises(RecipeError, match=f"llmtune no longer migrates configurations of {name}") as caught:
            migrate_config(file, tmp_path / "out.yaml")
        assert "Run `llmtune init ROWS`" in str(caught.value.problems[0].fix)
    with pytest.raises(RecipeError, match=f"llmtune no longer migrates configurations of {name}"):
        migrate_config(config(tmp_path, "base_model: a/b"), tmp_path / "out.yaml", name.lower().removeprefix("ms-"))


TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
PASSWORD = "https://ada:lovelace@rows.example/a.jsonl"
PLACES = {
    "axolotl": [
        *("run_name", "base_model", "default_system_message", "chat_template_jinja", "hf_use_auth_token"),
        *("wandb_project", "comet_api_key", "chat_template_kwargs.note", "special_tokens.pad_token", "no_such_key"),
        *("datasets.0.path", "datasets.0.revision", "datasets.0.field", "datasets.0.no_such_key", "output_dir"),
    ],
    "llamafactory": [
        *("run_name", "model_name_or_path", "default_system", "dataset", "dataset_dir", "hf_hub_token", "ms_hub_token"),
        *("swanlab_api_key", "swanlab_lark_webhook_url", "adapter_name_or_path", "lora_target", "add_tokens"),
    ],
    "trl": [
        *("run_name", "model_name_or_path", "dataset_name", "dataset_config", "hub_token", "eos_token", "env.WANDB"),
        *("chat_template_path", "dataset_text_field", "lora_target_modules", "model_init_kwargs.x", "report_to"),
    ],
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "secret", [TOKEN, PASSWORD, "https://rows.example/a.jsonl?X-Amz-Signature=0123abcdef"], ids=str
)
@pytest.mark.parametrize(("tool", "place"), [(tool, place) for tool, places in PLACES.items() for place in places])
def test_no_secret_reaches_the_recipe_or_the_terminal(tool: str, place: str, secret: str):
    stated: Any = secret
    for name in reversed(place.split(".")):
        stated = [stated] if name == "0" else {name: stated}
    Path("config.yaml").write_text(json.dumps({"learning_rate": 1e-4, **stated}), "utf-8")
    hidden = next(part for part in (TOKEN, "lovelace", "0123abcdef") if part in secret)
    for more in ([], ["--json"]):
        done = invoke("recipes", "migrate", "config.yaml", "--tool", tool, "--out", f"out{len(more)}.yaml", *more)
        assert done.exit_code == 0, done.stderr
        assert hidden not in done.stdout + done.stderr + Path(f"out{len(more)}.yaml").read_text("utf-8")


def test_secrets_of_a_listed_data_set_and_of_unknown_files_are_not_shown(tmp_path: Path):
    config(tmp_path, json.dumps({"one": {"hf_hub_url": PASSWORD, "subset": TOKEN}}), "dataset_info.json")
    stated = {"stage": "sft", "model_name_or_path": "a/b", "dataset_dir": ".", "dataset": "one"}
    migration, _ = migrate_config(config(tmp_path, json.dumps(stated)), tmp_path / "out.yaml")
    assert migration.moved["dataset[0].hf_hub_url"].state == "refused"
    assert migration.moved["dataset[0].subset"].state == "refused"
    assert "lovelace" not in write_migrated(migration)
    with pytest.raises(RecipeError) as caught:
        migrate_config(config(tmp_path, json.dumps({TOKEN: 1})), tmp_path / "out.yaml")
    assert TOKEN not in str(caught.value)


def test_secrets_in_a_mapping_are_not_written_and_a_guessed_task_is_reported(tmp_path: Path):
    text = "model_name_or_path: a/b\ndataset_name: c/d\nenv: {HF_TOKEN: hf_secret}"
    migration, _ = migrate_config(config(tmp_path, text), tmp_path / "out.yaml", "trl")
    assert "hf_secret" not in write_migrated(migration)
    assert migration.unset == ["task"]


@pytest.mark.parametrize(
    ("rows", "stated", "train_on"),
    [
        (None, "", "all"),
        (None, "assistant_only_loss: false", "all"),
        (None, "assistant_only_loss: true", "assistant"),
        ({"messages": []}, "assistant_only_loss: false", "all"),
        ({"messages": []}, "assistant_only_loss: true", "assistant"),
        ({"prompt": [], "completion": []}, "assistant_only_loss: false", "assistant"),
        ({"prompt": [], "completion": []}, "completion_only_loss: false", "all"),
    ],
)
def test_migrated_recipes_learn_the_same_tokens_as_trl(tmp_path: Path, rows: object, stated: str, train_on: str):
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows), "utf-8")
    name = "rows.jsonl" if rows else "c/d"
    text = f"model_name_or_path: a/b\ndataset_name: {name}\n{stated}"
    _, loaded = migrate_config(config(tmp_path, text), tmp_path / "out.yaml", "trl")
    assert loaded.recipe.data.train_on == train_on


def test_a_limit_on_samples_reaches_every_source_and_the_lower_limit_wins(tmp_path: Path):
    listed = {
        "one": {"file_name": "a.json"},
        "two": {"file_name": "b.json", "num_samples": 5},
        "three": {"file_name": "c"},
    }
    config(tmp_path, json.dumps(listed), "dataset_info.json")
    stated = {"stage": "sft", "max_samples": 10, "model_name_or_path": "a/b", "dataset_dir": ".", "dataset": "one,two"}
    _, loaded = migrate_config(config(tmp_path, json.dumps(stated | {"eval_dataset": "three"})), tmp_path / "out.yaml")
    assert [source.limit for source in loaded.recipe.data.train] == [10, 5]
    assert loaded.recipe.data.validation[0].limit == 10


def test_axolotl_alpaca_rows_without_chat_template_are_reported(tmp_path: Path):
    text = "base_model: a/b\ndatasets: [{path: c/d, type: TYPE}]"
    looks = {}
    for kind in ("alpaca", "chat_template"):
        migration, _ = migrate_config(config(tmp_path, text.replace("TYPE", kind)), tmp_path / "out.yaml")
        looks[kind] = "; ".join(migration.looks)
    assert "Below is an instruction" in looks["alpaca"]
    assert "formats conversations with its `chat_template`" in looks["chat_template"]


@pytest.mark.parametrize(
    ("tool", "stated"),
    [
        ("trl", "dataset_name: imdb"),
        ("axolotl", "datasets: [{path: imdb, type: completion}]"),
        ("llamafactory", "stage: sft\ndataset: identity"),
    ],
)
def test_a_name_without_an_owner_is_not_a_hub_name(tmp_path: Path, tool: str, stated: str):
    migration, loaded = migrate_config(config(tmp_path, stated), tmp_path / "out.yaml", tool)
    assert "data.train.0.path" in migration.unset
    assert loaded.recipe.data.train[0].path.endswith("rows.jsonl")
    assert [one for one in migration.outcomes if one.state == "refused"]


@pytest.mark.parametrize(
    ("tool", "keys"),
    [
        ("axolotl", {"dataset_prepared_path": "x", "tf32": True, "eval_sample_packing": True, "output_dir": "x"}),
        ("llamafactory", {"overwrite_cache": True, "preprocessing_num_workers": 16, "plot_loss": True}),
        ("trl", {"dataset_num_proc": 4, "eval_strategy": "no", "ddp_timeout": 9, "logging_first_step": True}),
        ("trl", {"use_peft": False, "lora_r": 8}),
    ],
)
def test_a_key_that_changes_nothing_is_not_needed(tmp_path: Path, tool: str, keys: dict[str, object]):
    migration, _ = migrate_config(config(tmp_path, json.dumps(keys)), tmp_path / "out.yaml", tool)
    assert "refused" not in {one.state for one in migration.outcomes}
    assert "not needed" in {one.state for one in migration.outcomes}
    assert "# Not needed:" in write_migrated(migration)


# One path: a command, with or without a launcher, and a file give the same recipe

ROWS = {
    "text": {"text": "one two"},
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "prompt": {"prompt": "a", "completion": "b"},
    "prompt of messages": {
        "prompt": [{"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
    },
    "chosen": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "no file": None,
}
PROGRAMS = {
    "trl": "trl {word}",
    "accelerate": "accelerate launch --num_processes 1 trl/scripts/{word}.py",
    "torchrun": "torchrun --nproc_per_node 1 trl/scripts/{word}.py",
    "python": "CUDA_VISIBLE_DEVICES=0 python examples/scripts/{word}.py",
}


def values_of(file: Path, out: Path) -> dict[str, object]:
    return dict(walk(migrate_config(file, out)[1].recipe))


@pytest.mark.parametrize("command", PROGRAMS.values(), ids=COMMANDS)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_an_sft_command_gives_the_recipe_of_the_same_file(tmp_path: Path, rows: object, command: str):
    if rows:
        (tmp_path / "rows.jsonl").write_text(json.dumps(rows) + "\n")
    name = "./rows.jsonl" if rows else "owner/rows"
    keys = {
        "model_name_or_path": "a/b",
        "dataset_name": name,
        "learning_rate": 1e-4,
        "max_length": 512,
        "packing": True,
    }
    words = " ".join(f"--{key} {value}" if value is not True else f"--{key}" for key, value in keys.items())
    (tmp_path / "config.yaml").write_text(json.dumps(keys))
    program = command.format(word="sft")
    for number, text in enumerate((f"{program} {words}", f"{program} --config {tmp_path / 'config.yaml'}")):
        ours = values_of(config(tmp_path, text, f"train{number}.sh"), tmp_path / "out.yaml")
        assert ours == {**values_of(tmp_path / "config.yaml", tmp_path / "out.yaml"), "name": ours["name"]}


@pytest.mark.parametrize("command", PROGRAMS.values(), ids=COMMANDS)
@pytest.mark.parametrize(("word", "loss"), [("dpo", "dpo"), ("kto", "kto"), ("reward", "reward"), ("orpo", "orpo")])
def test_a_preference_command_names_its_loss(tmp_path: Path, word: str, loss: str, command: str):
    text = f"{command.format(word=word)} --model_name_or_path a/b --dataset_name owner/rows"
    values = values_of(config(tmp_path, text, "train.sh"), tmp_path / "out.yaml")
    assert (values["task"], values["preference.loss"], values["data.test"]) == ("preference", loss, 0.1)


FORMS = {
    "axolotl": (
        "axolotl train {file}",
        {"base_model": "a/b", "datasets": [{"path": "owner/rows", "type": "alpaca"}], "sequence_len": 512},
    ),
    "llamafactory": (
        "llamafactory-cli train {file}",
        {"model_name_or_path": "a/b", "stage": "pt", "dataset": "owner/rows", "cutoff_len": 512},
    ),
}


@pytest.mark.parametrize("launcher", ["", "torchrun --nproc_per_node 1 -m "])
@pytest.mark.parametrize("tool", FORMS)
def test_a_command_of_another_tool_gives_the_recipe_of_its_file(tmp_path: Path, tool: str, launcher: str):
    command, keys = FORMS[tool]
    (tmp_path / "config.yaml").write_text(json.dumps(keys))
    script = config(tmp_path, launcher + command.format(file=tmp_path / "config.yaml"), "train.sh")
    ours = values_of(script, tmp_path / "out.yaml")
    assert ours == {**values_of(tmp_path / "config.yaml", tmp_path / "out.yaml"), "name": ours["name"]}


@pytest.mark.parametrize("tool", tables())
def test_a_migrated_recipe_holds_out_the_documented_shares(tmp_path: Path, tool: str):
    migration, loaded = migrate_config(config(tmp_path, "output_dir: x"), tmp_path / "out.yaml", tool)
    assert (loaded.recipe.data.validation, loaded.recipe.data.test) == (0.05, 0.1)
    page = " ".join((Path(__file__).parents[2] / "docs" / "migrate.md").read_text("utf-8").split())
    assert "`data.test: 0.1`" in page
    assert "`data.validation: 0.05`" in page
    assert "test: 0.1  # llmtune's own" in write_migrated(migration)


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("max_seq_length: 512", "max_length: 512"),
        ("seq_length: 512", "max_length: 512"),
        (
            "batch_size: 4\ngradient_accumulation_steps: 2",
            "per_device_train_batch_size: 4\ngradient_accumulation_steps: 2",
        ),
        ("model_name: a/b", "model_name_or_path: a/b"),
        ("log_with: wandb", "report_to: wandb"),
        ("peft_lora_r: 64\npeft_lora_alpha: 16", "lora_r: 64\nlora_alpha: 16"),
        ("target_modules: all-linear", "lora_target_modules: all-linear"),
    ],
)
def test_older_names_of_trl_mean_the_same_as_the_newer_ones(tmp_path: Path, older: str, newer: str):
    def migrated(stated: str) -> dict[str, object]:
        stem = "model_name_or_path: x/y\n" if "model_name" not in stated else ""
        file = config(tmp_path, f"{stem}dataset_name: owner/rows\nuse_peft: true\n{stated}\n", "trl.yaml")
        migration, _ = migrate_config(file, tmp_path / "out.yaml", task="chat")
        assert not [one for one in migration.outcomes if one.state == "refused"]
        return {ours: one.value for ours, one in migration.settings.items()}

    assert migrated(older) == migrated(newer)


def test_an_older_name_next_to_the_newer_one_is_refused_and_counts_once(tmp_path: Path):
    text = "dataset_name: owner/rows\nuse_peft: true\nmax_seq_length: 512\nmax_length: 256\nbatch_size: 4\n"
    file = config(tmp_path, f"{text}per_device_train_batch_size: 2\n", "trl.yaml")
    migration, _ = migrate_config(file, tmp_path / "out.yaml")
    assert migration.settings["data.max_length"].value == 256
    assert migration.settings["train.batch_size"].value == 2
    assert {key for key, one in migration.moved.items() if one.state == "refused"} == {"max_seq_length", "batch_size"}


@pytest.mark.parametrize("name", ["train.py", "train.ipynb", "train.txt", "train"])
def test_python_code_is_refused_and_gives_no_recipe_of_defaults(tmp_path: Path, name: str):
    code = "from trl import SFTConfig, SFTTrainer\nimport axolotl as trainer\nargs = SFTConfig(max_length=512)\n"
    file = config(tmp_path, json.dumps({"cells": [code]}) if name.endswith(".ipynb") else code, name)
    with pytest.raises(RecipeError) as caught:
        migrate_config(file, tmp_path / "out.yaml")
    assert name in str(caught.value)
    if name.endswith((".py", ".ipynb")):
        assert "`max_length: 512`" in str(caught.value)


def test_further_commands_of_a_script_are_reported(tmp_path: Path):
    sft, dpo = (
        "trl sft --model_name_or_path a/b --dataset_name c/d",
        "trl dpo --model_name_or_path a/b --dataset_name c/e",
    )
    config(tmp_path, f"pip install trl\n{sft} \\\n  --lora_r 8\n{dpo}\n{dpo}\n", "all.sh")
    migration, _ = migrate_config(tmp_path / "all.sh", tmp_path / "out.yaml")
    assert migration.settings["data.train.0.path"].value == "hub:c/d"
    assert "# Check: only the first of 3 commands is migrated" in write_migrated(migration)
    migration, _ = migrate_config(config(tmp_path, sft, "one.sh"), tmp_path / "out.yaml")
    assert "only the first" not in write_migrated(migration)
