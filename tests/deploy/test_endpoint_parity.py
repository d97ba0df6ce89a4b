import copy
import io
import json
import shutil
from contextlib import contextmanager, nullcontext

import pytest
from rich.console import Console
from support.http_server import answering
from support.runs import finish_run
from support.serving import load_served, serving
from support.templates import EMPTY_THOUGHTS
from transformers import AutoTokenizer

from llmtune.data.pictures import PLACE
from llmtune.deploy.endpoint_parity import ask_all, certify_run, find_endpoint_breaches, find_ignored_adapter
from llmtune.deploy.tuned_model import TransformersReader
from llmtune.errors import EnvironmentProblem, GateFailed, RecipeError
from llmtune.evaluate.suites.endpoint_client import connect
from llmtune.plan import open_finished
from llmtune.records import Prompt
from llmtune.run_models import Models


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_llama):
    return finish_run(tmp_path_factory.mktemp("certify"), tiny_llama)


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def served(finished):
    """The tuned model and its tokenizer, as loaded by a server."""
    context = open_finished(finished, Console(file=io.StringIO()), offline=True)
    return Models(context).adapted.model, context.plan.processor


@contextmanager
def fake_server(model, processor, *, knows=(), start=False, base=False, usage=True, busy=0, key=None):
    """A small OpenAI-compatible server with a real model; `knows` are the extra parameters that it accepts."""
    reader, left = TransformersReader(model), [busy]

    def complete(body):
        if unknown := set(body) - {"model", "temperature", "max_tokens", "messages", *knows}:
            return 400, {"error": {"message": f"unknown: {sorted(unknown)}"}}, {}
        sent = body.get("chat_template_kwargs", {})
        text = processor.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False, **sent)
        ids = processor(text, add_special_tokens=False)["input_ids"]
        ids = [processor.bos_token_id, *ids] if start else ids
        with model.disable_adapter() if base else nullcontext():
            written = reader.answer(Prompt(ids), [processor.eos_token_id], body["max_tokens"])
        choice = {"message": {"content": processor.decode(written, skip_special_tokens=True)}}
        if "logprobs" in body:
            logprobs = reader.logits(Prompt([*ids, *written]))[len(ids) - 1 : -1].log_softmax(-1)
            pairs = zip(written, logprobs, strict=True)
            tokens = [{"token": processor.decode([token]), "logprob": float(row[token])} for token, row in pairs]
            choice["logprobs"] = {"content": tokens}
        said = {"usage": {"prompt_tokens": len(ids), "completion_tokens": len(written)}} if usage else {}
        if "return_token_ids" in body:
            return 200, said | {"choices": [{**choice, "token_ids": written}], "prompt_token_ids": ids}, {}
        return 200, said | {"choices": [choice]}, {}

    def answer(verb, path, headers, body):
        if verb == "GET":
            return 200, {"data": [{"id": "other"}, {"id": "tiny"}]}, {}
        if key and headers.get("Authorization") != f"Bearer {key}":
            return 401, {"error": {"message": "no key"}}, {}
        if left[0]:
            left[0] -= 1
            return 429, {"error": {"message": "busy"}}, {"Retry-After": "0"}
        return complete(json.loads(body))

    with answering(answer) as url:
        yield url


def certify(run, url, console, **options):
    return certify_run(
        run, **{"url": url, "model": None, "key_file": None, "offline": True, **options}, console=console
    )


ALL = ("return_token_ids", "repetition_penalty", "logprobs", "top_logprobs")


@pytest.mark.parametrize(
    ("knows", "told"),
    [(ALL, ("ids", True)), (ALL[:2], ("ids", False)), (ALL[2:], ("count", True)), ((), ("count", False))],
)
def test_an_endpoint_with_the_same_model_passes_whatever_it_returns(run, served, console, knows, told):
    with fake_server(*served, knows=knows) as url:
        certificate = certify(run, url, console)
    measured = certificate["measured"]
    assert certificate["passed"]
    assert (measured["ids_known_by"], measured["logprob_mean_difference"] is not None) == told
    assert measured["answer_agreement"] == 1
    assert (measured["logprob_mean_difference"] or 0) < 1e-4
    assert (certificate["model"], measured["prompts"]) == ("tiny", 17)
    assert json.loads((run / "endpoint.certificate.json").read_text())["passed"]
    assert "parity with the adapter over 17 prompts" in console.file.getvalue()


@pytest.mark.parametrize(("knows", "said"), [(ALL, "other token ids"), ((), "a different number of tokens")])
def test_an_endpoint_with_an_extra_start_token_fails(run, served, console, knows, said):
    with fake_server(*served, knows=knows, start=True) as url, pytest.raises(GateFailed, match=said) as raised:
        certify(run, url, console)
    assert raised.value.exit_code == 6
    assert not json.loads((run / "endpoint.certificate.json").read_text())["passed"]


def test_an_endpoint_of_the_base_model_fails(run, served, console):
    with fake_server(*served, base=True) as url, pytest.raises(GateFailed, match="greedy answers are the same"):
        certify(run, url, console)


