"""Every variant of every task: what a user gets after training, from the merged model to `verify`."""

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from support.runs import expect_equal_run, expect_every_change_named, invoke
from support.serving import load_served, serving
from support.task_cases import CASES, PLACES, place_of
from tasks.test_contract import opened, outputs

from llmtune.data.examples import ExampleReader, load_examples
from llmtune.errors import RecipeError
from llmtune.serve.finished_run import FinishedRun

pytestmark = pytest.mark.slow
NAMES = {place_of(name): name for name in sorted(CASES, key=len, reverse=True)}
"""Row of the matrix -> its case with the shortest name."""
OF_DECODERS = {"chat", "completion", "translate-decoder", "summarize-decoder", "qa-decoder"}
OF_DECODERS |= {"preference", "preference-kto", "preference-orpo", "reinforce", "reinforce-filter"}
PICTURED = {"chat-pictures"}
UNKNOWN_CLASS = "llama.cpp's converter does not know the model class"
EXPORTS = {
    "GGUF": (["gguf"], {*OF_DECODERS, "classify"}, "read back by transformers or llama.cpp"),
    "ONNX": (["onnx"], {*PLACES} - PICTURED, "in onnxruntime"),
    "ONNX int8": (["onnx", "--int8"], {*PLACES} - PICTURED, "in onnxruntime, within the limits of 8 bits"),
    "quantized": (["quantize", "--scheme", "w8a8"], OF_DECODERS, "read by transformers, within the limits of 8 bits"),
}
"""Promise -> command, the places that make it, and how the certificate compares the export."""
REFUSALS = {
    **{(promise, place): "tuned with pictures" for promise in EXPORTS for place in PICTURED},
    ("GGUF", "classify-multi"): f"{UNKNOWN_CLASS} DebertaV2ForSequenceClassification",
    ("GGUF", "classify-number"): f"{UNKNOWN_CLASS} LlamaForSequenceClassification",
    "GGUF": "GGUF export supports models that continue or classify a text",
    "quantized": "vLLM reads this format for models that continue a text",
}
"""Reasons of the other places."""


def each_export() -> Iterator[Any]:
    for promise, (_, places, comparison) in EXPORTS.items():
        for place in PLACES:
            reason = None if place in places else REFUSALS.get((promise, place), REFUSALS.get(promise))
            outcome = {"refused": reason} if reason else {"equal": f"the tuned model, {comparison}: the certificate"}
            mark = pytest.mark.promise("task", promise, place=place, **outcome)
            yield pytest.param(place, promise, reason, marks=mark, id=f"{place}-{promise}")


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
    assert done.exit_code == 0, done.stderr
    context, models, processor, _ = opened(run)
    reader = ExampleReader(load_examples(run / "data" / "examples"), "test", context.plan.task.example_type)
    batch = context.plan.task.collator(processor, context.plan.recipe, False)([reader[0], reader[1]], 0)
    with models.tuned() as model:
        inputs, tuned = outputs(model, batch)
    plain = (
        getattr(transformers, context.plan.task.model_kind.auto_class)
        .from_pretrained(tmp_path / "merged", dtype=torch.float32)
        .eval()
    )
    with torch.no_grad():
        opened_plain = plain(**inputs)
    assert tuned
    for key, logits in tuned.items():
        torch.testing.assert_close(opened_plain[key], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("place", "promise", "reason"), [*each_export()])
