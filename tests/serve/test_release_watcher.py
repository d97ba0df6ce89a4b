"""A served release: reloaded on promotion and rollback without a failed request; the earlier one is freed."""

from __future__ import annotations

import gc
import io
import threading
import time
import weakref
from collections import Counter
from pathlib import Path

import httpx
import pytest
from rich.console import Console
from support.adapting import Tune, quiet
from support.runs import invoke
from support.serving import Process, load_served, running, served_of, serving_engine, wait_until

from llmtune.deploy.release_folder import promote_run
from llmtune.serve.engine import Engine
from llmtune.serve.finished_run import FinishedRun
from llmtune.serve.http_app import build_app
from llmtune.serve.release_watcher import ReleaseWatcher
from llmtune.store.release_store import CURRENT, rollback

QUESTION = "What comes after 3 and before 5?"
ASKED = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 24, "temperature": 0}


@pytest.fixture
def releases(runs: dict[str, Path], here: Path) -> dict[str, str]:
    """Two releases of one name by their hashes; `plain` is current."""
    folders = {name: promote_run(runs[name], quiet(), offline=True).folder for name in ("other", "plain")}
    return {name: folder.name for name, folder in folders.items()}


def ask(url: str) -> str:
    answer = httpx.post(f"{url}/v1/chat/completions", json=ASKED, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def alone(release: str) -> str:
    """The answer of one release without a server."""
    run = FinishedRun(Path("releases/tiny") / release, offline=True)
    return str(run.answer({"prompt": QUESTION}, max_new_tokens=24)["text"])


def state(url: str) -> str:
    return str(httpx.get(f"{url}/health/ready").json()["release"])


class Clients:
    """Clients that ask without a pause over connections that they keep; counts their answers by status and text."""

    def __init__(self, url: str, count: int = 6) -> None:
        self.url, self.ended = url, threading.Event()
        self.answers: Counter[tuple[int, str]] = Counter()
        self.threads = [threading.Thread(target=self.work) for _ in range(count)]

    def work(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self.ended.is_set():
                answer = client.post(f"{self.url}/v1/chat/completions", json=ASKED)
                text = answer.json()["choices"][0]["message"]["content"] if answer.status_code == 200 else answer.text
                self.answers[answer.status_code, text] += 1

    def __enter__(self) -> Counter[tuple[int, str]]:
        for thread in self.threads:
            thread.start()
        return self.answers

    def __exit__(self, *about: object) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()


def test_a_server_process_follows_promotion_and_rollback_and_no_request_fails(
    runs: dict[str, Path], releases: dict[str, str]
) -> None:
    before, after = alone(releases["plain"]), alone(releases["other"])
    assert before != after
    with Process("--release", "tiny") as server, Clients(server.url) as answers:
        assert state(server.url) == f"tiny@{releases['plain']}"
        card = httpx.get(f"{server.url}/v1/models").json()["data"][0]
        assert (card["id"], card["release"]) == ("tiny", f"tiny@{releases['plain']}")
        assert ask(server.url) == before
        assert invoke("release", runs["other"], "--offline").exit_code == 0
        wait_until(lambda: state(server.url) == f"tiny@{releases['other']}", 60)
        assert ask(server.url) == after
        assert invoke("release", "rollback", "tiny").stdout == f"tiny: {releases['other']} -> {releases['plain']}\n"
        wait_until(lambda: state(server.url) == f"tiny@{releases['plain']}", 60)
        assert ask(server.url) == before
    assert answers.keys() == {(200, before), (200, after)}
    assert min(answers.values()) > 3


def test_a_release_that_cannot_be_loaded_leaves_the_old_one_serving_and_is_tried_again(
    runs: dict[str, Path], releases: dict[str, str]
) -> None:
    served = load_served(tiny=Path("releases/tiny") / releases["plain"])
    engine, log = Engine(served, max_queue=8), io.StringIO()
    console = Console(file=log, width=300)
    engine.start()
    watcher = ReleaseWatcher(
        "tiny", releases["plain"], engine, lambda folder: load_served(tiny=folder), console, retry_seconds=0.5
    )
    weights = Path("releases/tiny") / releases["other"] / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with running(build_app(engine, body_bytes=2**20)) as url:
        watcher.start()
        (Path("releases/tiny") / CURRENT).write_text(releases["other"])  # as a copy between machines would
        wait_until(lambda: "keeps serving" in log.getvalue())
        assert f"tiny@{releases['other']} could not be loaded: " in log.getvalue()
        assert "missing or changed" in log.getvalue()
        assert (state(url), ask(url)) == (f"tiny@{releases['plain']}", alone(releases["plain"]))
        time.sleep(2.5)
        assert log.getvalue().count("keeps serving") == 1, "the same failure is reported once"
        weights.write_bytes(content)
        wait_until(lambda: state(url) == f"tiny@{releases['other']}")
        assert ask(url) == alone(releases["other"])
        (Path("releases/tiny") / CURRENT).write_text("damaged")
        wait_until(lambda: "is not the hash of a release" in log.getvalue())
        assert ask(url) == alone(releases["other"])
    watcher.stop()
    engine.close(10)


def test_a_replaced_model_answers_its_requests_and_is_then_freed(tune: Tune) -> None:
    old, new = served_of(tune()), served_of(tune(seed=3))
    gone = weakref.ref(old.model)
    asked = {**ASKED, "max_tokens": 60}
    with serving_engine(old) as (url, engine):
        answers: list[int] = []

        def work() -> None:
            answers.append(httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60).status_code)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: engine.requests > 1)
        engine.replace({"tiny": new})
        assert engine.requests > 0, "the swap waits for no answer"
        del old
        for thread in threads:
            thread.join()
        assert answers == [200] * 8
        wait_until(lambda: gc.collect() >= 0 and gone() is None)
        assert httpx.post(f"{url}/v1/chat/completions", json=ASKED, timeout=60).status_code == 200


def test_vllm_cannot_reload_a_release_and_a_fixed_one_is_not_watched(releases: dict[str, str]) -> None:
    refused = invoke("deploy", "serve", "--release", "tiny", "--engine", "vllm")
    assert refused.exit_code == 2
    assert "--engine vllm cannot do" in refused.stderr
    refused = invoke("deploy", "serve", "--release", "tinny")
    assert refused.exit_code == 2
    assert "Did you mean 'tiny'?" in refused.stderr
    with Process(f"release:tiny@{releases['other']}") as server:
        rollback("tiny", releases["other"])
        rollback("tiny", releases["plain"])
        time.sleep(2)
        assert state(server.url) == f"tiny@{releases['other']}"