@pytest.mark.slow
def test_an_endpoint_gets_no_template_values_so_its_template_must_contain_them(tmp_path, tiny_llama, console):
    (tmp_path / "mine.jinja").write_text(EMPTY_THOUGHTS)
    model = {"chat_template": "mine.jinja", "chat_template_kwargs": {"enable_thinking": False}}
    run = finish_run(tmp_path, tiny_llama, train={"num_train_epochs": 1}, model=model)
    tuned = Models(open_finished(run, console, offline=True)).adapted.model
    saved, plain = AutoTokenizer.from_pretrained(run / "adapter"), AutoTokenizer.from_pretrained(run / "adapter")
    plain.chat_template = EMPTY_THOUGHTS
    knows = (*ALL, "chat_template_kwargs")
    with fake_server(tuned, saved, knows=knows) as url:
        assert certify(run, url, console)["passed"]
    with fake_server(tuned, plain, knows=knows) as url, pytest.raises(GateFailed, match="other token ids"):
        certify(run, url, console)


def test_an_endpoint_without_token_counts_fails(run, served, console):
    with fake_server(*served, usage=False) as url, pytest.raises(GateFailed, match="template cannot be checked"):
        certify(run, url, console)


def test_an_answer_that_diverges_at_a_tie_passes_but_wrong_log_probabilities_fail():
    good = {"ids_known_by": "ids", "same_ids": 1.0, "answer_agreement": 1.0, "logprob_mean_difference": 0.01}
    assert find_endpoint_breaches(good) == []
    assert "off by 0.4 nats" in find_endpoint_breaches(good | {"logprob_mean_difference": 0.4})[0]
    assert len(find_endpoint_breaches(good | {"logprob_mean_difference": float("nan")})) == 1


def test_our_own_server_passes(run, served, console):
    with serving(*load_served(tiny=run).values()) as url:
        certificate = certify(run, f"{url}/v1/", console, model="tiny")
    assert (certificate["passed"], certificate["measured"]["ids_known_by"]) == (True, "ids")


def test_our_own_server_passes_with_pictures(image_run, tmp_path, console):
    run = shutil.copytree(image_run("smolvlm"), tmp_path / "run")
    with serving(*load_served(run=run).values()) as url:
        certificate = certify(run, url, console, model="run")
    assert certificate["passed"]
    assert certificate["measured"]["ids_known_by"] == "ids"
    assert certificate["measured"]["pictures"] >= 3
    assert "prompts with" in console.file.getvalue()
    assert certificate["score"]["rows"] > 0


def test_an_endpoint_that_reads_the_texts_but_not_the_pictures_fails(image_run, tmp_path, console):
    run = shutil.copytree(image_run("smolvlm"), tmp_path / "run")
    model = load_served(run=run)["run"]
    plain = model.task.prompt
    model.task = copy.copy(model.task)
    model.task.prompt = lambda row, *others: plain(without_pictures(row), *others)
    with serving(model) as url, pytest.raises(GateFailed, match="other token ids of"):
        certify(run, url, console, model="run")


def without_pictures(conversation):
    messages = [
        {**{key: one[key] for key in one.keys() - {"images"}}, "content": one["content"].replace(PLACE, "")}
        for one in conversation["messages"]
    ]
    return {**conversation, "messages": messages}


def test_a_busy_endpoint_is_retried_with_the_api_key(run, served, console, tmp_path):
    (tmp_path / "key").write_text("open-sesame\n")
    with fake_server(*served, knows=ALL, busy=2, key="open-sesame") as url:
        assert certify(run, url, console, key_file=tmp_path / "key")["passed"]
        with pytest.raises(EnvironmentProblem, match="rejects the API key"):
            certify(run, url, console)
    assert "open-sesame" not in (run / "endpoint.certificate.json").read_text()


def test_invalid_certify_options_are_refused(run, console, tmp_path):
    for url in ("127.0.0.1:8000", "ftp://x", "http://a:b@c", "http://"):
        with pytest.raises(RecipeError, match="not the address of an endpoint"):
            certify(run, url, console)
    with pytest.raises(EnvironmentProblem, match="--offline forbids"):
        certify(run, "https://api.example.com", console)
    with pytest.raises(EnvironmentProblem, match="does not answer"):
        certify(run, "http://127.0.0.1:9", console)
    with pytest.raises(RecipeError, match="key cannot be read"):
        certify(run, "http://127.0.0.1:9", console, key_file=tmp_path / "none")
    with fake_server(None, None) as url, pytest.raises(RecipeError, match="has no model 'mine'"):
        certify(run, url, console, model="mine")


def test_redirects_are_not_followed():
    with answering(lambda *asked: (307, {}, {"Location": "http://127.0.0.1:9/"})) as url:
        client = connect(url, "key", offline=True)
        with client, pytest.raises(EnvironmentProblem, match="status 307"):
            ask_all(client, "tiny", [{"prompt": "Once"}], False, [{}])


@pytest.mark.parametrize(
    ("listed", "says"),
    [
        ({"owned_by": "vllm", "parent": "base"}, ["does not map the names of an adapter on Molmo2"]),
        ({"owned_by": "vllm", "parent": None}, []),  # the merged model
        ({"owned_by": "llmtune"}, []),
    ],
)
def test_an_adapter_that_vllm_lists_but_does_not_read_is_a_breach(tmp_path, listed, says):
    (tmp_path / "config.json").write_text(
        '{"model_type": "molmo2", "architectures": ["Molmo2ForConditionalGeneration"]}'
    )
    models = {"data": [{"id": "base", "owned_by": "vllm"}, {"id": "tiny", **listed}]}
    with answering(lambda *_: (200, models, {})) as url, connect(url, None, True) as client:
        breaches = find_ignored_adapter(client, "tiny", tmp_path)
    assert [said in breach for said, breach in zip(says, breaches, strict=True)] == [True] * len(says)
