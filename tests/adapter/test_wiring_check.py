"""The wiring check finds adapters without effect, and leaves everything unchanged."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from support.adapting import open_model, quiet, recipe_with

from llmtune.adapter.injection import inject
from llmtune.adapter.wiring_check import NotWiredError, prove_wiring
from llmtune.errors import RecipeError


def adapted_and_recipe(folder, **adapter):
    recipe = recipe_with(folder, adapter=adapter)
    return inject(open_model(recipe), recipe, quiet()), recipe


@pytest.mark.parametrize("broken", ["does nothing", "cannot be switched off"])
def test_an_adapter_that_has_no_effect_or_cannot_be_switched_off_is_found(tiny_llama, broken):
    adapted, recipe = adapted_and_recipe(tiny_llama)
    for module in adapted.model.modules():
        if isinstance(module, LoraLayer) and broken == "does nothing":
            module.scaling["default"] = 0.0
        elif isinstance(module, LoraLayer):
            module._disable_adapters = True
            module.enable_adapters = lambda enabled: None
    with pytest.raises(NotWiredError):
        prove_wiring(adapted.model, adapted.selected, recipe)


def test_adapters_without_a_gradient_are_named(tiny_llama):
    recipe = recipe_with(tiny_llama, adapter={"target_modules": ["q_proj", "tower"]})
    selected = open_model(recipe)
    selected.model.model.layers[0].tower = torch.nn.Linear(4, 4)
    with pytest.raises(RecipeError) as caught:
        inject(selected, recipe, quiet())
    assert "model.layers.0.tower" in str(caught.value)
    assert "adapter.exclude_modules" in str(caught.value)


class Router(torch.nn.Linear):
    """Returns its choice next to the scores, as Llama 4's and Phi-3.5-MoE's do: a pair cannot be added to."""

    def forward(self, x):
        scores = super().forward(x)
        return scores, scores.argmax(-1)


def test_all_linear_skips_modules_that_no_input_reaches_and_says_so(tiny_llama, console):
    """The image tower of a model that also reads images, a pooling layer unused by the head, a router."""
    recipe = recipe_with(tiny_llama)
    selected = open_model(recipe)
    mlp = selected.model.model.layers[0].mlp
    mlp.tower = torch.nn.Linear(64, 64)
    mlp.ignored, mlp.router = torch.nn.Linear(64, 4), Router(64, 4)

    def call_both(module, inputs):
        module.ignored(inputs[0]), module.router(inputs[0])

    mlp.register_forward_pre_hook(call_both)
    adapted = inject(selected, recipe, console)
    assert len(adapted.matched_modules) == 14
    said = " ".join(console.file.getvalue().split())
    assert "all-linear skips 3 modules that the input does not reach: tower × 1, ignored × 1, router × 1" in said


def test_the_check_restores_weights_modes_gradients_and_random_state(tiny_llama):
    adapted, recipe = adapted_and_recipe(tiny_llama, lora_dropout=0.1)
    adapted.model.train()
    adapted.model.get_base_model().lm_head.eval()
    before = {name: tensor.clone() for name, tensor in adapted.model.state_dict().items()}
    modes = {name: module.training for name, module in adapted.model.named_modules()}
    state = torch.get_rng_state()
    prove_wiring(adapted.model, adapted.selected, recipe)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.model.state_dict().items())
    assert {name: module.training for name, module in adapted.model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in adapted.model.parameters())
