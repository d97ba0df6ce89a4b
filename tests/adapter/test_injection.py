"""Adapters: seeded, in float32, on the intended modules, switched on and off, learning."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.adapting import documents, logits, open_model, packed, quiet, recipe_with
from support.families import build_bert, build_whisper
from support.pairs import gradient, recipe_of, start_training
from transformers import AutoModelForCausalLM

from llmtune.adapter.injection import describe_adapter, inject, trained_parameters
from llmtune.display.number_format import size
from llmtune.errors import RecipeError
from llmtune.model.causal_lm_loss import causal_loss
from llmtune.model.device import compute_context
from llmtune.model.library_logging import hushed
from llmtune.pipeline import run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.schema import Recipe
from llmtune.store.run_request import RunRequest

QUESTIONS = [
    {"question": f"Which colour has the {thing}?", "context": f"The {thing} is {colour}.", "answer": colour}
    for thing in ("cat", "dog", "fox", "bird")
    for colour in ("red", "green", "blue")
]
QA = {"qa": {"stride": 4}, "generation": {"max_new_tokens": None}}
METHODS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa-niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "qlora": {"method": "qlora"},
    "qlora-dora": {"method": "qlora", "use_dora": True},
    "full": {"method": "full"},
}


def adapt(folder, console=None, train=None, model=None, **adapter):
    recipe = recipe_with(folder, adapter={"r": 8, **adapter}, train=train or {}, model=model or {})
    return inject(open_model(recipe), recipe, console or quiet())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_starts_from_the_base_model(tiny_llama, tiny_gpt2, family, method):
    folder = {"llama": tiny_llama, "gpt2": tiny_gpt2}[family]
    if (family, method) == ("gpt2", "olora"):
        with pytest.raises(RecipeError, match="Conv1D"):
            adapt(folder, **METHODS[method])
        return
    recipe = recipe_with(folder, adapter={"r": 8, **METHODS[method]})
    selected = open_model(recipe)
    before = logits(selected.model)
    torch.testing.assert_close(logits(inject(selected, recipe, quiet()).model), before, atol=2e-6, rtol=0)


def test_the_initialization_depends_only_on_the_seed(tiny_llama):
    starts = []
    for seed, noise in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(99 + noise)
        torch.randn(noise + 1)
        recipe = recipe_with(tiny_llama).model_copy(update={"seed": seed})
        adapted = inject(open_model(recipe), recipe, quiet())
        starts.append((torch.cat([p.flatten() for p in trained_parameters(adapted.model)]), torch.get_rng_state()))
    assert torch.equal(starts[0][0], starts[1][0])
    assert torch.equal(starts[0][1], starts[1][1])
    assert not torch.equal(starts[0][0], starts[2][0])


@pytest.mark.parametrize("method", ["lora", "dora", "qlora"])
def test_trained_weights_are_float32_on_a_bfloat16_base(tiny_llama, method):
    adapted = adapt(tiny_llama, model={"dtype": "bfloat16"}, **METHODS[method])
    trained = trained_parameters(adapted.model)
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert adapted.model.get_input_embeddings().weight.dtype == torch.bfloat16
    adapted.model.train()
    with compute_context(torch.bfloat16, "cpu"):
        loss = causal_loss(adapted.model, packed(documents([20, 30])))
    loss.sum.backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in trained)


def test_only_the_adapter_is_trained_or_with_full_every_weight(tiny_llama):
    adapted = adapt(tiny_llama)
    trained = {name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    assert adapted.trainable == sum(parameter.numel() for parameter in trained_parameters(adapted.model))
    assert adapt(tiny_llama, method="qlora").total == adapted.total, "weights in 4 bits are counted, not their bytes"
    full = adapt(tiny_llama, method="full")
    assert full.trainable == full.total == sum(parameter.numel() for parameter in full.model.parameters())
    assert full.matched_modules == ()


def test_matched_modules_share_and_size_are_printed(tiny_llama, console):
    adapted = adapt(tiny_llama, console)
    said = console.file.getvalue()
    assert "Adapter on 14 modules: q_proj × 2" in said
    assert f"{adapted.trainable:,} of {adapted.total:,} parameters" in said
    assert f"{size(adapted.adapter_bytes)} to save" in said
    described = describe_adapter(adapted)
    assert described["targets"]["down_proj"] == 2
    assert described["share"] == adapted.trainable / adapted.total
    assert described["r"] == 8


def test_checkpointing_changes_memory_and_not_gradients(tiny_llama):
    kept, gradients = [], []
    for on in (False, True):
        adapted = adapt(tiny_llama, train={"gradient_checkpointing": on})
        adapted.model.train()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            loss = causal_loss(adapted.model, packed(documents([20, 30])))
        loss.sum.backward()
        kept.append(sum(sizes))
        gradients.append(torch.cat([p.grad.flatten() for p in trained_parameters(adapted.model)]))
    torch.testing.assert_close(*gradients)
    assert kept[1] < 0.6 * kept[0]


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_initializations_that_change_the_base_are_refused_on_4_bits_above_a_matrixs_rank_and_on_embeddings(
    tiny_llama, start
):
    with pytest.raises(RecipeError, match="4-bit base cannot undo"):
        adapt(tiny_llama, method="qlora", init_lora_weights=start)
    with pytest.raises(RecipeError, match=r"Set adapter\.r to 32 or less"):
        adapt(tiny_llama, init_lora_weights=start, r=33)
    with pytest.raises(RecipeError, match="embed_tokens is not one"):
        adapt(tiny_llama, init_lora_weights=start, target_modules=["embed_tokens"])


def test_added_tokens_are_trained_and_nothing_else_of_the_embedding(tiny_llama, tmp_path):
    adapted = adapt(tiny_llama, model={"add_tokens": ["<tool>"]}, target_modules=["q_proj"])
    model = adapted.model
    new = model.get_base_model().config.vocab_size - 1
    optimizer = torch.optim.SGD(trained_parameters(model), lr=0.1)
    example = documents([12])[0]
    example.input_ids[5] = new
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "original_module" not in name}
    with torch.no_grad():
        start = model(input_ids=torch.tensor([[new]]), use_cache=False).logits[0]
    for _ in range(3):
        causal_loss(model, packed([example])).sum.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, tensor in model.state_dict().items() if name in before and not tensor.equal(before[name])}
    assert any("trainable_tokens_delta" in name for name in changed)
    assert all("lora_" in name or "trainable_tokens" in name for name in changed)
    with torch.no_grad():
        assert not torch.equal(model(input_ids=torch.tensor([[new]]), use_cache=False).logits[0], start)


def test_a_plain_peft_model_with_the_same_seed_is_equal(tiny_llama):
    """The options mean the same as in PEFT."""
    adapted = adapt(tiny_llama, target_modules=["q_proj", "v_proj"], lora_alpha=4, use_rslora=True)
    torch.manual_seed(42)
    config = LoraConfig(r=8, lora_alpha=4, target_modules=["q_proj", "v_proj"], use_rslora=True, task_type="CAUSAL_LM")
    with hushed():
        plain = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
    ours = dict(adapted.model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(ours[name], parameter), name


@pytest.mark.parametrize(
    ("adapter", "where", "name"),
    [
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save", r"model\.embed_tokens"),
        ({"target_modules": ["embed_tokens"]}, "target_modules", r"model\.embed_tokens"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save", "lm_head"),
    ],
)
def test_an_embedding_cannot_be_trained_fully_and_in_the_rows_of_added_tokens(tiny_llama, adapter, where, name):
    with pytest.raises(RecipeError, match=rf"{name} is trained only in the rows of model\.add_tokens") as caught:
        adapt(tiny_llama, model={"add_tokens": ["<tool>"]}, **adapter)
    assert caught.value.problems[0].where == f"adapter.{where}"


@pytest.mark.parametrize(
    ("adapter", "trained"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embedding"),
        ({"modules_to_save": ["lm_head"]}, "head"),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, "embedding, head"),
    ],
)
def test_untying_an_embedding_and_a_head_is_reported(tiny_llama, console, adapter, trained):
    recipe = recipe_with(tiny_llama, adapter=adapter)
    inject(open_model(recipe), recipe, console)
    said = " ".join(console.file.getvalue().split())
    assert f"share one weight in the base; with this adapter they are separate (trained: {trained})" in said


def test_only_the_rows_of_added_tokens_count_as_adapted(tiny_llama):
    share = describe_adapter(adapt(tiny_llama))["share_under_adapter"]
    more = describe_adapter(adapt(tiny_llama, model={"add_tokens": ["<tool>"]}))["share_under_adapter"]
    assert share < more < share + 0.002


def test_questions_and_contexts_are_distinguished_with_every_method(tmp_path):
    """BERT's token types: an adapter without effect yet starts at the loss of the original model."""
    model, losses = build_bert(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), {}
    for method in ("lora", "full"):
        path = recipe_of(tmp_path / method, model, QUESTIONS, "qa", adapter={"method": method}, **QA)
        losses[method] = gradient(start_training(path, tmp_path / method / "run"), 512)[0]
    assert losses["lora"] == pytest.approx(losses["full"], rel=1e-6)


