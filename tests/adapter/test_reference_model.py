"""The model before training, for every kind of adapter: restored temporarily, without side effects."""

import pytest
import torch
from support.adapting import logits, nudge, open_model, quiet, recipe_with, train_a_little

from llmtune.adapter.injection import inject, trained_parameters
from llmtune.adapter.reference_model import REFERENCE, keep_reference, reference_of, switches_off
from llmtune.adapter.saving import save_adapter
from llmtune.recipe.schema import Recipe

FRESH = {"lora": {}, "dora": {"use_dora": True}, "qlora": {"method": "qlora"}}
COPIED = {
    "full": {"method": "full"},
    "bias": {"bias": "all"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}
LOSSES = {"dpo": True, "ipo": True, "kto": True, "orpo": False}
"""By loss, whether it has a reference."""


def recipe_of(model, loss="dpo", **adapter) -> Recipe:
    shape = {} if adapter.get("method") == "full" else {"r": 4}
    content = recipe_with(model, adapter={**shape, **adapter}).model_dump(exclude_unset=True)
    return Recipe.model_validate({**content, "task": "preference", "preference": {"loss": loss}})


def adapt(model, loss="dpo", **adapter):
    recipe = recipe_of(model, loss, **adapter)
    return inject(open_model(recipe), recipe, quiet()).model


@pytest.mark.parametrize("kind", [*FRESH, *COPIED])
def test_the_reference_is_the_model_before_training_and_leaves_trained_weights_unchanged(kind, tiny_llama, tiny_gpt2):
    model = adapt(tiny_gpt2 if kind == "bias" else tiny_llama, **{**FRESH, **COPIED}[kind])  # Llama has no biases
    assert switches_off(model) is (kind in FRESH)
    assert hasattr(model, REFERENCE) is (kind in COPIED), "weights are kept only where they have to be"
    before = logits(model)
    nudge(model)
    after = logits(model)
    assert not torch.allclose(after, before, atol=1e-2)
    weights = [parameter.detach().clone() for parameter in trained_parameters(model)]

    def fail_inside():
        with reference_of(model):
            torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):  # an error puts the weights back too
        fail_inside()
    assert torch.equal(logits(model), after)
    for parameter, weight in zip(trained_parameters(model), weights, strict=True):
        assert torch.equal(parameter, weight)


def test_a_continued_adapter_is_itself_the_reference(tiny_llama, tmp_path):
    start = train_a_little(tiny_llama, target_modules=["q_proj", "v_proj"])
    save_adapter(start, tmp_path / "adapter")
    recipe = recipe_with(tiny_llama, adapter={"start_from": str(tmp_path / "adapter")})
    content = {**recipe.model_dump(exclude_unset=True), "task": "preference"}
    recipe = Recipe.model_validate(content)
    model = inject(open_model(recipe), recipe, quiet()).model
    nudge(model)
    with reference_of(model):
        torch.testing.assert_close(logits(model), logits(start.model))


@pytest.mark.parametrize(("loss", "has_one"), LOSSES.items())
def test_a_loss_without_a_reference_keeps_no_copy(loss, has_one, tiny_llama):
    assert hasattr(adapt(tiny_llama, loss, method="full"), REFERENCE) is has_one


def test_a_gradient_is_that_of_the_policy_even_with_the_reference_used_in_between(tiny_llama):
    ids = torch.arange(5, 25)[None]
    found = []
    for between in (False, True):
        model = adapt(tiny_llama, method="full")
        nudge(model)
        loss = model(input_ids=ids).logits.logsumexp(-1).sum()
        if between:
            with torch.no_grad(), reference_of(model):
                model(input_ids=ids)
        loss.backward()
        found.append([parameter.grad for parameter in trained_parameters(model)])
    for plain, disturbed in zip(*found, strict=True):
        assert torch.equal(plain, disturbed)


def test_a_wrapped_model_is_unwrapped_and_one_without_an_adapter_is_its_own_reference(tiny_llama):
    model = adapt(tiny_llama, method="full")
    wrapped = torch.nn.Module()
    wrapped.module = model
    before = logits(model)
    nudge(model)
    with reference_of(wrapped):
        torch.testing.assert_close(logits(model), before)
    delattr(model, REFERENCE)
    after = logits(model)
    with reference_of(model):
        assert torch.equal(logits(model), after)
    keep_reference(model)
    pairs = zip(model.parameters(), getattr(model, REFERENCE).values(), strict=True)
    assert all(torch.equal(weight, kept) for weight, kept in pairs)
