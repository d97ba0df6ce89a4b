"""Packed rows give each document the logits it gets alone, in every supported family."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers
from support.adapting import build_family, documents, open_model, packed, padded, recipe_with
from support.models import build_llama
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from llmtune.adapter.injection import enable_checkpointing
from llmtune.errors import RecipeError
from llmtune.model import packed_attention
from llmtune.model.block_attention import attend_documents, band
from llmtune.model.causal_lm_loss import causal_loss, predicted_logits
from llmtune.model.packed_attention import PACKED, AttentionOptions, attend_runs

WINDOWED = {"sliding_window": 4}
FAMILIES = {
    "llama": ({}, PACKED),
    "mistral": (WINDOWED, PACKED),
    "qwen2": ({"use_sliding_window": True, "max_window_layers": 1, **WINDOWED}, PACKED),
    "qwen3": ({}, PACKED),
    "gemma3_text": ({"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}, PACKED),
    "gemma2": ({"attn_logit_softcapping": 2.0, **WINDOWED}, PACKED),
    "gpt_oss": (
        {
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            **WINDOWED,
        },
        PACKED,
    ),
    "phi": ({}, PACKED),
    "phi3": ({}, PACKED),
    "gpt_neox": ({}, PACKED),
    "gpt2": ({"n_embd": 64, "n_head": 4, "n_layer": 2}, PACKED),
    "stablelm": ({}, "sdpa"),
    "roberta": ({"is_decoder": True}, PACKED),  # its positions begin behind the padding id
}
LENGTHS = [3, 11, 7, 7, 1, 18]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A family's folder: `built(family)`."""
    return cache(lambda family: build_family(tmp_path_factory.mktemp(family), family, **FAMILIES[family][0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_are_those_of_each_document_alone(built, family):
    model = open_model(recipe_with(built(family))).model
    assert model.config._attn_implementation == FAMILIES[family][1]
    examples = documents(LENGTHS)
    with torch.no_grad():
        together = predicted_logits(model, packed(examples))
        alone = torch.cat([predicted_logits(model, padded([example])) for example in examples])
        plain = AutoModelForCausalLM.from_pretrained(built(family), attn_implementation="eager").eval()
        reference = torch.cat([plain(torch.tensor([e.input_ids])).logits[0, e.spans[0] - 1 : -1] for e in examples])
    assert together.std() > 0.05
    torch.testing.assert_close(together, alone, atol=1e-5 * float(alone.abs().max()), rtol=0)
    torch.testing.assert_close(together, reference, atol=1e-5 * float(alone.abs().max()), rtol=0)


def test_a_window_hides_earlier_positions(tmp_path):
    """The test of families would pass if no window applied on either side; here its effect is visible."""
    model = open_model(recipe_with(build_family(tmp_path, "mistral", sliding_window=4, num_hidden_layers=1))).model
    first, second = documents([12, 12])
    changed = [*first.input_ids[:6], *second.input_ids[6:12]]
    examples = [second, type(first)(changed, [11, 12], 1)]
    with torch.no_grad():
        far = predicted_logits(model, packed(examples))[-1]
        near = predicted_logits(model, packed([second]))[-1]
    torch.testing.assert_close(far, near)


@pytest.mark.parametrize(
    ("family", "checkpointing"), [*((family, False) for family in FAMILIES), ("llama", True), ("mistral", True)]
)
def test_packed_gradients_equal_those_of_single_documents_in_the_plain_model(built, family, checkpointing):
    folder = built(family)
    model = open_model(recipe_with(folder)).model
    if checkpointing:
        enable_checkpointing(model)
        model.train()
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    examples = documents(LENGTHS)
    model.requires_grad_(True)
    together = causal_loss(model, packed(examples))
    together.sum.backward()
    alone = [causal_loss(plain, padded([example])) for example in examples]
    total = torch.stack([one.sum for one in alone]).sum()
    total.backward()
    assert together.count == sum(one.count for one in alone)
    torch.testing.assert_close(together.sum, total, rtol=1e-5, atol=0)
    longest = max(p.grad.norm() for p in plain.parameters() if p.grad is not None)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5 * float(longest), msg=name)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kept", [4, 2])
def test_documents_of_one_length_are_attended_to_at_once_as_each_alone(causal, window, kept):
    lengths = [5, 5, 5, 9, 1, 1, 5]
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(lengths), 8) for heads in (4, kept, kept)]
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    options = AttentionOptions(scaling=0.3, window=window, causal=causal)
    seen = block_mask(lengths) & band(sum(lengths), sum(lengths), window, causal, torch.device("cpu"))
    results = []
    wanted = scaled_dot_product_attention(*inputs, attn_mask=seen, scale=0.3, enable_gqa=True).transpose(1, 2)
    capped = replace(options, softcap=1e4)  # scores written out; so high a cap does next to nothing
    for out in (wanted, attend_runs(*inputs, lengths, options), attend_runs(*inputs, lengths, capped)):
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)


