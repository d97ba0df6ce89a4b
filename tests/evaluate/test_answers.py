"""Answers parsed by the template: text, calls, and truncation."""

import json
import re

import pytest
import torch
from support.families import build_t5
from support.learning import LOOKS_LIKE_A_CALL, WEATHER, learn_by_heart, weather_row
from support.models import build_llama
from support.pairs import DOCUMENTS, PAIRS, recipe_of
from support.rows import write_jsonl
from support.runs import invoke
from support.templates import (
    EMPTY_THOUGHTS,
    FAMILY_FILES,
    HERMES,
    conversation,
    family_tokenizer,
    recipe_for,
    tokenizer_with,
)
from transformers import LlamaConfig, LlamaForCausalLM

from llmtune.data.row_store import iterate_rows
from llmtune.evaluate.eval_inputs import measured_metrics, warn_of_cuts
from llmtune.evaluate.gates import check_gates
from llmtune.evaluate.generation import answer_reader, generate_completions
from llmtune.evaluate.text_metrics import TEXT_MEASURES
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.recipe.task_facts import TASK_FACTS, TOOL_METRICS
from llmtune.tasks.registry import get_task

LONG = """
recipe_version: 1
name: answers
task: chat
data: {{train: {rows}, test: test.jsonl, validation: 0, deduplicate: none, max_length: 2048}}
model: {{name: {model}, dtype: float32}}
generation: {{max_new_tokens: 90}}
"""


def write_rows(folder, rows):
    """Write test rows, and one training row next to them."""
    write_jsonl(folder / "test.jsonl", rows)
    return write_jsonl(folder / "rows.jsonl", [conversation("What is a fox?", "An animal.")])


def test_the_templates_empty_thoughts_are_not_part_of_an_answer(tmp_path, build):
    model = build_llama(tmp_path / "model", EMPTY_THOUGHTS)
    rows = [conversation(f"Which colour is number {i}?", colour) for i, colour in enumerate(("red", "green", "blue"))]
    bench = build(tmp_path, write_rows(tmp_path, rows), model, text=LONG)
    found = bench.evaluate(tmp_path, metrics=("exact_match", "chrf"))
    assert found.tuned == {"exact_match": 1.0, "chrf": 100.0, "answers_cut": 0.0}
    assert check_gates(EvaluateSection(gates=("answers_cut <= 0.02",)), found)[0].passed
    for line in map(json.loads, (tmp_path / "predictions.jsonl").read_text().splitlines()):
        assert line["tuned"] == line["reference"]
        assert line["tuned_right"]


@pytest.mark.parametrize("task", [name for name, facts in TASK_FACTS.items() if facts.templated and facts.generates])
def test_every_task_that_prompts_with_the_template_parses_its_answers_with_it(task):
    tokenizer = tokenizer_with(EMPTY_THOUGHTS)
    written = tokenizer("<think>\n\n</think>\n\nred<|im_end|>")["input_ids"]
    assert answer_reader(tokenizer, recipe_for(task))(written, None).text == "red"


@pytest.fixture(scope="module")
def weather(tmp_path_factory, build):
    """A bench of rows with tools, and one without, learned by a model; the results, and the folder."""
    folder = tmp_path_factory.mktemp("weather")
    rows = [weather_row("Paris"), weather_row("Rome"), conversation("Write a call!", LOOKS_LIKE_A_CALL)]
    bench = build(folder, write_rows(folder, rows), build_llama(folder / "model", HERMES), LONG)
    bench.steps = 150
    return bench, bench.evaluate(folder), folder


@pytest.mark.slow
def test_every_answer_of_a_row_with_tools_is_generated_after_its_recorded_turns(weather):
    bench, found, folder = weather
    tools = [line for line in lines_of(folder) if "tuned_parts" in line]
    assert len(tools) == 2
    assert bench.examples.counts["test"] == 3
    for line in tools:
        calling, saying = line["tuned_parts"]
        (call,) = calling["tool_calls"]
        assert call["function"]["name"] == "weather"
        assert f"In {call['function']['arguments']['city']}: " in saying["text"]
        assert line["tuned"] == line["reference"] == saying["text"]
    assert f"{2 * len(tools)} answers to {len(tools)} rows" in found.signatures["generated.turns"]


