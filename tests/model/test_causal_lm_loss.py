"""The loss equals the textbook's for any batching; logits exist only at predicted positions."""

import math

import pytest
import torch
from support.adapting import documents, open_model, packed, padded, recipe_with
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from llmtune.model import chunked_cross_entropy as chunked
from llmtune.model.causal_lm_loss import causal_loss, predicted_logits
from llmtune.model.chunked_cross_entropy import remove_head_loss
from llmtune.model.device import compute_context

LENGTHS = [9, 4, 17, 6, 12, 5, 8, 10]


@pytest.fixture
def model(tiny_llama):
    return open_model(recipe_with(tiny_llama)).model


@torch.no_grad()
def textbook(folder, examples) -> list[float]:
    """Nats of each row from a plain model, one row at a time."""
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    sums = []
    for example in examples:
        start, end = example.spans
        logits = plain(torch.tensor([example.input_ids])).logits[0, start - 1 : end - 1]
        sums.append(float(cross_entropy(logits, torch.tensor(example.input_ids[start:end]), reduction="sum")))
    return sums


@pytest.mark.parametrize("collate", [packed, padded])
def test_the_loss_equals_the_textbooks_for_each_row(tiny_llama, model, collate):
    examples = documents(LENGTHS)
    loss = causal_loss(model, collate(examples), by_row=True)
    wanted = textbook(tiny_llama, examples)
    assert loss.row_sums.tolist() == pytest.approx(wanted, rel=1e-5)
    assert float(loss.sum.detach()) == pytest.approx(sum(wanted), rel=1e-5)
    assert loss.count == sum(example.supervised for example in examples)
    assert loss.sum.dtype == torch.float32


def test_first_choices_are_counted_by_row(model):
    examples = documents(LENGTHS)
    for example in examples:  # let the model's own continuation be the reference of every second token
        ids = torch.tensor([example.input_ids])
        choice = model(input_ids=ids, use_cache=False).logits[0].argmax(-1)
        example.input_ids[-1] = int(choice[-2])
    loss = causal_loss(model, packed(examples), by_row=True)
    batch = packed(examples)
    right = predicted_logits(model, batch).argmax(-1) == batch["targets_S"]
    assert int(loss.correct) == int(right.sum()) == int(loss.row_correct.sum())
    assert bool((loss.row_correct >= 1).all())


def test_logits_exist_only_at_predicted_positions(model):
    seen = []
    remove_head_loss(model)
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:2].numel()))
    examples = documents([40, 40])
    batch = packed(examples)
    causal_loss(model, batch)
    assert seen == [len(batch["predict_S"])]
    assert seen[0] < batch["input_ids"].numel()


def test_a_model_without_logits_to_keep_gets_the_same_loss(tiny_llama, model):
    class Old(type(model)):
        def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None, **kwargs):
            assert "logits_to_keep" not in kwargs
            return super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache, **kwargs)

    remove_head_loss(model)
    examples = documents(LENGTHS)
    wanted = [float(causal_loss(model, collate(examples)).sum.detach()) for collate in (packed, padded)]
    model.__class__ = Old
    assert [float(causal_loss(model, collate(examples)).sum.detach()) for collate in (packed, padded)] == pytest.approx(
        wanted, rel=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_neither_loss_nor_gradient(monkeypatch, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(37, 101, generator=generator)).to(dtype)
    targets = torch.randint(0, 101, (37,), generator=generator)
    weights = torch.rand(37, generator=generator)
    reference = logits.clone().requires_grad_()
    wanted = cross_entropy(reference.float(), targets, reduction="none")
    (wanted * weights).sum().backward()
    for elements in (1 << 22, 101 * 5, 1):
        monkeypatch.setattr(chunked, "_FLOAT32_ELEMENTS", elements)
        ours = logits.clone().requires_grad_()
        losses, correct = chunked.CrossEntropy.apply(ours, targets)
        (losses * weights).sum().backward()
        torch.testing.assert_close(losses, wanted, atol=1e-6, rtol=1e-6)
        tolerance = 1e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(ours.grad, reference.grad, atol=1e-6, rtol=tolerance)
        assert torch.equal(correct, logits.float().argmax(1) == targets)


def test_a_batch_without_predictions_has_no_loss(model):
    batch = packed([type(documents([5])[0])([7, 8, 9], [], 0)])
    with torch.no_grad():
        loss = causal_loss(model, batch, by_row=True)
    assert (float(loss.sum), loss.count, loss.row_sums.tolist()) == (0.0, 0, [0.0])


def test_bfloat16_is_close_and_sums_in_float32(tiny_llama):
    selected = open_model(recipe_with(tiny_llama, model={"dtype": "bfloat16"}))
    examples = documents(LENGTHS)
    with torch.no_grad(), compute_context(torch.bfloat16, "cpu"):
        loss = causal_loss(selected.model, packed(examples))
    assert loss.sum.dtype == torch.float32
    assert float(loss.sum) == pytest.approx(sum(textbook(tiny_llama, examples)), rel=1e-2)
    assert float(loss.sum / loss.count) == pytest.approx(math.log(425), rel=0.05)
