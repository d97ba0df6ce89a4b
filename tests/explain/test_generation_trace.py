from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
)

from llmtune.explain.generation_trace import (
    ForwardPass,
    Sampling,
    find_layers,
    list_steps,
    read_lens,
    run_forward,
    score_answer,
    trace_answer,
    trace_masks,
)
from llmtune.explain.inputs import ModelInputs
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


def test_a_greedy_answer_is_the_one_that_the_model_gives(llama):
    model, tokenizer = llama
    prompt = prompt_for(tokenizer)
    trace = trace_answer(model, prompt, tokenizer, GREEDY)
    wanted = generated(model, prompt, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    assert trace.prefix + trace.ids == wanted
    assert trace.prefix == prompt.ids
    assert all(step.token == step.candidates[0].token for step in trace.steps)


def test_a_drawn_answer_is_the_one_of_the_same_seed(llama):
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


def test_probabilities_are_those_of_a_plain_forward_pass(llama):
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
def test_what_is_kept_is_what_sorting_and_adding_up_leaves(llama, temperature, top_p, top_k):
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


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_answers_as_it_does_by_itself(built, family):
    place = built(family)
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(place).eval(), AutoTokenizer.from_pretrained(place)
    prompt = prompt_for(tokenizer, "Which colour is the sky?", "summarize")
    trace = trace_answer(model, prompt, tokenizer, GREEDY)
    start = model.config.decoder_start_token_id
    wanted = generated(
        model,
        prompt,
        do_sample=False,
        decoder_start_token_id=start,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
    )
    assert trace.prefix + trace.ids == wanted
    assert trace.prefix == [start]
    readings = score_answer(model, prompt, tokenizer, trace.prefix, trace.ids)
    assert [reading.probability for reading in readings] == pytest.approx(
        [s.probability for s in trace.steps], rel=1e-3
    )
    assert all(step.layers for step in trace.steps)


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


def test_looking_leaves_the_random_numbers_as_they_were(llama):
    model, tokenizer = llama
    torch.manual_seed(11)
    wanted = torch.rand(3)
    torch.manual_seed(11)
    trace_answer(model, prompt_for(tokenizer), tokenizer, Sampling(2, 1.0, 1.0, sample=True, seed=3))
    assert torch.equal(torch.rand(3), wanted)


IDS = torch.tensor([[5, 9, 31, 7, 12, 40]])
PLACES = [2, 5]


def look(model: Any, places: list[int] = PLACES, **inputs: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """What the lens reads of one forward pass, and the output with all hidden states."""
    model.eval()
    lens = read_lens(run_forward(model, inputs, places))
    assert lens is not None
    with torch.no_grad():
        return torch.stack(list(lens)), model(**inputs, output_hidden_states=True)


def gemma2() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=64, num_key_value_heads=1, head_dim=16, final_logit_softcapping=2.0, **shape)
    return Gemma2ForCausalLM(config)


def albert() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 48, "num_attention_heads": 2}
    return AlbertForMaskedLM(AlbertConfig(vocab_size=64, num_hidden_layers=4, **shape))


BEHIND = {
    "llama": lambda model, hidden: model.lm_head(model.model.norm(hidden)),
    "gpt2": lambda model, hidden: model.lm_head(model.transformer.ln_f(hidden)),
    "t5": lambda model, hidden: model.lm_head(model.decoder.final_layer_norm(hidden) * model.config.d_model**-0.5),
    "bert": lambda model, hidden: model.cls(hidden),
}
"""By family what stands behind its layers: norm, scale and head."""
AUTO = {"bert": AutoModelForMaskedLM, "modernbert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}
AUTO |= {"bart": AutoModelForSeq2SeqLM, "whisper": AutoModelForSpeechSeq2Seq}
MADE = {"gemma2": gemma2, "albert": albert}
"""With a soft cap; with one layer that is used again and again."""


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert", "modernbert", "bart", "whisper", *MADE])
def test_each_layer_is_read_through_the_models_own_ending(built, family):
    model = MADE[family]() if family in MADE else AUTO.get(family, AutoModelForCausalLM).from_pretrained(built(family))
    inputs = {"input_features": torch.randn(1, 80, 200)} if family == "whisper" else {"input_ids": IDS}
    lens, output = look(model, **inputs, **({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}))
    torch.testing.assert_close(lens[:, -1], output.logits[0, PLACES], rtol=1e-4, atol=1e-4)
    states = output.decoder_hidden_states if model.config.is_encoder_decoder else output.hidden_states
    assert lens.shape[:2] == (2, len(states))
    for layer, hidden in enumerate(states[:-1] if family in BEHIND else ()):  # the last one is given behind the norm
        with torch.no_grad():
            wanted = BEHIND[family](model, hidden)[0, PLACES]
        torch.testing.assert_close(lens[:, layer], wanted, rtol=1e-4, atol=1e-4)


def test_the_layers_of_a_mixture_are_not_taken_for_its_experts(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.model.layers[0].mlp.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(8))
    assert find_layers(model) == list(model.model.layers)


def test_a_model_whose_reading_is_not_what_it_says_has_no_lens(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    # an ending that depends on the length of the text cannot be read a position at a time
    model.model.norm.register_forward_hook(lambda module, args, output: output + output.mean(dim=1, keepdim=True))
    assert read_lens(run_forward(model, {"input_ids": IDS}, PLACES)) is None


def test_nothing_of_looking_stays_in_the_model(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    before = model.eval()(input_ids=IDS).logits
    assert list(read_lens(run_forward(model, {"input_ids": IDS}, PLACES)) or [])
    assert torch.equal(model(input_ids=IDS).logits, before)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__
