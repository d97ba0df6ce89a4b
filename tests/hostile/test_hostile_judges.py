"""Endpoints that repeat the API key, keys that no header can carry, and addresses that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.hostile import attempt
from support.http_server import answering
from support.judging import ScriptedJudge, draw_answers, write_labelled
from support.runs import FAST, finish_run, write_recipe, write_sums

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.evaluate.suites import endpoint_client
from llmtune.evaluate.suites.endpoint_client import check_key, connect, explained_errors
from llmtune.evaluate.suites.judge_client import Judge, write_question
from llmtune.recipe.eval_suites_section import JudgeSection, is_endpoint

KEY = "Zm9vYmFy-none-of-your-business-42"
ESCAPED = "".join(f"\\u{ord(letter):04x}" for letter in KEY)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_client, "RETRIES", 0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("LLMTUNE_JUDGE_KEY", KEY)


def completion(text: str, model: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {"model": model, "choices": [{"index": 0, "finish_reason": "stop", "message": message}], "usage": None}


def said(kind: str) -> tuple[int, Any, dict[str, str]]:
    """Return an answer that repeats the key."""
    escaped = json.dumps(completion("KEY\nVerdict: A", "KEY")).replace("KEY", ESCAPED).encode()
    return {
        "reply and model": (200, completion(f"You sent {KEY}\nVerdict: A", KEY), {}),
        "escaped": (200, escaped, {"Content-Type": "application/json"}),
        "no verdict": (200, completion(KEY, KEY), {}),
        "error": (500, {"error": {"message": f"bad {KEY}"}}, {}),
        "text": (500, f"bad {KEY}".encode(), {}),
        "denied": (401, {"error": {"message": KEY, "code": KEY}}, {}),
        "refused": (400, {"error": {"message": f"{'x' * 290}{KEY}"}}, {}),
        "redirect": (302, KEY.encode(), {"Location": f"http://127.0.0.1:9/{KEY}"}),
        "not JSON": (200, KEY.encode(), {}),
    }[kind]


KINDS = ["reply and model", "escaped", "no verdict", "error", "text", "denied", "refused", "redirect", "not JSON"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_a_judge_repeats_is_in_no_journal_and_no_error(here: Path, kind: str) -> None:
    with answering(lambda verb, path, headers, body: said(kind)) as url:
        judge = Judge(JudgeSection(endpoint=url, model="m"), 0)
        questions = [write_question("Which?", f"prompt {i}", "a", "b") for i in range(3)]
        try:
            shown = str(judge.ask_all(questions, {}, here / "judge.jsonl", lambda count: None))
        except EnvironmentProblem as error:
            shown = str(error)
    texts = [shown, *(path.read_text() for path in here.rglob("*") if path.is_file())]
    assert not any(part in text for text in texts for part in (KEY, KEY[:12], ESCAPED[:30]))
    assert "[removed]" in "".join(texts) or kind in ("text", "refused", "not JSON", "redirect")


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_a_certified_endpoint_repeats_is_in_no_error(kind: str) -> None:
    with answering(lambda verb, path, headers, body: said(kind)) as url, connect(url, KEY, offline=True) as client:
        try:
            with explained_errors(client):
                shown = str(client.completions.create(model="m", prompt="x"))
        except EnvironmentProblem as error:
            shown = str(error)
    assert KEY not in shown
    assert KEY[:12] not in shown


@pytest.mark.slow
def test_a_key_that_a_judge_repeats_is_in_no_file_and_no_output_of_a_run(here: Path, tiny_llama: Path) -> None:
    judge = ScriptedJudge(fails=lambda number: said("reply and model"))
    with judge.serving() as url:
        write_sums(here / "rows.jsonl")
        labelled = write_labelled(here / "labelled.jsonl", draw_answers(12, 2, win=0.5))
        section = {"endpoint": url, "model": "m", "labelled": str(labelled)}
        evaluate = {"metrics": ["loss"], "judge": section}
        recipe = write_recipe(here / "r.yaml", tiny_llama, "rows.jsonl", train=FAST, evaluate=evaluate)
        output = attempt("run", recipe, "--out", "run", code=0, seconds=120)
    assert all(one["authorization"] == f"Bearer {KEY}" for one in judge.headers)
    assert (
        f"judge: sends prompts and answers of the test rows to {url.removeprefix('http://')}, with the key in" in output
    )
    files = [path for path in (here / "run").rglob("*") if path.is_file()]
    assert {"report.html", "report.json", "report.md", "junit.xml", "judge.jsonl"} <= {path.name for path in files}
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert KEY not in output


def test_a_key_in_the_journal_of_an_earlier_version_does_not_reach_the_report() -> None:
    judge = Judge(JudgeSection(endpoint="http://localhost:1", model="m"), 0)
    reply: Any = {"model": KEY, "texts": [f"{KEY}\nVerdict: A"], "verdict": "A"}
    assert KEY not in str(judge.without_key(reply))


BAD_KEYS = ["abc-secret-1234\nx", "abc-secret-1234\r\nHost: x", "abc-secret 1234", "abc-secret-é", "abc-secret\x01"]


@pytest.mark.parametrize("key", BAD_KEYS)
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(
    here: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("LLMTUNE_JUDGE_KEY", key)
    for refused in (
        lambda: Judge(JudgeSection(endpoint="http://127.0.0.1:9", model="m"), 0),
        lambda: connect("http://127.0.0.1:9", key, offline=True),
        lambda: check_key(key, "--api-key-file"),
    ):
        with pytest.raises(EnvironmentProblem, match="the API key has a line break") as raised:
            refused()
        assert "abc-secret" not in str(raised.value)


def test_a_key_that_no_header_can_carry_ends_a_run_and_certify_before_their_work(
    here: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finish_run(here / "made", tiny_llama, train=FAST, evaluate={"metrics": ["loss"]})
    Path("key").write_text(BAD_KEYS[0])
    certify = ("deploy", "certify", run, "--url", "http://127.0.0.1:9", "--api-key-file", "key")
    monkeypatch.setenv("LLMTUNE_JUDGE_KEY", BAD_KEYS[0])
    judge = {"endpoint": "http://127.0.0.1:9", "model": "m"}
    recipe = write_recipe(here / "made" / "r.yaml", tiny_llama, "rows.jsonl", evaluate={"judge": judge})
    for command in (certify, ("run", recipe, "--out", "other")):
        output = attempt(*command, code=4)
        assert "the API key has a line break" in output
        assert "abc-secret" not in output
    assert not Path("other", "adapter").exists()


@pytest.mark.usefixtures("here")
def test_a_secret_of_the_environment_is_removed_from_every_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_HUB_TOKEN", f"{KEY}\nsecond-line-77")
    monkeypatch.setenv("APP_KEY", "production")
    for shown in (KEY, "second-line-77"):
        for options in ((), ("--json",)):
            output = attempt("recipes", "check", f"{shown}.yaml", *options, code=2)
            assert shown not in output
            assert "[removed].yaml" in output
    assert "production.yaml" in attempt("recipes", "check", "production.yaml", code=2)


@pytest.mark.parametrize(
    "url",
    [
        *("http://h:x", "http://h:99999", "http://h:0", "http://\0", "http://h\n:1", "http://☃", "http://a/\ud800"),
        *("http://[bad", "http://[v1.x]/", "http://a..b", f"http://{'a' * 64}", f"http://h/{'x' * 3000}", "http://a b"),
        *("http://h#x", "http://h?x", "http://user@h", "ftp://h", "h:80", "http://", "http://."),
    ],
)
def test_an_address_that_is_none_is_refused_by_recipe_and_certify(url: str) -> None:
    assert not is_endpoint(url)
    with pytest.raises(RecipeError, match="not the address of an endpoint"):
        connect(url, None, offline=False)


def test_addresses_of_all_kinds_are_endpoints() -> None:
    for url in (
        "http://localhost:8000",
        "https://api.openai.com/v1/",
        "http://[::1]:8000",
        "http://10.0.0.1",
        "http://h.",
    ):
        assert is_endpoint(url), url
