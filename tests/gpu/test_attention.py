"""Packed attention on a CUDA device: flash kernels where they agree with SDPA, the same logits as row by row."""

import pytest
import torch
from support.adapting import build_family, documents, packed, padded, quiet, recipe_with

from llmtune.model.causal_lm_loss import predicted_logits
from llmtune.model.device import compute_context
from llmtune.model.loading import load_model
from llmtune.model.packed_attention import attend_varlen, flash_attn_varlen_func, has_varlen, varlen_attn
from llmtune.model.processor import load_processor
from llmtune.model.resolve import resolve_model
from llmtune.tasks.registry import get_task


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_packed_logits_are_those_of_each_document_alone(tmp_path, family, dtype):
    window = {"sliding_window": 8} if family == "mistral" else {}
    recipe = recipe_with(build_family(tmp_path, family, **window), model={"dtype": dtype})
    place = resolve_model(str(tmp_path), recipe.model, quiet())
    processor = load_processor(place, recipe.model)
    model = load_model(place, recipe, get_task("chat"), processor, device="cuda", training=False).model
    examples = documents([3, 30, 17, 1, 24])

    def move(batch):
        return {key: part.cuda() if isinstance(part, torch.Tensor) else part for key, part in batch.items()}

    with torch.no_grad(), compute_context(getattr(torch, dtype), "cuda"):
        together = predicted_logits(model, move(packed(examples))).float()
        alone = torch.cat([predicted_logits(model, move(padded([example]))).float() for example in examples])
    tolerance = 1e-4 if dtype == "float32" else 0.05
    assert (together - alone).abs().max() < tolerance * alone.abs().max()


def test_a_flash_kernel_is_used_in_half_precision_where_there_is_one():
    query = torch.randn(1, 4, 24, 64, device="cuda", dtype=torch.bfloat16)
    found = flash_attn_varlen_func is not None or varlen_attn is not None
    assert has_varlen(query, 0.0) == (found and torch.cuda.get_device_capability()[0] >= 8)
    assert not has_varlen(query.float(), 0.0)
    assert not has_varlen(query, 0.1)


def test_a_window_of_the_flash_kernel_is_the_models_window():
    shape = (1, 2, 40, 64)
    query, key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    if not has_varlen(query, 0.0):
        pytest.skip("no flash kernel here")
    starts = torch.tensor([0, 15, 40], dtype=torch.int32, device="cuda")
    got = attend_varlen(query, key, value, starts, 25, None, 8)
    at = torch.arange(40, device="cuda")
    distance = at[:, None] - at[None, :]
    seen = (distance >= 0) & (distance < 8) & ((at[:, None] < 15) == (at[None, :] < 15))
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2)
    torch.testing.assert_close(got, wanted, atol=0.03, rtol=0.03)
