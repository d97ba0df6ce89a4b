"""Samples depend on the prompt, the key and the stated settings alone."""

import pytest
import torch
from support.decoders import BEGINNING, make_decoder, prompts_of
from transformers import GenerationConfig

from llmtune.evaluate import greedy_decoding, sampled_decoding
from llmtune.evaluate.sampled_decoding import sample_answers
from llmtune.recipe.reinforce_section import ReinforceSection

SECTION = ReinforceSection(rewards={"chrf": 1.0}, max_new_tokens=10)
STOPS = {5, 6, 7, 8}
LENGTHS = [1, 9, 3, 17, 9, 2, 5, 11]


def sample(model, prompts, keys, section=SECTION, stops=STOPS):
    with torch.inference_mode():
        return sample_answers(model, prompts, keys, section, stops, "cpu")


def keys_of(prompts):
    return [(7, 1, row, 0) for row in range(len(prompts))]


def ids(answers):
    return [one.ids for one in answers]


def assert_same(left, right):
    assert ids(left) == ids(right)
    assert [one.truncated for one in left] == [one.truncated for one in right]
    for one, other in zip(left, right, strict=True):
        assert one.logps == pytest.approx(other.logps, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
@pytest.mark.parametrize("beginning", [[], BEGINNING], ids=["nothing shared", "a shared beginning"])
def test_samples_do_not_depend_on_the_batch_or_its_order(family, beginning):
    model, prompts = make_decoder(family), prompts_of(LENGTHS, beginning)
    keys = keys_of(prompts)
    together = sample(model, prompts, keys)
    assert len({tuple(one) for one in ids(together)}) > 5
    alone = [sample(model, [prompt], [key])[0] for prompt, key in zip(prompts, keys, strict=True)]
    assert_same(alone, together)
    assert_same(sample(model, prompts[::-1], keys[::-1])[::-1], together)


def test_samples_do_not_depend_on_the_budget_or_the_shared_prefix(monkeypatch):
    model, prompts = make_decoder("llama"), prompts_of(LENGTHS, BEGINNING)
    keys = keys_of(prompts)
    together = sample(model, prompts, keys)
    with monkeypatch.context() as patch:
        patch.setattr(greedy_decoding, "TOKEN_BUDGET", {"cpu": 24})
        patch.setattr(sampled_decoding, "MOST_ROWS", {"cpu": 3})
        assert_same(sample(model, prompts, keys), together)
    mixed = [*prompts, [4]]
    assert_same(sample(model, mixed, keys_of(mixed))[:-1], together)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "bloom", "mamba"])
@pytest.mark.parametrize("beginning", [[], BEGINNING], ids=["nothing shared", "a shared beginning"])
def test_several_samples_of_a_prompt_are_those_of_each_alone(family, beginning):
    model, prompts = make_decoder(family), prompts_of([6, 9, 6, 1], beginning)
    groups = [prompt for prompt in prompts for _ in range(4)]
    keys = [(7, 1, row, number) for row in range(4) for number in range(4)]
    together = sample(model, groups, keys)
    assert len({tuple(one) for one in ids(together)}) > 10
    alone = [sample(model, [prompt], [key])[0] for prompt, key in zip(groups, keys, strict=True)]
    assert_same(alone, together)
    mixed = [i * 7 % 16 for i in range(16)]
    assert_same(sample(model, [groups[i] for i in mixed], [keys[i] for i in mixed]), [together[i] for i in mixed])


def test_a_prompt_with_several_samples_is_read_once():
    model, prompts, read = make_decoder("llama"), prompts_of([9, 6, 9]), []
    model.model.register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"].shape), with_kwargs=True
    )
    groups = [prompt for prompt in prompts for _ in range(8)]
    sample(model, groups, keys_of(groups), SECTION.model_copy(update={"max_new_tokens": 2}), stops=set())
    assert read[-2:] == [(3, 9), (24, 1)]
    sample(model, groups[:8], keys_of(groups[:8]), SECTION.model_copy(update={"max_new_tokens": 2}), stops=set())
    assert read[-2:] == [(1, 9), (8, 1)], "a prompt has no prefix to share with itself"


def test_a_model_without_our_cache_gives_the_same_samples(monkeypatch):
    model, prompts = make_decoder("llama"), prompts_of(LENGTHS)
    keys = keys_of(prompts)
    cached = sample(model, prompts, keys)
    monkeypatch.setattr(sampled_decoding, "column_bytes_of", lambda *given: None)
    assert_same(sample(model, prompts, keys), cached)


def test_every_end_token_ends_a_sample_and_others_are_truncated():
    model, prompts = make_decoder("llama"), prompts_of([4] * 60)
    answers = sample(model, prompts, keys_of(prompts), stops={*range(5, 35)})
    assert len({one.ids[-1] for one in answers if not one.truncated}) > 3
    for one in answers:
        assert not {*one.ids[:-1]} & {*range(5, 35)}
        assert one.truncated == (one.ids[-1] not in range(5, 35))
        assert len(one.ids) == 10 or not one.truncated
        assert len(one.logps) == len(one.ids)
    assert all(one.truncated for one in sample(model, prompts[:6], keys_of(prompts[:6]), stops=set()))


@pytest.mark.parametrize("cached", [True, False])
def test_settings_of_the_model_are_ignored(cached, monkeypatch):
    if not cached:
        monkeypatch.setattr(sampled_decoding, "column_bytes_of", lambda *given: None)
    model, prompts = make_decoder("llama"), prompts_of(LENGTHS)
    keys = keys_of(prompts)
    plain = sample(model, prompts, keys)
    given = {"temperature": 0.1, "top_k": 1, "repetition_penalty": 5.0, "min_new_tokens": 10, "do_sample": True}
    model.generation_config = GenerationConfig(**given, eos_token_id=[*range(20, 80)])
    assert_same(sample(model, prompts, keys), plain)
    assert model.generation_config.repetition_penalty == 5.0


def test_the_stated_settings_change_the_samples():
    model, prompts = make_decoder("llama"), prompts_of(LENGTHS)
    keys = keys_of(prompts)
    plain = ids(sample(model, prompts, keys))
    greedy = greedy_decoding.decode_greedily
    with torch.inference_mode():
        likeliest = greedy(model, prompts, 10, STOPS, "cpu")
    assert ids(sample(model, prompts, keys, SECTION.model_copy(update={"top_k": 1}))) == [
        row[: next((i + 1 for i, token in enumerate(row) if token in STOPS), None)] for row in likeliest
    ]
    for change in ({"temperature": 3.0}, {"top_p": 0.3}):
        assert ids(sample(model, prompts, keys, SECTION.model_copy(update=change))) != plain
    assert ids(sample(model, prompts, [(8, 1, row, 0) for row in range(len(prompts))])) != plain
