"""A real server: a client that sends too much does not block others."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from support.runs import finish_run, llmtune
from support.serving import Process

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    return finish_run(tmp_path_factory.mktemp("served"), tiny_llama, evaluate={"metrics": ["loss"]})


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Process]:
    with Process(run) as process:
        yield process
        process.terminate()
        code, errors = process.end()
        assert (code, "Traceback" in errors) == (143, False), errors


@contextmanager
def longest_wait(server: Process, figures: dict[str, float]) -> Iterator[None]:
    """Poll /health inside the block, and record the longest response time."""
    done = threading.Event()
    waits: list[float] = []

    def watch() -> None:
        with httpx.Client(timeout=60) as client:
            while not done.is_set():
                began = time.monotonic()
                assert client.get(f"{server.url}/health/ready").status_code == 200
                waits.append(time.monotonic() - began)
                time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        figures["asked"], figures["longest"] = len(waits), max(waits)


LARGE = {
    "one message of 1.9 MB": [{"role": "user", "content": "some words " * 172_000}],
    "30,000 messages": [{"role": ("user", "assistant")[n % 2], "content": f"word {n}"} for n in range(29_999)],
    "60,000 parts": [{"role": "user", "content": [{"type": "text", "text": ""}] * 60_000}],
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_large_request_does_not_delay_other_answers(server: Process, kind: str) -> None:
    figures: dict[str, float] = {}
    with longest_wait(server, figures):
        began = time.monotonic()
        asked = {"messages": LARGE[kind], "max_tokens": 1}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=120)
        seconds = time.monotonic() - began
    print(f"{kind}: {answer.status_code} after {seconds:.1f} s; /health {figures}")
    assert answer.status_code in (400, 413)
    assert figures["longest"] < 0.5


def test_a_key_file_that_is_a_device_is_refused(run: Path) -> None:
    done = llmtune("deploy", "serve", run, "--api-key-file", "/dev/zero", cwd=run.parent, timeout=60)
    assert done.returncode == 2
    assert "not a regular file" in done.stderr
