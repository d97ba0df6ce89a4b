"""`deploy certify` of an endpoint whose answers are endless, late, malformed or missing."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
import torch

from llmtune.deploy.endpoint_parity import _parts_at_tie, ask_all, choose_served_model
from llmtune.errors import EnvironmentProblem, LlmtuneError
from llmtune.evaluate.suites import endpoint_client
from llmtune.evaluate.suites.endpoint_client import connect

Send = Callable[[bytes], None]
QUESTION = {"messages": [{"role": "user", "content": "x"}]}
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@contextmanager
def raw_server(answer: Callable[[Send], None]) -> Iterator[str]:
    """Answer every request with the raw bytes that `answer` sends, then close."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                connection.recv(2**16)
                answer(connection.sendall)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def with_length(body: bytes, head: bytes = HEAD) -> bytes:
    return head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


def chunk(body: bytes) -> bytes:
    return f"{len(body):x}\r\n".encode() + body + b"\r\n"


def endless(send: Send) -> None:
    send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    while True:
        send(chunk(b'"' + b"a" * 2**20))


def endless_events(send: Send) -> None:
    send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        send(chunk(b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n' * 2**12))


def dripping(send: Send) -> None:
    send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    while True:
        send(chunk(b" "))
        time.sleep(0.05)


def ask(url: str) -> None:
    """Request the models, then an answer."""
    with connect(url, None, offline=True) as client:
        with suppress(LlmtuneError):
            choose_served_model(client, None, "tiny")
        ask_all(client, "tiny", [QUESTION], chat=True, extras=[{}])


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_client, "RETRIES", 0)
    monkeypatch.setattr(endpoint_client, "TIMEOUT_SECONDS", 1)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (endless, "more than 8,388,608 bytes"),
        (endless_events, "more than 8,388,608 bytes"),
        (dripping, "did not end within 1 seconds"),
    ],
)
def test_an_endless_answer_is_abandoned_in_time_with_little_memory(answer: Callable[[Send], None], words: str) -> None:
    began = time.monotonic()
    tracemalloc.start()
    with raw_server(answer) as url, pytest.raises(EnvironmentProblem, match=words):
        ask(url)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.monotonic() - began < 20
    assert most < 100e6


def test_a_decompression_bomb_is_not_unpacked() -> None:
    packed = gzip.compress(b" " * 2**26)
    with (
        raw_server(lambda send: send(with_length(packed, HEAD + b"Content-Encoding: gzip\r\n"))) as url,
        pytest.raises(EnvironmentProblem, match="compress"),
    ):
        ask(url)


def completion(**choice: object) -> bytes:
    return json.dumps({"choices": [choice]}).encode()


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"choices": null}'),
        *(b'{"choices": []}', b'{"choices": [null]}', b'{"choices": {"a": 1}}', b'{"data": "x", "choices": "abc"}'),
        *(b'{"data": [{"id": {"a": 1}}], "choices": [{"message": 5}]}', b"data: {\n\n", b"data: [DONE]\n\n"),
        completion(message={"content": ["a", {"b": 1}]}),
        completion(message={"content": "a"}, logprobs={"content": [{"token": 5, "logprob": "x"}]}),
        completion(message={"content": "a"}, logprobs="x"),
        completion(message={"content": "a"}, token_ids="abc"),
        completion(message={"content": "a"}, token_ids=[["x"]]),
        completion(message={"content": "a"}, token_ids={"a": 10**300}),
        b'{"usage": {"prompt_tokens": "many"}, "choices": [{"message": {"content": "a"}}]}',
        b'{"prompt_token_ids": ["x"], "choices": [{"message": {"content": "a"}}]}',
    ],
)
def test_an_answer_in_another_format_is_explained(body: bytes) -> None:
    with raw_server(lambda send: send(with_length(body))) as url, pytest.raises(EnvironmentProblem):
        ask(url)


@pytest.mark.parametrize(
    "sent",
    [
        *(b"", b"nonsense\r\n\r\n", HEAD + b"Content-Length: 900\r\n\r\n{", HEAD + b"X: " + b"a" * 2**20),
        with_length(b"<html>no</html>", b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"),
        with_length(b"<html>no</html>", b"HTTP/1.1 500 No\r\nContent-Type: text/html\r\n"),
        with_length(b"", b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/v1\r\n"),
        with_length(b"", b"HTTP/1.1 307 Again\r\nLocation: /v1/models\r\n"),
        with_length(b"{}", HEAD + b"Content-Encoding: nonsense\r\n"),
    ],
)
def test_an_invalid_response_is_explained(sent: bytes) -> None:
    with raw_server(lambda send: send(sent)) as url, pytest.raises(EnvironmentProblem):
        ask(url)


@pytest.mark.parametrize("token", [-1, 7, 2**70])
def test_an_unknown_token_does_not_count_as_a_tie(token: int) -> None:
    assert not _parts_at_tie([3, 4], [3, token], torch.zeros(2, 7), stops=set())
