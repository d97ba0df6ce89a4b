"""Planned bytes match measured ones, and a refusal names a recipe that fits."""

import dataclasses
import io
import weakref

import numpy as np
import pytest
import torch
from rich.console import Console
from support.adapting import build_family, documents, open_model, packed, quiet, recipe_with, task_for
from support.image_text import build_image_text
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForImageTextToText

from llmtune.adapter.injection import inject, trained_parameters
from llmtune.errors import EnvironmentProblem
from llmtune.evaluate.greedy_decoding import column_bytes_of
from llmtune.evaluate.sampled_decoding import sample_answers
from llmtune.model.causal_lm_loss import causal_loss
from llmtune.model.config import build_skeleton, find_class
from llmtune.model.memory_plan import (
    check_memory,
    micro_batch_tokens,
    plan_memory,
    plan_skeleton,
    plan_training,
    resolve_checkpointing,
    suggest_recipe,
)
from llmtune.model.resolve import resolve_model
from llmtune.model.towers import find_projectors, find_towers
from llmtune.recipe.schema import Recipe
from llmtune.records import Layout, MemoryPlan
from llmtune.tasks.registry import get_task
from llmtune.train.optimizer import build_optimizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_family(
        tmp_path_factory.mktemp("planned"), "llama", hidden_size=256, head_dim=64, intermediate_size=512
    )


def plan_for(recipe, tokens: int = 128) -> MemoryPlan:
    place = resolve_model(recipe.model.name, recipe.model, quiet())
    return plan_memory(place, recipe, get_task(recipe.task), tokens, "cpu")


def measured(model: torch.nn.Module) -> int:
    seen = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planned_weights_match_those_in_memory(folder, method, dtype):
    recipe = recipe_with(folder, model={"dtype": dtype}, adapter={"method": method})
    plan = plan_for(recipe)
    assert plan.parts["weights"] == pytest.approx(measured(open_model(recipe).model), rel=0.03)


