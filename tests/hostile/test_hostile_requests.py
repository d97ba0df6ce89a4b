"""Idle, slow or odd clients do not block others."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from llmtune.serve.generation_endpoints import in_text_thread
from llmtune.serve.http_app import Gateway
from llmtune.serve.server import TimedProtocol

LONG = b"x" * 2**24
"""A response that no buffer holds."""


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    request = Request(scope, receive)
    if request.url.path == "/slow":
        await in_text_thread(time.sleep, 1.5)
    long = request.url.path == "/long"
    await (Response(LONG) if long else JSONResponse({"path": request.url.path}))(scope, receive, send)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[int]:
    """A server with small limits; its parameter is its key."""
    monkeypatch.setattr(TimedProtocol, "limit", 20)
    for name in ("server.HEAD_SECONDS", "server.TAKE_SECONDS", "http_app.BODY_SECONDS", "http_app.DRAIN_SECONDS"):
        monkeypatch.setattr(f"llmtune.serve.{name}", 1.0)
    app = Gateway(answer, body_bytes=1000, key=getattr(request, "param", None))
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=TimedProtocol, lifespan="off", log_level="warning", ws="none"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])))
    thread.start()
    yield bound.getsockname()[1]
    server.should_exit = True
    thread.join(10)
    bound.close()


def test_idle_connections_make_room_for_an_active_client(port: int) -> None:
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
    assert httpx.get(f"http://127.0.0.1:{port}/x", timeout=5).json() == {"path": "/x"}
    for one in idle:
        one.close()


def test_a_request_head_that_never_ends_times_out(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as slow:
        slow.settimeout(5)
        slow.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
        assert slow.recv(100) == b""


@pytest.mark.parametrize("headers", [{"Host": "["}, {"Host": "a b"}, {"Origin": "http://["}, {"Host": "http://x"}])
def test_an_invalid_host_or_origin_is_refused(port: int, headers: dict[str, str]) -> None:
    found = httpx.get(f"http://127.0.0.1:{port}/", headers=headers, timeout=5)
    assert found.status_code in (400, 403)


def test_slow_work_on_a_text_does_not_delay_other_answers(port: int) -> None:
    slow = threading.Thread(target=httpx.get, args=(f"http://127.0.0.1:{port}/slow",), kwargs={"timeout": 10})
    slow.start()
    time.sleep(0.3)
    began = time.monotonic()
    httpx.get(f"http://127.0.0.1:{port}/x", timeout=5)
    assert time.monotonic() - began < 1
    slow.join()


def post(
    port: int, size: int, path: str = "/v1/x", host: str = "localhost", source: str = "127.0.0.1"
) -> socket.socket:
    """Send the head of a request with a body of `size` bytes, and its first byte."""
    client = socket.create_connection(("127.0.0.1", port), timeout=5, source_address=(source, 0))
    client.sendall(f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {size}\r\n\r\nx".encode())
    return client


def read_all(client: socket.socket) -> bytes:
    """Return what the server sends until it closes the connection."""
    parts = []
    with suppress(ConnectionResetError):
        while part := client.recv(2**20):
            parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize(
    ("port", "host", "size", "status"),
    [
        ("k" * 16, "localhost", 9, 401),
        (None, "a.example", 9, 403),
        (None, "localhost", 9, 408),
        (None, "localhost", 2000, 413),
    ],
    indirect=["port"],
)
def test_a_refused_request_is_answered_and_its_connection_closed(port: int, host: str, size: int, status: int) -> None:
    began = time.monotonic()
    with post(port, size, host=host) as client:
        if status == 413:
            client.sendall(b"x" * 1200)
        head = client.recv(1000).split(b"\r\n\r\n")[0].lower()
        assert head.startswith(f"http/1.1 {status} ".encode())
        assert b"connection: close" in head
        assert time.monotonic() - began < (2 if status == 408 else 0.9), "it does not wait for the rest"
        read_all(client)
        assert time.monotonic() - began < 3


@pytest.mark.parametrize("port", ["k" * 16], indirect=True)
def test_a_client_that_sends_all_before_it_reads_gets_the_refusal(port: int) -> None:
    url = f"http://127.0.0.1:{port}/v1/x"
    assert httpx.post(url, content=b"x" * 7000, timeout=5).status_code == 401
    key = {"Authorization": "Bearer " + "k" * 16}
    assert httpx.post(url, content=b"x" * 7000, headers=key, timeout=5).status_code == 413


@pytest.mark.parametrize("port", [None, "k" * 16], indirect=True)
@pytest.mark.parametrize("kind", ["bodies", "unread"])
def test_clients_that_hold_connections_do_not_keep_others_out(port: int, kind: str) -> None:
    url = f"http://127.0.0.1:{port}"
    other = httpx.HTTPTransport(local_address="127.0.0.2")
    with httpx.Client(transport=other, timeout=5) as steady:
        steady.get(f"{url}/")
        (before,) = other._pool.connections
        held = []
        for _ in range(40):
            held.append(post(port, 10**6) if kind == "bodies" else post(port, 1, path="/long"))
            began = time.monotonic()
            assert steady.get(f"{url}/").status_code == 200
            assert time.monotonic() - began < 2  # 1 s on a machine that is not busy
        began = time.monotonic()
        assert httpx.get(f"{url}/", timeout=5).status_code == 200, "also for the same address"
        assert time.monotonic() - began < 2
        assert [*other._pool.connections] == [before], "another client keeps its connection"
        for one in held:
            one.close()


def test_a_client_that_does_not_take_its_response_is_cut_off(port: int) -> None:
    with post(port, 1, path="/long") as client:
        time.sleep(2)
        assert len(read_all(client)) < len(LONG)


def test_an_address_has_a_share_of_the_connections(port: int) -> None:
    first = post(port, 9, source="127.0.0.2")
    held = [post(port, 9) for _ in range(6)]
    assert read_all(held[0]) == b"", "5 of 20 are allowed, so the oldest one made room"
    assert b" 408 " in read_all(held[1])
    assert b" 408 " in read_all(first)
    for one in (first, *held):
        one.close()
