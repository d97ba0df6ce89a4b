"""The objective of reinforcement: answers sampled in rounds, their rewards, and the loss of a step on them.

The answers of a round are rows of `rollouts/ROUND.jsonl` in the run folder: an interrupted training reads them again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from llmtune.adapter.reference_model import reference_of
from llmtune.data.collators import collate_packed, collate_padded
from llmtune.data.example import Example
from llmtune.data.row_store import load_rows, read_rows, rows_folder
from llmtune.errors import Problem, TrainingError
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.evaluate.generation import answer_ends, answer_reader, generate_completions
from llmtune.evaluate.rewards import read_rewards, reward_answers, weigh_rewards
from llmtune.evaluate.sampled_decoding import sample_answers
from llmtune.evaluate.token_batches import over_processes
from llmtune.model.causal_lm_loss import move_to, target_losses, unwrap
from llmtune.recipe.reinforce_section import ReinforceSection, rewards_differ
from llmtune.recipe.schema import Recipe
from llmtune.records import Batch, Loss, Prompt
from llmtune.store.atomic_files import explained, hash_value, read_json_lines, write_text
from llmtune.store.json_shapes import ROLLOUTS, Count, Finite, Number
from llmtune.tasks.policy_losses import find_advantages, policy_loss
from llmtune.train.batch_plan import Indexes, StepPlan
from llmtune.train.distributed import run_on_main
from llmtune.train.objective import ComputeLoss, StepObjective, StepRows
from llmtune.train.setup import TrainContext


@dataclass(frozen=True)
class Rollout:
    """A sampled answer and its rewards."""

    row: Count
    """The training example that it answers."""
    sample: Count
    ids: list[Count]
    """Its tokens, the end token included."""
    answer: str
    """Its text as it was sampled."""
    truncated: bool
    rewards: dict[str, Number]
    """By name; None where a reward does not apply."""
    reward: float | None
    """The weighted sum."""
    logps: list[Finite] = field(default_factory=list)
    """Log-probabilities of the tokens when they were sampled; empty if the answers are used with the same weights."""


ROLLOUT = TypeAdapter(Rollout)
TOKEN_BYTES, LINE_BYTES = 2**10, 2**16
"""More than a token and the rest of an answer take in a file."""


class Rollouts(StepObjective):
    """Samples answers to the prompts of a round, and trains on them by their rewards."""

    def __init__(self, compute: ComputeLoss, task: EvaluatedTask, recipe: Recipe) -> None:
        super().__init__(compute)
        assert recipe.reinforce is not None, "rewards are required"
        self.task, self.recipe, self.section = task, recipe, recipe.reinforce
        self.rewards = read_rewards(recipe.reinforce.rewards)
        self.round = 0
        self.groups: dict[int, list[Rollout]] = {}
        """The answers of the round, by training example."""
        self.advantages: dict[int, list[float]] = {}

    def prepare(self, step: StepRows) -> None:
        """Sample and score the answers of a round at its first step; measure those of the step."""
        number, steps = find_round(self.section, step.training.plan, step.number)
        if self.round != number:
            rows = np.unique(np.concatenate([step.training.plan.rows(one) for one in steps])).tolist()
            self._begin_round(step, number, rows, keeps_logps=len(steps) > 1)
        groups = [self.groups[row] for row in step.rows.tolist()]
        answers = [answer for group in groups for answer in group]
        trained = any(weight for row in step.rows.tolist() for _, weight in self._trained(row))
        self.idle = None if trained else Problem(*_explain_idle(answers, self.section))
        rewards = [one.reward for one in answers if one.reward is not None]
        self.figures = {
            "reward": fmean(rewards or [math.nan]),
            "spread": fmean(rewards_differ([one.reward for one in group]) for group in groups),
            "answer_tokens": fmean(len(one.ids) for one in answers),
            "truncated": fmean(one.truncated for one in answers),
            "skipped": float(not trained),
        }

    def loss(self, model: torch.nn.Module, batch: Batch, rows: Indexes) -> Loss:
        """Return the loss of the answers to the prompts `rows`."""
        groups = [(row, self.groups[row]) for row in rows.tolist()]
        answers = [(self.groups[row][i], weight) for row, _ in groups for i, weight in self._trained(row)]
        count = self._count([one for _, group in groups for one in group], [one for one, _ in answers])
        # Every process needs a backward pass: without a trained answer, one with weight zero is used.
        chosen = answers or [(groups[0][1][0], 0.0)]
        prompts = dict(zip(rows.tolist(), batch["prompts"], strict=True))
        pairs = [(prompts[one.row], one.ids) for one, _ in chosen]
        made = answer_batch(pairs, batch) | {"advantages_R": torch.tensor([weight for _, weight in chosen])}
        if all(one.logps for one, _ in chosen):
            made["old_S"] = torch.tensor([logp for one, _ in chosen for logp in one.logps])
        made = move_to(batch["input_ids"].device, made)
        return Loss(self._policy_loss(model, made, placeholder=not answers), count)

    def complete_loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """Return the loss of answers of the greatest length to the prompts: what a step needs at most."""
        ids = [7 % len(prompt) for prompt in batch["prompts"]]
        answers = [
            (prompt, [prompt[i]] * self.section.max_new_tokens)
            for prompt, i in zip(batch["prompts"], ids, strict=True)
            for _ in range(self.section.samples)
        ]
        made = answer_batch(answers, batch) | {"advantages_R": torch.ones(len(answers))}
        return Loss(self._policy_loss(model, move_to(batch["input_ids"].device, made)), len(made["targets_S"]))

    def validate(self, blocks: StepRows) -> float:
        """Return minus the mean reward of greedy answers to the validation prompts; its parts are in `metrics`."""
        training: TrainContext = blocks.training
        reader = blocks.reader
        generation = self.recipe.generation.model_copy(update={"max_new_tokens": self.section.max_new_tokens})
        recipe = self.recipe.model_copy(update={"generation": generation})
        prompts = [Prompt(reader[int(i)].input_ids) for i in blocks.rows]
        model, processor = training.adapted.model, training.adapted.selected.processor
        with torch.no_grad(), training.compute():
            outputs = generate_completions(model, prompts, processor, recipe, device=str(training.device))
        items = [
            (int(reader.rows[int(i)]), list(prompt.ids), output.token_ids, output.finish_reason == "length")
            for i, prompt, output in zip(blocks.rows, prompts, outputs, strict=True)
        ]
        scored = over_processes(model, items, lambda share: self._score(share, blocks, "validation"))
        rewards = [reward for *_, reward in scored if reward is not None]
        self.metrics = {"reward": fmean(rewards or [math.nan])}
        return -self.metrics["reward"]

    def _begin_round(self, step: StepRows, number: int, rows: Sequence[int], *, keeps_logps: bool) -> None:
        """Read the answers of a round, or sample, score and write them."""
        training: TrainContext = step.training
        path = training.folder / ROLLOUTS / f"{number}.jsonl"
        count = len(rows) * self.section.samples
        header = {"round": number, "inputs": training.inputs, "prompts": [*rows], "answers": count}
        answers = run_on_main(training.accelerator, lambda: self._read_round(path, header, training, keeps_logps))
        if answers is None:
            with evaluating(training.model), torch.no_grad(), training.compute():
                answers = self._sample(step, number, rows, keeps_logps)
            run_on_main(training.accelerator, lambda: write_rollouts(path, header, answers))
        self.groups = {row: [] for row in rows}
        for answer in answers:
            self.groups[answer.row].append(answer)
        rewards = {row: [one.reward for one in group] for row, group in self.groups.items()}
        self.advantages = {row: find_advantages(values, self.section) for row, values in rewards.items()}
        self.round = number
        if self.section.method == "filter" and not any(map(any, self.advantages.values())):
            what, _, fix = _explain_idle(answers, self.section)
            raise TrainingError.of(f"round {number}: {what}", str(path), fix)

    def _read_round(
        self, path: Path, header: Mapping[str, Any], training: TrainContext, keeps_logps: bool
    ) -> list[Rollout] | None:
        """Return the recorded answers of a round; None if they are missing, damaged, or not of this training."""
        section, names = self.section, {one.name for one in self.rewards}
        answers = read_rollouts(path, header, header["answers"] * (TOKEN_BYTES * section.max_new_tokens + LINE_BYTES))
        vocabulary = unwrap(training.model).get_input_embeddings().weight.shape[0]
        expected = [(row, sample) for row in header["prompts"] for sample in range(section.samples)]
        is_ours = [(one.row, one.sample) for one in answers] == expected and all(
            0 < len(one.ids) <= section.max_new_tokens
            and max(one.ids) < vocabulary
            and len(one.logps) == keeps_logps * len(one.ids)
            and one.rewards.keys() == names
            and one.reward == weigh_rewards(self.rewards, one.rewards)
            for one in answers
        )
        return answers if is_ours else None

    def _sample(self, step: StepRows, number: int, rows: Sequence[int], keeps_logps: bool) -> list[Rollout]:
        """Sample and score answers; a prompt's answers are in one process."""
        training: TrainContext = step.training
        section = self.section
        model, processor = training.adapted.model, training.adapted.selected.processor
        stops = set(answer_ends(model, processor, self.recipe))

        def work(share: Sequence[int]) -> list[list[Rollout]]:
            pairs = [(row, sample) for row in share for sample in range(section.samples)]
            prompts = [list(step.reader[row].input_ids) for row, _ in pairs]
            keys = [(self.recipe.seed, number, row, sample) for row, sample in pairs]
            sampled = sample_answers(model, prompts, keys, section, stops, str(training.device))
            items = [
                (int(step.reader.rows[row]), prompt, one.ids, one.truncated)
                for (row, _), prompt, one in zip(pairs, prompts, sampled, strict=True)
            ]
            scored = self._score(items, step, "train")
            rollouts = [
                Rollout(row, sample, one.ids, answer, one.truncated, values, reward, one.logps if keeps_logps else [])
                for (row, sample), one, (answer, values, reward) in zip(pairs, sampled, scored, strict=True)
            ]
            return [rollouts[start : start + section.samples] for start in range(0, len(rollouts), section.samples)]

        return [one for group in over_processes(model, rows, work) for one in group]

    def _score(
        self, items: Sequence[tuple[int, list[int], list[int], bool]], step: StepRows, split: str
    ) -> list[tuple[str, dict[str, float | None], float | None]]:
        """Return text, rewards and weighted reward of answers, each given as row, prompt, tokens, and if truncated."""
        training: TrainContext = step.training
        section = self.recipe.evaluate
        rows = read_rows(load_rows(rows_folder(training.folder)), split, [row for row, *_ in items], full=True)
        read = answer_reader(training.adapted.selected.processor, self.recipe)
        pairs = [
            (row, read(ids, row.get("tools"), prompt, truncated))
            for row, (_, prompt, ids, truncated) in zip(rows, items, strict=True)
        ]
        values = reward_answers(self.rewards, pairs, seconds=section.metric_seconds, network=section.metric_network)
        return [
            (answer.sampled, one, weigh_rewards(self.rewards, one))
            for (_, answer), one in zip(pairs, values, strict=True)
        ]

    def _trained(self, row: int) -> list[tuple[int, float]]:
        """Return the answers of a group that have a loss, by their numbers, with their advantages."""
        masks = self.section.method == "grpo" and self.section.mask_truncated
        pairs = enumerate(zip(self.groups[row], self.advantages[row], strict=True))
        return [
            (i, weight) for i, (one, weight) in pairs if (weight or self.section.ties) and not (masks and one.truncated)
        ]

    def _count(self, answers: Sequence[Rollout], trained: Sequence[Rollout]) -> int:
        """Return the share of these answers in the denominator of the step."""
        section = self.section
        if section.method == "filter":
            return sum(len(one.ids) for one in trained)
        if section.loss == "dr_grpo":
            return len(answers) * section.max_new_tokens
        masked = sum(len(one.ids) for one in answers if not (section.mask_truncated and one.truncated))
        return len(answers) if section.loss == "grpo" else masked

    def _policy_loss(self, model: torch.nn.Module, made: Batch, *, placeholder: bool = False) -> torch.Tensor:
        temperature = self.section.temperature if self.section.method == "grpo" else 1.0
        if self.section.ties:
            with torch.no_grad(), evaluating(model), reference_of(model):
                made["reference_S"] = -target_losses(model, made, temperature=temperature)[0]
        losses_S, _ = target_losses(model, made, temperature=temperature)
        if placeholder:  # it has no distance from the starting model either
            made["reference_S"] = -losses_S.detach()
        return policy_loss(losses_S, made, self.section)


