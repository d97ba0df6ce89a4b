"""Fused LoRA products give the same as PEFT's layer, and fall back to it if they do not apply."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from support.adapting import documents, open_model, packed, quiet, recipe_with

from llmtune.adapter.fused_lora import FusedLinear, fuse_products
from llmtune.adapter.injection import inject
from llmtune.model.causal_lm_loss import causal_loss
from llmtune.model.device import compute_context


class Net(torch.nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(12, 20, bias=bias), torch.nn.Linear(20, 6, bias=bias)

    def forward(self, x):
        return self.second(torch.nn.functional.silu(self.first(x)))


def build(bias: bool = False, dtype: torch.dtype = torch.float32, **options):
    """Return the same network with adapters twice: with PEFT's layers, and fused."""
    torch.manual_seed(0)
    net = Net(bias).to(dtype)
    plain = get_peft_model(net, LoraConfig(r=4, lora_alpha=12, target_modules=["first", "second"], **options))
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.3
    fused = copy.deepcopy(plain)
    assert fuse_products(fused) == 2
    return plain, fused


def run(model, x, dtype: torch.dtype = torch.float32):
    torch.manual_seed(1)
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    with compute_context(dtype, "cpu"):
        out = model(leaf)
    out.float().square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), gradients | {"x": leaf.grad}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_and_gradients_equal_peft_s(bias, dropout, rslora):
    plain, fused = build(bias, lora_dropout=dropout, use_rslora=rslora)
    x = torch.randn(2, 7, 12)
    (wanted, wanted_gradients), (got, gradients) = run(plain, x), run(fused, x)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - wanted_gradients[name]).norm() < 1e-5 * wanted_gradients[name].norm(), name


def test_under_autocast_they_equal_pefts_up_to_rounding():
    plain, fused = build(dtype=torch.bfloat16)
    x = torch.randn(64, 12).bfloat16()
    (wanted, wanted_gradients), (got, gradients) = (run(model, x, torch.bfloat16) for model in (plain, fused))
    exact, exact_gradients = run(plain.float(), x.float())
    for name, gradient in [("out", got), *gradients.items()]:
        true = exact if name == "out" else exact_gradients[name]
        theirs = wanted if name == "out" else wanted_gradients[name]
        error, their_error = ((g.float() - true).norm() / true.norm() for g in (gradient, theirs))
        assert error < max(1.5 * their_error, 0.01), name


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_layers_with_more_than_two_matrices_are_unchanged(options):
    plain, fused = build(bias=True, **options)
    x = torch.randn(3, 12)
    assert torch.equal(plain(x), fused(x))


def test_a_layer_that_is_switched_off_merged_or_hooked_uses_peft():
    plain, fused = build()
    x = torch.randn(3, 12)
    with plain.disable_adapter(), fused.disable_adapter():
        assert torch.equal(plain(x), fused(x))
    heard = []
    hook = fused.base_model.model.first.base_layer.register_forward_hook(lambda *a: heard.append(1))
    fused(x)
    hook.remove()
    assert heard == [1]
    plain.merge_adapter()
    fused.merge_adapter()
    assert torch.equal(plain(x), fused(x))


def test_a_trained_bias_and_a_second_adapter_are_left_to_peft():
    plain, fused = build(bias=True)
    x = torch.randn(3, 12)
    name = "base_model.model.first.base_layer.bias"
    for model in (plain, fused):
        model.get_parameter(name).requires_grad_()
    torch.testing.assert_close(run(fused, x)[1][name], run(plain, x)[1][name])
    for model in (plain, fused):
        torch.manual_seed(3)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "other"])
    fuse_products(fused)
    torch.testing.assert_close(fused(x), plain(x))


def test_nothing_is_kept_or_computed_below_the_lowest_adapter(tiny_llama):
    recipe = recipe_with(tiny_llama, adapter={"target_modules": "all-linear", "layers_to_transform": [1]})
    adapted = inject(open_model(recipe), recipe, quiet())
    adapted.model.train()
    lora = [module for module in adapted.model.modules() if isinstance(module, Linear)]
    assert {type(layer) for layer in lora} == {FusedLinear}, "injected adapters are fused"
    layers = adapted.model.get_base_model().model.layers
    needed = []
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: needed.append(output.requires_grad))
    causal_loss(adapted.model, packed(documents([9, 14]))).sum.backward()
    assert needed == [index >= 1 for index in range(len(layers))]
    first = layers[1].self_attn.q_proj
    assert isinstance(first, FusedLinear)
    assert first.lora_B["default"].weight.grad.abs().sum() > 0
