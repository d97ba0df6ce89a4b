"""Samples of one model for held-out prompts, their rewards, and their distance from the base model."""

from __future__ import annotations

from collections.abc import Sequence

from llmtune.data.answer_parser import ParsedAnswer
from llmtune.data.collators import collate_padded
from llmtune.data.example import Example
from llmtune.evaluate.evaluated_task import EvaluatedTask, LoadedModel
from llmtune.evaluate.generation import answer_ends, answer_reader
from llmtune.evaluate.rewards import REWARDS, Reward, list_rewards, reward_answers, weigh_rewards
from llmtune.evaluate.sampled_decoding import SampledAnswer, sample_answers
from llmtune.evaluate.token_batches import TOKEN_BUDGET, budget_for, run_in_batches
from llmtune.model.causal_lm_loss import move_to
from llmtune.recipe.reinforce_section import ReinforceSection
from llmtune.records import Advance, Row
from llmtune.store.atomic_files import hash_file, hash_value
from llmtune.tasks.preference_losses import kl_per_token
from llmtune.tasks.sample_metrics import RatedAnswer, RatedPrompt, RatedSample, RewardFacts, repeats_prompt

SHARES = REWARDS.keys() - {"chrf"}
"""Rewards that are numbers from 0 to 1."""
ROUND = 0
"""The number of an evaluation among the rounds of samples; those of training begin at 1."""


def rate_samples(
    task: EvaluatedTask, rows: Sequence[Row], answers: Sequence[ParsedAnswer], loaded: LoadedModel
) -> list[RatedPrompt]:
    """Sample answers to rows, with random numbers that depend on the prompt alone, and rate them and `answers`."""
    model, processor, recipe, section = loaded.model, loaded.processor, loaded.recipe, loaded.recipe.reinforce
    assert section is not None
    count = section.samples
    prompts = [task.prompt_ids(task.split_answer(row)[0], processor, recipe) for row in rows]
    numbers = [int(hash_value(prompt)[:16], 16) for prompt in prompts]
    sampled = sample_answers(
        model,
        [prompt for prompt in prompts for _ in range(count)],
        [(recipe.seed, ROUND, number, sample) for number in numbers for sample in range(count)],
        section,
        set(answer_ends(model, processor, recipe)),
        loaded.device,
        advance_prompts(loaded.advance, count),
    )
    groups = [sampled[start : start + count] for start in range(0, len(sampled), count)]
    read = answer_reader(processor, recipe)
    pairs = [
        (row, parsed)
        for row, prompt, answer, group in zip(rows, prompts, answers, groups, strict=True)
        for parsed in (answer, *(read(one.ids, row.get("tools"), prompt, one.truncated) for one in group))
    ]
    rewards, audit = list_rewards(section)
    seconds, network = recipe.evaluate.metric_seconds, recipe.evaluate.metric_network
    values = reward_answers([*rewards, *audit], pairs, seconds=seconds, network=network)
    given = [
        RatedAnswer(text=parsed.sampled, rewards=one, reward=weigh_rewards(rewards, one))
        for (_, parsed), one in zip(pairs, values, strict=True)
    ]
    kl = measure_kl(prompts, [group[0] for group in groups], loaded)
    rated = []
    for i, (row, group) in enumerate(zip(rows, groups, strict=True)):
        own = slice(i * (count + 1), (i + 1) * (count + 1))
        greedy, *others = given[own]
        contents = [parsed.text for _, parsed in pairs[own][1:]]  # thoughts may repeat the prompt
        question = next((one["content"] for one in reversed(row["messages"]) if one["role"] == "user"), "")
        samples = [
            RatedSample(**one, tokens=len(drawn.ids), cut=drawn.truncated, repeats=repeats_prompt(content, question))
            for one, drawn, content in zip(others, group, contents, strict=True)
        ]
        rated.append(RatedPrompt(greedy=greedy, samples=samples, kl=kl[i] if kl else None))
    return rated


def advance_prompts(advance: Advance, count: int) -> Advance:
    """Return a function that counts samples, and advances by prompts of `count` samples."""
    finished = 0

    def count_samples(samples: int) -> None:
        nonlocal finished
        before, finished = finished // count, finished + samples
        advance(finished // count - before)

    return count_samples


def measure_kl(prompts: Sequence[list[int]], answers: Sequence[SampledAnswer], loaded: LoadedModel) -> list[float]:
    """Return the divergence of each answer from the model without its adapter, in nats per token.

    Empty if the recipe's adapter cannot be switched off.
    """
    if "kl" in loaded.recipe.variant.unmeasured:
        return []
    examples = [
        Example([*prompt, *one.ids], [len(prompt), len(prompt) + len(one.ids)], 0)
        for prompt, one in zip(prompts, answers, strict=True)
    ]

    def work(batch: list[int]) -> list[float]:
        padded = collate_padded([examples[i] for i in batch], loaded.processor.pad_token_id)
        return kl_per_token(loaded.model, move_to(loaded.device, padded))

    lengths = [len(example.input_ids) for example in examples]
    return run_in_batches(lengths, budget_for(loaded.device, TOKEN_BUDGET), work)


def describe_rewards(section: ReinforceSection) -> RewardFacts:
    """Return what the metrics need to know about the rewards of a recipe."""
    rewards, audit = list_rewards(section)
    sampling = f"mean of {section.samples} samples per prompt at temperature {section.temperature:g}"
    sampling += f", top_p {section.top_p:g}, top_k {section.top_k}, up to {section.max_new_tokens} tokens"
    return RewardFacts(
        section.accept,
        {one.name: one.weight for one in rewards},
        next((one.name for one in audit), None),
        frozenset(one.name for one in (*rewards, *audit) if one.stated in SHARES),
        {one.name: sign_reward(one) for one in (*rewards, *audit)},
        sampling,
    )


def sign_reward(reward: Reward) -> str:
    """Return the name of a reward, with the hash of its file if it has one."""
    return f"{reward.name} ({reward.file.name}, sha256 {hash_file(reward.file)[:12]})" if reward.file else reward.name
