"""DFT's loss and NEFTune's noise: in training only, and as in their papers; optimisers that average weights."""

import inspect
import shutil

import pytest
import torch
from support.adapting import documents, open_model, padded, recipe_with
from support.models import build_llama
from support.training import adapt, make_recipe, run_training, write_examples
from transformers import trainer_optimizer
from transformers.integrations.neftune import activate_neftune

from llmtune.errors import RecipeError
from llmtune.model.causal_lm_loss import DFT, causal_loss
from llmtune.recipe.train_section import OPTIM_ARGS
from llmtune.train.optimizer import averaged_weights, build_optimizer


@pytest.mark.parametrize("at_head", [True, False])
def test_dft_multiplies_the_loss_by_the_detached_probability(tiny_llama, at_head):
    model = open_model(recipe_with(tiny_llama, data={"packing": False})).model
    if not at_head:
        from llmtune.model.chunked_cross_entropy import remove_head_loss

        remove_head_loss(model)
    setattr(model, DFT, True)
    weight, batch = model.model.layers[0].mlp.down_proj.weight.requires_grad_(True), padded(documents([9, 14]))
    logs_SV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float().log_softmax(-1)
    losses_S = -logs_SV.flatten(0, 1)[batch["predict_S"]].gather(1, batch["targets_S"][:, None])[:, 0]
    expected = (losses_S * losses_S.detach().neg().exp()).sum()
    torch.testing.assert_close(causal_loss(model.eval(), batch).sum, losses_S.sum(), rtol=1e-4, atol=1e-4)
    found = causal_loss(model.train(), batch).sum
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    one, other = (torch.autograd.grad(loss, weight)[0] for loss in (found, expected))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_noise_is_added_in_training_only(tiny_llama):
    model = open_model(recipe_with(tiny_llama)).model
    batch = padded(documents([12]))
    before = causal_loss(model.eval(), batch).sum
    activate_neftune(model, 50.0)
    assert torch.equal(causal_loss(model.eval(), batch).sum, before)
    assert not torch.equal(causal_loss(model.train(), batch).sum, before)


def test_averaged_weights_are_restored_bit_by_bit(tmp_path, tiny_llama):
    train = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "warmup_steps": 0}
    recipe = make_recipe(tmp_path, tiny_llama, train=train)
    layer = torch.nn.Linear(8, 8)
    optimizer = build_optimizer(layer, recipe, torch.device("cpu"))
    for _ in range(5):
        layer(torch.randn(4, 8)).pow(2).mean().backward()
        optimizer.step()
    before = layer.weight.detach().clone()
    with averaged_weights(optimizer):
        assert not torch.equal(layer.weight, before)
    assert torch.equal(layer.weight, before)


def test_muon_updates_each_matrix_even_if_a_convolution_is_among_the_weights(tmp_path, tiny_llama):
    model = torch.nn.Sequential(torch.nn.Conv1d(8, 8, 3), torch.nn.Linear(8, 8))
    optimizer = build_optimizer(model, make_recipe(tmp_path, tiny_llama, train={"optim": "muon"}), torch.device("cpu"))
    assert [one for group in optimizer.muon.param_groups for one in group["params"]] == [model[1].weight]


def test_muon_leaves_embeddings_and_heads_to_adamw(tmp_path):
    folder = build_llama(tmp_path / "model", tie_word_embeddings=False)
    recipe = make_recipe(tmp_path, folder, train={"optim": "muon"}, adapter={"method": "full"})
    model = adapt(recipe).model
    optimizer = build_optimizer(model, recipe, torch.device("cpu"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices = {names[id(one)] for group in optimizer.muon.param_groups for one in group["params"]}
    others = {names[id(one)] for group in optimizer.adamw.param_groups for one in group["params"]}
    assert {name for name in matrices | others if "proj" in name} == matrices
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} < others


SCHEDULE_FREE = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant_with_warmup"}
RUNS = {
    "muon": {"train": {"optim": "muon"}},
    "schedule-free": {"train": SCHEDULE_FREE},
    "schedule-free-loraplus": {"train": {**SCHEDULE_FREE, "loraplus_lr_ratio": 8.0}},
    "dft-neftune": {"train": {"loss_type": "dft", "neftune_noise_alpha": 5.0}},
    "apollo": {"train": {"optim": "apollo_adamw", "optim_args": {"rank": 4}}, "adapter": {"method": "full"}},
    "galore": {"train": {"optim": "galore_adamw", "optim_args": {"rank": 4}}, "adapter": {"method": "full"}},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_truncated_run_resumes_to_the_same_bytes(tmp_path, tiny_llama, name):
    sections = RUNS[name]
    train = {"max_steps": 6, "eval_steps": 2, "save_steps": 2, "learning_rate": 1e-3, **sections["train"]}
    recipe = make_recipe(tmp_path, tiny_llama, **{**sections, "train": train})
    examples = write_examples(tmp_path / "examples", train=24, validation=8)
    trained = run_training(tmp_path / "run", recipe, examples)
    assert trained.train_loss < trained.first_loss
    result = "weights" if recipe.adapter.method == "full" else "adapter"
    whole = (tmp_path / "run" / result / ("model" if result == "weights" else "adapter_model")).with_suffix(
        ".safetensors"
    )
    bytes_of_all = whole.read_bytes()
    shutil.rmtree(tmp_path / "run" / result)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6")
    again = run_training(tmp_path / "run", recipe, examples)
    assert again.resumed_from == 4
    assert whole.read_bytes() == bytes_of_all


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"train": {"optim": "apollo_adamw"}}, "saves memory in full tuning only"),
        ({"train": {"optim": "schedule_free_adamw"}}, "constant_with_warmup"),
        (
            {"train": {"optim": "galore_adamw", "optim_args": {"rnak": 4}}, "adapter": {"method": "full"}},
            "'train.optim_args.rnak' has no effect with train.optim: galore_adamw",
        ),
        ({"train": {"optim_args": {"rank": 4}}}, "'train.optim_args' has no effect with train.optim: adamw_torch"),
        ({"train": {"optim": "muo"}}, "Did you mean 'muon'"),
    ],
)
def test_conflicting_optimiser_settings_are_refused(tmp_path, tiny_llama, sections, said):
    with pytest.raises(RecipeError) as caught:
        make_recipe(tmp_path, tiny_llama, **sections)
    assert said in str(caught.value)


def test_optimizer_options_are_those_of_transformers():
    source = inspect.getsource(trainer_optimizer)
    assert [name for names in OPTIM_ARGS.values() for name in names if f'"{name}"' not in source] == []
