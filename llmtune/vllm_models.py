"""Base and tuned model of a finished run in vLLM, which generates their answers, and what vLLM does not support."""

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
IN_4_BITS = "vLLM cannot load a base that bitsandbytes quantised to 4 bits"


@dataclass(frozen=True)
class VllmWeights:
    """The folders that vLLM loads for the base and the tuned model of a run; with an adapter both are the base's."""

    base: Path
    tuned: Path
    adapter: Path | None = None
    """The adapter of the tuned model; None if its weights are complete."""


def locate_vllm_weights(context: RunContext) -> VllmWeights:
    """Return the folders that vLLM loads for a run.

    They are the base with the adapter. If vLLM cannot apply the adapter, they are the base and the run's merged
    weights, which must have been made from this adapter. With `method: full` they are the base and the trained weights.

    Raises RecipeError if the run has no weights that vLLM can load.
    """
    plan, run = context.plan, context.folder.path
    base = plan.model_ref.path
    if plan.recipe.adapter.method == "full":
        return VllmWeights(base, context.trained_folder)
    adapter = find_adapter(run)
    reason = find_vllm_obstacle(base) or explain_unapplied(read_config(adapter))
    if plan.recipe.adapter.method == "qlora":
        reason = IN_4_BITS
    if reason is None:
        return VllmWeights(base, base, adapter)
    if merged := find_merged(context):
        return VllmWeights(base, merged)
    fix = f"Run llmtune deploy merge {run} if the adapter's method can be merged, or omit --engine."
    raise RecipeError.of(f"{reason}, and the run has no merged weights", str(adapter), fix)


def find_merged(context: RunContext) -> Path | None:
    """Return the folder of a run's merged weights; None if there are none, or if they are of an earlier training."""
    merged = context.folder.path / "merged"
    made_of = (read_json(merged / CERTIFICATE) or {}).get("trained_sha256")
    return merged if made_of == hash_folder(context.trained_folder) else None


def find_unanswerable(recipe: Recipe, task: EvaluatedTask, *, base: bool) -> Iterator[Problem]:
    """Yield the reasons why vLLM cannot answer as our own loop does; `base`: whether the base model answers too."""
    if task.predicts:
        yield Problem(f"vLLM only generates text, which models of task {task.name} do not", "--engine", OMIT)
    if task.model_kind.takes_images:
        yield Problem("--engine vllm sends no pictures, but this run was tuned with some", "--engine", OMIT)
    if (beams := recipe.generation.num_beams) > 1:
        yield Problem(f"--engine vllm does not support beam search (num_beams: {beams})", "generation.num_beams", OMIT)
    yield from find_other_sampling(recipe)
    if base and recipe.model.add_tokens:
        yield Problem("vLLM cannot add tokens to the base model", "model.add_tokens", OMIT)
    if base and recipe.adapter.method == "qlora":
        yield Problem(IN_4_BITS, "adapter.method", OMIT)
    if (processes := world_size()) > 1:
        what = f"vLLM answers in a single process, but this command has {processes}"
        yield Problem(what, "--engine", "Omit --engine, or start a single process.")


def find_other_sampling(recipe: Recipe) -> Iterator[Problem]:
    """Yield the problem of settings by which vLLM samples from other tokens than transformers.

    Top-p counts the probability of the tokens that min-p left, or of all: vLLM applies min-p first, transformers last.
    """
    if recipe.generation.min_p and (recipe.generation.top_p or 1) < 1:
        fix = "Remove generation.min_p or generation.top_p, or omit --engine."
        yield Problem("vLLM applies min_p before top_p, and transformers after it", "generation.min_p", fix)