def test_flash_attention_is_tried_with_gradients_even_if_the_first_pass_has_none(monkeypatch):
    """The result from a pass in inference mode also applies to later training."""
    tried = []

    def flash(q, k, v, starts, _, longest, __, softmax_scale, causal, window_size, deterministic):
        tried.append(q.requires_grad)
        query, key, value = (part.transpose(0, 1)[None] for part in (q, k, v))
        window = None if window_size[0] < 0 else window_size[0] + 1
        return attend_documents(query, key, value, starts.diff().tolist(), softmax_scale, window, causal)[0]

    monkeypatch.setattr(packed_attention, "flash_attn_varlen_func", flash)
    with torch.inference_mode():
        assert packed_attention._agrees_with_sdpa(8, torch.float32, True, torch.device("cpu"))
    assert all(tried)


def block_mask(lengths):
    """Whether two positions are in the same document."""
    of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return of[:, None] == of[None, :]


def test_dropout_within_documents_keeps_the_mean():
    lengths = [5, 5, 3]
    query, key, value = (torch.randn(1, 2, 13, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    torch.manual_seed(0)
    draws = torch.stack([attend_runs(query, key, value, lengths, AttentionOptions(dropout=0.3)) for _ in range(600)])
    assert draws.std(0).mean() > 0.1
    wanted = attend_runs(query, key, value, lengths, AttentionOptions())
    torch.testing.assert_close(draws.mean(0), wanted, atol=0.15, rtol=0)


def test_no_mask_is_built_for_a_packed_row(tiny_llama):
    model = open_model(recipe_with(tiny_llama)).model
    seen = []
    layer = model.model.layers[0].self_attn
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        predicted_logits(model, packed(documents([5, 6])))
        assert seen == [None]
        predicted_logits(model, padded(documents([5, 6])))
    assert seen[1].shape == (2, 1, 6, 6)


def test_a_four_dimensional_mask_is_used_unchanged(tiny_llama):
    model = open_model(recipe_with(tiny_llama)).model
    (example,) = documents([10])
    ids = torch.tensor([example.input_ids])
    blind = torch.ones(10, 10, dtype=torch.bool).tril()
    blind[6:, 2:5] = False  # the later tokens do not see 2, 3 and 4
    with torch.no_grad():
        masked = model(input_ids=ids, attention_mask=blind[None, None], use_cache=False).logits[0, -1]
        plain = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager").eval()
        additive = torch.where(blind, 0.0, torch.finfo(torch.float32).min)[None, None]
        wanted = plain(input_ids=ids, attention_mask=additive, use_cache=False).logits[0, -1]
    torch.testing.assert_close(masked, wanted, atol=1e-5, rtol=0)


def test_generation_equals_that_of_the_plain_model(tiny_llama):
    model = open_model(recipe_with(tiny_llama), training=False).model
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    ids = torch.tensor([[3, 3, 7, 9, 11], [5, 6, 7, 8, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 3}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


def test_a_plain_row_after_a_packed_one_is_masked_again(tiny_llama):
    model = open_model(recipe_with(tiny_llama)).model
    examples = documents([5, 9])
    with torch.no_grad():
        before = predicted_logits(model, padded(examples))
        predicted_logits(model, packed(examples))
        assert torch.equal(predicted_logits(model, padded(examples)), before)
        with pytest.raises(IndexError):
            predicted_logits(model, packed([type(examples[0])([5, 10_000], [1, 2], 1)]))
        assert torch.equal(predicted_logits(model, padded(examples)), before)


@pytest.mark.parametrize("family", ["mamba", "bloom"])
def test_a_model_that_cannot_isolate_rows_is_refused_with_packing(tmp_path, family):
    folder = build_family(tmp_path, family, **({"n_head": 4} if family == "bloom" else {}))
    with pytest.raises(RecipeError) as caught:
        open_model(recipe_with(folder))
    assert caught.value.problems[0].where == "data.packing"
    assert "data.packing: false" in str(caught.value)
    open_model(recipe_with(folder, data={"packing": False}))


def test_a_fallback_gives_its_reason(built, console):
    open_model(recipe_with(built("stablelm")), console=console)
    assert "Attention: sdpa" in console.file.getvalue()
    assert "StableLmForCausalLM does not use" in console.file.getvalue()


def test_the_attention_named_in_the_recipe_is_installed(tiny_llama):
    selected = open_model(recipe_with(tiny_llama, model={"attn_implementation": "eager"}))
    assert selected.model.config._attn_implementation == "eager"
    examples = documents(LENGTHS)
    with torch.no_grad():
        together = predicted_logits(selected.model, packed(examples))
        alone = torch.cat([predicted_logits(selected.model, padded([example])) for example in examples])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_a_saved_model_does_not_name_our_attention(tmp_path):
    model = open_model(recipe_with(build_llama(tmp_path / "a"))).model
    model.save_pretrained(tmp_path / "b")
    assert PACKED not in (tmp_path / "b" / "config.json").read_text()
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "b"), transformers.LlamaForCausalLM)
