"""Idle, slow or odd clients do not block others."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from llmtune.serve.generation_endpoints import in_text_thread
from llmtune.serve.http_app import Gateway
from llmtune.serve.server import TimedProtocol


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    request = Request(scope, receive)
    if request.url.path == "/slow":
        await in_text_thread(time.sleep, 1.5)
    await JSONResponse({"path": request.url.path})(scope, receive, send)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(TimedProtocol, "limit", 20)
    monkeypatch.setattr("llmtune.serve.server.HEAD_SECONDS", 1.0)
    app = Gateway(answer, body_bytes=1000, key=None)
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