def answer_batch(pairs: Sequence[tuple[list[int], list[int]]], like: Batch) -> Batch:
    """Return a batch of prompts with answers, packed or padded as the batch of prompts."""
    examples = [Example([*prompt, *ids], [len(prompt), len(prompt) + len(ids)], 0) for prompt, ids in pairs]
    return collate_packed(examples) if "cu_seq_lens_q" in like else collate_padded(examples, None)


def find_round(section: ReinforceSection, plan: StepPlan, step: int) -> tuple[int, range]:
    """Return the round of a step, counted from 1, and its steps."""
    total = plan.total_steps
    if section.rounds is None and section.method == "filter":
        number = (step - 1) // plan.steps_per_epoch + 1
        return number, range((number - 1) * plan.steps_per_epoch + 1, min(number * plan.steps_per_epoch, total) + 1)
    rounds = min(section.rounds or total, total)
    number = (step - 1) * rounds // total + 1
    return number, range(-((1 - number) * total // rounds) + 1, -(-number * total // rounds) + 1)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode."""
    trains = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(trains)


def read_rollouts(path: Path, header: Mapping[str, Any], most_bytes: int) -> list[Rollout]:
    """Return the answers in a file with this header; none if it is missing, damaged or larger than `most_bytes`."""
    is_read = path.is_file() and path.stat().st_size <= most_bytes
    first, *lines = (read_json_lines(path) if is_read else []) or [{}]
    hashes = [line.pop("hash", None) for line in lines]
    with suppress(ValidationError, RecursionError):
        answers = [ROLLOUT.validate_json(json.dumps(line), strict=True) for line in lines]
        if first == header and hashes == [hash_value(asdict(one)) for one in answers]:
            return answers
    return []


def write_rollouts(path: Path, header: Mapping[str, Any], answers: Sequence[Rollout]) -> None:
    """Write the answers of a round, each with its hash: all of them or none."""
    lines = [asdict(one) for one in answers]
    with explained(path):
        path.parent.mkdir(exist_ok=True)
        rows = [header, *({**line, "hash": hash_value(line)} for line in lines)]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _explain_idle(answers: Sequence[Rollout], section: ReinforceSection) -> tuple[str, str, str]:
    """Return why answers teach nothing, where, and what to do."""
    rewards = sorted(one.reward for one in answers if one.reward is not None)
    fix = "Check the rewards with `llmtune reward check`; give easier or harder prompts, or raise reinforce.samples."
    if section.method == "filter":
        best = f"the best reward is {rewards[-1]:.15g}" if rewards else "no reward applies"
        return f"no answer is accepted: {best}, and reinforce.accept is {section.accept:.15g}", "reinforce.accept", fix
    if not rewards:
        return "no reward applies to any answer", "reinforce.rewards", fix
    if not rewards_differ(rewards):
        return f"all rewards equal {rewards[0]:g}", "reinforce.rewards", fix
    if all(one.truncated for one in answers):
        fix = "Raise reinforce.max_new_tokens, or set reinforce.mask_truncated: false."
        return "all answers are truncated, so they are masked", "reinforce.max_new_tokens", fix
    return "the answers to each prompt have the same reward", "reinforce.rewards", fix
