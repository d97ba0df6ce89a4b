"""Values that are too large, of another type, or no characters: an error with place and fix, in time."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.hostile import attempt
from support.runs import write_recipe, write_sums

from llmtune.display.blocks import Page
from llmtune.errors import STEERING, EnvironmentProblem, RecipeError
from llmtune.evaluate.looks import LEDGER
from llmtune.launch.topology import Topology, is_host
from llmtune.report.render_html import embed_json, prose, to_html
from llmtune.report.render_markdown import to_markdown

HUGE = (10**400, -(10**400))
RELEVANCES: dict[str, tuple[str, Any]] = {
    "a list": ("rerank", lambda value: {"passages": ["a", "b"], "relevances": [value, 0]}),
    "one passage": ("rerank", lambda value: {"passage": "a", "relevance": value}),
    "a label": ("rerank", lambda value: {"text": "a", "label": value}),
    "a similarity": ("embed", lambda value: {"sentence2": "b", "score": value}),
}


@pytest.mark.parametrize("kind", RELEVANCES)
@pytest.mark.parametrize("value", HUGE, ids=["+", "-"])
def test_a_relevance_of_400_digits_is_a_bad_row(here: Path, tiny_llama: Path, kind: str, value: int) -> None:
    task, rest = RELEVANCES[kind]
    name = "sentence1" if task == "embed" else "query"
    rows = [{name: f"q{i}", **rest(value)} for i in range(30)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections: dict[str, Any] = {"evaluate": {"metrics": None}, "generation": {"max_new_tokens": None}}
    write_recipe(Path("r.yaml"), tiny_llama, "rows.jsonl", task=task, **sections)
    output = attempt("prepare", "r.yaml", "--out", "run", code=3)
    assert "rows.jsonl:1: no relevance" in output or "rows.jsonl:1: no number" in output
    assert "0" * 60 not in output


def test_half_of_a_surrogate_pair_in_a_corpus_is_a_bad_passage(here: Path, tiny_llama: Path) -> None:
    rows = [{"query": f"question {i}", "positive": f"answer {i}"} for i in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("corpus.jsonl").write_text('{"text": "half \\ud800 pair"}\n{"text": "whole"}\n')
    data = {"corpus": "corpus.jsonl"}
    sections: dict[str, Any] = {"evaluate": {"metrics": None}, "generation": {"max_new_tokens": None}}
    write_recipe(Path("r.yaml"), tiny_llama, "rows.jsonl", task="embed", data=data, **sections)
    output = attempt("prepare", "r.yaml", "--out", "run", code=3)
    assert "corpus.jsonl:1: not a character" in output


@pytest.mark.parametrize(
    "template", [3, True, 1.5, [3], [{"name": "default", "template": 3}], {"default": 3}, {"other": "x"}, [["a"]]]
)
def test_a_chat_template_that_is_no_text_names_the_file(here: Path, tiny_llama: Path, template: object) -> None:
    shutil.copytree(tiny_llama, "model")
    Path("model/chat_template.jinja").unlink(missing_ok=True)
    config = json.loads(Path("model/tokenizer_config.json").read_text())
    Path("model/tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    write_sums(here / "rows.jsonl")
    write_recipe(Path("r.yaml"), "model", "rows.jsonl")
    assert "model" in attempt("prepare", "r.yaml", "--out", "run", code=4)


@pytest.mark.parametrize(
    "piece", ["1e999|int", "'%d'|format(1e999)", "10**400 * 1.0", "'a' * 10**30", "1e999|round|int", "2.0**5000"]
)
def test_a_number_that_overflows_in_a_template_is_refused(here: Path, tiny_llama: Path, piece: str) -> None:
    Path("t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ " + piece + " }}")
    write_sums(here / "rows.jsonl")
    write_recipe(Path("r.yaml"), tiny_llama, "rows.jsonl", model={"chat_template": "t.jinja"})
    assert "t.jinja: the chat template refuses it" in attempt("prepare", "r.yaml", "--out", "run", code=4)


@pytest.mark.parametrize("name", ["b.jsonl.gz", "b.json.gz", "b.csv.gz", "b.txt.gz"])
def test_a_decompression_bomb_for_init_is_refused(here: Path, name: str) -> None:
    Path(name).write_bytes(gzip.compress(b"a" * 2**28))
    assert "it unpacks to more than" in attempt("init", name, "--out", "r.yaml", code=3)
    assert not Path("r.yaml").exists()


@pytest.mark.parametrize(
    "address",
    [
        *("h:99999", "h:0", "h:²", "h:٣", "a..b:1", "é:1", "h\n:1", "h\0:1", f"{'a' * 64}:1", "[::1:1", "[bad]:1"),
        *("http://h:1", " :1", "*:1", "[10.0.0.1]:1", ":1", "h"),
    ],
)
def test_an_address_of_machines_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(RecipeError, match=r"is not HOST:PORT|several machines need"):
        Topology(machines=2, address=address)


def test_names_and_ip_addresses_of_all_kinds_are_hosts() -> None:
    for host in ("localhost", "node-7.cluster.local", "10.0.0.1", "::1", "[fe80::1]", "my_node"):
        assert is_host(host), host


def test_an_address_that_cannot_be_reached_is_refused_in_seconds() -> None:
    from rich.console import Console

    from llmtune.launch.local_processes import _host_rendezvous

    with pytest.raises(EnvironmentProblem, match="cannot listen"):
        _host_rendezvous(Topology(machines=2, address="255.255.255.255:29500"), Console(quiet=True))


@pytest.mark.parametrize("count", ["1025", "99999999", "9" * 400])
@pytest.mark.parametrize("command", ["local", "slurm"])
def test_more_processes_than_any_machine_has_are_refused(
    here: Path, tiny_llama: Path, command: str, count: str
) -> None:
    write_sums(here / "rows.jsonl")
    write_recipe(Path("r.yaml"), tiny_llama, "rows.jsonl")
    output = attempt("launch", command, "r.yaml", "--processes", count, "--out", "run", code=2)
    assert "is more than 1,024" in output
    assert "--threads" in attempt("run", "r.yaml", "--threads", count + "0", "--out", "run", code=2)


@pytest.mark.usefixtures("here")
def test_a_ledger_of_looks_that_is_a_pipe_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from llmtune.evaluate import looks

    os.mkfifo(LEDGER)
    Path("champion.json").write_text("{}")
    monkeypatch.setattr(looks, "locate_champion", lambda recipe, run: Path("champion.json"))
    section = SimpleNamespace(looks=5, champion="champion.json")
    recipe: Any = SimpleNamespace(evaluate=section, name="x", data=SimpleNamespace(test=0.1))
    scores: Any = SimpleNamespace(measures=SimpleNamespace(rows=("1", "2")))
    with pytest.raises((OSError, EnvironmentProblem), match="a pipe"):
        looks.open_ledger(recipe, scores)


def test_control_codes_in_a_report_are_shown_and_not_executed() -> None:
    codes = "a\x1b]0;title\x07\x9b31m\u202eb\ttab\n"
    page = Page(title=codes, lead=codes, chips=[(codes, codes)], sections=[], footer=codes, data={"x": codes})
    for text in (to_html(page), to_markdown(page), str(embed_json(codes))):
        assert not STEERING.search(text)
    assert json.loads(str(embed_json({"x": codes}))) == {"x": codes}
    assert str(prose("`x`")) == "<code>x</code>"
