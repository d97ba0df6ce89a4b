"""Models of a finished run in vLLM, as the engine of its answers, and the requests that this engine refuses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from llmtune.adapter.load import find_adapter, read_config
from llmtune.adapter.vllm_lora import explain_unapplied, find_vllm_obstacle, largest_rank
from llmtune.errors import Problem, RecipeError
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.evaluate.evaluator import ModelLoaders
from llmtune.evaluate.inference import context_limit
from llmtune.evaluate.suites.eval_suite import EvalSuite
from llmtune.evaluate.suites.suite_registry import requested_suites
from llmtune.evaluate.vllm_completions import AUTO, VllmModel, engine_arguments, import_vllm, start_vllm
from llmtune.model.config import build_skeleton, find_class
from llmtune.model.device import release_memory, resolve_dtype
from llmtune.plan import RunContext, evaluation_hash
from llmtune.recipe.evaluate_section import metric_name
from llmtune.recipe.extras import require_vllm
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TOOL_METRICS
from llmtune.records import Prompt
from llmtune.store.atomic_files import hash_folder, hash_value, read_json
from llmtune.store.processes import world_size
from llmtune.store.run_folder import CERTIFICATE

OMIT = "Omit --engine."


@dataclass(frozen=True)
class VllmWeights:
    """The folders that vLLM loads for a run."""

    base: Path
    tuned: Path
    adapter: Path | None = None
    """The adapter of the tuned model; None if its weights are complete."""


def locate_vllm_weights(context: RunContext) -> VllmWeights:
    """Return the weights of a run for vLLM: with the adapter, or the run's merged weights if it cannot apply it.

    Raises RecipeError if it can read neither.
    """
    plan, run = context.plan, context.folder.path
    base = plan.model_ref.path
    if plan.recipe.adapter.method == "full":
        return VllmWeights(base, context.trained_folder)
    adapter = find_adapter(run)
    reason = find_vllm_obstacle(base) or explain_unapplied(read_config(adapter))
    if plan.recipe.adapter.method == "qlora":
        reason = "vLLM does not read its base, which is in 4 bits of bitsandbytes"
    if reason is None:
        return VllmWeights(base, base, adapter)
    merged = run / "merged"
    if (read_json(merged / CERTIFICATE) or {}).get("trained_sha256") == hash_folder(context.trained_folder):
        return VllmWeights(base, merged)
    fix = f"If its method can be merged, merge it (llmtune deploy merge {run}) and try again; else omit --engine."
    raise RecipeError.of(f"{reason}, and the run has no merged weights", str(adapter), fix)


def find_unanswerable(recipe: Recipe, task: EvaluatedTask, *, base: bool) -> Iterator[Problem]:
    """Yield why vLLM cannot answer as our own loop does; `base` is whether the base model answers too."""
    if task.predicts:
        yield Problem(f"vLLM only generates text, which models of task {task.name} do not", "--engine", OMIT)
    if task.model_kind.takes_images:
        yield Problem("--engine vllm gets token ids, but this run was tuned with pictures", "--engine", OMIT)
    if recipe.generation.num_beams > 1:
        yield Problem("vLLM does not search with beams", "generation.num_beams", OMIT)
    if base and recipe.model.add_tokens:
        yield Problem("vLLM cannot add tokens to the base model", "model.add_tokens", OMIT)
    if base and recipe.adapter.method == "qlora":
        yield Problem("vLLM does not read a base in 4 bits of bitsandbytes", "adapter.method", OMIT)
    if world_size() > 1:
        yield Problem("vLLM answers in one process", "--engine", "Omit --engine, or start a single process.")


def find_unmeasurable(recipe: Recipe, task: EvaluatedTask) -> Iterator[Problem]:
    """Yield the parts of an evaluation that need more than answers, or answers of our own loop."""
    section, stated = recipe.evaluate, recipe.evaluate.metrics or recipe.variant.default_metrics
    if task.has_rewards:
        yield Problem("rewards are of samples by llmtune's own loop", "task", OMIT)
        return
    if others := [metric_name(metric) for metric in stated if metric_name(metric) not in section.predicted]:
        is_default = tuple(stated) == recipe.variant.default_metrics
        unstated = TOOL_METRICS if is_default else ()  # of the default metrics, they need rows with tools
        answered = [one for one in stated if metric_name(one) in section.predicted and one not in unstated]
        answered = answered or ["exact_match"]
        what = f"vLLM returns answers, but no likelihoods, which these metrics need: {', '.join(others)}"
        fix = f"Add --set 'evaluate.metrics=[{', '.join(answered)}]', or omit --engine."
        yield Problem(what, "evaluate.metrics", fix)
    for suite in requested_suites(recipe):
        if issubclass(suite, EvalSuite) and suite.runs_models:
            yield Problem("vLLM returns only answers to the test rows", f"evaluate.{suite.key}", OMIT)
    compared = {"evaluate.champion": section.champion, "distil": recipe.distil and recipe.distil.weight}
    for key, value in compared.items():
        if value:
            fix = f"Add --set {key}=null, or omit --engine." if key == "evaluate.champion" else OMIT
            yield Problem("its model is not run by vLLM, so answers would not be comparable", key, fix)


def check_engine(context: RunContext, *, base: bool = True, scores: bool = False, chooses: bool = False) -> None:
    """Check that the requested engine can answer as our own loop does.

    Args:
        context: The finished run.
        base: Whether the base model answers too.
        scores: Whether the answers are scored.
        chooses: Whether answers have probabilities.

    Raises RecipeError if it cannot, EnvironmentProblem if it is not installed or cannot be imported.
    """
    if context.request.engine == "vllm":
        plan = context.plan
        problems = [*find_unanswerable(plan.recipe, plan.task, base=base)]
        problems += find_unmeasurable(plan.recipe, plan.task) if scores and not plan.task.predicts else ()
        if chooses:
            what = "this run's answers have probabilities of its choices, which vLLM does not return"
            problems.append(Problem(what, "--engine", OMIT))
        RecipeError.collect(problems)
        locate_vllm_weights(context)
        require_vllm()
        import_vllm()


def describe_engine(context: RunContext) -> str:
    """Return vLLM's version and the weights that it loads; empty if our own loop generates the answers."""
    if context.request.engine != "vllm":
        return ""
    weights = locate_vllm_weights(context)
    merged = weights.tuned.name == "merged" and f"the merged weights {hash_folder(weights.tuned)[:8]}"
    loaded = "the adapter on its base" if weights.adapter else merged or "the trained weights"
    return f"vLLM {import_vllm().__version__}, with {loaded}"