def test_calls_are_scored_alongside_the_texts_of_all_rows(weather):
    _, found, _ = weather
    assert {metric: found.tuned[metric] for metric in TOOL_METRICS} == dict.fromkeys(TOOL_METRICS, 1.0)
    assert found.base["tool_name"] == 0
    assert found.tuned["exact_match"] == 1.0
    assert found.difference["tool_name"].n == 2
    assert found.difference["exact_match"].n == 3


def test_an_answer_that_looks_like_a_call_is_text_if_its_row_offers_no_tools(weather):
    _, _, folder = weather
    (line,) = [line for line in lines_of(folder) if "tuned_parts" not in line]
    assert line["tuned"] == line["reference"] == LOOKS_LIKE_A_CALL


def lines_of(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_a_row_that_ends_in_a_call_is_not_text_and_is_shown_as_a_call(tmp_path, build, console):
    rows = [{**row, "messages": row["messages"][:2]} for row in map(weather_row, ("Paris", "Rome"))]
    bench = build(tmp_path, write_rows(tmp_path, rows), build_llama(tmp_path / "m", HERMES), LONG)
    bench.console, bench.steps = console, 0
    found = bench.evaluate(tmp_path)
    assert "exact_match" not in found.tuned
    assert found.tuned["tool_call_valid"] == 0
    assert found.samples[0]["reference"].startswith('weather({"city": ')


def test_tools_without_a_valid_schema_are_reported_and_not_scored_as_valid(tmp_path, build, console):
    parameters = {"type": "object", "properties": {"city": {"type": "str"}}}
    broken = {"type": "function", "function": {**WEATHER["function"], "parameters": parameters}}
    rows = [{**weather_row(city), "tools": [broken]} for city in ("Paris", "Rome")]
    bench = build(tmp_path, write_rows(tmp_path, rows), build_llama(tmp_path / "m", HERMES), LONG)
    bench.console, bench.steps = console, 0
    found = bench.evaluate(tmp_path)
    assert "tool_call_valid" not in found.tuned
    assert "tool_name" in found.tuned
    assert "weather ('str' is not valid" in found.signatures["tool_call_valid.schemas"]
    assert "tool_call_valid is not measured" in " ".join(console.file.getvalue().split())


def test_tool_metrics_are_omitted_if_no_row_has_tools(bench):
    assert {*TOOL_METRICS} <= {*measured_metrics(bench.recipe, has_tools=True)}
    assert not {*TOOL_METRICS} & {*measured_metrics(bench.recipe, has_tools=False)}


@pytest.mark.promise("metric", "referee", equal="answers counted", place="answers_cut")
def test_truncated_answers_are_counted_and_reported(bench, console):
    longer = bench.recipe.generation.model_copy(update={"max_new_tokens": 1})
    bench.recipe, bench.steps = bench.recipe.model_copy(update={"generation": longer}), 0
    found = bench.evaluate(metrics=("exact_match",))
    rows = bench.examples.counts["test"]
    assert found.tuned["answers_cut"] == 1
    assert not check_gates(EvaluateSection(gates=("answers_cut <= 0.02",)), found)[0].passed
    assert (
        f"answers truncated at generation.max_new_tokens (1): base {rows} of {rows}, tuned {rows} of {rows}"
        in " ".join(console.file.getvalue().split())
    )


def test_prompts_without_room_for_an_answer_are_counted_and_reported(bench, console):
    longer = bench.recipe.generation.model_copy(update={"max_new_tokens": 2040})
    bench.recipe, bench.steps = bench.recipe.model_copy(update={"generation": longer}), 0
    assert not bench.evaluate(metrics=("exact_match",)).tuned
    rows = bench.examples.counts["test"]
    told = " ".join(console.file.getvalue().split())
    assert f"{rows} prompts skipped: with generation.max_new_tokens they exceed the model's context" in told


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_references_longer_than_max_new_tokens_are_reported_before_training(make_bench, train_on):
    rows = [conversation(f"What is {i}?", "ten " * i) for i in range(1, 30)]
    bench = make_bench(rows=rows, train_on=train_on)
    warn_of_cuts(bench.rows, bench.examples, bench.task, bench.processor, bench.recipe, bench.console)
    told = " ".join(bench.console.file.getvalue().split())
    answers = [row["messages"][1]["content"] for _, row in iterate_rows(bench.rows, "test")]
    lengths = [len(bench.processor(answer)["input_ids"]) + 1 for answer in answers]
    longer = sum(length > 6 for length in lengths)
    assert 0 < longer < len(lengths)
    assert f"{longer} of {len(lengths)} reference answers of the test rows have more than 6 tokens" in told
    assert f"generation.max_new_tokens: {max(lengths)} fits all" in told


QUICK = ("qwen-3", "gpt-oss")
LEARNED = [
    conversation(question, answer)
    for question, answer in (("cat?", "It is red."), ("dog?", "Green."), ("fox?", "Blue!"))
]


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILY_FILES]
)
def test_a_model_that_learned_its_rows_answers_all_of_them_correctly(family):
    tokenizer, task = family_tokenizer(family), get_task("chat")
    recipe = recipe_for(max_length=2048)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape))
    examples = [example for encoded in task.encode(LEARNED, tokenizer, recipe) for example in encoded]
    learn_by_heart(model, examples, task, tokenizer.pad_token_id, steps=300)
    prompts = [task.prompt(task.split_answer(row)[0], tokenizer, recipe) for row in LEARNED]
    outputs = generate_completions(model.eval(), prompts, tokenizer, recipe, device="cpu")
    read = answer_reader(tokenizer, recipe)
    parsed = [read(output.token_ids, None, prompt.ids) for output, prompt in zip(outputs, prompts, strict=True)]
    references = [task.split_answer(row)[1] for row in LEARNED]
    score = TEXT_MEASURES["exact_match"]([answer.text for answer in parsed], references).value
    assert score == 1.0, [tokenizer.decode(output.token_ids) for output in outputs]
    assert [output.finish_reason for output in outputs] == ["stop"] * 3


