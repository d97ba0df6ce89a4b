import io
import json
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from support.learning import learn_by_heart
from support.rows import prepare, write_jsonl

from llmtune.data.contamination import find_overlap
from llmtune.data.row_store import read_rows
from llmtune.display.console import counting_bars
from llmtune.evaluate.evaluation_file import load_evaluation, save_evaluation
from llmtune.evaluate.gates import check_gates
from llmtune.evaluate.inference import add_bar
from llmtune.evaluate.scoring import show_examples
from llmtune.evaluate.text_metrics import METRICS
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.recipe.task_facts import CUT_METRIC, TASK_FACTS, TOOL_METRICS
from llmtune.records import Difference
from llmtune.store.score_records import Evaluation


def losses_by_hand(bench):
    """Nats, tokens and correct first choices of each test row, one row at a time with plain transformers."""
    model, found = bench.load(), []
    for example in bench.reader:
        ids = torch.tensor([list(example.input_ids)])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0].log_softmax(-1)
        at = [i for start, end in zip(example.spans[::2], example.spans[1::2], strict=True) for i in range(start, end)]
        nats = -sum(float(logs[i - 1, ids[0, i]]) for i in at)
        found.append((nats, len(at), sum(int(logs[i - 1].argmax() == ids[0, i]) for i in at)))
    return found


def test_every_metric_of_the_task_is_measured_on_both_models(measured):
    bench, found, _ = measured
    assert set(found.base) == set(found.tuned) == set(found.difference) == {*METRICS, CUT_METRIC}
    assert {*METRICS, CUT_METRIC, *TOOL_METRICS} == {*TASK_FACTS["chat"].metrics}
    assert found.rows == bench.examples.counts["test"] > 10
    assert bench.entered == ["base", "base left", "tuned", "tuned left"]
    for metric, change in found.difference.items():
        assert change.value == pytest.approx(found.tuned[metric] - found.base[metric])
        assert metric.endswith("ece") or change.low <= change.value <= change.high
        assert change.n == found.rows
        assert metric in found.signatures


def test_a_model_that_learned_the_rows_is_found_better(measured):
    _, found, _ = measured
    for metric in ("loss", "perplexity", "bits_per_byte"):
        assert found.difference[metric].high < 0
    for metric in ("accuracy", "exact_match", "rougeL", "choice_accuracy"):
        assert found.difference[metric].low > 0
    assert found.tuned["exact_match"] > 0.9
    assert found.tuned["choice_accuracy"] > 0.9


@pytest.mark.parametrize("packing", [True, False])
def test_losses_equal_those_of_plain_forward_passes(make_bench, packing):
    bench = make_bench(packing=packing)
    bench.steps = 0
    rows = losses_by_hand(bench)
    nats, tokens, correct = (sum(column) for column in zip(*rows, strict=True))
    size = sum(example.target_bytes for example in bench.reader)
    found = bench.evaluate(metrics=("loss", "bits_per_byte", "perplexity", "accuracy"), samples=0).base
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["accuracy"] == pytest.approx(correct / tokens)


@pytest.mark.promise("metric", "referee", equal="predictions.jsonl, counted", place="choice_accuracy")
def test_predictions_have_a_line_per_row_and_add_up_to_the_scores(measured):
    bench, found, folder = measured
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == found.rows
    rows = read_rows(bench.rows, "test", list(range(found.rows)))
    assert [line["prompt"] for line in lines] == [row["messages"][0]["content"] for row in rows]
    assert [line["reference"] for line in lines] == [row["messages"][1]["content"] for row in rows]
    for side, scores in (("base", found.base), ("tuned", found.tuned)):
        tokens = sum(line["tokens"] for line in lines)
        assert sum(line[f"{side}_nats"] for line in lines) / tokens == pytest.approx(scores["loss"])
        assert sum(line[f"{side}_right"] for line in lines) / len(lines) == pytest.approx(scores["exact_match"])
        right = [line[f"{side}_choice"] == line["reference"] for line in lines]
        assert sum(right) / len(lines) == pytest.approx(scores["choice_accuracy"])
        assert right == [line[f"{side}_choice_right"] for line in lines]


