import typing

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from support.models import build_llama
from support.training import adapt, make_recipe

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.recipe.train_section import Optimizer, Schedule
from llmtune.train.optimizer import build_optimizer, build_schedule

NAMES = [name for name in typing.get_args(Optimizer) if not name.startswith("paged_")]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_llama):
    return make_recipe(tmp_path_factory.mktemp("optimizer"), tiny_llama)


def change(recipe, **train):
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(96, 96), torch.nn.LayerNorm(96))


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_learns_and_resumes_from_its_saved_state_bit_by_bit(name, recipe, tmp_path):
    inputs = torch.randn(32, 96, generator=torch.Generator().manual_seed(1))

    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            loss = (model(inputs) - inputs).pow(2).mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    model = small_model()
    optimizer = build_optimizer(model, change(recipe, optim=name, learning_rate=1e-2), CPU)
    first = steps(model, optimizer, 1)
    steps(model, optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    twin = small_model()
    twin.load_state_dict(model.state_dict())
    again = build_optimizer(twin, change(recipe, optim=name, learning_rate=1e-2), CPU)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert steps(model, optimizer, 3) == steps(twin, again, 3) < first
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("name", sorted(set(typing.get_args(Optimizer)) - set(NAMES)))
def test_a_paged_optimizer_without_a_gpu_is_refused_with_an_alternative(name, recipe):
    with pytest.raises(EnvironmentProblem) as caught:
        build_optimizer(small_model(), change(recipe, optim=name), CPU)
    assert caught.value.problems[0].fix.removeprefix("Set train.optim to ").removesuffix(".") in NAMES


def test_biases_and_norms_do_not_decay(recipe):
    groups = build_optimizer(small_model(), change(recipe, weight_decay=0.5), CPU).param_groups
    assert [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in groups] == [
        (0.5, [2]),
        (0.0, [1, 1, 1]),
    ]


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused"])
def test_torch_adamw_is_configured_as_transformers_would(name, recipe):
    from transformers import Trainer, TrainingArguments

    values = {"optim": name, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "learning_rate": 0.5}
    kind, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(**values, use_cpu=True, report_to="none"))
    assert options["betas"] == (0.8, 0.9)
    optimizer = build_optimizer(small_model(), change(recipe, **values), CPU)
    assert type(optimizer) is kind
    assert {key: optimizer.param_groups[0][key] for key in options} == options


@pytest.mark.parametrize(
    "adapter", [{}, {"bias": "lora_only"}, {"use_dora": True}, {"target_modules": ["q_proj", "embed_tokens"]}]
)
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "sgd"])
def test_lora_plus_groups_match_peft(tmp_path, adapter, optim):
    train = {"loraplus_lr_ratio": 8.0, "learning_rate": 1e-3, "weight_decay": 0.5, "optim": optim}
    recipe = make_recipe(tmp_path, build_llama(tmp_path / "model", attention_bias=True), adapter=adapter, train=train)
    model = adapt(recipe).model
    groups = build_optimizer(model, recipe, CPU).param_groups
    settings = {"loraplus_lr_ratio": 8.0, "loraplus_weight_decay": 0.5, "loraplus_lr_embedding": 1e-3}
    theirs = create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-3, **settings).param_groups
    assert [(g["lr"], g["weight_decay"], [*map(id, g["params"])]) for g in groups] == [
        (g["lr"], g["weight_decay"], [*map(id, g["params"])]) for g in theirs
    ]
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    trained = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert {rate for name, rate in trained.items() if ".lora_A." in name or ".lora_embedding_" in name} == {1e-3}
    assert {rate for name, rate in trained.items() if ".lora_B." in name} == {8e-3}


@pytest.mark.parametrize(
    ("warmup_steps", "rates"),
    [(0.25, [0.5, 1, 6 / 7, 5 / 7]), (1, [1, 7 / 8, 6 / 8, 5 / 8]), (0, [1, 7 / 8, 6 / 8, 5 / 8])],
)
def test_warmup_below_one_is_a_share_of_all_steps_and_the_first_rate_is_not_zero(warmup_steps, rates, recipe):
    optimizer = build_optimizer(small_model(), change(recipe, learning_rate=1.0), CPU)
    schedule = build_schedule(optimizer, change(recipe, warmup_steps=warmup_steps), 8)
    seen = []
    for _ in range(4):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx(rates)


@pytest.mark.parametrize(
    ("name", "options"),
    [("cosine", {"min_lr": 0.1}), ("warmup_stable_decay", {}), ("cosine_with_min_lr", {}), ("linear", {"power": 2.0})],
)
def test_options_that_do_not_fit_the_schedule_are_a_recipe_error(name, options, recipe):
    wrong = change(recipe, lr_scheduler_type=name, lr_scheduler_kwargs=options)
    optimizer = build_optimizer(small_model(), recipe, CPU)
    with pytest.raises(RecipeError, match=f"the schedule {name} with {next(iter(options), 'no arguments')}: "):
        build_schedule(optimizer, wrong, 8)


@pytest.mark.parametrize("name", [name for name in typing.get_args(Schedule) if name != "constant"])
def test_no_step_of_any_schedule_has_a_learning_rate_of_zero(name, recipe):
    options = {"warmup_stable_decay": {"num_decay_steps": 3}, "cosine_with_min_lr": {"min_lr_rate": 0.1}}.get(name, {})
    chosen = change(recipe, lr_scheduler_type=name, lr_scheduler_kwargs=options, warmup_steps=2, learning_rate=1.0)
    optimizer = build_optimizer(small_model(), chosen, CPU)
    schedule = build_schedule(optimizer, chosen, 8)
    seen = []
    for _ in range(8):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen[0] == 0.5
    assert max(seen) == seen[1] == 1.0
    assert min(seen) > 0


def test_a_warmup_share_never_takes_the_only_step(recipe):
    optimizer = build_optimizer(small_model(), change(recipe, warmup_steps=0.03), CPU)
    build_schedule(optimizer, change(recipe, warmup_steps=0.03), 1)
    assert optimizer.param_groups[0]["lr"] == recipe.train.learning_rate


def test_a_warmup_as_long_as_training_is_an_error(recipe):
    optimizer = build_optimizer(small_model(), recipe, CPU)
    with pytest.raises(RecipeError, match=r"train\.warmup_steps"):
        build_schedule(optimizer, change(recipe, warmup_steps=5), 5)
