from __future__ import annotations

import io
import json
import shutil
import threading
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console
from support.finished import finish_run

from llmtune.deploy.endpoint_parity import ask_all, certify_run, connect, find_endpoint_breaches
from llmtune.deploy.tuned_model import TransformersReader
from llmtune.errors import EnvironmentProblem, GateFailed, RecipeError
from llmtune.model.processor import load_processor
from llmtune.session import Models, open_finished


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_llama):
    return finish_run(tmp_path_factory.mktemp("certify"), tiny_llama)


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def served(finished):
    """The tuned model and its tokenizer, as a server would hold them."""
    context, place = open_finished(finished, Console(file=io.StringIO()), offline=True)
    processor = load_processor(place, context.recipe.model)
    return Models(context, place, processor).adapted.model, processor


class FakeServer:
    """A small OpenAI-compatible server around a real model; `knows` are the further parameters that it takes."""

    def __init__(self, model, processor, *, knows=(), start=False, base=False, usage=True, busy=0, key=None):
        self.reader, self.processor, self.knows = TransformersReader(model), processor, set(knows)
        self.start, self.base, self.usage, self.busy, self.key = start, base, usage, busy, key

    def answer(self, body):
        unknown = set(body) - {"model", "temperature", "max_tokens", "messages", *self.knows}
        if unknown:
            return 400, {"error": {"message": f"unknown: {sorted(unknown)}"}}
        if self.busy:
            self.busy -= 1
            return 429, {"error": {"message": "busy"}}
        text = self.processor.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
        ids = self.processor(text, add_special_tokens=False)["input_ids"]
        ids = [self.processor.bos_token_id, *ids] if self.start else ids
        with self.reader.model.disable_adapter() if self.base else nullcontext():
            written = self.reader.answer(ids, [self.processor.eos_token_id], body["max_tokens"])
        choice = {"message": {"content": self.processor.decode(written, skip_special_tokens=True)}}
        if "logprobs" in body:
            logprobs = self.reader.logits([*ids, *written])[len(ids) - 1 : -1].log_softmax(-1)
            pairs = zip(written, logprobs, strict=True)
            tokens = [{"token": self.processor.decode([token]), "logprob": float(row[token])} for token, row in pairs]
            choice["logprobs"] = {"content": tokens}
        usage = {"usage": {"prompt_tokens": len(ids), "completion_tokens": len(written)}} if self.usage else {}
        if "return_token_ids" in body:
            return 200, {"choices": [{**choice, "token_ids": written}], "prompt_token_ids": ids, **usage}
        return 200, {"choices": [choice], **usage}