QUESTIONS = [
    {"question": f"which {i}?", "context": f"The fox is red and number {i}.", "answer": f"red and number {i}"}
    for i in range(30)
]
COMPLETIONS = [{"prompt": pair["source"], "completion": f" {pair['target']}"} for pair in PAIRS]
LANGUAGES = {"translate": {"source_language": "English", "target_language": "French"}}
GENERATING = {
    "translate": (build_t5, PAIRS, LANGUAGES),
    "translate-decoder": (build_llama, PAIRS, LANGUAGES),
    "summarize": (build_t5, DOCUMENTS, {}),
    "completion": (build_llama, COMPLETIONS, {"evaluate": {"metrics": ["loss", "exact_match"]}}),
    "qa": (build_t5, QUESTIONS, {}),
    "qa-decoder": (build_llama, QUESTIONS, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", GENERATING)
def test_every_generating_task_reports_references_longer_than_max_new_tokens(task, tmp_path):
    build, rows, sections = GENERATING[task]
    sections = {"generation": {"max_new_tokens": 1}, "data": {"validation": 0.1, "test": 0.3}, **sections}
    name = task.removesuffix("-decoder")
    done = invoke(
        "prepare", recipe_of(tmp_path, build(tmp_path / "model"), rows, name, **sections), "--out", tmp_path / "run"
    )
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert re.search(r"(\d+) of \1 reference answers of the test rows have more than 1 tokens", said)
    assert re.search(r"generation\.max_new_tokens: \d+ fits all", said)
