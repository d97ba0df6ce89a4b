"""LoRA initializations from training rows: they begin as the base, depend on the rows, and reload in plain PEFT."""

import pytest
import torch
from peft import PeftModel
from support.adapting import logits, nudge, open_model, quiet
from support.training import make_recipe, write_examples
from transformers import AutoModelForCausalLM

from llmtune.adapter.data_init import sample_rows
from llmtune.adapter.injection import inject, trained_parameters
from llmtune.adapter.saving import save_adapter
from llmtune.errors import RecipeError
from llmtune.tasks.registry import get_task

STARTS = ("eva", "corda", "lora_ga")


def adapt(folder, model, start, seed=0):
    recipe = make_recipe(folder, model, adapter={"init_lora_weights": start, "r": 4})
    selected, examples = open_model(recipe), write_examples(folder / "examples", seed=seed, train=24)
    before = logits(selected.model)
    return inject(selected, recipe, quiet(), sample_rows(examples, get_task("chat"), selected, recipe)), before


@pytest.mark.parametrize("start", STARTS)
def test_an_initialization_from_rows_equals_the_base_and_reloads_in_plain_peft(tmp_path, tiny_llama, start):
    adapted, before = adapt(tmp_path, tiny_llama, start)
    torch.testing.assert_close(logits(adapted.model), before, atol=1e-5, rtol=1e-5)
    nudge(adapted.model)
    tuned = logits(adapted.model)
    assert (tuned - before).abs().max() > 0.01
    save_adapter(adapted, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "adapter")
    torch.testing.assert_close(logits(plain.eval()), tuned, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("start", STARTS)
def test_an_initialization_from_rows_depends_only_on_the_rows(tmp_path, tiny_llama, start):
    starts = []
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        adapted, _ = adapt(tmp_path / name, tiny_llama, start, seed)
        starts.append(torch.cat([p.detach().flatten() for p in trained_parameters(adapted.model)]))
    assert torch.equal(starts[0], starts[1])
    assert starts[0].shape != starts[2].shape or not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("start", STARTS)
def test_only_the_process_that_builds_the_model_computes_an_initialization_from_rows(tmp_path, tiny_llama, start):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        adapt(tmp_path, tiny_llama, start)  # PEFT warns, which is an error here, where it would ask the others
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("sets", "why"),
    [
        ({"init_lora_weights": "loftq"}, "LoftQ is not supported"),
        ({"method": "qlora", "init_lora_weights": "corda"}, "weights that are not quantised"),
    ],
)
def test_initializations_that_no_file_can_store_are_refused(tmp_path, tiny_llama, sets, why):
    with pytest.raises(RecipeError, match=why):
        make_recipe(tmp_path, tiny_llama, adapter=sets)