@pytest.mark.parametrize(
    "adapter",
    [{}, {"r": 4}, {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": r".*\.mlp\..*"}, {"method": "full"}],
)
def test_planned_adapter_gradients_and_optimizer_match_those_of_training(folder, adapter):
    recipe = recipe_with(folder, adapter=adapter)
    plan = plan_for(recipe)
    adapted = inject(open_model(recipe), recipe, quiet())
    trained = trained_parameters(adapted.model)
    causal_loss(adapted.model, packed(documents([20]))).sum.backward()
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    states = [part for state in optimizer.state.values() for part in state.values() if part.dim() > 0]
    assert plan.parts["gradients"] == sum(4 * parameter.grad.numel() for parameter in trained)
    assert plan.parts["optimizer"] == sum(part.numel() * part.element_size() for part in states)
    if adapted.method != "full":
        assert plan.parts["adapter"] == adapted.adapter_bytes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_planned_activations_match_the_size_kept_by_the_backward_pass(folder, checkpointing):
    recipe = recipe_with(folder, train={"gradient_checkpointing": checkpointing})
    tokens = 256
    plan = plan_for(recipe, tokens)
    adapted = inject(open_model(recipe), recipe, quiet())
    adapted.model.train()
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in adapted.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = causal_loss(adapted.model, packed(documents([tokens // 4] * 4)))
    found = sum(size for pointer, size in kept.items() if pointer not in weights)
    assert loss.count > 0
    planned = plan.parts["activations"] + plan.parts["logits"]
    assert 0.4 * planned < found < 1.3 * planned or (checkpointing and found < planned)


@pytest.mark.parametrize("r", [4, 64])
@pytest.mark.parametrize(
    "optim", ["adamw_8bit", "lion_8bit", "ademamix_8bit", "rmsprop_bnb_8bit", "lion_32bit", "ademamix"]
)
def test_planned_states_of_other_optimizers_match_theirs(folder, optim, r):
    recipe = recipe_with(folder, adapter={"r": r}, train={"optim": optim})
    adapted = inject(open_model(recipe), recipe, quiet())
    optimizer = build_optimizer(adapted.model, recipe, torch.device("cpu"))
    causal_loss(adapted.model, packed(documents([20]))).sum.backward()
    optimizer.step()
    parts = [part for state in optimizer.state.values() for name, part in state.items() if torch.is_tensor(part)]
    tables = {part.data_ptr() for state in optimizer.state.values() for n, part in state.items() if "qmap" in n}
    kept = sum(part.numel() * part.element_size() for part in parts if part.data_ptr() not in tables and part.dim() > 0)
    assert plan_for(recipe).parts["optimizer"] == pytest.approx(kept, rel=0.02)


def test_a_paged_optimizers_state_is_not_in_the_lower_bound(folder):
    plain, paged = (
        plan_for(recipe_with(folder, train={"optim": optim})) for optim in ("adamw_torch", "paged_adamw_32bit")
    )
    assert paged.parts == plain.parts
    assert paged.lower_bound == plain.lower_bound - plain.parts["optimizer"]


@pytest.mark.parametrize(("limit", "wanted"), [(0.5, True), (0.999, True), (1.001, False), (3.0, False)])
def test_auto_checkpoints_only_if_the_longest_row_does_not_fit_otherwise(folder, monkeypatch, limit, wanted):
    recipe = recipe_with(folder)
    assert recipe.train.gradient_checkpointing == "auto"
    place, task = resolve_model(recipe.model.name, recipe.model, quiet()), get_task(recipe.task)
    total = plan_for(recipe, tokens=512).total
    monkeypatch.setattr("llmtune.model.memory_plan.device_memory", lambda device: int(limit * total / 0.85))
    assert resolve_checkpointing(place, recipe, task, 512, "cpu") is wanted
    monkeypatch.setattr("llmtune.model.memory_plan.device_memory", lambda device: None)
    assert resolve_checkpointing(place, recipe, task, 512, "cpu") is False


def test_unresolved_auto_is_planned_as_off(folder):
    on, off, auto = (plan_for(recipe_with(folder, train={"gradient_checkpointing": g})) for g in (True, False, "auto"))
    assert auto.parts == off.parts == on.parts  # on a CPU what is given back stays with the process


def test_checkpointing_is_planned_to_save_activations_on_a_card(folder):
    plans = []
    for stated in (True, False):
        recipe = recipe_with(folder, train={"gradient_checkpointing": stated}, model={"dtype": "bfloat16"})
        task, place = get_task(recipe.task), resolve_model(recipe.model.name, recipe.model, quiet())
        skeleton = build_skeleton(*find_class(place, recipe, task), recipe)
        plans.append(plan_skeleton(skeleton, recipe, task, 512, "cuda", 10**9))
    assert plans[0].parts["activations"] < 0.6 * plans[1].parts["activations"]  # of two layers
    assert (plans[0].limit, "libraries" in plans[0].parts) == (10**9, False)


def test_a_step_is_planned_with_the_longest_rows_that_fit_into_it(folder):
    recipe = recipe_with(folder, train={"batch_size": 4})
    task, place = get_task(recipe.task), resolve_model(recipe.model.name, recipe.model, quiet())
    lengths = np.array([10] * 50 + [90, 100], dtype=np.int32)
    known, unknown = (plan_training(place, recipe, task, 100, "cpu", rows) for rows in (lengths, None))
    assert known.parts["activations"] / unknown.parts["activations"] == pytest.approx((100 + 90 + 10 + 10) / 400)
    assert known.tokens == unknown.tokens


def test_a_model_that_cannot_fit_is_refused_with_what_fits(folder):
    recipe = recipe_with(folder, adapter={"method": "full"})
    plan = plan_for(recipe)
    limit = plan.parts["libraries"] + 2 * plan.parts["weights"]
    with pytest.raises(EnvironmentProblem) as caught:
        check_memory(dataclasses.replace(plan, limit=limit), recipe, quiet())
    assert "adapter.method: lora" in str(caught.value)
    assert "model.check_memory: false" in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_recipe_named_in_a_refusal_fits(folder, dtype, method):
    """Follow the suggestion: the new plan's lower bound is below the limit."""
    changes = {"adamw_8bit": {"train": {"optim": "adamw_8bit"}, "adapter": {"method": "full"}}}
    changes |= {name: {"adapter": {"method": name, "r": 2}} for name in ("lora", "qlora")}
    recipe = recipe_with(folder, model={"dtype": dtype}, adapter={"method": method, "r": 2})
    plan = plan_for(recipe)
    bounds = {
        name: plan_for(recipe_with(folder, model={"dtype": dtype}, **sections)).lower_bound
        for name, sections in changes.items()
    }
    followed, libraries = set(), plan.parts["libraries"]
    for share in range(5, 100, 5):
        limit = libraries + share * (plan.lower_bound - libraries) // 100
        said = suggest_recipe(dataclasses.replace(plan, limit=limit), recipe)
        named = next((name for name in bounds if f": {name}, which should fit" in said), None)
        if named is None:
            assert "Choose a smaller model" in said
        else:
            followed.add(named)
            assert bounds[named] <= limit, share
    assert followed == ({"adamw_8bit", "lora", "qlora"} if method == "full" else {"qlora"})


def test_the_plan_is_printed_and_a_doubtful_or_overridden_one_is_a_warning(folder, console):
    recipe = recipe_with(folder)
    plan = plan_for(recipe, tokens=4096)
    check_memory(dataclasses.replace(plan, limit=plan.lower_bound + 1), recipe, console)
    said = console.file.getvalue()
    for part in ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "lower bound", "total"):
        assert part in said
    assert "exceeds the memory" in said
    check_memory(dataclasses.replace(plan, limit=1), recipe_with(folder, model={"check_memory": False}), console)
    assert "continuing" in " ".join(console.file.getvalue().split())


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_offloaded_shards_are_planned_in_main_memory(folder, method):
    recipe = recipe_with(folder, adapter={"method": method}, model={"dtype": "bfloat16"})
    place, task = resolve_model(recipe.model.name, recipe.model, quiet()), get_task("chat")

    def plan(device: str, *layout: object) -> MemoryPlan:
        return plan_memory(place, recipe, task, 128, device, Layout(*layout))

    alone, sharded, offloaded = (plan("h100", *one) for one in ((), (4, 1, True), (4, 1, True, True)))
    shards = ("weights", "adapter", "gradients", "optimizer")
    assert offloaded.host == sum(sharded.parts[name] for name in shards) > 0
    assert not set(shards) & offloaded.parts.keys()
    assert offloaded.total < sharded.total < alone.total + sharded.parts["gathered"] + sharded.parts["evaluation"]
    assert (sharded.host, offloaded.parts["gathered"]) == (0, sharded.parts["gathered"])
    assert plan("cpu", 4, 1, True, True).parts == plan("cpu", 4, 1, True).parts


def test_a_layer_in_4_bits_is_gathered_in_4_bits(folder):
    parts = {}
    for method in ("lora", "qlora"):
        recipe = recipe_with(folder, adapter={"method": method}, model={"dtype": "float32"})
        place = resolve_model(recipe.model.name, recipe.model, quiet())
        parts[method] = plan_memory(place, recipe, get_task("chat"), 128, "h100", Layout(2, 1, True)).parts
    assert parts["qlora"]["weights"] < parts["lora"]["weights"]
    assert parts["qlora"]["gathered"] < parts["lora"]["gathered"]


def test_the_first_budget_follows_from_total_memory_and_fits_the_longest_row(folder):
    plan = plan_for(recipe_with(folder), tokens=100)
    per_token = (plan.parts["activations"] + plan.parts["logits"]) // 100
    fixed = plan.lower_bound
    roomy = dataclasses.replace(plan, limit=1 << 60)
    assert micro_batch_tokens(roomy, 100, 10) == 2048
    assert micro_batch_tokens(dataclasses.replace(roomy, device="cuda"), 100, 10) > 2048
    tight = dataclasses.replace(plan, limit=int((fixed + 500 * per_token) / 0.85))
    assert micro_batch_tokens(tight, 100, 10) == pytest.approx(500, rel=0.05)
    assert micro_batch_tokens(tight, 100, 800) == 800
    assert micro_batch_tokens(dataclasses.replace(plan, limit=None), 100, 10) == 2048


def test_a_run_on_pictures_plans_its_towers_and_what_they_compute(tmp_path):
    for family in ("gemma3", "qwen3_vl", "smolvlm"):
        folder = build_image_text(tmp_path / family, family)
        plans = {}
        for images in (False, True):
            recipe = recipe_with(folder, chat={"images": images}, data={"packing": False})
            place = resolve_model(str(folder), recipe.model, quiet(), True)
            plans[images] = plan_memory(place, recipe, task_for(recipe), 64, "cpu").parts
        model = AutoModelForImageTextToText.from_pretrained(folder)
        towers = sum(one.numel() for name in find_towers(model) for one in model.get_submodule(name).parameters())
        assert plans[True]["weights"] - plans[False]["weights"] == pytest.approx(4 * towers, rel=0.01)
        assert plans[True]["adapter"] == plans[False]["adapter"]
        assert plans[True]["activations"] > plans[False]["activations"]
        recipe = recipe_with(folder, chat={"images": True}, adapter={"train_projector": True})
        trained = plan_memory(place, recipe, task_for(recipe), 64, "cpu").parts["adapter"]
        projector = [*find_projectors(model)]
        more = sum(one.numel() for name in projector for one in model.get_submodule(name).parameters())
        assert trained - plans[True]["adapter"] == 4 * more


class LivePeak(TorchDispatchMode):
    """Measures the most bytes of the tensors that are made in it and live at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.storages = weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.note, made)
        return made

    def note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.storages:
            self.storages.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, size: int) -> None:
        self.live -= size


@pytest.mark.parametrize(("vocabulary", "prompt", "new"), [(425, 20, 60), (425, 60, 20), (20_000, 20, 8)])
def test_planned_samples_match_the_peak_while_answers_are_sampled(tmp_path, vocabulary, prompt, new):
    folder = build_family(tmp_path, "llama", vocab_size=vocabulary, num_hidden_layers=4)
    reinforce = {"rewards": {"chrf": 1.0}, "samples": 8, "max_new_tokens": new}
    sections = {"data": {"train": "/nowhere.jsonl"}, "model": {"name": str(folder), "dtype": "float32"}}
    recipe = Recipe.model_validate(
        {"task": "reinforce", "reinforce": reinforce, "train": {"batch_size": 3}, **sections}
    )
    place, task = resolve_model(str(folder), recipe.model, quiet()), get_task("reinforce")
    cost = 8 * (prompt + new)
    plan = plan_training(place, recipe, task, cost, "cpu", np.array([cost] * 9, dtype=np.int32))
    model = open_model(recipe, training=False).model.eval()
    prompts = [[7 + row] * prompt for row in range(3) for _ in range(8)]
    with torch.inference_mode():
        column_bytes_of(model, "cpu")
    with LivePeak() as memory, torch.no_grad():
        sample_answers(model, prompts, [(i,) for i in range(24)], recipe.reinforce, set(), "cpu")
    assert 0.7 * memory.peak < plan.parts["samples"] < 1.3 * memory.peak
    assert plan.lower_bound == plan_memory(place, recipe, task, cost, "cpu").lower_bound
    console = Console(file=io.StringIO(), width=200)
    check_memory(plan, recipe, console)
    assert "samples" in console.file.getvalue()


@pytest.mark.parametrize(
    ("changes", "rows"),
    [({}, 16), ({"method": "filter"}, 200), ({"rounds": 2}, 200), ({"method": "filter", "samples": 16}, 256)],
)
def test_samples_are_planned_for_a_round_up_to_the_largest_batch(folder, changes, rows):
    reinforce = {"rewards": {"chrf": 1.0}, "samples": 8, "max_new_tokens": 4, **changes}
    sections = {"data": {"train": "/nowhere.jsonl"}, "model": {"name": str(folder), "dtype": "float32"}}
    recipe = Recipe.model_validate(
        {"task": "reinforce", "reinforce": reinforce, "train": {"batch_size": 2}, **sections}
    )
    place, task = resolve_model(str(folder), recipe.model, quiet()), get_task("reinforce")
    cost = recipe.reinforce.samples * 20

    def plan(prompts: int) -> int:
        lengths = np.array([cost] * prompts, dtype=np.int32)
        return plan_training(place, recipe, task, cost, "cpu", lengths).parts["samples"]

    each = plan(1) / recipe.reinforce.samples if changes else plan(25) / 16
    assert plan(25) == rows * each
    chat = recipe_with(folder)
    assert "samples" not in plan_training(place, chat, get_task("chat"), 20, "cpu").parts
