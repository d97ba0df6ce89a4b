import queue
import time

import pytest
import torch
from support.adapting import build_family, open_model, recipe_with
from support.serving import served_of, wait_until
from transformers import GenerationConfig

from llmtune.evaluate.generation import only_these_settings
from llmtune.evaluate.greedy_decoding import decode_greedily
from llmtune.serve.engine import HEADROOM, Engine, LiveRows, OutOfMemory, TokenSampler, sample_tokens
from llmtune.serve.finished_run import ChatSession
from llmtune.serve.request_queue import AnswerJob, End, Stopping

QUESTIONS = [f"Which colour has the {thing} number {n}?" for n, thing in enumerate(["cat", "dog", "fox", "fish", "x"])]


class Client:
    """One job and its events."""

    def __init__(self, engine, served, question, **stated):
        self.events = queue.SimpleQueue()
        row = {"messages": [{"role": "user", "content": question}]}
        ids = served.task.prompt_ids(row, served.processor, served.recipe)
        new = stated.pop("new_tokens", served.recipe.generation.max_new_tokens)
        settings = served.request_settings(stated, new)
        self.engine, self.served = engine, served
        self.job = AnswerJob(served, ids=ids, settings=settings, seed=served.recipe.seed + 1, deliver=self.events.put)
        self.ids = []
        engine.submit(self.job)

    def first(self):
        self.ids += self.events.get(timeout=20)
        return self

    def end(self):
        while isinstance(event := self.events.get(timeout=20), list):
            self.ids += event
        return event

    def text(self):
        assert isinstance(self.end(), End)
        return self.served.read(self.ids)


@pytest.fixture
def start():
    engines = []

    def build(*models, max_batch=4, max_queue=64):
        engine = Engine({served.name: served for served in models}, max_batch=max_batch, max_queue=max_queue)
        engine.start()
        engines.append(engine)
        return engine

    yield build
    for engine in engines:
        engine.queue.stop(0)
        engine.thread.join(20)
        assert not engine.thread.is_alive()


def as_generate(tuned, question):
    """Return the answer of `llmtune generate`."""
    served = served_of(tuned)
    session = ChatSession(served)
    return "".join(piece.content for piece in session.answer(question))


@pytest.mark.parametrize(
    "generation",
    [
        {"max_new_tokens": 20},
        {"max_new_tokens": 20, "do_sample": True, "temperature": 1.3, "top_p": 0.9},
        {"max_new_tokens": 10, "num_beams": 3},
    ],
)
def test_answers_equal_those_of_generate_in_any_batch(tune, start, generation):
    tuned = tune(generation=generation)
    wanted = [as_generate(tuned, question) for question in QUESTIONS]
    engine, served = start(served := served_of(tuned), max_batch=3), served
    clients = []
    for question in QUESTIONS:
        clients.append(Client(engine, served, question))
        time.sleep(0.01)  # they join a running batch
    assert [client.text() for client in clients] == wanted
    assert len(set(wanted)) > 1 or generation.get("num_beams")


def test_models_that_share_a_base_take_turns_without_interfering(tune, start):
    tuned = tune(generation={"max_new_tokens": 24})
    model = tuned[0].model
    model.add_adapter("other", model.peft_config["default"])
    generator = torch.Generator().manual_seed(8)
    for name, parameter in model.named_parameters():
        if "lora_" in name and ".other." in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    names = {"tiny": "default", "more": "other", "base": None}
    models = [served_of(tuned, name, adapter=adapter) for name, adapter in names.items()]

    def ask(engine):
        return [Client(engine, served, question) for question in QUESTIONS for served in models]

    expected = [as_generate(tuned, question) for question in QUESTIONS]
    alone = []
    for served in models:
        engine = start(served)
        alone.append([Client(engine, served, question).text() for question in QUESTIONS])
        engine.queue.stop(5)
        engine.thread.join(5)
    texts = [client.text() for client in ask(start(*models))]
    assert [texts[at::3] for at in range(3)] == alone
    assert alone[0] != alone[1] != alone[2] != alone[0]
    assert alone[0] == expected


def test_cancelled_jobs_leave_batch_and_queue_and_the_others_get_their_answers(tune, start):
    tuned = tune(generation={"max_new_tokens": 30})
    served = served_of(tuned)
    wanted = [as_generate(tuned, question) for question in QUESTIONS[:2]]
    engine = start(served, max_batch=3)
    endless = Client(engine, served, "tell me everything", new_tokens=1900).first()
    clients = [Client(engine, served, question).first() for question in QUESTIONS[:2]]
    queued = Client(engine, served, "me too")
    engine.queue.cancel(endless.job)
    engine.queue.cancel(queued.job)
    assert [client.text() for client in clients] == wanted
    wait_until(lambda: (engine.queue.running, len(engine.queue)) == (0, 0))
    assert endless.events.qsize() < 1800
    assert queued.events.empty()