def find_unmeasurable(recipe: Recipe, task: EvaluatedTask) -> Iterator[Problem]:
    """Yield a problem for each part of an evaluation that needs more than answers, or answers of our own loop."""
    section, metrics = recipe.evaluate, recipe.evaluate.metrics or recipe.variant.default_metrics
    if task.has_rewards:
        yield Problem("rewards are scores of samples that llmtune's own loop generates", "task", OMIT)
        return
    if likelihood_metrics := [metric_name(one) for one in metrics if metric_name(one) not in section.predicted]:
        is_default = tuple(metrics) == recipe.variant.default_metrics
        tool_metrics = TOOL_METRICS if is_default else ()  # if stated, they require rows with tools
        names = [one for one in metrics if metric_name(one) in section.predicted and one not in tool_metrics]
        what = f"vLLM returns answers, but no likelihoods, which these metrics need: {', '.join(likelihood_metrics)}"
        fix = f"Add --set 'evaluate.metrics=[{', '.join(names or ['exact_match'])}]', or omit --engine."
        yield Problem(what, "evaluate.metrics", fix)
    for suite in requested_suites(recipe):
        if issubclass(suite, EvalSuite) and suite.runs_models:
            yield Problem("it queries the models, but vLLM answers only test rows", f"evaluate.{suite.key}", OMIT)
    other_models = {"evaluate.champion": section.champion, "distil": recipe.distil and recipe.distil.weight}
    for key, value in other_models.items():
        if value:
            fix = f"Add --set {key}=null, or omit --engine." if key == "evaluate.champion" else OMIT
            yield Problem("vLLM does not run this model, so its answers would not be comparable", key, fix)


def check_engine(context: RunContext, *, base: bool = True, scores: bool = False, chooses: bool = False) -> None:
    """Check that the requested engine can answer as our own loop does.

    Args:
        context: The finished run.
        base: Whether the base model answers too.
        scores: Whether the answers are scored.
        chooses: Whether the answers need probabilities of choices, for a calibration or a decision rule.

    Raises RecipeError if it cannot, EnvironmentProblem if it is not installed or cannot be imported.
    """
    if context.request.engine == "vllm":
        plan = context.plan
        problems = [*find_unanswerable(plan.recipe, plan.task, base=base)]
        problems += find_unmeasurable(plan.recipe, plan.task) if scores and not plan.task.predicts else ()
        if chooses:
            what = "this run's answers need probabilities of its choices, which vLLM does not return"
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
    is_merged = weights.tuned.name == "merged"
    complete = f"the merged weights {hash_folder(weights.tuned)[:8]}" if is_merged else "the trained weights"
    loaded = "the adapter on its base" if weights.adapter else complete
    return f"vLLM {import_vllm().__version__}, with {loaded}"


def hash_scores(context: RunContext) -> str:
    """Return the hash of what the scores depend on; with vLLM, its version and the weights that it loads too."""
    inputs, engine = evaluation_hash(context), describe_engine(context)
    return hash_value([inputs, engine]) if engine else inputs


@dataclass
class VllmModels:
    """Base and tuned model of a run in vLLM, one engine at a time; they share it if the tuned one has an adapter."""

    context: RunContext
    prompts: Sequence[Prompt] = ()
    """All prompts, if they are known: the longest one, with its answer, then sets `max_model_len`; else memory does."""
    _started: tuple[Path, Any] | None = None
    """The folder of the loaded weights, and vLLM's `LLM`."""

    @contextmanager
    def base(self) -> Iterator[torch.nn.Module]:
        """Yield the base model."""
        yield self._open(self._weights.base, None)

    @contextmanager
    def tuned(self) -> Iterator[torch.nn.Module]:
        """Yield the tuned model."""
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
            self._started = None
            release_memory()  # collects the engine of the other weights, which ends its process
            rank = largest_rank(read_config(self._weights.adapter)) if self._weights.adapter else None
            dtype = resolve_dtype(plan.recipe.model.dtype, plan.device)
            limit = context_limit(skeleton)
            lengths = (len(prompt) + plan.recipe.generation.max_new_tokens for prompt in self.prompts)
            longest = max((length for length in lengths if length <= limit), default=AUTO)
            arguments = engine_arguments(weights, plan.recipe, dtype=dtype, longest=longest, rank=rank)
            self._started = weights, start_vllm(arguments)
        with suppress(OSError):  # without the file, the configuration's settings apply
            skeleton.generation_config = GenerationConfig.from_pretrained(weights)
        return VllmModel(skeleton.eval(), self._started[1], adapter)