@contextmanager
def listening(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def at_work(server):
    class Handler(BaseHTTPRequestHandler):
        def send(self, status, content):
            self.send_response(status)
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def do_GET(self):
            self.send(200, {"data": [{"id": "other"}, {"id": "tiny"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                self.send(401, {"error": {"message": "no key"}})
            else:
                self.send(*server.answer(body))

        def log_message(self, *about):
            pass

    return listening(Handler)


def certify(run, url, console, **options):
    return certify_run(
        run, **{"url": url, "model": None, "key_file": None, "offline": True, **options}, console=console
    )


ALL = ("return_token_ids", "repetition_penalty", "logprobs", "top_logprobs")


@pytest.mark.parametrize(
    ("knows", "told"),
    [(ALL, ("ids", True)), (ALL[:2], ("ids", False)), (ALL[2:], ("count", True)), ((), ("count", False))],
)
def test_an_endpoint_of_the_same_model_passes_by_all_that_it_tells(run, served, console, knows, told):
    with at_work(FakeServer(*served, knows=knows)) as url:
        certificate = certify(run, url, console)
    measured = certificate["measured"]
    assert certificate["passed"]
    assert (measured["ids_known_by"], measured["logprob_mean_difference"] is not None) == told
    assert measured["answer_agreement"] == 1
    assert (measured["logprob_mean_difference"] or 0) < 1e-4
    assert (certificate["model"], measured["prompts"]) == ("tiny", 16)
    assert json.loads((run / "endpoint.certificate.json").read_text())["passed"]
    assert "parity with the adapter over 16 prompts" in console.file.getvalue()


@pytest.mark.parametrize(("knows", "said"), [(ALL, "other token ids"), ((), "another number of tokens")])
def test_an_endpoint_with_an_extra_start_token_fails(run, served, console, knows, said):
    with at_work(FakeServer(*served, knows=knows, start=True)) as url, pytest.raises(GateFailed, match=said) as raised:
        certify(run, url, console)
    assert raised.value.exit_code == 6
    assert not json.loads((run / "endpoint.certificate.json").read_text())["passed"]


def test_an_endpoint_of_the_base_model_fails(run, served, console):
    with at_work(FakeServer(*served, base=True)) as url, pytest.raises(GateFailed, match="greedy answers are the same"):
        certify(run, url, console)


def test_an_endpoint_that_tells_nothing_of_its_prompts_is_unproven(run, served, console):
    with at_work(FakeServer(*served, usage=False)) as url, pytest.raises(GateFailed, match="template is unproven"):
        certify(run, url, console)


def test_an_answer_that_parts_at_a_tie_counts_as_the_same_and_log_probabilities_far_off_do_not():
    good = {"ids_known_by": "ids", "same_ids": 1.0, "answer_agreement": 1.0, "logprob_mean_difference": 0.01}
    assert find_endpoint_breaches(good) == []
    assert "off by 0.4 nats" in find_endpoint_breaches(good | {"logprob_mean_difference": 0.4})[0]
    assert len(find_endpoint_breaches(good | {"logprob_mean_difference": float("nan")})) == 1


def test_our_own_server_passes(run, served, console):
    support = pytest.importorskip("support.serving")
    from llmtune.serve.serve_runs import ServeOptions, load_models, open_runs

    options = ServeOptions()
    models = load_models(open_runs({"tiny": run}, options, console), options)
    with support.serving(*models.values()) as url:
        certificate = certify(run, f"{url}/v1/", console, model="tiny")
    assert (certificate["passed"], certificate["measured"]["ids_known_by"]) == (True, "ids")


def test_a_busy_endpoint_is_asked_again_and_a_key_is_sent(run, served, console, tmp_path):
    (tmp_path / "key").write_text("open-sesame\n")
    with at_work(FakeServer(*served, knows=ALL, busy=2, key="open-sesame")) as url:
        assert certify(run, url, console, key_file=tmp_path / "key")["passed"]
        with pytest.raises(EnvironmentProblem, match="wants another key"):
            certify(run, url, console)
    assert "open-sesame" not in (run / "endpoint.certificate.json").read_text()


def test_mistakes_are_told(run, console, tmp_path):
    for url in ("127.0.0.1:8000", "ftp://x", "http://a:b@c", "http://"):
        with pytest.raises(RecipeError, match="not the address of an endpoint"):
            certify(run, url, console)
    with pytest.raises(EnvironmentProblem, match="--offline forbids"):
        certify(run, "https://api.example.com", console)
    with pytest.raises(EnvironmentProblem, match="does not answer"):
        certify(run, "http://127.0.0.1:9", console)
    with pytest.raises(RecipeError, match="key cannot be read"):
        certify(run, "http://127.0.0.1:9", console, key_file=tmp_path / "none")
    with at_work(FakeServer(None, None)) as url, pytest.raises(RecipeError, match="has no model 'mine'"):
        certify(run, url, console, model="mine")


def test_an_address_that_sends_elsewhere_is_not_followed():
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(307)
            self.send_header("Location", "http://127.0.0.1:9/")
            self.end_headers()

        def log_message(self, *about):
            pass

    with listening(Handler) as url:
        client = connect(url, "key", offline=True)
        with client, pytest.raises(EnvironmentProblem, match="status 307"):
            ask_all(client, "tiny", [{"prompt": "Once"}], False, [{}])
