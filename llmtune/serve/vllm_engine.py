"""Serve with vLLM, if it is installed: its command line, with the adapters of runs as LoRA modules."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft import PeftConfig
from rich.console import Console

from llmtune.adapter.load import find_adapter, read_config
from llmtune.adapter.vllm_lora import explain_unapplied, find_vllm_obstacle, largest_rank
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.plan import Plan, RunContext
from llmtune.serve.chat_prompt import MAX_PICTURES
from llmtune.serve.server import KEY_VARIABLE, ServeOptions, open_served, public_name, read_key
from llmtune.store.atomic_files import hash_value
from llmtune.store.run_folder import trained_name
from llmtune.vllm_models import IN_4_BITS, find_merged, find_other_sampling

VLLM_KEY_VARIABLE = "VLLM_API_KEY"
Parsers = Sequence[tuple[tuple[str, ...], str]]
"""Marks that a template must all have, and the parser; the first match wins. The names come from
https://docs.vllm.ai/en/latest/features/tool_calling.html and `reasoning_outputs.html`."""
TOOL_PARSERS: Parsers = (
    (("<|channel|>", "<|start|>"), "openai"),
    (("<arg_key>",), "glm45"),
    (("<minimax:tool_call>",), "minimax_m2"),
    (("<tool_call>", "<function="), "qwen3_xml"),
    (("<tool_call>",), "hermes"),
    (("<tool_calls>",), "hunyuan_a13b"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<｜tool▁calls▁begin｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁calls▁begin｜>",), "deepseek_v31"),
    (("<|START_ACTION|>", "<|START_THINKING|>"), "cohere_command3"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    (("<|tool_call|>", "<|start_of_role|>"), "granite"),
    (("<|tool_call|>",), "phi4_mini_json"),
    (("<|tool_call_start|>",), "lfm2"),
    (("<function_calls>",), "olmo3"),
    (("<start_function_call>",), "functiongemma"),
    (("<|header_start|>", '"parameters"'), "llama4_json"),
    (("<|header_start|>", "tools"), "llama4_pythonic"),
    (("<|start_header_id|>", "tools"), "llama3_json"),
)
REASONING_PARSERS: Parsers = (
    (("<|channel|>", "<|start|>"), "openai_gptoss"),
    (("<arg_key>", "<think>"), "glm45"),
    (("<minimax:tool_call>", "<think>"), "minimax_m2"),
    (("<|START_THINKING|>",), "cohere_command3"),
    (("[THINK]",), "mistral"),
    (("<answer>", "<think>"), "hunyuan_a13b"),
    (("Here is my thought process",), "granite"),
    (("<｜Assistant｜>", "thinking"), "deepseek_v3"),
    (("<｜Assistant｜>", "<think>"), "deepseek_r1"),
    (("enable_thinking", "<think>"), "qwen3"),
    ((r"<|im_start|>assistant\n<think>",), "deepseek_r1"),
)


def serve_by_vllm(runs: Mapping[str, Path], options: ServeOptions, console: Console) -> None:
    """Replace this process by vLLM's command, with the key in its environment only.

    Raises:
        EnvironmentProblem: vLLM is not installed.
        RecipeError: vLLM does not support this task, or these adapters.
    """
    program = shutil.which("vllm")
    if program is None:
        fix = "Install it (pip install vllm; it needs a GPU), or omit --engine: llmtune's own server needs none."
        raise EnvironmentProblem.of("vLLM is not installed: command vllm not found", "--engine", fix)
    key = read_key(options)
    opened = {name: open_served(path, options, console) for name, path in runs.items()}
    check_shared_base(opened, options)
    task = next(iter(opened.values())).plan.task
    if not task.free_prompt:
        fix = "Omit --engine: llmtune's own server has an endpoint for it."
        raise RecipeError.of(f"vLLM does not serve llmtune's models of task {task.name}", "--engine", fix)
    command = vllm_command(opened, options)
    console.print(f"handing over to: {' '.join(command)}", highlight=False, markup=False)
    kept = {name: value for name, value in os.environ.items() if name not in {KEY_VARIABLE, VLLM_KEY_VARIABLE}}
    environment = {**kept, **({VLLM_KEY_VARIABLE: key} if key else {})}
    os.execve(program, command, environment)  # noqa: S606 - no shell is wanted


def check_shared_base(opened: Mapping[str, RunContext], options: ServeOptions) -> None:
    """Raise RecipeError for runs that one process cannot serve together."""
    (first, context), *others = opened.items()
    facts = shared_facts(context.plan)
    for _, other in others:
        where = str(other.folder.path)
        if options.merged or "full" in (facts["method"], other.plan.recipe.adapter.method):
            raise RecipeError.of("complete weights are served alone", where, "Serve one run.")
        for name, value in shared_facts(other.plan).items():
            if value != facts[name]:
                what = f"its {name} is {value}, but that of {first} is {facts[name]}"
                raise RecipeError.of(what, where, "Serve it on another port.")


def shared_facts(plan: Plan) -> dict[str, object]:
    """Return the facts that must be equal in runs that share a process; vLLM has one chat template for all."""
    facts = {"base": plan.model_ref.name, "base's content": plan.model_ref.content_hash, "task": plan.task.name}
    facts |= {"method": plan.recipe.adapter.method, "template's hash": hash_value(plan.processor.chat_template)}
    options = plan.recipe.model.model_dump(exclude={"candidates", "chat_template"})
    return {**facts, **{f"model.{key}": value for key, value in options.items()}}


def vllm_command(opened: Mapping[str, RunContext], options: ServeOptions) -> list[str]:
    """Return the command that serves the runs; tokenizer and chat template come from the first run's folder."""
    name, context = next(iter(opened.items()))
    recipe, model_ref, path = context.plan.recipe, context.plan.model_ref, context.folder.path
    whole = find_merged(context) if options.merged else path / trained_name(recipe)
    if whole is None:
        what = "no merged model of this training found"
        raise RecipeError.of(what, str(path / "merged"), f"Make it: llmtune deploy merge {path}")
    if recipe.generation.num_beams > 1:
        raise RecipeError.of(
            "vLLM does not search with beams", "generation.num_beams", "Serve it without --engine vllm."
        )
    RecipeError.collect(find_other_sampling(recipe))
    served = [str(whole), "--tokenizer", str(whole), "--served-model-name", name]
    adapters: list[str] = []
    if not options.merged and recipe.adapter.method != "full":
        folders = {run: find_adapter(one.folder.path) for run, one in opened.items()}
        whole = folders[name]
        served = [str(model_ref.path), "--tokenizer", str(whole), "--served-model-name", public_name(model_ref)]
        configs = [read_config(folder) for folder in folders.values()]
        obstacle = IN_4_BITS if recipe.adapter.method == "qlora" else find_vllm_obstacle(model_ref.path)
        if obstacle:
            fix = f"Merge it and serve it with --merged: llmtune deploy merge {path}"
            raise RecipeError.of(obstacle, str(whole), fix)
        for folder, config in zip(folders.values(), configs, strict=True):
            check_vllm_adapter(config, str(folder))
        adapters = ["--enable-lora", "--max-lora-rank", str(largest_rank(*configs))]
        adapters += ["--max-loras", str(len(folders)), "--lora-modules"]
        adapters += [f"{run}={folder}" for run, folder in folders.items()]
    generation = recipe.generation.model_dump(exclude_none=True, exclude={"do_sample", "num_beams"})
    if not recipe.generation.do_sample:
        generation["temperature"] = 0.0
    command = ["vllm", "serve", *served, "--host", options.host, "--port", str(options.port)]
    command += ["--dtype", recipe.model.dtype, "--generation-config", "vllm"]
    command += ["--override-generation-config", json.dumps(generation)]
    if (template := whole / "chat_template.jinja").is_file():
        command += ["--chat-template", str(template), *parser_options(template.read_text("utf-8"))]
    if context.plan.task.model_kind.takes_images:
        command += ["--limit-mm-per-prompt", json.dumps({"image": MAX_PICTURES, "video": 0})]
    if recipe.model.trust_remote_code:
        command.append("--trust-remote-code")
    return [*command, *adapters]


def check_vllm_adapter(config: PeftConfig, where: str) -> None:
    """Raise RecipeError for an adapter that vLLM would not apply as trained."""
    if what := explain_unapplied(config):
        merge = "" if "activated" in what else " Or merge it and serve it with --merged."
        raise RecipeError.of(what, where, f"Serve it without --engine vllm.{merge}")


def parser_options(template: str) -> list[str]:
    """Return the parser options of `vllm serve` for a chat template; empty without a known parser."""
    tools, reasoning = (
        next((name for marks, name in parsers if all(mark in template for mark in marks)), None)
        for parsers in (TOOL_PARSERS, REASONING_PARSERS)
    )
    options = ["--enable-auto-tool-choice", "--tool-call-parser", tools] if tools else []
    return [*options, "--reasoning-parser", reasoning] if reasoning else options
