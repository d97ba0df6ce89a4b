"""Compare the closed lists of keys and values with the installed libraries."""

import ast
import dataclasses
import inspect
import typing
from pathlib import Path

import pytest

from llmtune.recipe.adapter_section import LORA_KEYS, QUANTIZATION_KEYS, AdapterSection
from llmtune.recipe.format_names import COLUMNS, ROW_FORMATS, ROW_KINDS
from llmtune.recipe.model_section import ModelSection
from llmtune.recipe.schema import GenerationSection
from llmtune.recipe.task_facts import (
    CUT_METRIC,
    GENERATED,
    LANGUAGE,
    TASK_FACTS,
    TOOL_METRICS,
)
from llmtune.recipe.train_section import BETAS, EPSILON, SCHEDULE_OPTIONS, Optimizer, Schedule, Tracker, TrainSection

OWN_TRAIN_KEYS = {
    *("batch_size", "batch_tokens", "early_stopping_patience", "early_stopping_threshold", "eval_metrics", "seeds"),
}
OF_TRL = {"loss_type"}
OWN_ADAPTER_KEYS = {"method", "start_from", "train_projector"}


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
    from llmtune.data.row_kind import KINDS

    assert set(COLUMNS) == set(READ)
    assert set(ROW_FORMATS) == set(FORMATS)
    assert {name: {*formats} for name, formats in ROW_KINDS.items()} == {kind.name: {*kind.parsers} for kind in KINDS}


SHARED_FILES_THAT_KNOW_A_TASK = {
    "data/column_mapping.py": "import: the keys that each kind of row reads, to name those that are not used",
    "data/file_survey.py": "import: which task reads a file that several can read",
    "mining.py": "column, import, literal, section: queries and passages, of which negatives are mined",
    "recipe/schema.py": "literal, section: keys of a section without effect on a kind of model or of rows",
}
"""By file, how it knows one task or kind, and why. Shrink the list; instead of a new entry, add a field to a table.

`literal`: the name of a task. `import`: a module of one task, or of one kind of row. `section`: a recipe section of one
task. `column`: a column that only some kinds of rows have. `class`: a transformers class of one kind of model.
"""
TABLES = (
    *("recipe/task_facts.py", "recipe/task_sections.py", "recipe/reinforce_section.py", "recipe/format_names.py"),
    "recipe/model_kind.py",
    *("recipe/first_settings.py", "data/row_kind.py", "tasks/"),
    "model/audio_models.py",
)
ONE_KIND = ("audio", "classify_rows", "label_candidates", "search_rows", "task_rows", "waveforms")
"""Modules of `data/` about one kind of rows; only the tables and the tasks import them."""
CONVERSATIONS = (
    *("chat_encoding", "chat_rows", "chat_template", "completion_encoding", "conversation_texts", "overlong"),
    *("pictures", "prompt_rows", "rendering_check"),
)
"""Modules of `data/` about conversations, with which many tasks write prompts."""
FOR_ALL_TASKS = {"base", "label_rules", "registry", "reward_rules"}
KIND_COLUMNS = {
    *("messages", "prompt", "completion", "source", "target", "document", "summary", "question", "context", "answers"),
    *("label", "pair", "tokens", "tags", "audio", "chosen", "rejected", "answer", "good"),
    *("query", "passages", "relevances", "negatives", "score"),
}
"""Columns of canonical rows that only some kinds of rows have; `text` belongs to several."""


def knowledge_of_tasks(source: str) -> set[str]:
    """Return the ways in which a module's source knows a single task or kind."""
    names = TASK_FACTS.keys() - {"chat", "completion"}  # these also name a command and a column
    sections = {facts.section for facts in TASK_FACTS.values() if facts.section}
    known: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Constant(value=str(text)) if text in names:
                known.add("literal")
            case ast.Constant(value=str(text)) if text.startswith("AutoModel"):
                known.add("class")
            case ast.Attribute(value=of, attr=name):
                known |= {"class"} if name.startswith("AutoModelFor") else set()
                known |= {"section"} if name in sections and last_name(of) == "recipe" else set()
            case ast.ImportFrom(module=str(module), names=aliases):
                known |= knowledge_by_import(module, {alias.name for alias in aliases})
            case ast.Compare(left=ast.Constant(value=column), ops=[ast.In() | ast.NotIn()], comparators=[of]):
                known |= {"column"} if column in KIND_COLUMNS and is_row(of) else set()
            case ast.Subscript(value=of, slice=ast.Constant(value=column)):
                known |= {"column"} if column in KIND_COLUMNS and is_row(of) else set()
            case ast.Call(func=ast.Attribute(value=of, attr="get"), args=[ast.Constant(value=column), *_]):
                known |= {"column"} if column in KIND_COLUMNS and is_row(of) else set()
    return known


def knowledge_by_import(module: str, names: set[str]) -> set[str]:
    package, _, file = module.rpartition(".")
    if any(name.startswith("AutoModelFor") for name in names):
        return {"class"}
    if module == "llmtune.recipe.task_sections" and any(name.endswith("Section") for name in names - {"TaskSection"}):
        return {"section"}
    of_one_task = package == "llmtune.tasks" and file not in FOR_ALL_TASKS
    return {"import"} if of_one_task or (package == "llmtune.data" and file in ONE_KIND) else set()


def last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def is_row(node: ast.expr) -> bool:
    return last_name(node).split("_")[-1] == "row"


@pytest.mark.parametrize(
    ("source", "known"),
    [
        ('kind = "classify"', {"literal"}),
        ("from llmtune.tasks.embed import Embed", {"import"}),
        ("from llmtune.tasks.base import AnyTask", set()),
        ("labels = run.recipe.classify.labels", {"section"}),
        ('if "chosen" in row: ...', {"column"}),
        ('text = row["document"]', {"column"}),
        ('good = swapped_row.get("good")', {"column"}),
        ('text = row["text"]', set()),
        ('if task.auto_class == "AutoModelForCTC": ...', {"class"}),
        ("from transformers import AutoModelForCausalLM", {"class"}),
    ],
)
def test_knowledge_of_a_task_is_found_in_each_of_its_forms(source, known):
    assert knowledge_of_tasks(source) == known


def test_only_the_listed_shared_files_know_a_task():
    import llmtune

    package = Path(llmtune.__file__).parent
    allowed = (*TABLES, "data/row_formats.py", *(f"data/{name}.py" for name in (*ONE_KIND, *CONVERSATIONS)))
    found: dict[str, set[str]] = {}
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package).as_posix()
        if not name.startswith(allowed) and (known := knowledge_of_tasks(file.read_text())):
            found[name] = known
    listed = {name: {*ways.partition(":")[0].split(", ")} for name, ways in SHARED_FILES_THAT_KNOW_A_TASK.items()}
    assert found == listed


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
