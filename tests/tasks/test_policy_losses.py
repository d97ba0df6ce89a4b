"""Policy losses, advantages and masks equal those of TRL's trainer, for the same samples and rewards."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from support.models import build_llama
from support.pairs import gradient, recipe_of, start_training
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from llmtune.evaluate.generation import answer_ends, answer_reader
from llmtune.recipe.reinforce_section import ReinforceSection
from llmtune.records import Json
from llmtune.tasks.policy_losses import find_advantages
from llmtune.tasks.rollouts import Rollout, write_rollouts

ROWS = [{"prompt": f"Which colour has the {thing}?", "completion": "It is red"} for thing in ("cat", "dog", "bird")]
SAMPLES, LONGEST = 4, 7
REWARDS: list[list[float | None]] = [[1.0, 0.0, 0.25, 1.0], [0.5, 0.5, 0.5, 0.5], [0.0, None, 1.0, 0.0]]
"""By prompt; one has no spread, and one an answer to which no reward applies."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("model") / "llama")


def start(model: Path, folder: Path, section: Json) -> Any:
    """Set up a training of three prompts in one step."""
    reinforce = {"rewards": {"exact_match": 1.0}, "samples": SAMPLES, "max_new_tokens": LONGEST, **section}
    data = {"validation": 0, "test": 0}
    train = {"batch_size": 3, "num_train_epochs": 2, "max_grad_norm": 0.0}
    adapter = {"lora_dropout": 0.0}
    path = recipe_of(folder, model, ROWS, "reinforce", reinforce=reinforce, data=data, train=train, adapter=adapter)
    training = start_training(path, folder / "run")
    training.adapted.selected.model.generation_config.eos_token_id = [2, 9]
    return training


def move(training: Any, seed: int) -> None:
    with torch.no_grad():
        for i, parameter in enumerate(training.parameters):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * seed + i))
            parameter.add_(0.05 * noise)


def make_rollouts(training: Any, cut_row: int | None = None) -> list[Rollout]:
    """Make answers: most end with one of two end tokens; some are truncated, and all to the prompt `cut_row`."""
    chance, processor = random.Random(5), training.adapted.selected.processor
    stops = answer_ends(training.adapted.model, processor, training.recipe)
    assert len(stops) > 1
    rollouts = []
    for row, rewards in enumerate(REWARDS):
        for sample, reward in enumerate(rewards):
            truncated = row == cut_row or (row, sample) in ((0, 1), (1, 2), (2, 3))
            length = LONGEST if truncated else chance.randint(1, LONGEST - 1)
            ids = [chance.randrange(10, 250) for _ in range(length)]
            ids += [] if truncated else [stops[sample % len(stops)]]
            assert len(ids) <= LONGEST
            rollouts.append(Rollout(row, sample, ids, "", truncated, {"exact_match": reward}, reward))
    return rollouts


def build_trainer(training: Any, rollouts: list[Rollout], folder: Path, options: Json) -> GRPOTrainer:
    """Build TRL's trainer around a model with the same weights, with our samples and their rewards."""
    plain = AutoModelForCausalLM.from_pretrained(training.recipe.model.name, dtype=torch.float32)
    tuned = get_peft_model(plain, training.adapted.model.peft_config["default"])
    copy_adapter(training, tuned)
    processor, prompts = training.adapted.selected.processor, [row["prompt"] for row in ROWS]

    def sample(given: list[str], trainer: GRPOTrainer) -> Json:
        assert given == [prompt for prompt in prompts for _ in range(SAMPLES)]
        ids = [list(training.examples[one.row].input_ids) for one in rollouts]
        return {"prompt_ids": ids, "completion_ids": [one.ids for one in rollouts], "logprobs": None}

    read = answer_reader(processor, training.recipe)

    def reward(completions: list[str], **columns: Any) -> list[float | None]:
        assert completions == [read(one.ids, None).sampled for one in rollouts], "the text that rewards read"
        return [one.reward for one in rollouts]

    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=len(rollouts),
        num_generations=SAMPLES,
        max_completion_length=LONGEST,
        use_cpu=True,
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
        mask_truncated_completions=True,
        **options,
    )
    dataset = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    trainer = GRPOTrainer(tuned, reward, config, dataset, processing_class=processor, rollout_func=sample)
    trainer.eos_token_ids = answer_ends(training.adapted.model, processor, training.recipe)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def copy_adapter(training: Any, tuned: PeftModel) -> None:
    set_peft_model_state_dict(tuned, get_peft_model_state_dict(training.adapted.model))