def test_a_part_of_a_classifiers_body_is_fully_trained_and_its_embedding_is_not_tied_to_a_head(tmp_path, console):
    rows = [{"text": row["context"], "label": row["answer"]} for row in QUESTIONS] * 2
    adapter = {"modules_to_save": ["pooler"], "target_modules": ["query", "word_embeddings"]}
    sections = {"adapter": adapter, "generation": {"max_new_tokens": None}, "data": {"deduplicate": "none"}}
    recipe = recipe_of(tmp_path, build_bert(tmp_path / "model"), rows, "classify", **sections)
    run_pipeline(load_recipe(str(recipe)), RunRequest(out=tmp_path / "run", until="adapt"), console)
    said = console.file.getvalue()
    assert "query × 2" in said
    assert "share one weight" not in said


def test_a_model_that_fails_with_an_adapter_on_named_modules_gives_no_traceback(tmp_path):
    recipe = recipe_with(build_whisper(tmp_path), adapter={"target_modules": ["conv1"]}).model_dump()
    recipe = Recipe.model_validate({**recipe, "task": "speech", "speech": {"window_seconds": 2, "language": "fr"}})
    with pytest.raises(RecipeError, match="the model does not run with this adapter: 'Conv1d' object has no attribute"):
        inject(open_model(recipe), recipe, quiet())