def test_a_limit_applies_only_to_generated_answers(bench):
    bench.steps = 0
    found = bench.evaluate(metrics=("loss", "exact_match", "choice_accuracy"), limit=4)
    assert found.difference["exact_match"].n == 4
    assert found.difference["loss"].n == found.difference["choice_accuracy"].n == found.rows
    assert f"4 of {found.rows}" in found.signatures["generated"]


def test_texts_without_a_prompt_have_losses_but_no_answers(make_bench):
    text = """
recipe_version: 1
name: texts
task: completion
data: {{train: {rows}, test: 0.4, validation: 0, deduplicate: exact}}
model: {{name: {model}, dtype: float32}}
"""
    rows = [{"text": f"The house number {i} is {i % 7} metres high."} for i in range(30)]
    bench = make_bench(text, rows)
    bench.steps = 0
    found = bench.evaluate(metrics=("loss", "exact_match", "choice_accuracy"))
    assert set(found.tuned) == {"loss"}
    assert "no prompt" in found.signatures["generated"]
    assert "not measured" in found.signatures["choice_accuracy.choices"]
    assert found.samples == ()


@pytest.mark.parametrize("knows_starts", [True, False])
def test_a_base_that_is_worse_on_later_pieces_of_texts_is_reported(make_bench, knows_starts):
    text = """
recipe_version: 1
name: pieces
task: completion
data: {{train: {rows}, test: 0.4, validation: 0, deduplicate: exact, on_overlong: split, max_length: 24}}
model: {{name: {model}, dtype: float32}}
"""
    bench = make_bench(text, [{"text": f"House {i} " + f"has {i % 7} doors and a roof " * 6} for i in range(12)])
    load, rows = bench.load, bench.reader.rows
    is_first = np.diff(rows, prepend=-1) > 0
    assert 1 < is_first.sum() < len(rows)

    def load_taught():
        model = load()
        if knows_starts:
            firsts = [bench.reader[at] for at in np.flatnonzero(is_first)]
            learn_by_heart(model, firsts, bench.task, bench.processor.pad_token_id, 40)
        return model

    taught = replace(bench, load=load_taught, steps=0)
    found = taught.evaluate(metrics=("loss",), samples=0)
    warned = " ".join(bench.console.file.getvalue().split())
    assert ("loss.pieces" in found.signatures) == knows_starts
    if knows_starts:
        nats, tokens, _ = np.array(losses_by_hand(taught)).T
        later, first = (nats[part].sum() / tokens[part].sum() for part in (~is_first, is_first))
        assert f"is {later:.2f} on later pieces of split texts and {first:.2f} on their first pieces" in warned
    else:
        assert "later pieces" not in warned


def test_without_test_rows_nothing_is_measured_and_no_model_is_loaded(make_bench):
    bench = make_bench(test=0.0)
    found = bench.evaluate()
    assert found.rows == 0
    assert bench.entered == []
    assert not check_gates(EvaluateSection(gates=("loss < base",)), found)[0].passed
    assert "no test rows" in bench.console.file.getvalue()


def test_an_evaluation_survives_a_round_trip_to_disk(measured, tmp_path):
    _, found, _ = measured
    save_evaluation(found, tmp_path / "saved")
    assert repr(load_evaluation(tmp_path / "saved")) == repr(found)  # not a number equals nothing


def test_a_nan_score_is_valid_json_and_survives_a_round_trip(tmp_path):
    change = Difference(math.nan, math.nan, math.nan, 1.0, 1)
    save_evaluation(Evaluation({"loss": math.nan}, {"loss": 1.0}, {"loss": change}, (), 1), tmp_path)
    json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)
    found = load_evaluation(tmp_path)
    assert math.isnan(found.base["loss"])
    assert math.isnan(found.difference["loss"].low)
    assert check_gates(EvaluateSection(gates=("loss <= base", "loss.low > base")), found)[0].passed is False