def test_an_export_is_certified_or_refused_with_the_reason(place, promise, reason, finished, tmp_path):
    if (place, promise) == ("classify", "GGUF"):  # transformers has no GGUF reader for encoders
        pytest.importorskip("llama_cpp")
    (word, *options), *_ = EXPORTS[promise]
    done = invoke("deploy", word, finished(NAMES[place])[0], *options, "--out", tmp_path / "export")
    if reason is None:
        assert done.exit_code == 0, done.stderr
    else:
        assert done.exit_code in (2, 4), done.output
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
    task = served["mine"].task
    with serving(*served.values()) as url:
        if task.free_prompt:
            path = "chat/completions" if task.is_conversational else "completions"
            turns = [{"role": "user", "content": given["prompt"]}]
            body: dict[str, Any] = {"messages": turns} if task.is_conversational else {"prompt": given["prompt"]}
            (choice,) = httpx.post(f"{url}/v1/{path}", json=body, timeout=60).json()["choices"]
            assert (choice["message"]["content"] if task.is_conversational else choice["text"]) == expected["text"]
            return
        body = {task.endpoint.prompt_field if key == "prompt" else key: value for key, value in given.items()}
        if "audio" in body:
            body["audio"] = base64.b64encode(Path(body["audio"]).read_bytes()).decode()
        answer = httpx.post(f"{url}{task.endpoint.path}", json=body, timeout=60).json()
    assert answer["text"] == expected["text"]
    if isinstance(expected["prediction"], dict) and isinstance(expected["prediction"].get("scores"), dict):
        expected["prediction"]["scores"] = [*expected["prediction"]["scores"].values()]  # the server names them apart
        assert answer["labels"] == [*FinishedRun(run).answer(given)["prediction"]["scores"]]
    wanted = json.loads(json.dumps(expected["prediction"]), parse_float=lambda text: round(float(text), 4))
    assert json.loads(json.dumps(answer["prediction"]), parse_float=lambda text: round(float(text), 4)) == wanted


@pytest.mark.parametrize("place", PLACES)
def test_a_text_alone_is_the_first_input_of_answer(place, finished, clips):
    run, _ = finished(NAMES[place])
    tuned, speech = FinishedRun(run), CASES[NAMES[place]].task == "speech"
    given = {"audio": str(clips / "3.wav")} if speech else INPUTS.get(place.split("-")[0], QUESTION)
    first, *others = (name for name, required in tuned.task.inputs.items() if required or name == "prompt")
    if others:
        with pytest.raises(RecipeError, match=f"--{others[0]}: task {tuned.task.name} needs it"):
            tuned.answer(given[first])
    else:
        alone = {first: given[first]}
        assert json.dumps(tuned.answer(given[first])) == json.dumps(tuned.answer(alone))


@pytest.mark.promise("task", "reproduce", by="place", equal="the run: every byte of its weights, every score")
@pytest.mark.parametrize("place", PLACES)
def test_a_run_is_reproduced_to_the_byte(place, finished, tmp_path):
    run, _ = finished(NAMES[place])
    done = invoke("reproduce", run, "--out", tmp_path / "again")
    assert done.exit_code == 0, done.stderr
    expect_equal_run(tmp_path / "again", run)


@pytest.mark.promise(
    "task", "verify", by="place", refused="a changed byte in any file of the rows, examples, weights or scores"
)
@pytest.mark.parametrize("place", PLACES)
def test_a_changed_byte_in_any_file_fails_verify_by_name(place, copied):
    run = copied(place)
    folders = ("data/rows", "data/examples", "adapter", "weights", "evaluation")
    files = [path for folder in folders for path in sorted((run / folder).rglob("*")) if path.is_file()]
    assert len(files) > 8
    expect_every_change_named(run, files)


SEARCH = [place for place in PLACES if place.startswith(("embed", "rerank"))]


@pytest.mark.promise("task", "served", by="place", equal="`generate`: vectors and scores within 1e-5")
@pytest.mark.parametrize("place", SEARCH)
def test_the_server_gives_the_vectors_and_scores_of_generate(place, finished):
    run, _ = finished(NAMES[place])
    query, passage = "Which colour has the cat 4?", "The quick cat is blue"
    with serving(*load_served(mine=run).values()) as url:
        if CASES[NAMES[place]].task == "embed":
            (expected,) = FinishedRun(run).answer({"prompt": query})["prediction"].values()
            body: dict[str, Any] = {"input": query, "input_type": "query"}
            answer = httpx.post(f"{url}/v1/embeddings", json=body, timeout=60).json()["data"][0]["embedding"]
        else:
            (expected,) = FinishedRun(run).answer({"prompt": query, "passages": passage})["prediction"]["scores"]
            body = {"query": query, "documents": [passage]}
            answer = httpx.post(f"{url}/v1/rerank", json=body, timeout=60).json()["results"][0]["relevance_score"]
    assert answer == pytest.approx(expected, abs=1e-5)
