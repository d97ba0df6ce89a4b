import json
import socket
import threading

import httpx
import openai
import pytest
from rich.console import Console
from support.adapting import tuner
from support.learning import WEATHER
from support.runs import write_colours
from support.serving import served_of, serving, serving_engine, wait_until
from tokenizers.processors import TemplateProcessing

from llmtune.evaluate.generation import generate_completions
from llmtune.recipe.retired import RETIRED
from llmtune.records import Prompt
from llmtune.serve.finished_run import ChatSession
from llmtune.serve.served_model import ServedModel

QUESTION = [{"role": "user", "content": "Which colour has the cat?"}]
KEY = "correct-horse-battery"


@pytest.fixture(scope="module")
def served(tmp_path_factory, tiny_llama):
    """A served tuned chat model; a test that changes it must make its own."""
    folder = tmp_path_factory.mktemp("api")
    tune = tuner(tiny_llama, write_colours(folder / "chat.jsonl"), folder, Console(quiet=True))
    return served_of(tune(generation={"max_new_tokens": 20}))


@pytest.fixture(scope="module")
def talk(served):
    """OpenAI's client, the address of its server, and the served model."""
    with serving(served, max_queue=2) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        yield client, url, served


def said_by_session(served):
    session = ChatSession(served)
    return "".join(piece.content for piece in session.answer(QUESTION[0]["content"]))


def test_the_openai_client_gets_the_answer_of_generate_at_once_and_in_pieces(talk):
    client, _, served = talk
    wanted = said_by_session(served)
    whole = client.chat.completions.create(model="tiny", messages=QUESTION)
    assert whole.choices[0].message.content == wanted != ""
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 20
    ids = served.task.prompt_ids({"messages": QUESTION}, served.processor, served.recipe)
    assert whole.usage.prompt_tokens == len(ids)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(model="tiny", messages=QUESTION, stream=True, stream_options=options))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == wanted
    assert sum(map(bool, pieces)) > 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage
    assert chunks[0].choices[0].delta.role == "assistant"


def test_the_openai_client_continues_a_text(talk):
    client, _, served = talk
    ids = served.processor("The quick").input_ids
    [output] = generate_completions(served.model, [Prompt(ids)], served.processor, served.recipe, device="cpu")
    wanted = served.processor.decode(output.token_ids, skip_special_tokens=True)
    for prompt in ("The quick", ["The quick"], served.processor("The quick").input_ids):
        assert client.completions.create(model="tiny", prompt=prompt).choices[0].text == wanted
    chunks = client.completions.create(model="tiny", prompt="The quick", stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == wanted


def test_models_are_listed_and_found_by_name(talk):
    client, _, _ = talk
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == 2048
    with pytest.raises(openai.NotFoundError, match="Did you mean 'tiny'"):
        client.chat.completions.create(model="tinny", messages=QUESTION)


def test_stop_texts_length_and_seed_are_honoured(talk):
    client, _, served = talk

    def ask(**parameters):
        return client.chat.completions.create(model="tiny", messages=QUESTION, **parameters)

    drawn = ask(temperature=1.5, seed=5, max_tokens=40).choices[0].message.content
    assert ask(temperature=1.5, seed=5, max_tokens=40).choices[0].message.content == drawn
    assert ask(temperature=1.5, seed=6, max_tokens=40).choices[0].message.content != drawn
    stop = drawn[8:10]
    for stream in (False, True):
        found = ask(temperature=1.5, seed=5, max_tokens=40, stop=[stop], stream=stream)
        if stream:
            chunks = list(found)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            text, reason = found.choices[0].message.content, found.choices[0].finish_reason
            assert found.usage.completion_tokens < 40
        assert (text, reason) == (drawn[: drawn.index(stop)].rstrip(), "stop")
    assert ask(max_completion_tokens=3).usage.completion_tokens == 3
    ends = served.stops
    served.stops = {ask(extra_body={"return_token_ids": True}).choices[0].token_ids[2]}
    assert ask().choices[0].finish_reason == "stop"
    served.stops = ends


def user(content):
    return [{"role": "user", "content": content}]


PICTURE = [{"type": "image_url", "image_url": {"url": "data:x"}}]
REFUSED = [
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
    ({"tools": [WEATHER], "parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "clock"}}}, "'clock'"),
    ({"tool_choice": "required"}, "tools is empty"),
    ({"logprobs": True}, "logprobs"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"n": 2}, "n"),
    ({"temperature": 2.5}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_token": 5}, "max_token"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": []}, "messages"),
    ({"messages": user("\ud800")}, "messages: contains a lone surrogate"),
    ({"messages": [{"role": "system", "content": "Be brief."}]}, "only a system message"),
    ({"messages": [*QUESTION, {"role": "system", "content": "late"}]}, "system message not first"),
    ({"messages": [*QUESTION, {"role": "assistant", "content": "blue"}]}, "Add a user message"),
    ({"messages": user("")}, "has no content"),
    ({"messages": [{"role": "user"}]}, "has no content"),
    ({"messages": user(PICTURE)}, "a message has a picture; only texts are read"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "'robot' is none of"),
    ({"messages": [{**QUESTION[0], "nane": "Ann"}]}, "Did you mean 'name'"),
]


def test_unsupported_requests_are_refused_by_name_in_openais_format(talk):
    client, url, _ = talk
    for changes, words in REFUSED:
        body = json.dumps({"messages": QUESTION, **changes})
        answer = httpx.post(f"{url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, changes
        error = answer.json()["error"]
        assert words in error["message"]
        assert error["type"] == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model="tiny", messages=QUESTION, extra_body={"tools": [{}]})


def test_unsupported_parameters_without_effect_are_accepted(talk):
    client, _, served = talk
    nothing = {"tools": [], "logprobs": False, "presence_penalty": 0, "logit_bias": {}, "metadata": None, "n": 1}
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, extra_body=nothing, user="me")
    assert answer.choices[0].message.content == said_by_session(served)


