import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune.errors import RecipeError
from llmtune.recipe.gate_grammar import Gate, find_reversed_problem, parse_gate
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.task_facts import TASK_FACTS


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("exact_match >= 0.8", Gate("exact_match >= 0.8", "exact_match", None, ">=", 0.8)),
        ("rougeL>base", Gate("rougeL>base", "rougeL", None, ">", None, "base")),
        (" wer <  base - 0.02 ", Gate("wer < base - 0.02", "wer", None, "<", None, "base", 1.0, -0.02)),
        ("loss <= base + 1e-3", Gate("loss <= base + 1e-3", "loss", None, "<=", None, "base", 1.0, 1e-3)),
        (
            "perplexity <= base * 1.05",
            Gate("perplexity <= base * 1.05", "perplexity", None, "<=", None, "base", 1.05, 0.0),
        ),
        ("exact_match.low > base", Gate("exact_match.low > base", "exact_match", "low", ">", None, "base")),
        ("loss.high < base", Gate("loss.high < base", "loss", "high", "<", None, "base")),
        (
            "exact_match.low>champion - 0.01",
            Gate("exact_match.low>champion - 0.01", "exact_match", "low", ">", None, "champion", 1.0, -0.01),
        ),
        ("ndcg@10.low > base", Gate("ndcg@10.low > base", "ndcg@10", "low", ">", None, "base")),
        (
            "deploy.onnx.recall@1>=tuned",
            Gate("deploy.onnx.recall@1>=tuned", "deploy.onnx.recall@1", None, ">=", None, "tuned"),
        ),
        (
            "accuracy.low > tfidf - 0.01",
            Gate("accuracy.low > tfidf - 0.01", "accuracy", "low", ">", None, "tfidf", 1, -0.01),
        ),
        ("ndcg@10 >= bm25", Gate("ndcg@10 >= bm25", "ndcg@10", None, ">=", None, "bm25")),
        ("chrf == -.5", Gate("chrf == -.5", "chrf", None, "==", -0.5)),
        ("accuracy[new] >= 0.6", Gate("accuracy[new] >= 0.6", "accuracy", None, ">=", 0.6, rows="new")),
        (
            "recall@1[new].low > champion - 0.05",
            Gate("recall@1[new].low > champion - 0.05", "recall@1", "low", ">", None, "champion", 1.0, -0.05, "new"),
        ),
    ],
)
def test_every_form_of_a_gate_is_parsed(text, gate):
    assert parse_gate(text) == gate
    assert (gate.against is None) == (gate.number is not None)


NO_GATES = ["", "loss", "loss >", "> 3", "loss = 3", "loss => 3", "loss > base > 3", "loss > base / 2", "loss > base *"]
ODD = [
    "loss..low > base",
    "loss > 3 + base",
    "loss > best",
    "loss > 3; import os",
    "loss > 1e9999",
    "loss > ٣",
    "3 < loss",
    "ndcg@ > base",
    "ndcg@ten > base",
]


@pytest.mark.parametrize("text", [*NO_GATES, *ODD, "3 < loss", "loss > nan"])
def test_other_texts_are_refused_with_the_valid_forms(text):
    with pytest.raises(RecipeError, match="is not a gate") as caught:
        parse_gate(text)
    assert "`rougeL > base`" in caught.value.problems[0].fix


def test_only_scores_of_test_rows_have_an_interval_to_compare_with_a_number():
    assert parse_gate("loss.high < 0.3").on_own_interval
    assert not parse_gate("loss.high < base").on_own_interval
    with pytest.raises(RecipeError, match=r"Write `forgetting\.loss\.high < base`"):
        parse_gate("forgetting.loss.high < 0.3")


def test_gates_select_only_new_rows_and_only_of_test_metrics():
    with pytest.raises(RecipeError, match="gates know only `new`"):
        parse_gate("accuracy[old] > 0.5")
    with pytest.raises(RecipeError, match="no metric of the test rows"):
        parse_gate("forgetting.loss[new] < base")
    with pytest.raises(RecipeError, match="is not a gate"):
        parse_gate("accuracy.low[new] > base")


@given(st.text(alphabet="abse.low<>=*+- 0123456789e_", max_size=30))
def test_any_text_is_parsed_or_refused(text):
    try:
        gate = parse_gate(text)
    except RecipeError:
        return
    assert gate.metric in text
    assert parse_gate(gate.text) == gate


@pytest.mark.parametrize(
    ("gate", "instead"),
    [
        ("loss > base", "loss < base"),
        ("loss.low > base", "loss.high < base"),
        ("loss >= champion", "loss < champion"),
        ("loss.high > base + 0.1", "loss.high < base"),
        ("accuracy < base", "accuracy > base"),
        ("accuracy.high < champion", "accuracy.low > champion"),
        ("accuracy[new].high <= champion - 0.1", "accuracy[new].low > champion"),
        ("accuracy.low < tfidf", "accuracy.low > tfidf"),
        ("brier > base", "brier < base"),
        ("speed_cost > base", "speed_cost < base"),
        ("deploy.onnx.loss.low > tuned", "deploy.onnx.loss.high < tuned"),
        ("forgetting.perplexity > base", "forgetting.perplexity < base"),
        ("accuracy.low > base", None),
        ("accuracy.high >= base", None),
        ("accuracy <= base + 0.2", None),
        ("accuracy < base * 1.2", None),
        ("accuracy < 0.9", None),
        ("loss.low <= base", None),
        ("loss > base - 0.5", None),
        ("mine < base", None),
        ("mine > base", None),
    ],
)
def test_a_gate_that_a_worse_model_passes_is_refused_with_its_reverse(gate: str, instead: str | None):
    problem = find_reversed_problem(parse_gate(gate), TASK_FACTS["classify"])
    assert (problem and problem[1]) == (instead and f"Write `{instead}`.")
    if instead:
        assert find_reversed_problem(parse_gate(instead), TASK_FACTS["classify"]) is None


@pytest.mark.parametrize(
    ("task", "gate"), [("chat", "loss.low > base"), ("embed", "ndcg@10.high < base"), ("embed", "ndcg@20 < base")]
)
def test_a_recipe_with_a_reversed_gate_is_refused(write, task: str, gate: str):
    metrics = "[loss]" if task == "chat" else "[ndcg@10, ndcg@20]"
    with pytest.raises(RecipeError, match="passes a worse model, and fails a better one"):
        load_recipe(write(), [f"task={task}", f"evaluate.metrics={metrics}", f"evaluate.gates=['{gate}']"])
