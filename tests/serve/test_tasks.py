"""One endpoint for each task whose answer is no conversation: what `generate` says is what the endpoint says."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.audio import write_tone
from support.families import build_bert
from support.rows import write_jsonl
from support.served_tasks import COLOURS, finish, finish_with, quiet
from support.serving import serving

from llmtune.serve.generate import answer_once
from llmtune.serve.serve_runs import ServeOptions, load_models, open_runs

GIVEN: dict[str, list[dict[str, str]]] = {
    "classify": [{"prompt": "red cat 4"}, {"prompt": "the blue cat 9 sits here"}],
    "token-classify": [{"prompt": "the red cat 4"}, {"prompt": "a blue, blue cat"}],
    "qa": [{"prompt": "Which colour?", "context": "The cat number 4 is green."}],
    "translate": [{"prompt": "number 4 is red"}, {"prompt": "number 77 is red and blue"}],
    "summarize": [{"prompt": "number 4 is red"}, {"prompt": "number 77 is red and blue"}],
}
NAMES = {"qa": {"prompt": "question", "context": "context"}}


def rounded(said: Any) -> Any:
    """What is predicted, its numbers to four places."""
    return json.loads(json.dumps(said), parse_float=lambda text: round(float(text), 4))


def served_models(run: Path) -> Any:
    options = ServeOptions()
    return load_models(open_runs({"mine": run}, options, quiet()), options)


@pytest.mark.parametrize("task", GIVEN)
def test_an_endpoint_says_what_generate_says(task: str, tmp_path: Path) -> None:
    run = finish(task, tmp_path)
    names = NAMES.get(task, {"prompt": "text"})
    with serving(*served_models(run).values()) as url:
        for given in GIVEN[task]:
            wanted = answer_once(run, given, quiet())
            asked = {names[key]: value for key, value in given.items()}
            answer = httpx.post(f"{url}/v1/{task}", json=asked)
            assert answer.status_code == 200, answer.text
            found = answer.json()
            assert (found["text"], found["model"]) == (wanted["text"], "mine")
            assert rounded(wanted["prediction"]) == rounded(found["prediction"])
        for body in ({}, {**asked, "text2": "x"}, {**asked, next(iter(asked)): 5}, {**asked, next(iter(asked)): ""}):
            refused = httpx.post(f"{url}/v1/{task}", json=body)
            assert refused.status_code == 400, body
            assert refused.json()["error"]["param"]
        description = httpx.get(f"{url}/openapi.json").json()
        assert f"/v1/{task}" in description["paths"]
        assert "/v1/chat/completions" not in description["paths"]
        assert f"/v1/{task}" in httpx.get(url, follow_redirects=True).text


def test_rows_asked_at_once_are_predicted_together_and_stay_apart(tmp_path: Path) -> None:
    run = finish("classify", tmp_path)
    (served, *_) = served_models(run).values()
    predict, sizes = served.task.predict, []

    def counted(model: Any, rows: Any, *rest: Any, **named: Any) -> Any:
        sizes.append(len(rows))
        return predict(model, rows, *rest, **named)

    object.__setattr__(served.task, "predict", counted)

    async def ask_all(url: str, texts: list[str]) -> list[Any]:
        async with httpx.AsyncClient(timeout=30) as client:
            answers = [client.post(f"{url}/v1/classify", json={"text": text}) for text in texts]
            return [answer.json()["prediction"]["scores"] for answer in await asyncio.gather(*answers)]

    texts = [f"{COLOURS[i % 3]} cat {'x' * i}" for i in range(12)]
    try:
        with serving(served, most_rows=8) as url:
            together = asyncio.run(ask_all(url, texts))
            alone = [asyncio.run(ask_all(url, [text]))[0] for text in texts]
    finally:
        object.__setattr__(served.task, "predict", predict)
    assert max(sizes) > 1
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_a_recording_is_written_down_as_base64_or_as_a_file(tmp_path: Path) -> None:
    run = finish("speech", tmp_path)
    recording = write_tone(tmp_path / "heard.wav", 0.7)
    wanted = answer_once(run, {"audio": str(recording)}, quiet())["text"]
    with serving(*served_models(run).values()) as url:
        address = f"{url}/v1/transcribe"
        coded = base64.b64encode(recording.read_bytes()).decode()
        assert httpx.post(address, json={"audio": coded}).json()["text"] == wanted
        files = {"file": ("heard.wav", recording.read_bytes())}
        assert httpx.post(address, files=files, data={"model": "mine"}).json()["text"] == wanted
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


def test_completion_is_served_as_completions_alone(tmp_path: Path, tiny_gpt2: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"number {i} is red"} for i in range(30)])
    run = finish_with(tmp_path, tiny_gpt2, rows, task="completion")
    wanted = answer_once(run, {"prompt": "number 4"}, quiet())["text"]
    with serving(*served_models(run).values()) as url:
        found = httpx.post(f"{url}/v1/completions", json={"prompt": "number 4"}).json()
        assert found["choices"][0]["text"] == wanted
        assert httpx.post(f"{url}/v1/chat/completions", json={}).status_code == 404
        assert 'data-kind="completion"' in httpx.get(url).text


def test_masked_words_are_filled_in(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"cat number {i} is red and blue"} for i in range(40)])
    sections = {"completion": {"objective": "masked"}, "generation": {"max_new_tokens": None}}
    run = finish_with(tmp_path, build_bert(tmp_path / "bert"), rows, task="completion", **sections)
    given = {"prompt": "cat number [MASK] is red"}
    wanted = answer_once(run, given, quiet())["text"]
    with serving(*served_models(run).values()) as url:
        assert httpx.post(f"{url}/v1/fill", json={"text": given["prompt"]}).json()["text"] == wanted


def test_a_reward_model_scores_and_one_of_preferences_talks(tmp_path: Path, tiny_llama: Path) -> None:
    rows = [{"prompt": f"Number {i}?", "chosen": f"It is {i}.", "rejected": "No."} for i in range(30)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    given = {"prompt": "Number 4?", "answer": "It is 4."}
    sections = {"preference": {"loss": "reward"}, "generation": {"max_new_tokens": None}}
    reward = finish_with(tmp_path / "reward", tiny_llama, path, task="preference", **sections)
    wanted = answer_once(reward, given, quiet())["text"]
    with serving(*served_models(reward).values()) as url:
        assert httpx.post(f"{url}/v1/score", json=given).json()["text"] == wanted
    talking = finish_with(tmp_path / "dpo", tiny_llama, path, task="preference", preference={"loss": "dpo"})
    wanted = answer_once(talking, {"prompt": "Number 4?"}, quiet())["text"]
    with serving(*served_models(talking).values()) as url:
        asked = {"messages": [{"role": "user", "content": "Number 4?"}]}
        answer = httpx.post(f"{url}/v1/chat/completions", json=asked).json()
        assert answer["choices"][0]["message"]["content"] == wanted
