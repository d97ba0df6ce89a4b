"""Any content of a file, a recipe, a gate or a template gives an answer, or one of our errors."""

from __future__ import annotations

import gzip
import json
import math
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import train_tokenizer

from llmtune.data.chat_template import ChatTemplate, TemplateRefusal
from llmtune.data.file_readers import parse_lines, read_lazily
from llmtune.data.rejected_rows import RowError
from llmtune.errors import DataError, EnvironmentProblem, RecipeError
from llmtune.evaluate.suites.endpoint_client import hide_key
from llmtune.evaluate.suites.own_metrics import Failure, read_outcomes
from llmtune.launch.topology import is_host
from llmtune.recipe.eval_suites_section import is_endpoint, is_local
from llmtune.recipe.gate_grammar import parse_gate
from llmtune.recipe.yaml_reader import parse_yaml

MANY = settings(max_examples=10_000, deadline=None)
PIECES = ["{", "}", "[", "]", '"', ",", ":", "\n", "\\ud800", "\0", "1e999", "a", ";", "\t", "\xef", "null", "\\u0000"]
YAML = [
    *("a", ":", " ", "\n", "- ", "[", "]", "{", "}", "&x ", "*x", "!!str ", "!", "|", ">", "'", '"', "<<", "?", "#"),
    "~",
]
GATE = [
    *(
        "exact_match",
        "loss",
        "base",
        ".low",
        ".high",
        ".",
        "-",
        "_",
        ">=",
        "<=",
        "==",
        ">",
        "<",
        "=",
        " ",
        "\t",
        "+",
        "*",
    ),
    *("0.8", "1e5", "1e999", "-", "nan", "inf", "9" * 400, "\u0663", "forgetting.perplexity", "\n"),
]
JINJA = [
    *("{{", "}}", "{%", "%}", " for x in messages ", " endfor ", " if ", " endif ", "messages", "[0]", ".content", "|"),
    *("tojson", "'x'", " * ", "99999", "(", ")", "~", " set y = ", "loop", "range(9999)", ".__class__", "namespace"),
]


@pytest.mark.slow
@given(
    st.binary(max_size=200) | st.lists(st.sampled_from(PIECES), max_size=40).map("".join).map(str.encode),
    st.sampled_from(["jsonl", "json", "csv", "text", "parquet"]),
    st.sampled_from([bytes, gzip.compress, lambda data: gzip.compress(data)[:-9], lambda data: b"PAR1" + data]),
)
@MANY
def test_any_file_gives_rows_or_a_data_error(data, container, pack):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        path.write_bytes(pack(data))
        with suppress(DataError):
            for origin, row in parse_lines(read_lazily(path, "file", container)):
                assert origin.startswith("file")
                assert isinstance(row, dict | RowError)


@pytest.mark.slow
@given(st.text(max_size=60) | st.lists(st.sampled_from(YAML), max_size=40).map("".join))
@MANY
def test_any_text_is_yaml_or_a_recipe_error(text):
    with suppress(RecipeError):
        parse_yaml(text, "recipe.yaml", Path("/"))


@pytest.mark.slow
@given(st.text(max_size=60) | st.lists(st.sampled_from(GATE), max_size=12).map("".join))
@MANY
def test_any_text_is_a_gate_or_a_recipe_error(text):
    try:
        gate = parse_gate(text)
    except RecipeError:
        return
    assert parse_gate(gate.text) == gate
    assert gate.against or gate.number == gate.number


LINES = [
    '{"value": ',
    "1",
    "}",
    "\n",
    '{"error": "',
    '", "line": ',
    "null",
    "1e999",
    "NaN",
    "[",
    "]",
    "\\ud800",
    "9" * 5000,
    "\xff",
]
URLS = [
    "http",
    "https",
    "://",
    "[",
    "]",
    ":",
    "%",
    "@",
    "/",
    "?",
    "#",
    "\0",
    "é",
    "a.b",
    "::1",
    "99999",
    " ",
    "\ud800",
    ".",
]
KEY = "Zm9vYmFy-none-of-your-business-42"


@pytest.mark.slow
@given(st.binary(max_size=200) | st.lists(st.sampled_from(LINES), max_size=20).map("".join).map(str.encode))
@MANY
def test_any_output_of_a_metric_is_values_or_a_failure(written):
    found = read_outcomes(written, 2, "it ended", {"kind": "number"})
    assert isinstance(found, Failure) or [math.isfinite(one["value"]) for one in found] == [True, True]


@pytest.mark.slow
@given(st.lists(st.sampled_from(URLS), max_size=12).map("".join) | st.text(max_size=30))
@MANY
def test_any_text_is_an_endpoint_that_the_client_takes_or_none(text):
    is_local(text)
    is_host(text)
    if is_endpoint(text):
        httpx.URL(text.strip())


@pytest.mark.slow
@given(st.binary(max_size=50), st.binary(max_size=50), st.booleans())
@MANY
def test_no_answer_keeps_the_key(before, after, is_json):
    body = json.dumps({"x": KEY, "y": before.hex()}).encode() if is_json else before + KEY.encode() + after
    assert KEY.encode() not in hide_key(KEY, body)


@cache
def tokenizer():
    return train_tokenizer()


# The stop of an endless template may fall into hypothesis' own callback of the collector, which Python reports.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
@given(st.lists(st.sampled_from(JINJA), max_size=25).map("".join))
@MANY
def test_any_template_renders_or_is_refused(text):
    processor = tokenizer()
    processor.chat_template = text or "x"
    try:
        rendered = ChatTemplate(processor, {}, "template").render([{"role": "user", "content": "a"}])
    except (TemplateRefusal, EnvironmentProblem):
        return
    assert isinstance(rendered, str)
