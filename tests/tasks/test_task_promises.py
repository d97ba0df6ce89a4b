"""Every variant of every task: what a user gets after training, from the merged model to `verify`."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from support.runs import invoke
from support.serving import load_served, serving
from support.task_cases import CASES, PLACES, place_of
from tasks.test_contract import opened, outputs

from llmtune.data.examples import ExampleReader, load_examples
from llmtune.serve.finished_run import FinishedRun

pytestmark = pytest.mark.slow
NAMES = {place_of(name): name for name in reversed(CASES)}
"""Row of the matrix -> the case that stands for it."""
OF_DECODERS = {"chat", "completion", "translate-decoder", "summarize-decoder", "qa-decoder"}
OF_DECODERS |= {"preference", "preference-kto", "preference-orpo"}
GGUF = {*OF_DECODERS, "classify-number", "reward"}
EXPORTS: dict[str, tuple[tuple[str, ...], set[str], str, str]] = {
    "GGUF": (
        ("gguf",),
        GGUF,
        "the tuned model, read back by transformers: the certificate passes",
        "GGUF export supports models that continue or classify a text",
    ),
    "ONNX": (("onnx",), {*PLACES}, "the tuned model, in onnxruntime: the certificate passes", ""),
    "ONNX int8": (
        ("onnx", "--int8"),
        {*PLACES},
        "the tuned model, in onnxruntime, within the limits of 8 bits: the certificate passes",
        "",
    ),
    "quantized": (
        ("quantize", "--scheme", "w8a8"),
        OF_DECODERS,
        "the tuned model, read by transformers, within the limits of 8 bits: the certificate passes",
        "vLLM reads this format for models that continue a text",
    ),
}
"""Promise -> command, the places that make it, equal to what, and the reason of the others' refusal."""


def each_export() -> Any:
    for promise, (_, places, equal, reason) in EXPORTS.items():
        for place in PLACES:
            outcome = {"equal": equal} if place in places else {"refused": reason}
            mark = pytest.mark.promise("task", promise, place=place, **outcome)
            yield pytest.param(place, promise, marks=mark, id=f"{place}-{promise}")


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of a place's finished run, with its recipe."""

    def copy(place: str) -> Path:
        run, _ = finished(NAMES[place])
        return Path(shutil.copytree(run.parent, tmp_path / "copy") / "run")

    return copy


@pytest.mark.promise(
    "task", "merged", by="place", equal="the model with its adapter, by transformers alone: logits within 1e-4"
)
@pytest.mark.parametrize("place", PLACES)
def test_the_merged_folder_opens_in_transformers_with_the_outputs_of_the_tuned_model(place, finished, tmp_path):
    run, _ = finished(NAMES[place])
    done = invoke("deploy", "merge", run, "--out", tmp_path / "merged")
    if CASES[NAMES[place]].method == "full":
        assert done.exit_code == 2, done.output
        assert "nothing to merge" in done.stderr.replace("\n", " ")
        merged = run / "weights"
    else:
        assert done.exit_code == 0, done.stderr
        merged = tmp_path / "merged"
    context, models, processor, _ = opened(run)
    reader = ExampleReader(load_examples(run / "data" / "examples"), "test")
    batch = context.plan.task.collator(processor, context.plan.recipe, False)([reader[0], reader[1]], 0)
    with models.tuned() as model:
        inputs, tuned = outputs(model, batch)
    plain = getattr(transformers, context.plan.task.auto_class).from_pretrained(merged, dtype=torch.float32).eval()
    with torch.no_grad():
        opened_plain = plain(**inputs)
    assert tuned
    for key, logits in tuned.items():
        torch.testing.assert_close(opened_plain[key], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("place", "promise"), [*each_export()])
def test_an_export_is_certified_or_refused_with_the_reason(place, promise, finished, tmp_path):
    command, places, _, reason = EXPORTS[promise]
    done = invoke("deploy", command[0], finished(NAMES[place])[0], *command[1:], "--out", tmp_path / "export")
    if place in places:
        assert done.exit_code == 0, done.stderr
    else:
        assert done.exit_code == 2, done.output
        assert reason in " ".join(done.stderr.split())
        assert not (tmp_path / "export").exists()


