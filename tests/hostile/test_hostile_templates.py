"""Chat templates that loop, nest, allocate or fail stay in the sandbox, with limited time, memory and text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.hostile import attempt
from support.models import CHATML
from support.runs import write_recipe

from llmtune.data import chat_template
from llmtune.data.arrow_rows import _class_names
from llmtune.data.chat_messages import _with_arguments
from llmtune.data.template_text import reads_date, template_variables
from llmtune.evaluate.tool_metrics import schema_problem
from llmtune.store.atomic_files import read_json_lines

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "loop": (LOOP, "does not end"),
    "loop over some rows": (f"{{% if 'house' in messages[0].content %}}{LOOP}{{% endif %}}", "does not end"),
    "recursion that doubles": (
        "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "does not end",
    ),
    "a gigabyte of text": ("{% set n = 10**9 %}{{ 'x' * n }}", "too much memory"),
    "text that doubles": (
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "the chat template",
    ),
    "folded when compiled": ("{{ 'x' * 9999999999 }}", "too much memory"),
    "a long text": ("{{ 'x y ' * 1000000 }}", "are allowed"),
    "a wide field": ("{{ '%999999999d' % 1 }}", "the chat template"),
    "half a character": ("{{ '\\ud800' }}", "writes invalid text"),
    "endless macro": ("{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}", "recursion"),
    "division": ("{{ 1/0 }}", "division by zero"),
    "too large a number": ("{{ 2.0**99999 }}", "refuses it"),
    "deep brackets": ("{{ " + "(" * 500 + "1" + ")" * 500 + " }}", "recursion"),
    "deep loops": ("{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "nested blocks"),
    "a long program": ("{# " + "x" * 200_000 + " #}", "are allowed"),
    "dates without end": ("strftime_now('" * 9000, "today's date"),
    "attributes": ("{{ ''.__class__.__mro__ }}", "refuses it"),
    "globals": ("{{ cycler.__init__.__globals__ }}", "refuses it"),
    "files": ("{% include '/etc/passwd' %}", "refuses it"),
    "escape codes": ("{{ raise_exception('\x1b[31m') }}", "\\x1b[31m"),
    "syntax": ("{% nope %}", "refuses it"),
}


BRIEF = (
    "deep brackets",
    "loop",
    "a gigabyte of text",
    "a long text",
    "half a character",
    "deep loops",
    "attributes",
    "escape codes",
)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in BRIEF else pytest.mark.slow) for kind in TEMPLATES]
)
def test_a_hostile_template_is_refused(
    here: Path, tiny_llama: Path, chat_rows: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    template, words = TEMPLATES[kind]
    (here / "template.jinja").write_text(template + CHATML)
    write_recipe(here / "recipe.yaml", tiny_llama, chat_rows, model={"chat_template": "template.jinja"})
    assert words in attempt("prepare", "recipe.yaml", "--out", "run", code=4)


@pytest.mark.parametrize("depth", [100, 500, 3000])
def test_a_deep_file_of_a_stranger_is_read_or_refused_by_name(depth: int) -> None:
    for template in ("{{ " + "(" * depth + "1" + ")" * depth + " }}", "{% if a %}" * depth + "{% endif %}" * depth):
        assert not reads_date(template)
        assert template_variables(template) <= {"a"}
    schema: dict[str, object] = {}
    for _ in range(depth):
        schema = {"properties": {"a": schema}}
    assert schema_problem(schema) == "nested too deeply"
    text = "[" * depth + "]" * depth
    assert _class_names({b"huggingface": text.encode()}) == {}
    call = {"type": "function", "function": {"name": "f", "arguments": text}}
    assert _with_arguments(call)


def test_a_deep_line_of_a_record_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text("".join('{"a": ' + "[" * n + "]" * n + "}\n" for n in (1, 200, 900, 3000)))
    assert read_json_lines(tmp_path / "lines.jsonl") == [{"a": []}]


@pytest.mark.parametrize("name", ["fifo", "/dev/zero", "."])
def test_a_template_is_not_read_from_a_pipe_or_a_device(
    here: Path, tiny_llama: Path, chat_rows: Path, name: str
) -> None:
    os.mkfifo("fifo")
    write_recipe(here / "recipe.yaml", tiny_llama, chat_rows, model={"chat_template": name})
    assert "model.chat_template" in attempt("prepare", "recipe.yaml", "--out", "run", code=2)
