import asyncio
import time

import pytest
import torch
from support.serving import served_of

from llmtune.records import Prompt
from llmtune.serve.engine import Engine, generate_ids
from llmtune.serve.finished_run import ChatSession
from llmtune.serve.schemas import ApiError

QUESTIONS = [f"Which colour has the {thing} number {n}?" for n, thing in enumerate(["cat", "dog", "fox", "fish", "x"])]


@pytest.fixture
def start():
    engines = []

    def build(*models):
        engine = Engine({served.name: served for served in models}, max_queue=64)
        engine.start()
        engines.append(engine)
        return engine

    yield build
    for engine in engines:
        engine.close(20)
        assert not engine.thread.is_alive()
        assert engine.requests == 0


def stream(engine, served, question, new_tokens=None):
    """Return the iterator over a request's ids."""
    row = {"messages": [{"role": "user", "content": question}]}
    ids = served.task.prompt_ids(row, served.processor, served.recipe)
    settings = served.request_settings({}, new_tokens or served.recipe.generation.max_new_tokens)
    return generate_ids(engine, served, Prompt(ids), settings, served.recipe.seed + 1)


async def ask(engine, served, question, new_tokens=None):
    return served.read([token async for ids in stream(engine, served, question, new_tokens) for token in ids])


async def ask_all(engine, asked):
    return await asyncio.gather(*(ask(engine, served, question) for served, question in asked))


def as_generate(tuned, question):
    """Return the answer of `llmtune generate`."""
    session = ChatSession(served_of(tuned))
    return "".join(piece.content for piece in session.answer(question))


@pytest.mark.parametrize(
    "generation",
    [
        {"max_new_tokens": 20},
        {"max_new_tokens": 20, "do_sample": True, "temperature": 1.3, "top_p": 0.9},
        {"max_new_tokens": 10, "num_beams": 3},
    ],
)
def test_concurrent_requests_get_the_answers_of_generate(tune, start, generation):
    tuned = tune(generation=generation)
    expected = [as_generate(tuned, question) for question in QUESTIONS]
    served = served_of(tuned)
    assert asyncio.run(ask_all(start(served), [(served, question) for question in QUESTIONS])) == expected
    assert len(set(expected)) > 1 or generation.get("num_beams")


def test_requests_for_the_base_and_the_tuned_model_do_not_interfere(tune, start):
    tuned = tune(generation={"max_new_tokens": 24})
    generator = torch.Generator().manual_seed(8)
    for name, parameter in tuned[0].model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    models = [served_of(tuned), served_of(tuned, "base", is_base=True)]
    expected = [as_generate(tuned, question) for question in QUESTIONS]
    with tuned[0].model.disable_adapter():
        of_base = [as_generate(tuned, question) for question in QUESTIONS]
    both = [(served, question) for question in QUESTIONS for served in models]
    texts = asyncio.run(ask_all(start(*models), both))
    assert (texts[::2], texts[1::2]) == (expected, of_base)
    assert expected != of_base


def test_clients_that_leave_give_up_their_turns_and_the_others_get_their_answers(tune, start):
    tuned = tune(generation={"max_new_tokens": 30})
    served = served_of(tuned)
    expected, engine = as_generate(tuned, QUESTIONS[0]), start(served)
    calls, generate = [], served.generate

    def counted(prompt, *arguments):
        ids = generate(prompt, *arguments)
        calls.append(len(ids))
        return ids

    served.generate = counted

    async def leave():
        endless = stream(engine, served, "tell me everything", 1900)
        await anext(endless)
        waiting = asyncio.create_task(ask(engine, served, "me too", 1900))
        other = asyncio.create_task(ask(engine, served, QUESTIONS[0]))
        await asyncio.sleep(0)
        assert engine.requests == 3
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await endless.aclose()
        assert await other == expected

    asyncio.run(leave())
    assert len(calls) == 2, "the waiting request was answered although its client had left"
    assert calls[0] < 1800


@pytest.mark.parametrize("beams", [1, 2])
def test_stopping_refuses_waiting_requests_and_ends_the_running_one_in_time(tune, start, beams):
    served = served_of(tune(generation={"num_beams": beams}))
    engine = start(served)

    async def stop(running_tokens):
        running = asyncio.create_task(ask(engine, served, "one", running_tokens))
        waiting = asyncio.create_task(ask(engine, served, "two"))
        while engine.calls.qsize() != 1:
            await asyncio.sleep(0.01)
        engine.stop(1.0)
        late = ask(engine, served, "late")
        return await asyncio.gather(running, waiting, late, return_exceptions=True)

    began = time.monotonic()
    errors = asyncio.run(stop(1900))
    assert [(error.status, error.code) for error in errors] == [(503, "stopping")] * 3
    assert time.monotonic() - began < 8
    assert not engine.ready


def test_a_running_answer_is_completed_within_the_grace_period(tune, start):
    tuned = tune(generation={"max_new_tokens": 30})
    served = served_of(tuned)
    engine = start(served)

    async def stop():
        ids = stream(engine, served, QUESTIONS[0])
        first = await anext(ids)
        engine.stop(20)
        return served.read([*first, *[token async for more in ids for token in more]])

    assert asyncio.run(stop()) == as_generate(tuned, QUESTIONS[0])


class Broken(torch.nn.Module):
    """A head that raises while `armed`."""

    def __init__(self, inner, error):
        super().__init__()
        self.inner, self.error, self.armed = inner, error, False

    def forward(self, *args, **kwargs):
        if self.armed:
            raise self.error
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(
    ("error", "code"), [(ZeroDivisionError("bug"), "internal_error"), (MemoryError("no room"), "out_of_memory")]
)
def test_an_error_in_the_model_fails_its_request_only_and_the_next_is_served(tune, start, error, code, capsys):
    tuned = tune()
    base = tuned[0].model.get_base_model()
    broken = base.model.norm = Broken(base.model.norm, error)
    served = served_of(tuned)
    engine = start(served)

    async def fail():
        ids = stream(engine, served, "one", 1000)
        await anext(ids)
        broken.armed = True
        with pytest.raises(ApiError) as failed:
            async for _ in ids:
                pass
        broken.armed = False
        return failed.value.code, await ask(engine, served, QUESTIONS[0])

    assert asyncio.run(fail()) == (code, as_generate(tuned, QUESTIONS[0]))
    assert ("ZeroDivisionError" in capsys.readouterr().err) == (code == "internal_error")


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
def test_a_request_overrides_the_recipe_for_itself_only(tune, section, stated, drawn, temperature):
    settings = served_of(tune(generation=section)).request_settings(stated, 5)
    assert (settings.do_sample, settings.temperature, settings.max_new_tokens) == (drawn, temperature, 5)
    assert settings.top_p == (stated.get("top_p", section.get("top_p")) if drawn else None)
