import pytest
import torch
from support.adapting import build_family, sharpened
from transformers import AutoTokenizer

from llmtune.evaluate import generation
from llmtune.evaluate.generation import (
    CompletionOutput,
    answer_ends,
    cache_budget,
    end_output,
    generate_completions,
    is_greedy,
)
from llmtune.records import Prompt

LONGROPE = {
    "original_max_position_embeddings": 12,
    "max_position_embeddings": 256,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 12,
    },
}
"""Positions of all rows in a batch change once one row has more than twelve tokens."""
PROMPTS = ["The quick brown", "Which colour is the sky? The sky", "one two three four five six seven eight", "a"]


def load(folder, attention=None):
    return sharpened(folder, attention), AutoTokenizer.from_pretrained(folder)


def settings(bench, **changes):
    return bench.recipe.model_copy(update={"generation": bench.recipe.generation.model_copy(update=changes)})


def test_answers_keep_the_order_of_the_prompts_for_any_batches(tiny_llama, bench, monkeypatch):
    model, tokenizer = load(tiny_llama)
    prompts = [Prompt(tokenizer(text).input_ids) for text in PROMPTS]
    recipe, advanced = settings(bench, max_new_tokens=5), []
    together = generate_completions(model, prompts, tokenizer, recipe, device="cpu")
    monkeypatch.setattr(generation, "MOST_ROWS", {"cpu": 2})
    assert generate_completions(model, prompts, tokenizer, recipe, device="cpu", advance=advanced.append) == together
    assert sum(advanced) == len(prompts)
    assert len(advanced) > 1


def test_a_single_prompt_is_read_without_a_trial_of_padding(tiny_llama, bench):
    model, tokenizer = load(tiny_llama)
    passes = []
    model.register_forward_hook(lambda module, inputs, output: passes.append(output.logits.shape[0]))
    (output,) = generate_completions(
        model, [Prompt(tokenizer(PROMPTS[0]).input_ids)], tokenizer, settings(bench, max_new_tokens=5), device="cpu"
    )
    assert passes == [1] * (len(output.token_ids) + (output.finish_reason == "stop"))


def test_an_answer_ends_before_the_end_of_turn_or_is_truncated():
    assert end_output([5, 6, 2, 7, 0, 0], {2, 3}) == CompletionOutput([5, 6], "stop")
    assert end_output([5, 6], {2, 3}) == CompletionOutput([5, 6], "length")


def test_generation_stops_at_the_end_tokens_of_tokenizer_and_model(tiny_llama):
    model, tokenizer = load(tiny_llama)
    model.generation_config.eos_token_id = [5, 6]
    assert answer_ends(model, tokenizer) == sorted([5, 6, tokenizer.eos_token_id])


def test_generation_settings_of_the_model_repository_are_ignored(tiny_llama, bench):
    model, tokenizer = load(tiny_llama)
    prompts = [Prompt(tokenizer(text).input_ids) for text in PROMPTS]
    recipe = settings(bench, max_new_tokens=12)
    plain = generate_completions(model, prompts, tokenizer, recipe, device="cpu")
    model.generation_config.repetition_penalty = 5.0
    own = model.generation_config
    assert generate_completions(model, prompts, tokenizer, recipe, device="cpu") == plain
    assert model.generation_config is own


def test_sampling_follows_the_recipes_seed_and_restores_torchs_random_state(tiny_llama, bench):
    model, tokenizer = load(tiny_llama)
    prompts = [Prompt(tokenizer(text).input_ids) for text in PROMPTS]
    recipe = settings(bench, max_new_tokens=12, do_sample=True, temperature=1.5)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = generate_completions(model, prompts, tokenizer, recipe, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert generate_completions(model, prompts, tokenizer, recipe, device="cpu") == first
    other = recipe.model_copy(update={"seed": recipe.seed + 1})
    assert generate_completions(model, prompts, tokenizer, other, device="cpu") != first


def test_generation_stops_at_the_templates_end_of_turn_if_the_tokenizers_end_differs(tiny_llama, bench):
    model, tokenizer = load(tiny_llama)
    tokenizer.eos_token = "<|endoftext|>"
    model.generation_config.eos_token_id = None
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert set(answer_ends(model, tokenizer, bench.recipe)) == {end_of_turn, tokenizer.eos_token_id}


@pytest.mark.parametrize("changes", [{"num_beams": 3}, {"repetition_penalty": 3.0}, {"repetition_penalty": 1.0}, {}])
def test_beams_and_penalties_use_transformers_and_plain_greedy_gives_the_same(tiny_llama, bench, changes):
    model, tokenizer = load(tiny_llama)
    recipe = settings(bench, max_new_tokens=10, **changes)
    assert is_greedy(recipe) is (changes == {})
    prompts = [Prompt(tokenizer(text).input_ids) for text in PROMPTS]
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": tokenizer.pad_token_id, **changes}
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt.ids])
        options["attention_mask"] = torch.ones_like(ids)
        options["eos_token_id"] = answer_ends(model, tokenizer, recipe)
        ids = model.generate(ids, **options)[0, len(prompt) :].tolist()
        wanted.append(end_output(ids, set(options["eos_token_id"])))
    assert generate_completions(model, prompts, tokenizer, recipe, device="cpu") == wanted


@pytest.mark.parametrize(
    ("family", "config", "batched"),
    [
        ("rwkv", {"attention_hidden_size": 64}, False),
        ("mamba", {"state_size": 8, "intermediate_size": 128}, True),
        ("phi3", LONGROPE, False),
    ],
)
def test_answers_match_those_to_single_prompts_in_models_sensitive_to_padding_or_length(
    family, config, batched, bench, tmp_path, monkeypatch
):
    model, tokenizer = load(build_family(tmp_path, family, **config))
    prompts = [Prompt(tokenizer(text).input_ids) for text in (*PROMPTS, "dog", "The sky is blue red green", "cat bird")]
    asked = settings(bench, max_new_tokens=8)
    batches = []
    plain = generation.generate_batch
    monkeypatch.setattr(
        generation,
        "generate_batch",
        lambda model, batch, *more: batches.append(len(batch)) or plain(model, batch, *more),
    )
    with torch.inference_mode():
        together = generate_completions(model, prompts, tokenizer, asked, device="cpu")
        assert (max(batches) > 1) == batched
        assert together == [
            generate_completions(model, [prompt], tokenizer, asked, device="cpu")[0] for prompt in prompts
        ]


def test_a_batch_takes_a_share_of_the_total_memory(monkeypatch):
    monkeypatch.setattr(generation, "device_memory", lambda device: 8_000_000)
    assert cache_budget("cpu", 1000) == 1000
    monkeypatch.setattr(generation, "device_memory", lambda device: None)
    assert cache_budget("cpu", 1000) == generation.GENERATION_BUDGET["cpu"]