SETTINGS: dict[str, tuple[Json, Json]] = {
    "dr_grpo": ({}, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "grpo": ({"loss": "grpo"}, {"loss_type": "grpo", "scale_rewards": "group"}),
    "dapo": ({"loss": "dapo"}, {"loss_type": "dapo", "scale_rewards": "group"}),
    "bnpo": ({"loss": "bnpo"}, {"loss_type": "bnpo", "scale_rewards": "group"}),
    "scaled": ({"scale_rewards": "group"}, {"loss_type": "dr_grpo", "scale_rewards": "group"}),
    "unscaled": ({"loss": "grpo", "scale_rewards": "none"}, {"loss_type": "grpo", "scale_rewards": "none"}),
    "warm": ({"temperature": 0.7}, {"loss_type": "dr_grpo", "scale_rewards": "none", "temperature": 0.7}),
    "tied": ({"beta": 0.1}, {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.1}),
    "tied-grpo": ({"beta": 0.1, "loss": "grpo"}, {"loss_type": "grpo", "scale_rewards": "group", "beta": 0.1}),
    "tied-cut": ({"beta": 0.1}, {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.1}),
    "reused": ({"rounds": 1}, {"loss_type": "dr_grpo", "scale_rewards": "none", "num_iterations": 2}),
    "clipped": (
        {"rounds": 1, "epsilon": 0.02, "loss": "grpo"},
        {"loss_type": "grpo", "scale_rewards": "group", "num_iterations": 2, "epsilon": 0.02},
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_the_same_samples_give_the_loss_and_gradient_of_trl(name: str, model: Path, tmp_path: Path) -> None:
    section, options = SETTINGS[name]
    training = start(model, tmp_path, section)
    rollouts = make_rollouts(training, 0 if name == "tied-cut" else None)
    trainer = build_trainer(training, rollouts, tmp_path, options)
    move(training, 0)  # away from the start, where half of the gradient is zero
    copy_adapter(training, trainer.model)
    trainer.model.train()
    inputs = [{"prompt": row["prompt"]} for row in ROWS for _ in range(SAMPLES)]
    scored = trainer._generate_and_score_completions(inputs)
    if "num_iterations" in options:
        tokens = scored["old_per_token_logps"].tolist()
        rollouts = [replace(one, logps=logps[: len(one.ids)]) for one, logps in zip(rollouts, tokens, strict=True)]
        move(training, 1)
        copy_adapter(training, trainer.model)
    loss = trainer.compute_loss(trainer.model, scored)
    loss.backward()
    expected = torch.cat([weight.grad.flatten() for weight in trainer.model.parameters() if weight.requires_grad])

    header = {"round": 1, "inputs": "inputs", "prompts": [0, 1, 2], "answers": len(rollouts)}
    write_rollouts(training.folder / "rollouts" / "1.jsonl", header, rollouts)
    for budget in (1, 100_000):
        found_loss, found = gradient(training, budget)
        assert found_loss == pytest.approx(loss.item(), abs=1e-5)
        assert float(expected.norm()) > 1e-3
        assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("total", [0.7 + 0.2 + 0.1, 1.0, 1.0 - 1e-8])
def test_an_answer_is_accepted_although_its_weighted_sum_is_rounded(total: float) -> None:
    section = ReinforceSection(method="filter", rewards={"exact_match": 1.0})
    assert find_advantages([total, None, 0.0], section) == [float(total > 1 - 1e-8), 0.0, 0.0]


def test_rewards_that_differ_by_rounding_alone_teach_nothing() -> None:
    for scale in ("none", "group"):
        section = ReinforceSection(rewards={"exact_match": 1.0}, scale_rewards=scale)
        assert find_advantages([0.7 + 0.2 + 0.1, 1.0, None], section) == [0.0, 0.0, 0.0]
        assert find_advantages([0.5, 1.0], section)[1] > 0