def test_a_conversation_gets_the_ids_of_training_in_any_form(talk):
    client, _, served = talk
    plain = [
        {"role": "system", "content": "Be brief."},
        *QUESTION,
        {"role": "assistant", "content": "Blue."},
        *QUESTION,
    ]
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in plain]
    wanted = served.task.prompt_ids({"messages": plain}, served.processor, served.recipe)
    newer = [{**plain[0], "role": "developer"}, *plain[1:]]
    for messages in (plain, parts, newer):
        more = {"return_token_ids": True}
        answer = client.chat.completions.create(model="tiny", messages=messages, extra_body=more, max_tokens=2)
        assert answer.prompt_token_ids == wanted
        assert len(answer.choices[0].token_ids) == 2
    chunks = list(client.chat.completions.create(model="tiny", messages=plain, stream=True, extra_body=more))
    assert chunks[0].prompt_token_ids == wanted
    assert sum(len(chunk.choices[0].token_ids) for chunk in chunks) == 20


def test_a_text_that_begins_with_the_start_token_gets_no_second_one(tune):
    served = served_of(tune())
    start, number = served.processor.bos_token, served.processor.bos_token_id
    served.processor.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, number)]
    )
    plain = served.processor("The quick", add_special_tokens=False).input_ids
    with serving(served) as url:
        for prompt in ("The quick", f"{start}The quick"):
            asked = {"prompt": prompt, "return_token_ids": True, "max_tokens": 1}
            assert httpx.post(f"{url}/v1/completions", json=asked).json()["prompt_token_ids"] == [number, *plain]


def test_a_prompt_beyond_the_context_is_refused_with_numbers(talk):
    _, url, _ = talk
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": [5] * 2050})
    assert answer.status_code == 400
    assert "2050 tokens" in answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": [5] * 40, "max_tokens": 2040})
    assert "may have 2040" in answer.json()["error"]["message"]
    assert httpx.post(f"{url}/v1/completions", json={"prompt": [5, 9999]}).status_code == 400
    fitted = httpx.post(f"{url}/v1/completions", json={"prompt": [5] * 2045}).json()
    assert fitted["usage"]["completion_tokens"] == 3