def test_the_base_is_freed_before_the_tuned_model_is_loaded(bench):
    loaded, load = [], bench.load

    def watched():
        assert [model() for model in loaded] == [None] * len(loaded)
        model = load()
        loaded.append(weakref.ref(model))
        return model

    bench.load, bench.steps = watched, 0
    bench.evaluate(metrics=("loss",), samples=0)
    assert len(loaded) == 2


def test_without_a_terminal_a_line_replaces_the_progress_bar():
    console = Console(file=io.StringIO())
    with counting_bars(console) as bars:
        add_bar(bars, "loss", 2)(2)
    assert console.file.getvalue() == "loss: 2 rows\n"


COLOURS = ("red", "green", "blue")
RECIPE = """
recipe_version: 1
name: colours
task: chat
data: {{train: {rows}, test: test.jsonl, validation: 0, deduplicate: none}}
model: {{name: {model}, dtype: float32}}
generation: {{max_new_tokens: 6}}
"""


def turn(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def long_question(i):
    return f"In house number {i} on street {i} there lives a person whose door {i} is painted in one colour, {i}."


@pytest.fixture
def contaminated(make_bench, tmp_path):
    """Twenty-four test rows; every second one repeats a training row's question with other punctuation."""
    train = [turn(long_question(i), COLOURS[i % 3]) for i in range(30)]
    test = [turn(f"*{long_question(i)}*" if i % 2 else long_question(i + 100), COLOURS[i % 3]) for i in range(24)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    return make_bench(RECIPE, train)


def test_overlapping_rows_are_counted_shown_kept_and_excluded_from_clean_scores(contaminated, tmp_path):
    found = contaminated.evaluate(metrics=("loss", "exact_match"), samples=1)
    told = found.contamination
    assert (told.rows, told.overlapping, told.near, told.equal, told.short) == (24, 12, 12, 0, 0)
    assert told.shared == 12
    clean, dirty = told.scores
    assert (clean.value, clean.rows, dirty.value, dirty.rows) == ("clean rows", 12, "overlapping rows", 12)
    assert clean.difference["exact_match"].n == dirty.difference["exact_match"].n == 12
    both = (clean.tuned["exact_match"] + dirty.tuned["exact_match"]) / 2
    assert both == pytest.approx(found.tuned["exact_match"])
    example = told.examples[0]
    assert example["kind"] == "nearly equal"
    assert example["test"].endswith("test.jsonl:2")
    assert example["train"].endswith("chat.jsonl:2")
    assert "house number 1 on street" in example["words"]
    shown = contaminated.console.file.getvalue()
    assert "12 of 24 test rows (50.0 %) overlap with a training row" in shown
    assert "clean rows" in shown
    save_evaluation(found, tmp_path)
    assert repr(load_evaluation(tmp_path)) == repr(found)  # not a number equals nothing


def test_rows_dropped_for_resembling_a_test_row_are_reported(contaminated, make_bench):
    bench = make_bench(RECIPE, [turn(long_question(i), COLOURS[i % 3]) for i in range(30)], deduplicate="near")
    bench.steps = 0
    found = bench.evaluate(metrics=("loss",))
    assert found.contamination.near == 0
    assert found.contamination.dropped == {"near a test row": 12}
    assert "12 other rows were dropped from training" in " ".join(bench.console.file.getvalue().split())


def test_for_rows_with_the_same_prompt_the_prompt_is_shown_and_not_the_answer(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [turn("Who was here first?", "Ada was")])
    test = write_jsonl(tmp_path / "test.jsonl", [turn("Who was here first?", "Nobody I know of")])
    rows = prepare(tmp_path, str(train), test=str(test))
    (shown,) = show_examples(rows, find_overlap(rows, near=False))
    assert (shown["kind"], shown["words"]) == ("the same prompt", "Who was here first?")
    assert shown["train"].endswith("train.jsonl:1")