QUESTION = {"prompt": "Which colour has the cat 4?"}
INPUTS: dict[str, dict[str, str]] = {
    "masked": {"prompt": "The quick cat is [MASK]."},
    "qa": {"prompt": "Which colour has the fox?", "context": "The quick fox is blue"},
    "reward": {**QUESTION, "answer": "It is blue"},
    "embed": {"prompt": "Where is the cat?"},
    "rerank": {**QUESTION, "answer": "The quick cat is blue"},
}
"""Inputs of `generate` by the first word of a place; the others get a question."""


@pytest.mark.promise("task", "served", by="place", equal="`generate`: the same text and prediction")
@pytest.mark.parametrize("place", [place for place in PLACES if not place.startswith(("embed", "rerank"))])
def test_the_server_answers_as_generate_does(place, finished, clips):
    run, _ = finished(NAMES[place])
    given = INPUTS.get(place.split("-")[0], QUESTION)
    if CASES[NAMES[place]].task == "speech":
        given = {"audio": str(clips / "3.wav")}
    expected = FinishedRun(run).answer(given)
    served = load_served(mine=run)
    endpoint = served["mine"].task.endpoint
    with serving(*served.values()) as url:
        if endpoint is None:
            path = "chat/completions" if CASES[NAMES[place]].task != "completion" else "completions"
            turns = [{"role": "user", "content": given["prompt"]}]
            body: dict[str, Any] = {"messages": turns} if "chat" in path else {"prompt": given["prompt"]}
            (choice,) = httpx.post(f"{url}/v1/{path}", json=body, timeout=60).json()["choices"]
            assert (choice["message"]["content"] if "chat" in path else choice["text"]) == expected["text"]
            return
        body = {endpoint.prompt_field if key == "prompt" else key: value for key, value in given.items()}
        if "audio" in body:
            body["audio"] = base64.b64encode(Path(body["audio"]).read_bytes()).decode()
        answer = httpx.post(f"{url}{endpoint.path}", json=body, timeout=60).json()
    assert answer["text"] == expected["text"]
    wanted = json.loads(json.dumps(expected["prediction"]), parse_float=lambda text: round(float(text), 4))
    assert json.loads(json.dumps(answer["prediction"]), parse_float=lambda text: round(float(text), 4)) == wanted


@pytest.mark.promise("task", "reproduce", by="place", equal="the run: every byte of its weights, every score")
@pytest.mark.parametrize("place", PLACES)
def test_a_run_is_reproduced_to_the_byte(place, finished, tmp_path):
    run, report = finished(NAMES[place])
    done = invoke("reproduce", run, "--out", tmp_path / "again")
    assert done.exit_code == 0, done.stderr
    result = "weights" if CASES[NAMES[place]].method == "full" else "adapter"
    weights = [path.relative_to(run) for path in (run / result).glob("*.safetensors")]
    assert weights
    for path in weights:
        assert (tmp_path / "again" / path).read_bytes() == (run / path).read_bytes()
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    assert again["evaluation"]["tuned"] == report["evaluation"]["tuned"]


@pytest.mark.promise(
    "task", "verify", by="place", refused="a changed byte in any file of the rows, examples, weights or scores"
)
@pytest.mark.parametrize("place", PLACES)
def test_a_changed_byte_in_any_file_fails_verify_by_name(place, copied):
    run = copied(place)
    assert invoke("verify", run).exit_code == 0
    folders = ("data/rows", "data/examples", "adapter", "weights", "evaluation")
    files = [path for folder in folders for path in sorted((run / folder).rglob("*")) if path.is_file()]
    assert len(files) > 8
    unnoticed = []
    for file in files:
        content = file.read_bytes()
        if not content:
            continue
        changed = bytearray(content)
        changed[len(changed) // 2] ^= 1
        file.write_bytes(changed)
        done = invoke("verify", run)
        if done.exit_code != 6 or file.name not in done.stderr.replace("\n", ""):
            unnoticed.append((file.relative_to(run).as_posix(), done.exit_code))
        file.write_bytes(content)
    assert unnoticed == []
