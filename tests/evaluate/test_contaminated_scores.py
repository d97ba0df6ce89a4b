import json

import pytest
from support.rows import prepare, write_jsonl

from llmtune.data.contamination import find_overlap
from llmtune.evaluate.contaminated_scores import show_examples
from llmtune.evaluate.evaluation_file import load_evaluation, save_evaluation

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
    """Twenty-four test rows, of which every second asks what a training row asks, in other signs."""
    train = [turn(long_question(i), COLOURS[i % 3]) for i in range(30)]
    test = [turn(f"*{long_question(i)}*" if i % 2 else long_question(i + 100), COLOURS[i % 3]) for i in range(24)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    return make_bench(RECIPE, train)


def test_rows_that_overlap_are_counted_shown_kept_and_left_out_of_clean_scores(contaminated, tmp_path):
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
    assert load_evaluation(tmp_path) == found


def test_rows_left_out_for_being_like_a_test_row_are_told(contaminated, make_bench):
    bench = make_bench(RECIPE, [turn(long_question(i), COLOURS[i % 3]) for i in range(30)], deduplicate="near")
    bench.steps = 0
    found = bench.evaluate(metrics=("loss",))
    assert found.contamination.near == 0
    assert found.contamination.dropped == {"near a test row": 12}
    assert "12 other rows were kept out of training" in " ".join(bench.console.file.getvalue().split())


def test_of_rows_with_the_same_prompt_the_prompt_is_shown_and_not_the_answer(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [turn("Who was here first?", "Ada was")])
    test = write_jsonl(tmp_path / "test.jsonl", [turn("Who was here first?", "Nobody I know of")])
    rows = prepare(tmp_path, str(train), test=str(test))
    (shown,) = show_examples(rows, find_overlap(rows, near=False))
    assert (shown["kind"], shown["words"]) == ("the same prompt", "Who was here first?")
    assert shown["train"].endswith("train.jsonl:1")