@pytest.mark.parametrize("beams", [1, 2])
def test_stopping_refuses_waiting_jobs_and_ends_running_ones_in_time(tune, start, beams):
    served = served_of(tune(generation={"num_beams": beams}))
    engine = start(served, max_batch=1)
    short, endless, queued = (Client(engine, served, "one", new_tokens=n) for n in (12, 1900, 5))
    if beams == 1:
        short.first()
    wait_until(lambda: engine.queue.running)
    began = time.monotonic()
    engine.queue.stop(1.0)
    with pytest.raises(Stopping):
        Client(engine, served, "late")
    assert isinstance(queued.end(), Stopping)
    assert isinstance(endless.end(), Stopping)
    assert isinstance(short.end(), End)
    engine.thread.join(10)
    assert time.monotonic() - began < 8
    assert not engine.ready


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
    ("error", "told"), [(ZeroDivisionError("bug"), ZeroDivisionError), (MemoryError("no room"), OutOfMemory)]
)
def test_an_error_in_the_model_fails_its_jobs_only_and_the_next_is_served(tune, start, error, told, capsys):
    tuned = tune()
    base = tuned[0].model.get_base_model()
    broken = base.model.norm = Broken(base.model.norm, error)
    served = served_of(tuned)
    engine = start(served)
    client = Client(engine, served, "one", new_tokens=1000).first()
    broken.armed = True
    assert isinstance(client.end(), told)
    broken.armed = False
    assert Client(engine, served, QUESTIONS[0]).text() == as_generate(tuned, QUESTIONS[0])
    assert engine.queue.running == 0
    assert ("ZeroDivisionError" in capsys.readouterr().err) == (told is ZeroDivisionError)
    assert engine.batches[served].max_rows == (1 if told is OutOfMemory else 4)


ARRIVALS = {0: [9, 40], 3: [5], 4: [60, 2], 11: [17], HEADROOM + 9: [30]}
"""Step -> the lengths of the prompts that join."""
LENGTHS = [12, HEADROOM * 2 + 5, 7, 1, 25, 14, 3]
"""Lengths of the answers; one is longer than the reserved columns."""
FAMILIES = {
    "llama": {"max_position_embeddings": 512},
    "mistral": {"sliding_window": 16},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "max_position_embeddings": 512},
}


def prompts_of(lengths: list[int], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 400, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_rows_that_join_and_leave_at_any_step_answer_as_if_alone(tmp_path, family):
    model = open_model(recipe_with(build_family(tmp_path / family, family, **FAMILIES[family])), training=False).model
    rows, prompts, answers = LiveRows(model, "cpu"), [], []
    names, tokens = [], []  # by slot
    for step in range(2 * sum(LENGTHS)):
        if names:
            tokens = rows.step(torch.tensor(tokens)).argmax(-1).tolist()
        if joining := prompts_of(ARRIVALS.get(step, []), step):
            names += range(len(prompts), len(prompts) + len(joining))
            prompts += joining
            answers += [[] for _ in joining]
            tokens += rows.join(joining).argmax(-1).tolist()
        for name, token in zip(names, tokens, strict=True):
            answers[name].append(token)
        if ended := [slot for slot, name in enumerate(names) if len(answers[name]) == LENGTHS[name]]:
            taken = rows.leave(ended)
            names, tokens = [names[slot] for slot in taken], [tokens[slot] for slot in taken]
        if not names and step > max(ARRIVALS):
            break
    assert answers == [decode_greedily(model, [p], n, set(), "cpu")[0] for p, n in zip(prompts, LENGTHS, strict=True)]
    assert len({tuple(answer) for answer in answers}) == len(answers)
    assert (len(rows), rows.columns.states) == (0, {}), "memory is kept after all have left"


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


def test_sampled_rows_of_one_batch_match_transformers_for_each_alone(tune):
    served, new = served_of(tune()), 12
    model = served.model
    prompts = [[5, 9, 30 + i, 7][: 2 + i % 3] for i in range(len(SETTINGS))]
    samplers = [
        TokenSampler(model, served.request_settings(stated, new), ids, 100 + i)
        for i, (stated, ids) in enumerate(zip(SETTINGS, prompts, strict=True))
    ]
    with torch.inference_mode():
        rows = LiveRows(model, "cpu")
        sample_tokens(rows.join(prompts), samplers)
        for _ in range(new - 1):
            sample_tokens(rows.step(torch.tensor([sampler.ids[-1] for sampler in samplers])), samplers)
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
def test_a_request_overrides_the_recipe_for_itself_only(tune, section, stated, drawn, temperature):
    settings = served_of(tune(generation=section)).request_settings(stated, 5)
    assert (settings.do_sample, settings.temperature, settings.max_new_tokens) == (drawn, temperature, 5)
    assert settings.top_p == (stated.get("top_p", section.get("top_p")) if drawn else None)
