"""Refuses keys that a recipe does not have: names the nearest key, and what other tools' keys are called here."""

from __future__ import annotations

from llmtune.errors import Problem, nearest
from llmtune.recipe.schema import Recipe
from llmtune.recipe.section import BRANCHES, Section, find_section, is_section
from llmtune.recipe.source_map import Key, SourceMap, dotted

ALIASES = {
    "per_device_train_batch_size": "Use 'train.batch_size': rows in one step over all processes.",
    "per_device_eval_batch_size": "Evaluation finds its own batches; leave it out.",
    "micro_batch_size": "Use 'train.batch_size'; micro-batches are cut by what fits into memory.",
    "train_batch_size": "Use 'train.batch_size': rows in one step over all processes.",
    "gradient_accumulation_steps": "Use 'train.batch_size'; accumulation follows from what fits into memory.",
    "epochs": "Use 'train.num_train_epochs'.",
    "num_epochs": "Use 'train.num_train_epochs'.",
    "lr": "Use 'train.learning_rate'.",
    "lr_scheduler": "Use 'train.lr_scheduler_type'.",
    "scheduler": "Use 'train.lr_scheduler_type'.",
    "optimizer": "Use 'train.optim'.",
    "warmup_ratio": "Use 'train.warmup_steps': below 1 it is a share of all steps.",
    "grad_clip": "Use 'train.max_grad_norm'.",
    "bf16": "Use 'model.dtype: bfloat16'.",
    "fp16": "Use 'model.dtype: float16'.",
    "torch_dtype": "Use 'model.dtype'.",
    "load_in_4bit": "Use 'adapter.method: qlora'.",
    "quantization": "Use 'adapter.method: qlora'.",
    "model_name_or_path": "Use 'model.name'.",
    "base_model": "Use 'model.name'.",
    "attn_impl": "Use 'model.attn_implementation'.",
    "flash_attention": "Use 'model.attn_implementation'.",
    "lora_r": "Use 'adapter.r'.",
    "rank": "Use 'adapter.r'.",
    "lora_rank": "Use 'adapter.r'.",
    "alpha": "Use 'adapter.lora_alpha'.",
    "dropout": "Use 'adapter.lora_dropout'.",
    "lora_target": "Use 'adapter.target_modules'.",
    "lora_target_modules": "Use 'adapter.target_modules'.",
    "lora": "Use 'adapter'.",
    "peft": "Use 'adapter'.",
    "training": "Use 'train'.",
    "trainer": "Use 'train'.",
    "dataset": "Use 'data'.",
    "datasets": "Use 'data.train': a source or a list of them.",
    "train_file": "Use 'data.train'.",
    "val_set_size": "Use 'data.validation'.",
    "max_seq_length": "Use 'data.max_length'.",
    "max_seq_len": "Use 'data.max_length'.",
    "sequence_len": "Use 'data.max_length'.",
    "cutoff_len": "Use 'data.max_length'.",
    "sample_packing": "Use 'data.packing'.",
    "train_on_inputs": "Use 'data.train_on': assistant, last or all.",
    "assistant_only_loss": "Use 'data.train_on': assistant, last or all.",
    "output_dir": "A recipe does not say where it runs: use the option `--out`.",
    "num_processes": "A recipe does not say where it runs: use `llmtune launch local --processes N`.",
    "device": "A recipe does not say where it runs; the device is found.",
    "hub_token": "Keep tokens out of a recipe: log in, or set HF_TOKEN.",
    "token": "Keep tokens out of a recipe: log in, or set HF_TOKEN.",
}
"""Keys of other tools -> what to write here."""


def unknown_key(key: Key, source_map: SourceMap) -> Problem:
    """Return the problem of an unknown key: what is near it, and which keys are allowed beside it."""
    *parents, last = [step for step in key if step not in BRANCHES]
    name = str(last)
    section = section_at(parents)
    allowed = sorted(section.model_fields) if section else []
    elsewhere = [path for path in key_paths() if path.rpartition(".")[2] == name]
    if name in ALIASES:
        hint = f" {ALIASES[name]}"
    elif elsewhere:
        hint = f" Did you mean '{elsewhere[0]}'?"
    else:
        hint = nearest(name, allowed)
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
