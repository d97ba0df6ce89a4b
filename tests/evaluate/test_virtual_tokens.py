"""Answers under prompt tuning, p-tuning and prefix tuning are the most likely tokens of the trained forward pass."""

from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from support.adapting import nudge, open_model, padded, quiet, recipe_with
from support.decoders import BEGINNING, make_decoder, prompts_of
from support.method_table import SMALL
from transformers import GenerationConfig

from llmtune.adapter.injection import inject
from llmtune.adapter.saving import save_adapter
from llmtune.data.example import Example
from llmtune.errors import DataError
from llmtune.evaluate import generation
from llmtune.evaluate.generation import generate, generate_completions, windows_count_padding
from llmtune.evaluate.greedy_decoding import column_bytes_of, decode_greedily
from llmtune.evaluate.inference import context_limit
from llmtune.evaluate.shared_prefix import make_tree, score_trees
from llmtune.explain.generation_trace import Sampling, trace_answer
from llmtune.explain.inputs import ModelInputs
from llmtune.model.causal_lm_loss import causal_loss, virtual_logits
from llmtune.model.memory_plan import check_context
from llmtune.records import Prompt
from llmtune.tasks.registry import get_task

pytestmark = pytest.mark.filterwarnings(
    "ignore:`past_key_values` is deprecated:FutureWarning",  # PEFT's prefix tuning has the old name
    "ignore:Position ids are not supported:UserWarning",  # PEFT, in its own `generate`
)
CONFIGS = {
    "prompt_tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p_tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    "prefix_tuning": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}
PROMPTS = [[*range(5, 14)], [*range(30, 33)], [*range(70, 85)], [*range(9, 15)]]
LENGTHS = [1, 9, 3, 17, 9, 2, 5, 9, 11, 4]
FAMILIES = ["llama", "gemma3_text", "gpt2", "opt", "gpt_neox"]
GREEDY = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=True)


def build(family, method):
    """A model whose virtual tokens matter."""
    model = get_peft_model(make_decoder(family), CONFIGS[method]()).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def forward_logits(model, prompt, answer):
    """Return the logits of the trained forward pass that predict each token of an answer."""
    ids_1T = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logits_TV = model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False).logits[0]
    return logits_TV[virtual_logits(model) + len(prompt) - 1 : -1]


def first_choices(model, prompt, answer):
    return forward_logits(model, prompt, answer).argmax(-1).tolist()


def likeliest(model, prompt, count=8):
    answer = []
    for _ in range(count):
        answer.append(int(forward_logits(model, prompt, [*answer, 0])[-1].argmax()))
    return answer


def log_probability(model, prompt, answer):
    logs_TV = forward_logits(model, prompt, answer).log_softmax(-1)
    return logs_TV[torch.arange(len(answer)), torch.tensor(answer)].sum()


