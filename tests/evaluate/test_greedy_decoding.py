import pytest
import torch
from support.decoders import BEGINNING, FAMILIES, make_decoder, prompts_of

from llmtune.evaluate import greedy_decoding as greedy
from llmtune.evaluate.greedy_decoding import DecodeBatch, KVCache, column_bytes_of, decode_greedily
from llmtune.model.packed_attention import PACKED

WRITTEN = [family for family in FAMILIES if family != "mamba"]


def by_transformers(model, prompts, new, stops):
    """Each prompt alone, up to its end."""
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
        found = decode_greedily(model, prompts, new, set(stops), "cpu")
    assert found == wanted
    return wanted


@pytest.mark.parametrize("family", WRITTEN)
@pytest.mark.parametrize("beginning", [[], BEGINNING], ids=["nothing shared", "a shared beginning"])
def test_rows_of_any_length_get_the_answers_of_transformers(family, beginning):
    model = make_decoder(family)
    with torch.inference_mode():
        assert column_bytes_of(model, "cpu") is not None
    written = check(model, prompts_of([1, 9, 3, 17, 9, 2, 5, 9, 11, 4], beginning))
    assert len({tuple(row) for row in written}) > 5


@pytest.mark.parametrize("attention", ["eager", "sdpa", PACKED])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_the_result_does_not_depend_on_the_installed_attention(family, attention):
    check(make_decoder(family, attention), prompts_of([8, 1, 5, 13, 20, 2], BEGINNING))


def test_rows_end_at_different_steps_and_leave():
    model = make_decoder("llama")
    kept = []
    written = check(model, prompts_of([3, 4, 5, 6, 7, 8, 9, 10]), new=20, stops=range(1, 20))
    assert len({len(row) for row in written}) > 3
    original = DecodeBatch.step

    def step(self, tokens, count):
        kept.append(len(tokens))
        return original(self, tokens, count)

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(DecodeBatch, "step", step)
        decode_greedily(model, prompts_of([3, 4, 5, 6, 7, 8, 9, 10]), 20, set(range(1, 20)), "cpu")
    assert kept == [sum(len(row) > count for row in written) for count in range(1, len(kept) + 1)]


def test_prompts_are_read_in_parts_and_their_shared_prefix_only_once(monkeypatch):
    model, read = make_decoder("llama"), []
    model.model.register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"].shape), with_kwargs=True
    )
    monkeypatch.setattr(greedy, "TOKEN_BUDGET", {"cpu": 24})
    prompts = prompts_of([4, 6, 6, 5, 6, 4, 2, 5], BEGINNING)
    with torch.inference_mode():
        found = decode_greedily(model, prompts, 1, set(), "cpu")
    assert read == [(1, 12), (4, 6), (4, 5)]
    assert found == [[token] for token in (row[0] for row in by_transformers(model, prompts, 1, {0}))]


def test_a_model_with_a_recurrent_state_is_left_to_transformers():
    with torch.inference_mode():
        assert column_bytes_of(make_decoder("mamba"), "cpu") is None


def test_a_cache_that_returns_other_keys_is_detected(monkeypatch):
    model = make_decoder("llama")
    monkeypatch.setattr(KVCache, "move", lambda self, places, rows: None)
    with torch.inference_mode():
        assert column_bytes_of(model, "cpu") is None
