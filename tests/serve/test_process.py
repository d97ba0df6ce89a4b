"""The server in its own process: keys, hostile clients, load, and shutdown."""

import asyncio
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.serving import Process, wait_until

KEY = "correct-horse-battery"
QUESTION = [{"role": "user", "content": "What comes after 3 and before 5?"}]
HEADERS = {"Authorization": f"Bearer {KEY}"}
CLIENTS = 64


@pytest.fixture(scope="module")
def server(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    file = tmp_path_factory.mktemp("key") / "key"
    file.write_text(f"{KEY}\n")
    with Process("--adapter", f"plain={runs['plain']}", "--max-queue", 32, "--api-key-file", file) as process:
        yield process


def address_of(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def raw_request(server: Process, body: bytes, length: int | None = None) -> bytes:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {server.url.removeprefix('http://')}\r\n"
    head += f"Authorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    return head.encode() + body


def test_bodies_of_ten_megabytes_are_refused_without_leaking_memory(server: Process) -> None:
    address = f"{server.url}/v1/chat/completions"
    before = server.memory_bytes
    long = [{"role": "user", "content": "word " * 2_000_000}]
    for _ in range(5):
        answer = httpx.post(address, json={"messages": long}, headers=HEADERS, timeout=30)
        assert answer.status_code == 413
    assert server.memory_bytes - before < 60e6
    fits = [{"role": "user", "content": "word " * 300_000}]  # within the limit of the body, beyond the context
    assert httpx.post(address, json={"messages": fits}, headers=HEADERS, timeout=30).status_code == 400


def test_a_client_that_disconnects_within_its_request_leaves_nothing_behind(server: Process) -> None:
    with socket.create_connection(address_of(server.url)) as connection:
        connection.sendall(raw_request(server, b'{"messages"', length=500))
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": QUESTION}, headers=HEADERS, timeout=30)
    assert answer.status_code == 200


class Load:
    """Clients that send requests in a loop, half of them streaming, and their results."""

    def __init__(self, server: Process, tokens: int = 16) -> None:
        self.address, self.tokens = f"{server.url}/v1/chat/completions", tokens
        self.statuses: Counter[Any] = Counter()
        self.lost = 0
        self.stopped = False

    async def ask(self, client: httpx.AsyncClient, number: int) -> None:
        asked = {"messages": QUESTION, "max_tokens": self.tokens, "model": ["plain", "tiny-llama"][number % 2]}
        while not self.stopped:
            try:
                if number % 4 < 2:
                    answer = await client.post(self.address, json=asked)
                    self.statuses[answer.status_code] += 1
                else:
                    async with client.stream("POST", self.address, json={**asked, "stream": True}) as answer:
                        lines = [line async for line in answer.aiter_lines() if line]
                    self.statuses[answer.status_code] += 1
                    self.lost += answer.status_code == 200 and lines[-1] != "data: [DONE]"
                if answer.status_code == 429:
                    assert int(answer.headers["retry-after"]) >= 1
                    await asyncio.sleep(0.2)
            except httpx.TransportError as error:
                self.statuses[type(error).__name__] += 1
                return

    async def run(self, seconds: float) -> None:
        """Send requests for `seconds`, or until `stopped`."""
        async with httpx.AsyncClient(
            headers=HEADERS, timeout=60, limits=httpx.Limits(max_connections=CLIENTS)
        ) as client:
            asking = [asyncio.create_task(self.ask(client, number)) for number in range(CLIENTS)]
            end = time.monotonic() + seconds
            while time.monotonic() < end and not self.stopped:
                await asyncio.sleep(0.1)
            self.stopped = True
            await asyncio.gather(*asking)


def test_sixty_four_clients_at_once_get_answers_or_429_and_no_stream_is_lost(server: Process) -> None:
    asyncio.run(Load(server).run(1.5))
    before, load = server.memory_bytes, Load(server)
    asyncio.run(load.run(4))
    grown = server.memory_bytes - before
    assert set(load.statuses) <= {200, 429}, load.statuses
    assert load.statuses[200] > 4
    assert load.lost == 0
    assert grown < 30e6, f"memory grew by {grown / 1e6:.0f} MB"


def test_a_stop_under_load_ends_running_answers_and_exits_143_without_a_traceback(runs: dict[str, Path]) -> None:
    with Process("--adapter", f"plain={runs['plain']}", "--grace", 20, LLMTUNE_API_KEY=KEY) as server:
        load = Load(server, tokens=20)
        thread = threading.Thread(target=lambda: asyncio.run(load.run(20)))
        thread.start()
        wait_until(lambda: load.statuses[200] > 2)
        began = time.monotonic()
        server.terminate()
        code, errors = server.end()
        load.stopped = True
        thread.join(30)
    assert code == 143
    assert "Traceback" not in errors
    assert "ERROR" not in errors
    assert KEY not in errors
    assert time.monotonic() - began < 20
    assert load.lost == 0
    # Queued requests get an error; later ones cannot connect.
    assert set(load.statuses) <= {200, 429, 503, "ConnectError", "ReadError", "RemoteProtocolError"}, load.statuses


@pytest.mark.slow
def test_an_endless_answer_is_cut_off_after_the_grace_period(runs: dict[str, Path]) -> None:
    with Process(runs["plain"], "--grace", 0.5) as server:
        asked = {"messages": QUESTION, "max_tokens": 1950, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=asked, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.terminate()
            rest = [line for line in lines if line]
        assert "shutting down" in rest[-1]
        code, errors = server.end()
    assert (code, "Traceback" in errors) == (143, False)


@pytest.mark.slow
def test_ctrl_c_stops_an_idle_server_at_once(runs: dict[str, Path]) -> None:
    with Process(runs["plain"]) as server, socket.create_connection(address_of(server.url)):  # says nothing
        server.process.send_signal(signal.SIGINT)
        code, errors = server.end(15)
    assert (code, "Traceback" in errors) == (130, False)
