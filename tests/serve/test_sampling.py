import pytest
import torch
from support.serving import served_of
from transformers import GenerationConfig

from llmtune.evaluate.generation import only_these_settings
from llmtune.serve.engine import LiveRows, TokenSampler, sample_tokens

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"top_k": 12},
    {"temperature": 1.4, "min_p": 0.05, "repetition_penalty": 1.2},
    {"temperature": 0, "repetition_penalty": 1.5},
    {"temperature": 0},
]


def by_transformers(model, ids, stated, seed, new_tokens):
    drawn = stated.get("temperature") != 0
    own = {name: value for name, value in stated.items() if drawn or name == "repetition_penalty"}
    own |= {"top_k": own.get("top_k", 0)} if drawn else {}
    settings = GenerationConfig(do_sample=drawn, max_new_tokens=new_tokens, pad_token_id=3, **own)
    with torch.random.fork_rng(), only_these_settings(model):
        torch.manual_seed(seed)
        out = model.generate(input_ids=torch.tensor([ids]), generation_config=settings)
    return out[0, len(ids) :].tolist()


def test_rows_of_one_batch_draw_what_each_draws_alone_by_transformers(tune):
    served, new = served_of(tune()), 12
    model = served.model
    prompts = [[5, 9, 30 + i, 7][: 2 + i % 3] for i in range(len(SETTINGS))]
    samplers = [
        TokenSampler(model, served.request_settings(stated, new), ids, 100 + i)
        for i, (stated, ids) in enumerate(zip(SETTINGS, prompts, strict=True))
    ]
    with torch.inference_mode():
        rows = LiveRows(model, "cpu")
        tokens = sample_tokens(rows.join(prompts), samplers)
        for _ in range(new - 1):
            tokens = sample_tokens(rows.step(torch.tensor(tokens)), samplers)
    for i, (sampler, ids) in enumerate(zip(samplers, prompts, strict=True)):
        assert sampler.ids[len(ids) :] == by_transformers(model, ids, SETTINGS[i], 100 + i, new), SETTINGS[i]


@pytest.mark.parametrize(
    ("section", "stated", "drawn", "temperature"),
    [
        ({}, {}, False, None),
        ({}, {"temperature": 0.5}, True, 0.5),
        ({}, {"top_p": 0.5}, True, None),
        ({}, {"top_p": 1.0}, False, None),
        ({"do_sample": True, "temperature": 0.3}, {}, True, 0.3),
        ({"do_sample": True, "temperature": 0.3}, {"temperature": 0}, False, None),
        ({"do_sample": True, "temperature": 0.3, "top_p": 0.9}, {"temperature": 0.6}, True, 0.6),
    ],
)
def test_a_request_overrules_the_recipe_and_nothing_else(tune, section, stated, drawn, temperature):
    settings = served_of(tune(generation=section)).request_settings(stated, 5)
    assert (settings.do_sample, settings.temperature, settings.max_new_tokens) == (drawn, temperature, 5)
    assert settings.top_p == (stated.get("top_p", section.get("top_p")) if drawn else None)
