"""One endpoint for each task without conversations: it gives the same answers as `generate`."""

import base64
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.audio import write_tone
from support.families import build_bert
from support.pairs import finish, finish_with
from support.rows import write_jsonl
from support.runs import invoke
from support.serving import load_served, serving

from llmtune.errors import DataError
from llmtune.serve.finished_run import FinishedRun

CASES: dict[str, tuple[str, list[dict[str, str]]]] = {
    "classify": ("/v1/classify", [{"prompt": "red cat 4"}, {"prompt": "the blue cat 9 sits here"}]),
    "token-classify": ("/v1/token-classify", [{"prompt": "a blue, blue cat"}]),
    "qa": ("/v1/qa", [{"prompt": "Which colour?", "context": "The cat number 4 is green."}]),
    "translate": ("/v1/translate", [{"prompt": "number 77 is red and blue"}]),
    "summarize": ("/v1/summarize", [{"prompt": "number 77 is red and blue"}]),
    "masked": ("/v1/fill", [{"prompt": "cat number [MASK] is red"}]),
    "reward": ("/v1/score", [{"prompt": "Number 4?", "answer": "It is 4."}]),
}
"""Case -> its path, and the inputs of `generate`."""
FIELDS = {"qa": {"prompt": "question"}, "reward": {"prompt": "prompt"}}
PREFERENCES = [{"prompt": f"Number {i}?", "chosen": f"It is {i}.", "rejected": "No."} for i in range(30)]


def run_of(case: str, folder: Path, tiny_llama: Path) -> Path:
    silent = {"generation": {"max_new_tokens": None}}
    if case == "masked":
        rows = write_jsonl(folder / "rows.jsonl", [{"text": f"cat number {i} is red and blue"} for i in range(40)])
        sections = {"completion": {"objective": "masked"}, **silent}
        return finish_with(folder, build_bert(folder / "bert"), rows, task="completion", **sections)
    if case == "reward":
        rows = write_jsonl(folder / "rows.jsonl", PREFERENCES)
        return finish_with(folder, tiny_llama, rows, task="preference", preference={"loss": "reward"}, **silent)
    return finish(case, folder)


def rounded(prediction: Any) -> Any:
    """Return a prediction with its numbers rounded to four places."""
    return json.loads(json.dumps(prediction), parse_float=lambda text: round(float(text), 4))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Callable[[str], Path]:
    """The run folder of a case, trained once for all tests."""
    return functools.cache(lambda case: run_of(case, tmp_path_factory.mktemp(case), tiny_llama))


@pytest.mark.parametrize("case", CASES)
def test_an_endpoint_answers_like_generate(case: str, finished: Callable[[str], Path]) -> None:
    run = finished(case)
    path, inputs = CASES[case]
    names = {"context": "context", "answer": "answer", "prompt": "text", **FIELDS.get(case, {})}
    with serving(*load_served(mine=run).values()) as url:
        for given in inputs:
            expected = FinishedRun(run).answer(given)
            body = {names[key]: value for key, value in given.items()}
            response = httpx.post(f"{url}{path}", json=body)
            assert response.status_code == 200, response.text
            answer = response.json()
            assert (answer["text"], answer["model"]) == (expected["text"], "mine")
            predicted = answer["prediction"]
            if isinstance(predicted, dict) and "labels" in answer:  # the endpoint keeps a list, with its labels
                predicted = {**predicted, "scores": dict(zip(answer["labels"], predicted["scores"], strict=True))}
            assert rounded(predicted) == rounded(expected["prediction"])
        name = next(iter(body))
        for wrong in ({}, {**body, "text2": "x"}, *({**body, name: value} for value in (5, "", "red cat " * 40_000))):
            refused = httpx.post(f"{url}{path}", json=wrong)
            assert refused.status_code == 400, wrong
            assert refused.json()["error"]["param"]
        paths = httpx.get(f"{url}/openapi.json").json()["paths"]
        assert path in paths
        assert "/v1/chat/completions" not in paths
        assert httpx.get(url, follow_redirects=True).url.path == "/docs"


@pytest.mark.parametrize("case", ["masked", "reward"])
def test_a_longer_text_is_refused(case: str, finished: Callable[[str], Path], tmp_path: Path) -> None:
    run, (path, ((given, *_))) = finished(case), CASES[case]
    longer = {**given, "answer" if case == "reward" else "prompt": "red cat [MASK] " * 500}
    with pytest.raises(DataError, match="tokens, but the model reads 128"):
        FinishedRun(run).answer(longer)
    rows = write_jsonl(tmp_path / "rows.jsonl", [given, longer])
    lines = invoke("generate", run, "--input", rows).stdout.splitlines()
    assert ["error" in json.loads(line) for line in lines] == [False, True]
    names = {"answer": "answer", "prompt": "text", **FIELDS.get(case, {})}
    with serving(*load_served(mine=run).values()) as url:
        response = httpx.post(f"{url}{path}", json={names[key]: value for key, value in longer.items()})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_recording_is_transcribed_as_base64_or_as_a_file(tmp_path: Path) -> None:
    run = finish("speech", tmp_path)
    recording = write_tone(tmp_path / "heard.wav", 0.7)
    expected = FinishedRun(run).answer({"audio": str(recording)})["text"]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"audio": name} for name in ("missing.wav", "heard.wav")])
    lines = [json.loads(line) for line in invoke("generate", run, "--input", rows).stdout.splitlines()]
    assert ("file not found" in lines[0]["error"], lines[1]["answer"]) == (True, expected)
    with serving(*load_served(mine=run).values()) as url:
        address = f"{url}/v1/transcribe"
        encoded = base64.b64encode(recording.read_bytes()).decode()
        assert httpx.post(address, json={"audio": encoded}).json()["text"] == expected
        files = {"file": ("heard.wav", recording.read_bytes())}
        assert httpx.post(address, files=files, data={"model": "mine"}).json()["text"] == expected
        for bad in (
            httpx.post(address, json={"audio": "no base64!"}),
            httpx.post(address, json={"audio": base64.b64encode(b"no sound").decode()}),
            httpx.post(address, files={"file": b"no sound"}),
            httpx.post(address, files=files, data={"speed": "2"}),
            httpx.post(address, data={"model": "mine"}),
            httpx.post(address, content=b"x", headers={"content-type": "multipart/form-data"}),
        ):
            assert bad.status_code == 400, bad.text
            assert str(tmp_path) not in bad.text
            assert "/tmp" not in bad.text


def test_a_completion_model_has_only_openais_completion_endpoint(tmp_path: Path, tiny_gpt2: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"number {i} is red"} for i in range(30)])
    run = finish_with(tmp_path, tiny_gpt2, rows, task="completion")
    expected = FinishedRun(run).answer({"prompt": "Number 4?"})["text"]
    with serving(*load_served(mine=run).values()) as url:
        chat = httpx.post(f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "Number 4?"}]})
        assert chat.status_code == 404
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "Number 4?"}).json()
        assert answer["choices"][0]["text"] == expected
        assert 'data-kind="completion"' in httpx.get(url).text
