"""The loss computed at the head equals that of the logits, with the same gradient; full logits never exist."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.adapting import documents, open_model, packed, padded, recipe_with
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2LMHeadModel, GraniteConfig, LlamaConfig

from llmtune.model import causal_lm_loss as loss
from llmtune.model import chunked_cross_entropy as head_loss
from llmtune.model.causal_lm_loss import causal_loss, predicted_logits
from llmtune.model.chunked_cross_entropy import LogitShape, remove_head_loss, takes_head_loss
from llmtune.model.library_logging import hushed
from llmtune.model.self_checks import take_loss_at_head

SIZES = {"vocab_size": 90, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
SHAPED = {
    "gemma2": Gemma2Config(**SIZES, final_logit_softcapping=0.5, query_pre_attn_scalar=8),
    "cohere": CohereConfig(**SIZES, logit_scale=0.25),
    "granite": GraniteConfig(**SIZES, logits_scaling=3.0),
}


def batch_within(vocabulary: int):
    examples = documents([9])
    return padded([type(one)([i % vocabulary for i in one.input_ids], one.spans, 1) for one in examples])


@pytest.mark.parametrize("shape", [LogitShape(), LogitShape(0.5), LogitShape(2.0, 3.0)])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("chunk", "piece"), [(1 << 24, 1 << 19), (300, 120)])
def test_losses_choices_and_gradients_equal_those_of_the_logits(monkeypatch, shape, trained, bias, chunk, piece):
    monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(head_loss, "_PIECE_ELEMENTS", piece)
    torch.manual_seed(0)
    hidden, targets, weights = torch.randn(17, 8).requires_grad_(), torch.randint(0, 50, (17,)), torch.rand(17)
    head = torch.nn.Linear(8, 50, bias=bias).requires_grad_(trained)
    found = head_loss.head_loss(hidden, head, targets, shape, choices=True)
    logits = head(hidden) * shape.scale
    if shape.cap is not None:
        logits = shape.cap * torch.tanh(logits / shape.cap)
    wanted = cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(found["losses_S"], wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(found["correct_S"], logits.argmax(1) == targets)
    leaves = [hidden, *(head.parameters() if trained else ())]
    got = torch.autograd.grad((found["losses_S"] * weights).sum(), leaves)
    for one, other in zip(got, torch.autograd.grad((wanted * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_in_16_bits_the_gradients_error_is_no_larger_than_that_of_full_logits():
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 500, bias=False).requires_grad_(False)
    hidden, targets = torch.randn(40, 32), torch.randint(0, 500, (40,))

    def gradient(compute, dtype):
        leaf = hidden.to(dtype, copy=True).requires_grad_()
        compute(leaf, copy.deepcopy(head).to(dtype)).backward()
        return leaf.grad.float()

    def plain(leaf, layer):
        return cross_entropy(layer(leaf).float(), targets, reduction="sum")

    def ours(leaf, layer):
        return head_loss.head_loss(leaf, layer, targets, LogitShape(), choices=False)["losses_S"].sum()

    exact = gradient(plain, torch.float32)
    errors = [float((gradient(f, torch.bfloat16) - exact).norm() / exact.norm()) for f in (ours, plain)]
    assert errors[0] < 1.2 * errors[1]


@pytest.mark.parametrize("name", SHAPED)
def test_models_that_transform_their_logits_keep_their_loss(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPED[name], attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert take_loss_at_head(model, torch.float32)
    batch = batch_within(90)
    wanted = cross_entropy(predicted_logits(model, batch), batch["targets_S"], reduction="sum")
    assert float(causal_loss(model, batch).sum.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    plain = cross_entropy(model.base_model(batch["input_ids"])[0][0] @ model.lm_head.weight.T, batch["input_ids"][0])
    assert float(plain.detach()) != pytest.approx(float(wanted.detach()) / len(batch["targets_S"]), rel=1e-3)


def test_full_logits_are_never_in_memory(tiny_llama, monkeypatch):
    monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", 4 * 600)
    model = open_model(recipe_with(tiny_llama)).model
    batch, rows = packed(documents([40, 40])), []
    linear = head_loss.linear
    monkeypatch.setattr(head_loss, "linear", lambda h, w, b: rows.append(len(h)) or linear(h, w, b))
    causal_loss(model, batch)
    assert sum(rows) == len(batch["predict_S"])
    assert max(rows) <= 4 * 600 // model.config.vocab_size + 1


def test_a_head_with_an_adapter_or_a_hook_is_called_as_usual(tiny_llama):
    model = open_model(recipe_with(tiny_llama)).model
    assert takes_head_loss(model)
    hook = model.lm_head.register_forward_hook(lambda *a: None)
    assert not takes_head_loss(model)
    hook.remove()
    untied = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=False))
    assert take_loss_at_head(untied.eval(), torch.float32)
    with hushed():
        adapted = get_peft_model(untied, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    assert not takes_head_loss(untied)
    causal_loss(adapted, batch_within(90)).sum.backward()
    trained = [parameter for name, parameter in adapted.named_parameters() if "lora_" in name]
    assert len(trained) == 2
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained)


def test_a_copy_of_the_model_computes_with_its_own_weights(tiny_llama):
    model = open_model(recipe_with(tiny_llama)).model
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    batch = packed(documents([9]))
    with torch.no_grad():
        one, two = (float(causal_loss(m, batch).sum) for m in (model, other))
    assert one != pytest.approx(two)


def test_a_model_that_does_more_before_its_head_computes_its_loss_from_logits(tiny_gpt2, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2).eval()
    forward = GPT2LMHeadModel.forward

    def doubled(self, *args, **kwargs):
        found = forward(self, *args, **kwargs)
        found.logits = 2 * found.logits
        return found

    assert take_loss_at_head(model, torch.float32)
    remove_head_loss(model)
    monkeypatch.setattr(GPT2LMHeadModel, "forward", doubled)
    loss.accepted_arguments.cache_clear()
    assert not take_loss_at_head(model, torch.float32)
    assert "forward" not in vars(model)
    loss.accepted_arguments.cache_clear()