def answer_alone(model, prompt, settings=GREEDY):
    ids_1T = torch.tensor([prompt])
    with torch.no_grad():
        out_1T = generate(model, ids_1T, torch.ones_like(ids_1T), generation_config=settings)
    return out_1T[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", CONFIGS)
def test_batched_and_single_greedy_answers_are_those_of_the_forward_pass(family, method):
    model, prompts = build(family, method), prompts_of(LENGTHS, BEGINNING)
    with torch.inference_mode():
        assert column_bytes_of(model, "cpu") is not None
        answers = decode_greedily(model, prompts, 8, set(), "cpu")
        assert decode_greedily(model, [*prompts, *prompts[::-1]], 8, set(), "cpu") == [*answers, *answers[::-1]]
    assert answers == [first_choices(model, *pair) for pair in zip(prompts, answers, strict=True)]
    assert [answer_alone(model, prompt) for prompt in prompts[:3]] == answers[:3]
    with torch.inference_mode(), model.disable_adapter():
        assert decode_greedily(model, prompts, 8, set(), "cpu") != answers


@pytest.mark.parametrize("method", CONFIGS)
def test_beams_and_sampled_answers_have_the_logits_of_the_forward_pass(method):
    model, (prompt,) = build("llama", method), prompts_of([7])
    more = {"output_logits": True, "return_dict_in_generate": True, "use_cache": True, "pad_token_id": 0}
    ids_2T = torch.tensor([prompt, [0, 0, 0, *prompt[3:]]])
    mask_2T = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    torch.manual_seed(0)
    drawn = GenerationConfig(max_new_tokens=5, do_sample=True, top_k=0, repetition_penalty=1.5, **more)
    out = generate(model, ids_2T, mask_2T, generation_config=drawn)
    for row, text in enumerate([prompt, prompt[3:]]):
        logits_TV = torch.stack([step[row] for step in out.logits])
        torch.testing.assert_close(logits_TV, forward_logits(model, text, out.sequences[row, 7:].tolist()))
    beams = GenerationConfig(max_new_tokens=2, do_sample=False, num_beams=90, **more)
    best = generate(model, ids_2T[:1], mask_2T[:1], generation_config=beams).sequences[0, 7:].tolist()
    first_V = forward_logits(model, prompt, [0])[0].log_softmax(-1)
    pairs_VV = torch.stack([forward_logits(model, prompt, [one, 0])[1].log_softmax(-1) for one in range(90)])
    assert best == [*divmod(int((first_V[:, None] + pairs_VV).argmax()), 90)]  # 90 beams of a vocabulary of 90


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_a_model_that_cannot_continue_from_a_cache_reads_all_tokens_again(method, monkeypatch):
    model, (prompt,) = build("llama", method), prompts_of([7])
    monkeypatch.setattr(generation, "column_bytes_of", lambda model, device: None)
    assert answer_alone(model, prompt) == likeliest(model, prompt)


def test_padding_after_virtual_tokens_keeps_windows_from_batches():
    model, plain = build("mistral", "prompt_tuning"), make_decoder("mistral")
    assert windows_count_padding(model, 2)
    assert not windows_count_padding(model, 1)
    assert not windows_count_padding(plain, 50)
    assert not windows_count_padding(build("llama", "prompt_tuning"), 10**6)


def adapt(folder, **adapter):
    recipe = recipe_with(folder, adapter=adapter, generation={"max_new_tokens": 8})
    selected = open_model(recipe, training=False)
    with torch.no_grad():
        for parameter in selected.model.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    adapted = inject(selected, recipe, quiet())
    for _ in range(6):
        nudge(adapted.model)
    return adapted, recipe


ADAPTERS = {name: {"method": name, **SMALL[name]} for name in CONFIGS}
ACTIVATED = {"r": 4, "alora_invocation_tokens": [41, 42]}


@pytest.mark.parametrize("adapter", [*ADAPTERS.values(), ACTIVATED], ids=[*ADAPTERS, "activated lora"])
def test_an_explained_answer_is_that_of_the_forward_pass(tiny_llama, adapter):
    adapted, recipe = adapt(tiny_llama, **adapter)
    prompt = [*range(5, 17), 41, 42, 77]
    trace = trace_answer(adapted.model, ModelInputs(prompt, recipe), adapted.selected.processor, Sampling(8))
    assert trace.ids == first_choices(adapted.model, prompt, trace.ids)
    logs_TV = forward_logits(adapted.model, prompt, trace.ids).log_softmax(-1)
    for step, logs_V in zip(trace.steps, logs_TV, strict=True):
        assert step.probability == pytest.approx(float(logs_V[step.token.id].exp()), rel=1e-3)
        assert step.layers is not None


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_choices_are_scored_by_the_forward_pass(tiny_llama, adapter):
    adapted, _ = adapt(tiny_llama, **adapter)
    model = adapted.model
    prompt, answers = [*range(5, 17)], [[30, 31, 32], [40, 41]]
    tree = make_tree([[*prompt, *answer] for answer in answers], [len(prompt)] * 2)
    expected = [float(log_probability(model, prompt, answer)) for answer in answers]
    with torch.inference_mode():
        assert score_trees(model, [tree], device="cpu")[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.needs("lm_eval")
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_benchmarks_are_scored_by_the_forward_pass(tiny_llama, adapter):
    from lm_eval.api.instance import Instance

    from llmtune.evaluate.suites.lm_eval_model import BatchedLM

    adapted, recipe = adapt(tiny_llama, **adapter)
    model, processor = adapted.model, adapted.selected.processor
    context = SimpleNamespace(processor=processor, recipe=recipe, device="cpu")
    judge = BatchedLM(model, context, lambda rows: None)
    text, word = "Where is the red box", " now"
    ask = Instance("loglikelihood", {}, (text, word), 0, ("task", 0, 1))
    ids, both = judge.tok_encode(text), judge.tok_encode(text + word)
    ((nats, _),) = judge.loglikelihood([ask])
    assert nats == pytest.approx(float(log_probability(model, ids, both[len(ids) :])), rel=1e-4)
    ask = Instance("generate_until", {}, (text, {"until": ["nothing"], "max_gen_toks": 6}), 0, ("task", 0, 1))
    (answer,) = judge.generate_until([ask])
    assert answer == processor.decode(likeliest(model, ids, 6), skip_special_tokens=True)


@pytest.mark.parametrize("method", CONFIGS)
def test_plain_peft_gives_the_same_answers_as_the_guide_says(tiny_llama, method, tmp_path):
    adapted, recipe = adapt(tiny_llama, **ADAPTERS[method])
    save_adapter(adapted, tmp_path)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    model.get_base_model().load_state_dict(adapted.model.get_base_model().state_dict())
    prompt_1T, options = torch.tensor([PROMPTS[0]]), {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    if method == "prefix_tuning":
        mask_1T = torch.ones(1, model.active_peft_config.num_virtual_tokens + len(PROMPTS[0]))
        inner, prefix = model.get_base_model(), model.get_prompt(1)
        with torch.no_grad():
            out_1T = inner.generate(prompt_1T, attention_mask=mask_1T, cache=prefix, **options)
    else:
        out_1T = model.generate(input_ids=prompt_1T, use_cache=False, **options)
    (output,) = generate_completions(
        adapted.model, [Prompt(PROMPTS[0])], adapted.selected.processor, recipe, device="cpu"
    )
    assert out_1T[0, len(PROMPTS[0]) :].tolist()[: len(output.token_ids)] == output.token_ids


def test_virtual_tokens_take_positions_of_the_context(tiny_llama):
    adapted, recipe = adapt(tiny_llama, method="prompt_tuning", num_virtual_tokens=6)
    context = adapted.selected.model.config.max_position_embeddings
    assert context_limit(adapted.model) == context - 6
    check_context(adapted.selected.model_ref, recipe, get_task("chat"), context - 6)
    with pytest.raises(DataError, match=f"after 6 virtual tokens.*\n.*Set data.max_length: {context - 6}"):
        check_context(adapted.selected.model_ref, recipe, get_task("chat"), context - 5)


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_every_token_of_an_answer_is_the_first_choice_of_the_loss(tiny_llama, adapter):
    adapted, recipe = adapt(tiny_llama, **adapter)
    with torch.inference_mode():
        outputs = generate_completions(
            adapted.model, [*map(Prompt, PROMPTS)], adapted.selected.processor, recipe, device="cpu"
        )
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            end = len(prompt) + len(output.token_ids)
            example = Example([*prompt, *output.token_ids], [len(prompt), end], 1)
            loss = causal_loss(adapted.model, padded([example]), by_row=True)
            assert int(loss.row_correct.sum()) == loss.count == len(output.token_ids) > 0
