"""Activated LoRA: the base before its tokens, the adapter after them; saved as plain PEFT, never merged."""

import pytest
import torch
from peft import PeftModel
from support.adapting import documents, open_model, padded, quiet, recipe_with
from transformers import AutoModelForCausalLM

from llmtune.adapter.injection import inject, trained_parameters
from llmtune.adapter.merging import merge_adapter
from llmtune.adapter.saving import save_adapter
from llmtune.data.example import Example
from llmtune.errors import RecipeError
from llmtune.model.causal_lm_loss import causal_loss

CALL = [41, 42]
BEFORE, BEHIND = list(range(5, 20)), list(range(60, 75))


def read(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([BEFORE + CALL + BEHIND]), use_cache=False).logits[0]


def test_activated_lora_is_the_base_before_its_tokens_and_reloads_in_plain_peft(tiny_llama, tmp_path):
    recipe = recipe_with(tiny_llama, adapter={"r": 4, "alora_invocation_tokens": CALL})
    selected = open_model(recipe)
    base = read(selected.model)
    adapted = inject(selected, recipe, quiet())
    assert torch.equal(read(adapted.model), base)
    called = [Example([*one.input_ids[:9], *CALL, *one.input_ids[9:]], [11, 11 + 8], 1) for one in documents([20, 26])]
    optimizer = torch.optim.SGD(trained_parameters(adapted.model), lr=0.5)
    losses = []
    adapted.model.train()
    for _ in range(8):
        loss = causal_loss(adapted.model, padded(called))
        (loss.sum / loss.count).backward()
        assert all(p.grad.isfinite().all() for p in trained_parameters(adapted.model))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.sum.detach()))
    assert losses[-1] < losses[0] - 0.1
    adapted.model.eval()
    tuned = read(adapted.model)
    assert torch.equal(tuned[: len(BEFORE)], base[: len(BEFORE)])
    assert (tuned[len(BEFORE) :] - base[len(BEFORE) :]).abs().max() > 0.01
    save_adapter(adapted, tmp_path)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path)
    torch.testing.assert_close(read(plain.eval()), tuned, atol=1e-5, rtol=0)
    with pytest.raises(RecipeError, match=r"is an activated LoRA \(alora_invocation_tokens\)"):
        inject(open_model(recipe), recipe_with(tiny_llama, adapter={"start_from": str(tmp_path)}), quiet())
    with pytest.raises(RecipeError, match="cannot be merged: it becomes active in the middle of each row"):
        merge_adapter(adapted)
