from __future__ import annotations

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llmtune.evaluate import greedy
from llmtune.evaluate.greedy import Writing, column_bytes_of, common_beginning, write_greedily
from llmtune.evaluate.kv_cache import Columns
from llmtune.model.packed_attention import PACKED, install_packed

SIZE = 90
SHAPE = {"vocab_size": SIZE, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
WIDE = {**SHAPE, "intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": 0}
GEMMA = {**WIDE, "head_dim": 8, "sliding_window": 5, "tie_word_embeddings": False}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**WIDE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**WIDE, sliding_window=5)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA, layer_types=MIXED, query_pre_attn_scalar=8)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA, layer_types=MIXED, query_pre_attn_scalar=8)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**WIDE)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, intermediate_size=64)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=128)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=128)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=SIZE, hidden_size=32, n_layer=2, n_head=4)),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**SHAPE)),
}
BEGINNING = [(7 * i + 3) % SIZE for i in range(12)]


def make(family, attention=None):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(8 if "embed" in name else 5)  # a fresh model repeats itself whatever the prompt
    if attention is not None:
        model.set_attn_implementation(attention)
    if attention == PACKED:
        install_packed(model)
    return model


def prompts_of(lengths, beginning=()):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, SIZE, (length,), generator=generator).tolist() for length in lengths]
    return [[*beginning, *row] for row in rows]


def by_transformers(model, prompts, new, stops):
    """Each prompt by itself, up to its end."""
    found = []
    for prompt in prompts:
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": sorted(stops), "pad_token_id": 0}
        ids = torch.tensor([prompt])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        found.append(out[0, len(prompt) :].tolist())
    return found


def check(model, prompts, new=14, stops=(5, 6, 7, 8, 9, 10, 11, 12)):
    with torch.inference_mode():
        wanted = by_transformers(model, prompts, new, stops)
        found = write_greedily(model, prompts, new, set(stops), "cpu")
    assert found == wanted
    return wanted


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beginning", [[], BEGINNING], ids=["nothing shared", "a shared beginning"])
def test_rows_of_any_length_get_what_transformers_writes_to_each_alone(family, beginning):
    model = make(family)
    with torch.inference_mode():
        assert column_bytes_of(model, "cpu") is not None
    written = check(model, prompts_of([1, 9, 3, 17, 9, 2, 5, 9, 11, 4], beginning))
    assert len({tuple(row) for row in written}) > 5


@pytest.mark.parametrize("attention", ["eager", "sdpa", PACKED])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_it_does_not_matter_which_attention_is_installed(family, attention):
    check(make(family, attention), prompts_of([8, 1, 5, 13, 20, 2], BEGINNING))


def test_rows_end_at_different_steps_and_leave():
    model = make("llama")
    kept = []
    written = check(model, prompts_of([3, 4, 5, 6, 7, 8, 9, 10]), new=20, stops=range(1, 20))
    assert len({len(row) for row in written}) > 3
    original = Writing.step

    def step(self, tokens, count):
        kept.append(len(tokens))
        return original(self, tokens, count)

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(Writing, "step", step)
        write_greedily(model, prompts_of([3, 4, 5, 6, 7, 8, 9, 10]), 20, set(range(1, 20)), "cpu")
    assert kept == [sum(len(row) > count for row in written) for count in range(1, len(kept) + 1)]


def test_prompts_are_read_in_parts_and_what_they_share_only_once(monkeypatch):
    model, read = make("llama"), []
    model.model.register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"].shape), with_kwargs=True
    )
    monkeypatch.setattr(greedy, "TOKEN_BUDGET", {"cpu": 24})
    prompts = prompts_of([4, 6, 6, 5, 6, 4, 2, 5], BEGINNING)
    with torch.inference_mode():
        found = write_greedily(model, prompts, 1, set(), "cpu")
    assert read == [(1, 12), (4, 6), (4, 5)]
    assert found == [[token] for token in (row[0] for row in by_transformers(model, prompts, 1, {0}))]


def test_one_token_and_prompts_that_are_equal(monkeypatch):
    monkeypatch.setattr(greedy, "WORTH_SHARING", 0)
    model = make("llama")
    check(model, [BEGINNING] * 4, new=1)
    check(model, [BEGINNING] * 4, new=5)
    check(model, [BEGINNING, BEGINNING[:1]], new=5)


def test_a_beginning_leaves_each_prompt_a_token_of_its_own():
    assert common_beginning([[1, 2, 3], [1, 2, 4]]) == 2
    assert common_beginning([[1, 2, 3], [1, 2]]) == 1
    assert common_beginning([[1, 2], [1, 2]]) == 1
    assert common_beginning([[1], [2, 3]]) == 0
    assert common_beginning([[1, 2, 3]]) == 2


def test_a_model_that_keeps_a_state_is_left_to_transformers():
    shape = {"vocab_size": SIZE, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    model = MambaForCausalLM(MambaConfig(**shape)).eval()
    with torch.inference_mode():
        assert column_bytes_of(model, "cpu") is None


def test_a_cache_that_hands_back_other_keys_is_found_out(monkeypatch):
    model = make("llama")
    monkeypatch.setattr(Columns, "move", lambda self, places, rows: None)
    with torch.inference_mode():
        assert column_bytes_of(model, "cpu") is None


def test_the_bytes_of_a_column_are_those_of_the_keys_and_values_of_a_token():
    with torch.inference_mode():
        assert (
            column_bytes_of(make("llama"), "cpu") == 3 * 2 * 2 * 8 * 4
        )  # layers, keys and values, heads, width, bytes
        assert column_bytes_of(make("llama").to(torch.bfloat16), "cpu") == 3 * 2 * 2 * 8 * 2
