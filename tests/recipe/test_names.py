"""Compare the closed lists of keys and values with the installed libraries."""

import ast
import dataclasses
import inspect
import typing
from pathlib import Path

import pytest

from llmtune.recipe.adapter_section import LORA_KEYS, QUANTIZATION_KEYS, AdapterSection
from llmtune.recipe.model_section import ModelSection
from llmtune.recipe.schema import GenerationSection
from llmtune.recipe.task_facts import COLUMNS, CUT_METRIC, GENERATED, LANGUAGE, ROW_FORMATS, TASK_FACTS, TOOL_METRICS
from llmtune.recipe.train_section import BETAS, EPSILON, SCHEDULE_OPTIONS, Optimizer, Schedule, Tracker, TrainSection

OWN_TRAIN_KEYS = {
    *("batch_size", "batch_tokens", "early_stopping_patience", "early_stopping_threshold", "eval_metrics", "seeds"),
}
OF_TRL = {"loss_type"}
OWN_ADAPTER_KEYS = {"method", "start_from"}


def values(literal: object) -> set[str]:
    return set(typing.get_args(literal))


def test_train_keys_match_training_arguments_and_early_stopping():
    from peft.optimizers import create_loraplus_optimizer
    from transformers import EarlyStoppingCallback, TrainingArguments
    from trl import SFTConfig

    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    lora_plus = set(inspect.signature(create_loraplus_optimizer).parameters)
    assert set(TrainSection.model_fields) - known - lora_plus - OF_TRL == OWN_TRAIN_KEYS
    assert {field.name for field in dataclasses.fields(SFTConfig)} >= OF_TRL
    assert "loraplus_lr_ratio" in lora_plus
    callback = set(inspect.signature(EarlyStoppingCallback).parameters)
    assert {"early_stopping_patience", "early_stopping_threshold"} <= callback


def test_adapter_keys_match_lora_and_quantisation():
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    lora = {field.name for field in dataclasses.fields(LoraConfig)}
    quantization = set(inspect.signature(BitsAndBytesConfig).parameters)
    assert set(AdapterSection.model_fields) - lora - quantization == OWN_ADAPTER_KEYS
    assert set(LORA_KEYS) <= lora
    assert set(QUANTIZATION_KEYS) <= quantization
    assert {*LORA_KEYS, *QUANTIZATION_KEYS, *OWN_ADAPTER_KEYS} == set(AdapterSection.model_fields)


def test_generation_keys_match_the_generation_config():
    from transformers import GenerationConfig

    assert set(GenerationSection.model_fields) <= set(vars(GenerationConfig()))


def test_loading_keys_match_from_pretrained():
    from transformers import PreTrainedModel

    text = inspect.getsource(PreTrainedModel.from_pretrained)
    for key in ("revision", "dtype", "trust_remote_code", "use_safetensors", "attn_implementation"):
        assert key in ModelSection.model_fields
        assert key in text


def test_optimisers_have_transformers_names():
    import torch
    from transformers.training_args import OptimizerNames

    assert values(Optimizer) - {"muon"} <= {str(name.value) for name in OptimizerNames}
    assert hasattr(torch.optim, "Muon")


def test_trackers_have_accelerate_names():
    from accelerate.utils import LoggerType

    assert values(Tracker) == {str(name) for name in LoggerType} - {"all"}


def test_schedules_and_options_match_transformers():
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, SchedulerType

    assert values(Schedule) == set(SCHEDULE_OPTIONS)
    for name, options in SCHEDULE_OPTIONS.items():
        parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]).parameters
        set_by_us = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
        not_numbers = {"warmup_type", "decay_type"}
        assert set(options) == set(parameters) - set_by_us - not_numbers


@pytest.mark.parametrize("optim", sorted(values(Optimizer) - {"muon"}))
def test_optimisers_read_exactly_the_adam_settings_in_the_rules(optim):
    from types import SimpleNamespace

    import torch
    from transformers import Trainer

    arguments = SimpleNamespace(
        optim=optim,
        optim_args=None,
        optim_target_modules="all-linear",
        parallel_mode=None,
        weight_decay=0.0,
        warmup_steps=0,
        learning_rate=0.1,
        adam_beta1=0.11,
        adam_beta2=0.22,
        adam_epsilon=0.33,
    )
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(layer.weight)  # GaLore's options contain it; its digits must not look like a setting
    _, options = Trainer.get_optimizer_cls_and_kwargs(arguments, torch.nn.Sequential(layer))
    read = repr({name: value for name, value in options.items() if name != "lr"})
    assert ("0.11" in read) == optim.startswith(BETAS)
    assert ("0.22" in read) == optim.startswith(BETAS)
    assert ("0.33" in read) == optim.startswith(EPSILON)


def test_row_formats_and_columns_match_the_reader():
    from llmtune.data.row_formats import COLUMNS as READ
    from llmtune.data.row_formats import FORMATS

    assert set(COLUMNS) == set(READ)
    assert set(ROW_FORMATS) == set(FORMATS)
    for task in ("chat", "completion"):
        assert set(TASK_FACTS[task].formats) == {name for name, form in FORMATS.items() if form.parser(task)}


NAMING_TASKS = {
    "recipe/task_facts.py": "the facts",
    "data/row_formats.py": "parsers of rows",
    "data/column_mapping.py": "other names of columns",
    "data/file_survey.py": "which task goes first where several can read a file",
    "recipe/schema.py": "keys of a section that have no effect on a kind of model or of rows",
    "recipe/task_sections.py": "sections are called as their tasks",
    "recipe/first_recipe.py": "a kind of model is called `speech`",
    "explain/inputs.py": "the section `speech`",
    "deploy/folder_settings.py": "the section `embed`",
}


def test_a_task_is_named_only_in_its_file_and_the_tables():
    import llmtune

    package = Path(llmtune.__file__).parent
    names = TASK_FACTS.keys() - {"chat", "completion"}  # these also name a command and a column
    found = set()
    for file in package.rglob("*.py"):
        texts = {node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)}
        if names & texts and file.parent.name != "tasks":
            found.add(file.relative_to(package).as_posix())
    assert found == {*NAMING_TASKS}


def test_metrics_match_the_evaluation():
    from llmtune.evaluate.text_metrics import METRICS, TEXT_METRICS, TOKEN_METRICS
    from llmtune.evaluate.tool_metrics import TOOL_SCORES

    assert set(GENERATED) == set(TEXT_METRICS)
    assert set(LANGUAGE) == set(TOKEN_METRICS)
    for task in ("chat", "completion"):
        assert {*TASK_FACTS[task].metrics} - {*TOOL_METRICS} == {*METRICS, CUT_METRIC}
    assert {*TOOL_SCORES} == {*TOOL_METRICS} < {*TASK_FACTS["chat"].metrics}


def test_the_default_metrics_of_a_task_are_among_its_metrics():
    for facts in TASK_FACTS.values():
        assert facts.default_metrics
        assert set(facts.default_metrics) <= set(facts.metrics)
