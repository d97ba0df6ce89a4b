"""Refuses keys that a recipe does not have: names the nearest key, and what other tools' keys are called here."""

from __future__ import annotations

from collections.abc import Collection

from llmtune.errors import Problem, nearest
from llmtune.recipe.schema import Recipe
from llmtune.recipe.section import BRANCHES, Section, find_section, is_section
from llmtune.recipe.source_map import Key, SourceMap, dotted

THREADS = "All cores are used, or as many as the option `--threads` says; omit it."
ALIASES = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "train_batch_size"),
        "Use 'train.batch_size': rows in one step over all processes.",
    ),
    "per_device_eval_batch_size": "Evaluation finds its own batches; omit it.",
    "micro_batch_size": "Use 'train.batch_size'; micro-batches are cut by what fits into memory.",
    "gradient_accumulation_steps": "Use 'train.batch_size'; accumulation follows from what fits into memory.",
    **dict.fromkeys(("epochs", "num_epochs"), "Use 'train.num_train_epochs'."),
    "lr": "Use 'train.learning_rate'.",
    **dict.fromkeys(("lr_scheduler", "scheduler"), "Use 'train.lr_scheduler_type'."),
    "optimizer": "Use 'train.optim'.",
    "warmup_ratio": "Use 'train.warmup_steps': below 1 it is a share of all steps.",
    "grad_clip": "Use 'train.max_grad_norm'.",
    "bf16": "Use 'model.dtype: bfloat16'.",
    "fp16": "Use 'model.dtype: float16'.",
    "torch_dtype": "Use 'model.dtype'.",
    **dict.fromkeys(("load_in_4bit", "quantization"), "Use 'adapter.method: qlora'."),
    **dict.fromkeys(("model_name_or_path", "base_model"), "Use 'model.name'."),
    **dict.fromkeys(("attn", "attn_impl", "flash_attention"), "Use 'model.attn_implementation'."),
    **dict.fromkeys(("lora_r", "rank", "lora_rank"), "Use 'adapter.r'."),
    "alpha": "Use 'adapter.lora_alpha'.",
    "dropout": "Use 'adapter.lora_dropout'.",
    **dict.fromkeys(("lora_target", "lora_target_modules"), "Use 'adapter.target_modules'."),
    **dict.fromkeys(("lora", "peft"), "Use 'adapter'."),
    **dict.fromkeys(("training", "trainer"), "Use 'train'."),
    "dataset": "Use 'data'.",
    "datasets": "Use 'data.train': a source or a list of them.",
    **dict.fromkeys(
        ("columns", "encoding", "format", "path"),
        "It belongs to a source: `train: {path: rows.csv, columns: {prompt: question, completion: answer}}`.",
    ),
    "train_file": "Use 'data.train'.",
    **dict.fromkeys(("val_set_size", "val_size"), "Use 'data.validation'."),
    **dict.fromkeys(("max_seq_length", "max_seq_len", "sequence_len", "cutoff_len"), "Use 'data.max_length'."),
    **dict.fromkeys(("sample_packing", "group_by_length", "length_column_name"), "Use 'data.packing'."),
    "shuffle": "Rows are drawn in an order that 'seed' decides; omit it.",
    **dict.fromkeys(("num_proc", "dataset_num_proc", "preprocessing_num_workers", "dataloader_num_workers"), THREADS),
    **dict.fromkeys(("evaluation_strategy", "eval_strategy"), "Use 'train.eval_steps'."),
    "save_strategy": "Use 'train.save_steps'.",
    **dict.fromkeys(("train_on_inputs", "assistant_only_loss"), "Use 'data.train_on': assistant, last or all."),
    **dict.fromkeys(("push_to_hub", "hub_model_id"), "Use `llmtune deploy publish RUN` after the run."),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "local_rank"), "A recipe does not state where it runs: see `llmtune launch local --help`."
    ),
    "output_dir": "A recipe does not state where it runs: use the option `--out`.",
    "num_processes": "A recipe does not state where it runs: use `llmtune launch local --processes N`.",
    "device": "A recipe does not state where it runs: llmtune picks the device.",
    **dict.fromkeys(("hub_token", "token"), "Keep tokens out of a recipe: log in, or set HF_TOKEN."),
}
"""Keys of other tools -> what to write here."""


def unknown_key(key: Key, source_map: SourceMap, others: Collection[str] = ()) -> Problem:
    """Return the problem of an unknown key: what is near it, and which keys are allowed beside it, `others` too."""
    *parents, last = [step for step in key if step not in BRANCHES]
    name = str(last)
    section = section_at(parents)
    allowed = sorted({*section.model_fields, *others}) if section else []
    elsewhere = [path for path in key_paths() if path.rpartition(".")[2] == name]
    if name in ALIASES:
        return Problem(f"unknown key '{dotted(key)}'", source_map.where(key), ALIASES[name])
    hint = f" Did you mean '{elsewhere[0]}'?" if elsewhere else nearest(name, allowed)
    if not parents:
        allowed.append("extends")
    fix = f"{hint} Allowed here: {', '.join(allowed)}.".strip()
    return Problem(f"unknown key '{dotted(key)}'", source_map.where(key), fix)


def section_at(key: Key) -> type[Section] | None:
    """Return the section whose keys stand at a key path, or None where it is no section."""
    section: type[Section] | None = Recipe
    for step in key:
        if step not in BRANCHES and not isinstance(step, int):
            field = section.model_fields.get(step) if section else None
            section = find_section(field.annotation) if field else None
    return section


def key_paths(section: type[Section] = Recipe, prefix: str = "") -> list[str]:
    """List the dotted paths of all keys of the schema."""
    paths: list[str] = []
    for key, field in section.model_fields.items():
        paths.append(f"{prefix}{key}")
        inner = field.annotation
        if is_section(inner):
            paths.extend(key_paths(inner, f"{prefix}{key}."))
    return paths
