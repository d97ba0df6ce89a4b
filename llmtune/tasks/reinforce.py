"""Task reinforce: sample answers to prompts, and learn from their rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmtune.data.answer_parser import ParsedAnswer
from llmtune.data.chat_rows import ChatRow
from llmtune.data.example import AnyExample, Collate, Example
from llmtune.data.overlong import too_long
from llmtune.data.task_interface import Encoded, StepCosts
from llmtune.errors import DataError
from llmtune.evaluate.evaluated_task import EvalPrediction, LoadedModel
from llmtune.evaluate.generation import cache_rows
from llmtune.evaluate.metric import Measure
from llmtune.recipe.reinforce_section import ReinforceSection
from llmtune.recipe.schema import Recipe
from llmtune.records import Batch, Row, Rows
from llmtune.store.score_records import Study
from llmtune.tasks.chat import Chat
from llmtune.tasks.rated_samples import describe_rewards, rate_samples
from llmtune.tasks.rollouts import Rollouts
from llmtune.tasks.sample_metrics import RatedPrompt, measure_samples, study_rewards
from llmtune.train.objective import StepObjective


class Reinforce(Chat):
    """A decoder that answers conversations, and learns from rewards of its own answers."""

    name = "reinforce"
    has_row_loss = False
    has_rewards = True
    adapter_metrics = ("kl",)

    def matches(self, recipe: Recipe) -> bool:
        """Return True: there is one variant."""
        return True

    def infer_section(self, recipe: Recipe, rows: Rows | None) -> Recipe:
        """Return the recipe: rows decide nothing."""
        return recipe

    def needs_reference_model(self, recipe: Recipe) -> bool:
        """Whether the loss compares with the starting model, or evaluation does with a continued adapter."""
        return reinforce_section(recipe).ties or recipe.adapter.start_from is not None

    def sampled_batch(self, recipe: Recipe, costs: StepCosts, device: str, column_bytes: int) -> tuple[int, int]:
        """Return the answers of a round that fit into a batch, and the length of the longest prompt with its answer."""
        section = reinforce_section(recipe)
        length = -(-costs.longest // section.samples)
        most = cache_rows(device, column_bytes, length)
        together = costs.step if section.method == "grpo" and section.rounds is None else costs.epoch
        return most if together is None else min(most, -(-together // length)), length

    def split_answer(self, row: ChatRow) -> tuple[ChatRow, str]:
        """Split a row at its last answer, which is the reference; a row that ends with a question has none."""
        return super().split_answer(row) if row["messages"][-1]["role"] == "assistant" else (row, "")

    def encode_row(self, row: ChatRow, processor: PreTrainedTokenizerBase, recipe: Recipe) -> Encoded:
        """Return the prompt of a row, with the cost of its samples."""
        section = reinforce_section(recipe)
        try:
            ids = self.prompt_ids(self.split_answer(row)[0], processor, recipe)
        except DataError as error:
            return error.problems[0].what
        longest = len(ids) + section.max_new_tokens
        if longest > recipe.data.max_length:
            why = f" with the {section.max_new_tokens} of reinforce.max_new_tokens"
            return too_long(longest, recipe.data.max_length, why)
        counted, cost = section.samples * section.max_new_tokens, section.samples * longest
        return [Example(ids, (), 0, counted=counted, cost=cost, longest=longest)]

    def encode(self, rows: Sequence[ChatRow], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
        """Return the prompt of each row, or the reason why it has none."""
        return [self.encode_row(row, processor, recipe) for row in rows]

    def collator(self, processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool | None = None) -> Collate:
        """Return the function that makes batches of prompts, with their ids, from which the objective makes its own."""
        collate = super().collator(processor, recipe, packs)

        def collate_prompts(examples: Sequence[AnyExample], draw: int = 0) -> Batch:
            return collate(examples, draw) | {"prompts": [[*example.input_ids] for example in examples]}

        return collate_prompts

    def objective(self, recipe: Recipe) -> StepObjective:
        """Return the objective that samples answers."""
        return Rollouts(self.loss, self, recipe)

    def rate_samples(
        self, rows: Sequence[Row], answers: Sequence[ParsedAnswer], loaded: LoadedModel
    ) -> list[RatedPrompt]:
        """Sample answers to complete rows, and rate them and the greedy `answers`."""
        return rate_samples(self, rows, answers, loaded)

    def compute_metric(self, metric: str, output: EvalPrediction[Any], recipe: Recipe) -> Measure | None:
        """Return a metric of the samples; None for one of the greedy answers."""
        return measure_samples(metric, output.predictions, describe_rewards(reinforce_section(recipe)))

    def study_answers(
        self,
        base: Mapping[int, RatedPrompt],
        tuned: Mapping[int, RatedPrompt],
        prompts: Sequence[str],
        clusters: Sequence[int],
        recipe: Recipe,
    ) -> dict[str, Study]:
        """Return the study of each reward, on the prompts that both models answered."""
        rows = [row for row in tuned if row in base]
        if not rows:
            return {}
        models = {"base": [base[row] for row in rows], "tuned": [tuned[row] for row in rows]}
        shared, groups = [prompts[row] for row in rows], [clusters[row] for row in rows] if clusters else []
        facts = describe_rewards(reinforce_section(recipe))
        return {"rewards": study_rewards(models, shared, groups, facts, recipe.seed, recipe.evaluate.samples)}


def reinforce_section(recipe: Recipe) -> ReinforceSection:
    """Return the recipe's section."""
    assert recipe.reinforce is not None, "rewards are required"
    return recipe.reinforce


VARIANTS = (Reinforce(),)