def test_bodies_that_are_invalid_json_too_large_or_of_another_type_are_refused(talk):
    _, url, _ = talk
    kind = {"content-type": "application/json"}
    address = f"{url}/v1/chat/completions"
    for body in ("{", "", "[]", '"x"', "nul", '{"messages": NaN}', "[" * 100_000):
        answer = httpx.post(address, content=body, headers=kind)
        assert answer.status_code == 400, body[:20]
        assert answer.json()["error"]["message"]
    assert httpx.post(address, content="a" * (2**20 + 1), headers=kind).status_code == 413
    assert httpx.post(address, content=json.dumps({"messages": QUESTION})).status_code == 400
    missing = httpx.get(f"{url}/v1/nothing")
    assert (missing.status_code, "/v1/models" in missing.json()["error"]["message"]) == (404, True)
    assert httpx.get(address).status_code == 405
    assert RETIRED["GET /metrics"] in httpx.get(f"{url}/metrics").json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        *((f"/v1/{name}", None) for name in ("embeddings", "responses", "messages", "moderations", "score", "files")),
        ("/v1/complete", "/v1/completions"),
        ("/v1/model", "/v1/models"),
        ("/chat/completions", "/v1/chat/completions"),
    ],
)
def test_a_wrong_path_suggests_only_a_path_that_is_near(talk, path, meant):
    message = httpx.post(f"{talk[1]}{path}", json={}).json()["error"]["message"]
    assert message.partition("Did you mean ")[2].partition("?")[0] == (repr(meant) if meant else "")


@pytest.mark.parametrize("text", ["a" * 1_000_000, "the red cat " * 80_000])
def test_a_text_far_beyond_the_context_is_refused_by_its_start(talk, text):
    _, url, _ = talk
    asked_by_path = {
        "chat/completions": {"messages": [{"role": "user", "content": text}]},
        "completions": {"prompt": text},
    }
    for path, asked in asked_by_path.items():
        answer = httpx.post(f"{url}/v1/{path}", json=asked, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert "longer than the model's context" in answer.json()["error"]["message"], "it was not tokenized in full"


def test_other_origins_and_host_names_are_refused(served):
    with serving(served) as url:
        assert httpx.get(f"{url}/v1/models").status_code == 200
        assert httpx.get(f"{url}/v1/models", headers={"Origin": url}).status_code == 200
        assert httpx.get(f"{url}/v1/models", headers={"Origin": "https://example.org"}).status_code == 403
        assert httpx.get(f"{url}/v1/models", headers={"Host": "rebound.example.org"}).status_code == 403
        answer = httpx.options(f"{url}/v1/models", headers={"Access-Control-Request-Method": "POST"})
        assert "access-control-allow-origin" not in answer.headers


def test_a_configured_key_is_required(served):
    with serving(served, key=KEY) as url:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": KEY},
            {"Authorization": f"Basic {KEY}"},
        ):
            for path in ("/v1/models", "/v1/nothing"):
                answer = httpx.get(url + path, headers=headers)
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
        assert httpx.get(f"{url}/health/ready").status_code == 200
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
            assert client.chat.completions.create(model="tiny", messages=QUESTION).choices


def test_a_full_queue_returns_429_and_when_to_retry(served):
    endless = {"messages": QUESTION, "max_tokens": 1900, "stream": True}
    with serving_engine(served, max_queue=1) as (url, engine), httpx.Client() as client:
        address = f"{url}/v1/chat/completions"
        with client.stream("POST", address, json=endless) as first:
            lines = first.iter_lines()  # keep a reference, or the connection is closed
            next(lines)
            second = threading.Thread(target=lambda: httpx.post(address, json={"messages": QUESTION}, timeout=60))
            second.start()
            wait_until(lambda: engine.requests == 2)
            full = httpx.post(address, json={"messages": QUESTION})
            assert full.status_code == 429
            assert 1 <= int(full.headers["retry-after"]) <= 60
            assert full.json()["error"]["type"] == "rate_limit_error"
        second.join(30)
        assert not second.is_alive(), "the answer of a client that left goes on"


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_when_its_client_leaves(served, stream, monkeypatch):
    body = json.dumps({"messages": QUESTION, "max_tokens": 1900, "stream": stream})
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    lengths = []

    def counted(*arguments):
        ids = ServedModel.generate(served, *arguments)
        lengths.append(len(ids))
        return ids

    monkeypatch.setattr(served, "generate", counted)
    with serving_engine(served) as (url, engine):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            if stream:
                assert b"200 OK" in connection.recv(200)
            wait_until(lambda: engine.requests == 1)
        wait_until(lambda: engine.requests == 0 and lengths)
    assert lengths[0] < 1900
