from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
)

from llmtune.explain.generation_trace import Sampling, list_steps, score_answer, trace_answer, trace_masks
from llmtune.explain.inputs import ModelInputs
from llmtune.explain.logit_lens import ForwardPass
from llmtune.recipe.schema import Recipe

GREEDY = Sampling(max_new_tokens=6, temperature=0.7, top_p=0.9)


def recipe(task: str) -> Recipe:
    stated = {"recipe_version": 1, "name": "model", "task": task, "data": {"train": "none"}, "model": {"name": "model"}}
    return Recipe.model_validate(stated)


@pytest.fixture(scope="module")
def llama(tiny_llama) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), AutoTokenizer.from_pretrained(tiny_llama)


def prompt_for(tokenizer: Any, text: str = "The quick brown fox", task: str = "completion") -> ModelInputs:
    return ModelInputs(list(tokenizer(text)["input_ids"]), recipe(task))


def generated(model: Any, prompt: ModelInputs, **settings: Any) -> list[int]:
    ids = torch.tensor([prompt.ids])
    config = GenerationConfig(max_new_tokens=6, use_cache=True, **settings)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return out[0].tolist()


def test_a_sampled_answer_equals_generates_with_the_same_seed(llama):
    model, tokenizer = llama
    prompt = prompt_for(tokenizer)
    choice = Sampling(max_new_tokens=6, temperature=1.3, top_p=0.95, top_k=20, sample=True, seed=5)
    trace = trace_answer(model, prompt, tokenizer, choice)
    torch.manual_seed(5)
    drawn = {"do_sample": True, "temperature": 1.3, "top_p": 0.95, "top_k": 20}
    wanted = generated(model, prompt, eos_token_id=tokenizer.eos_token_id, pad_token_id=0, **drawn)
    assert trace.prefix + trace.ids == wanted
    assert trace.ids != trace_answer(model, prompt, tokenizer, GREEDY).ids
    for step in trace.steps:
        assert next(one.kept for one in step.candidates if one.token == step.token) > 0


def test_probabilities_equal_those_of_a_plain_forward_pass(llama):
    model, tokenizer = llama
    prompt = prompt_for(tokenizer)
    trace = trace_answer(model, prompt, tokenizer, GREEDY)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([trace.prefix + trace.ids])).logits[0, len(prompt.ids) - 1 : -1]
    for step, row in zip(trace.steps, logits.double().softmax(-1), strict=True):
        assert step.probability == pytest.approx(float(row[step.token.id]), rel=1e-4)
        for one in step.candidates:
            assert one.probability == pytest.approx(float(row[one.token.id]), rel=1e-4)
        assert step.entropy_bits == pytest.approx(-float((row * row.log2()).sum()), rel=1e-4)


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.0])
@pytest.mark.parametrize(("top_p", "top_k"), [(0.5, 0), (0.9, 0), (1.0, 5), (0.8, 10)])
def test_kept_tokens_match_sorting_and_cumulative_sums(llama, temperature, top_p, top_k):
    logits = torch.randn(200, generator=torch.Generator().manual_seed(1)) * 3
    seen = ForwardPass(llama[0], logits[None], [], {})
    (found,) = list_steps([0], [logits.log_softmax(-1)], Sampling(1, temperature, top_p, top_k), seen, llama[1])
    shares = np.exp(np.log(torch.softmax(logits.double(), -1).numpy()) / temperature)
    shares /= shares.sum()
    order = np.argsort(-shares)
    kept = order[: top_k or len(order)]
    before = np.cumsum(shares[kept] / shares[kept].sum()) - shares[kept] / shares[kept].sum()
    kept = kept[before < top_p] if top_p < 1 else kept
    assert found.kept_tokens == len(kept)
    wanted = {int(i): float(shares[i] / shares[kept].sum()) for i in kept}
    for one in found.candidates:
        assert one.kept == pytest.approx(wanted.get(one.token.id, 0.0), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_a_greedy_answer_equals_the_models_own(built, family):
    folder, task = built(family), "completion" if family == "llama" else "summarize"
    auto = AutoModelForCausalLM if family == "llama" else AutoModelForSeq2SeqLM
    model, tokenizer = auto.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    prompt = prompt_for(tokenizer, "Which colour is the sky?", task)
    start = getattr(model.config, "decoder_start_token_id", None)
    trace = trace_answer(model, prompt, tokenizer, GREEDY)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    assert trace.prefix + trace.ids == generated(model, prompt, do_sample=False, decoder_start_token_id=start, **ends)
    assert trace.prefix == (prompt.ids if start is None else [start])
    assert all(step.token == step.candidates[0].token and step.layers for step in trace.steps)
    scores = score_answer(model, prompt, tokenizer, trace.prefix, trace.ids)
    assert [score.probability for score in scores] == pytest.approx([s.probability for s in trace.steps], rel=1e-3)


def test_a_mask_is_filled_with_the_likeliest_word(built):
    place = built("bert")
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(place).eval(), AutoTokenizer.from_pretrained(place)
    ids = list(tokenizer("The [MASK] is [MASK].")["input_ids"])
    places = tuple(at for at, token in enumerate(ids) if token == tokenizer.mask_token_id)
    trace = trace_masks(model, ModelInputs(ids, recipe("completion"), masks=places), tokenizer, GREEDY)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0, list(places)]
    assert trace.ids == logits.argmax(-1).tolist()
    assert [s.probability for s in trace.steps] == pytest.approx(logits.softmax(-1).max(-1).values.tolist(), rel=1e-4)
    assert [len(step.layers or []) for step in trace.steps] == [model.config.num_hidden_layers + 1] * 2
    assert tokenizer.mask_token not in trace.text


def test_the_answer_ends_at_an_end_token(llama):
    model, tokenizer = llama
    trace = trace_answer(model, prompt_for(tokenizer), tokenizer, GREEDY)
    assert (len(trace.steps), trace.ended) == (6, False)
    stopped = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    stopped.eos_token = stopped.convert_ids_to_tokens(trace.ids[0])
    short = trace_answer(model, prompt_for(stopped), stopped, GREEDY)
    assert (short.ids, short.ended, short.text) == (trace.ids[:1], True, "")


def test_tracing_leaves_the_random_state_unchanged(llama):
    model, tokenizer = llama
    torch.manual_seed(11)
    wanted = torch.rand(3)
    torch.manual_seed(11)
    trace_answer(model, prompt_for(tokenizer), tokenizer, Sampling(2, 1.0, 1.0, sample=True, seed=3))
    assert torch.equal(torch.rand(3), wanted)