def hash_scores(context: RunContext) -> str:
    """Hash the inputs of the scores, with the engine of the answers if it is not our own loop."""
    inputs, engine = evaluation_hash(context), describe_engine(context)
    return hash_value([inputs, engine]) if engine else inputs


@dataclass
class VllmModels:
    """Base and tuned model of a run in vLLM, which share their weights if the tuned one has an adapter."""

    context: RunContext
    prompts: Sequence[Prompt] = ()
    """All prompts, if they are known: vLLM then reserves memory for the longest one, else for what fits."""
    _started: tuple[Path, Any] | None = None

    @contextmanager
    def base(self) -> Iterator[torch.nn.Module]:
        """The base model."""
        yield self._open(self._weights.base, None)

    @contextmanager
    def tuned(self) -> Iterator[torch.nn.Module]:
        """The tuned model."""
        yield self._open(self._weights.tuned, self._weights.adapter)

    @property
    def loaders(self) -> ModelLoaders:
        """The loaders of both models for the evaluation."""
        return ModelLoaders(self.base, self.tuned)

    @cached_property
    def _weights(self) -> VllmWeights:
        return locate_vllm_weights(self.context)

    def _open(self, weights: Path, adapter: Path | None) -> VllmModel:
        plan = self.context.plan
        skeleton = build_skeleton(*find_class(plan.model_ref, plan.recipe, plan.task), plan.recipe)
        if self._started is None or self._started[0] != weights:
            new, self._started = plan.recipe.generation.max_new_tokens, None
            release_memory()  # ends the process with the other weights
            rank = largest_rank(read_config(self._weights.adapter)) if self._weights.adapter else None
            dtype = resolve_dtype(plan.recipe.model.dtype, plan.device)
            limit = context_limit(skeleton)
            fitting = [length for prompt in self.prompts if (length := len(prompt) + new) <= limit]
            longest = max(fitting, default=AUTO)
            arguments = engine_arguments(weights, plan.recipe, dtype=dtype, longest=longest, rank=rank)
            self._started = weights, start_vllm(arguments)
        with suppress(OSError):  # without the file, its settings are those of the configuration
            skeleton.generation_config = GenerationConfig.from_pretrained(weights)
        return VllmModel(skeleton.eval(), self._started[1], adapter)
