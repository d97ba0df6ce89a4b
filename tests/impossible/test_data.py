"""Failures that must be impossible in data: each test provokes one without its guard, then sees it caught."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapting import build_family
from support.encoding import encode, learned
from support.models import CHATML
from support.rows import chat, prepare, questions, write_jsonl
from support.templates import (
    DOUBLED_START,
    LLAMA2,
    NO_END,
    STABLE,
    conversation,
    recipe_for,
    tokenizer_with,
)
from support.training import read_metrics
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from llmtune.data import chat_template
from llmtune.data.chat_template import render_prompt, stop_ids
from llmtune.data.examples import ExampleReader, load_examples
from llmtune.data.row_store import load_rows
from llmtune.errors import DataError
from llmtune.evaluate.generation import answer_reader

CHAT = conversation("one two", "three", "four five", "six")


def decoded(place: Path, example: int = 0) -> str:
    """The text of a training example, as the model reads it."""
    reader = ExampleReader(load_examples(place / "run/data/examples"), "train")
    return AutoTokenizer.from_pretrained(place / "model").decode(reader[example].input_ids)


@pytest.mark.guarantee(
    0,
    cannot="text of a row that is lost in the rendering, or template text that counts as its answer",
    kept="llmtune renders a conversation of the same shape with marker texts once, then looks for each text of a "
    "row in its rendering. Answers, and their byte counts, exclude the template's own text.",
    shows="error rows.jsonl:1: the chat template leaves out the system message",
    cases=[
        "tools_in_prompt",
        "arguments_as_text",
        "nulls_of_other_rows",
        "nulls_in_json_lines",
        "thoughts",
        "thoughts_of_earlier_answers",
        "image_in_text_model",
    ],
)
def test_every_text_of_a_row_reaches_the_model(place, run, without, shows):
    forgetful = CHATML.replace("{{ '<|im", "{% if message['role'] != 'system' %}{{ '<|im", 1).replace(
        "{% endfor %}", "{% endif %}{% endfor %}", 1
    )
    (place / "model/chat_template.jinja").write_text(forgetful)
    write_jsonl(place / "rows.jsonl", [conversation(f"q{i}", "yes", system="be kind") for i in range(9)])
    with without("llmtune.data.chat_encoding.find_missing", lambda *given: None):
        run("prepare")
    assert "be kind" not in decoded(place), "lost without an error"
    shows(run("prepare", "--fresh", code=3))
    named = tokenizer_with(
        CHATML.replace("'\n' + message", "'\n' + ('Say: ' if loop.index % 2 == 0 else '') + message")
    )
    (example,) = encode(CHAT, named)
    written = learned(example, named)[0]
    assert written == "Say: three<|im_end|>", "the template's word is written as well"
    assert answer_reader(named, recipe_for())(named(written)["input_ids"], None).text == "three"
    assert example.target_bytes == len("three" + "six")


@pytest.mark.guarantee(
    1,
    cannot="an assistant mask that is empty or covers everything",
    kept="Spans come from rendering the template with and without the turn, and are compared with its `{% "
    "generation %}` marks. The share of supervised tokens and one coloured example are shown before step 1.",
    shows="the chat template's {% generation %} marks are not where its answers are",
    cases=["answers_only", "completion_only"],
)
def test_the_mask_covers_exactly_the_answers(place, run, shows):
    def share(template: str) -> float:
        """The share of a conversation that transformers' own mask supervises."""
        masked = tokenizer_with(template).apply_chat_template(
            CHAT["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        return float(np.mean(masked["assistant_masks"]))

    everything = "{% generation %}" + CHATML + "{% endgeneration %}"
    assert (share(CHATML), share(everything)) == (0, 1), "one mask is empty, the other includes questions"
    assert "% of all tokens are learned. ╭─ one example: >>>text<<< is learned" in run("prepare")
    report = json.loads((place / "run/report.json").read_text())["data"]
    assert 0 < report["supervised_share"] < 0.5
    (place / "model/chat_template.jinja").write_text(everything)
    shows(run("prepare", code=3))


@pytest.mark.guarantee(
    2,
    cannot="a row whose target was truncated",
    kept="An overlong row is an error by default. data.on_overlong can instead drop and count it, truncate it "
    "without losing a target, or split it between turns.",
    shows="error rows.jsonl:40: too long: ... tokens, data.max_length is 60",
    cases=["answer_cut_off"],
)
def test_no_choice_of_on_overlong_truncates_a_target(place, run, shows):
    long = conversation("one", "cat " * 100)
    write_jsonl(place / "rows.jsonl", [*(chat(f"q{i}", "fox") for i in range(39)), long])
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    cut = tokenizer.apply_chat_template(long["messages"], truncation=True, max_length=60)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in cut[-20:], "an answer without its end is supervised"
    data = {"test": 0.2, "validation": 0, "max_length": 60, "max_dropped": 0.0}
    for choice in ("error", "split", "truncate"):
        said = run("prepare", "--fresh", code=3, data={**data, "on_overlong": choice})
        shows(said)
    assert "its last answer does not fit with any of its question" in said
    assert "1 too long" in run("prepare", "--fresh", data={**data, "on_overlong": "drop"})
    report = json.loads((place / "run/report.json").read_text())["data"]
    assert report["dropped"] == {"too long": 1}


@pytest.mark.guarantee(
    3,
    cannot="rows dropped without a count and a reason",
    kept="Every row is either kept or counted under a reason; rejected rows are listed with file and line.",
    shows="42 rows read; ... 2 left out: bad: empty content",
    also=["test_any_bytes_in_a_file_give_rows_or_an_error_and_every_line_is_counted"],
    cases=["null_answer"],
)
def test_rows_are_dropped_with_a_count_and_a_reason(place, run, without, shows):
    def lost() -> int:
        data = json.loads((place / "run/report.json").read_text())["data"]
        return data["rows_in"] - sum(data["kept"].values()) - sum(data["dropped"].values())

    with (place / "rows.jsonl").open("a") as file:
        file.write(json.dumps(chat("")) + "\n" + json.dumps(chat("x", "")) + "\n")
    with without("llmtune.data.ingest.IngestState.add_bad", lambda account, origin, error: None):
        assert "empty content" not in run("prepare")
    assert lost() == 2, "dropped without a message"
    shows(run("prepare", "--fresh"))
    assert lost() == 0


@given(st.lists(st.binary(max_size=50) | st.just(json.dumps(chat("q")).encode()), min_size=1, max_size=6))
@settings(max_examples=80, deadline=None)
def test_any_bytes_in_a_file_give_rows_or_an_error_and_every_line_is_counted(lines):
    with tempfile.TemporaryDirectory() as folder:
        data = b"\n".join(lines)
        (Path(folder) / "a.jsonl").write_bytes(data)
        try:
            rows = prepare(Path(folder), "a.jsonl", deduplicate="none", max_dropped=1.0)
        except DataError:
            return
    filled = sum(1 for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip(b" \t\r\x0b\x0c"))
    assert rows.rows_in == filled == rows.counts["train"] + sum(rows.dropped.values())


@pytest.mark.guarantee(
    4,
    cannot="an end-of-turn token that is not supervised",
    kept="The template's text after an answer, up to the end-of-turn token, belongs to the answer's span. A "
    "template without such a token is refused.",
    shows="an assistant's turn ends in ..., not in an end-of-turn token, so answers would never end",
    also=["test_each_answer_is_supervised_with_its_end_and_nothing_else"],
    cases=["end_without_pad_token"],
)
def test_answers_are_trained_with_their_end_so_generation_stops(place, run, without, shows):
    def cut() -> float:
        """The share of answers that ended only at the token limit."""
        return json.loads((place / "run/report.json").read_text())["evaluation"]["tuned"]["answers_cut"]

    really_split = chat_template._split_end
    learn = {"train": {"num_train_epochs": 6}}
    with without("llmtune.data.chat_template._split_end", lambda *turn: (really_split(*turn)[0], "")):
        run("run", **learn)
    assert cut() == 1, "no answer ever ends"
    run("run", "--fresh", **learn)
    assert cut() < 0.5  # which answers end by now may differ between CPUs
    (place / "model/chat_template.jinja").write_text(NO_END)
    shows(run("prepare", "--fresh", code=4))


@pytest.mark.parametrize("name", STABLE)
def test_each_answer_is_supervised_with_its_end_and_nothing_else(name):
    tokenizer = tokenizer_with(STABLE[name])
    (example,) = encode(CHAT, tokenizer)
    expected = tokenizer.apply_chat_template(CHAT["messages"])["input_ids"]
    assert example.input_ids == expected[: len(example.input_ids)]
    assert not tokenizer.decode(expected[len(example.input_ids) :]).strip()
    first, second = (text.strip() for text in learned(example, tokenizer))
    end = first.removeprefix("three").strip()
    assert tokenizer.convert_tokens_to_ids(end) in stop_ids(tokenizer, recipe_for())
    assert (first.split(end)[0].strip(), second.split(end)[0].strip()) == ("three", "six")
    assert example.target_bytes == len("three") + len("six")


@pytest.mark.guarantee(
    5,
    cannot="a doubled start token; different ids in training, evaluation, chat and serving for the same messages",
    kept="One function renders the prompt for all of them, and it adds no token that the template already wrote.",
    shows="the template writes '<|endoftext|>' twice at the start",
    also=[
        "data/test_chat_encoding.py::test_an_answer_is_trained_after_the_exact_ids_of_its_generation_prompt",
        "serve/test_api.py::test_a_conversation_gets_the_ids_of_training_in_any_form",
        "test_pipeline.py::test_generate_and_chat_answer_as_in_the_evaluation",
    ],
    cases=["start_token_once", "start_token_of_text", "default_system_message"],
)
def test_the_start_token_occurs_once_even_if_the_tokenizer_adds_one(place, run, shows):
    tokenizer = tokenizer_with(LLAMA2)
    start = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", start)]
    )
    text = tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)
    assert tokenizer(text)["input_ids"][:2] == [start, start], "the result of scripts that tokenize rendered text"
    (example,) = encode(CHAT, tokenizer)
    assert example.input_ids.count(start) == 1
    assert render_prompt(CHAT["messages"][:1], tokenizer, recipe_for()) == example.input_ids[: example.spans[0]]
    (place / "model/chat_template.jinja").write_text(DOUBLED_START)
    shows(run("prepare", code=4))


@pytest.mark.guarantee(
    6,
    cannot="attention or loss that leaks across packed rows",
    kept="Packing is tested on the loaded model: each of three packed rows must get the same logits as alone.",
    shows="error data.packing: in ... packed rows see one another: its architecture does not isolate them -> "
    "Set data.packing: false.",
    also=["model/test_packed_attention.py::test_packed_logits_are_those_of_each_document_alone"],
    cases=["packed_rows"],
)
def test_packed_and_unpacked_training_give_the_same_losses(place, run, without, shows):
    def losses(**sections: object) -> list[list[float]]:
        found = []
        for packing in (True, False):
            run("train", "--fresh", data={"packing": packing}, **sections)
            found.append([line["loss"] for line in read_metrics(place / "run")])
        return found

    packed, padded = losses()
    assert packed == pytest.approx(padded, abs=1e-4)
    leaky = {"model": {"name": str(build_family(place / "leaky", "bloom", n_head=4))}}
    with without("llmtune.model.loading.isolates_documents", lambda model, dtype, decodes: True):
        packed, padded = losses(**leaky)
    assert packed != pytest.approx(padded, abs=1e-4), "rows see each other"
    shows(run("train", "--fresh", code=2, **leaky))


@pytest.mark.guarantee(
    7,
    cannot="a stale cache",
    kept="A step is skipped only if the hash of all its inputs is unchanged.",
    shows="prepare unchanged, skipped ... train unchanged, skipped",
    also=["test_cache.py"],
)
def test_rows_changed_in_place_are_read_trained_and_scored_again(place, run, without, shows):
    def weights() -> bytes:
        return (place / "run/adapter/adapter_model.safetensors").read_bytes()

    run("run")
    before, rows = weights(), (place / "rows.jsonl").read_text()
    shows(run("run"))
    (place / "rows.jsonl").write_text(rows.replace("Which colour", "What colour"))
    with without("llmtune.store.run_folder.RunFolder.is_valid", lambda folder, step, inputs: folder.is_done(step)):
        run("run")
    assert weights() == before, "the adapter of the old rows"
    assert "skipped" not in run("run")
    assert weights() != before


@pytest.mark.guarantee(
    8,
    cannot="a row of the test split in the training rows",
    kept="A hash of the content assigns the split. Rows equal to a row of another split are dropped and counted; "
    "with data.deduplicate: near, so are nearly equal rows.",
    shows="1 left out: equal to a test row",
    also=["test_a_test_row_is_never_in_train_or_validation"],
    cases=["copies_across_the_split"],
)
def test_a_test_row_in_the_training_file_is_dropped(place, run, without, shows):
    (place / "test.jsonl").write_text("".join((place / "rows.jsonl").read_text().splitlines(keepends=True)[5]))
    data = {"test": "test.jsonl"}
    everything = lambda index, split_N, method: np.full(len(index), "", dtype=object)  # noqa: E731
    with without("llmtune.data.preparation.drop_equal", everything):
        run("prepare", data=data)
    train, test = (questions(load_rows(place / "run/data/rows"))[split] for split in ("train", "test"))
    assert set(test) < set(train), "the test rows were trained on"
    shows(run("prepare", "--fresh", data=data))
    train, test = (questions(load_rows(place / "run/data/rows"))[split] for split in ("train", "test"))
    assert not set(test) & set(train)


@pytest.mark.parametrize("method", ["none", "exact", "near"])
def test_a_test_row_is_never_in_train_or_validation(tmp_path, method):
    long = " ".join(f"word{i % 47}" for i in range(60))
    write_jsonl(tmp_path / "train.jsonl", [chat("a"), chat("b"), chat("c"), chat(long), chat("d")])
    write_jsonl(tmp_path / "validation.jsonl", [chat("b"), chat("a "), chat("v")])
    write_jsonl(tmp_path / "test.jsonl", [chat("a"), chat(long + " more")])
    rows = prepare(tmp_path, "train.jsonl", validation="validation.jsonl", test="test.jsonl", deduplicate=method)
    near = method == "near"
    assert questions(rows) == {
        "train": ["c", "d"] if near else ["c", "d", long],
        "validation": ["b", "v"],
        "test": ["a", long + " more"],
    }
    want = {"equal to a test row": 2, "equal to a validation row": 1} | ({"near a test row": 1} if near else {})
    assert rows.dropped == want


@pytest.mark.guarantee(
    9,
    cannot="a bad row without file, line number and reason",
    kept="All bad rows are reported together; if their share exceeds data.max_dropped, the run stops.",
    shows="error 25 of 85 rows are bad: 29.4%, and data.max_dropped allows 5.0% ... error rows.jsonl:31: empty "
    "content: message 1 (user) has no content error rows.jsonl:32: not valid JSON: ... error rows.jsonl:33: no "
    "assistant answer",
)
def test_bad_rows_are_reported_with_file_line_and_reason(place, run, shows):
    good = [json.dumps(chat(f"q{i}")) for i in range(60)]
    bad = [json.dumps(chat("")), '{"messages": [', json.dumps({"messages": [{"role": "user", "content": "q"}]})] * 8
    lines = [*good[:30], *bad, *good[30:]]
    (place / "rows.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\n")
    with pytest.raises(json.JSONDecodeError) as bare:
        json.loads(bad[1])
    assert "rows.jsonl" not in str(bare.value), "the parser alone reports neither file nor line"
    said = run("prepare", code=3)
    shows(said)
    assert "and 5 more bad rows" in said
    listed = [json.loads(line) for line in (place / "run/data/bad_rows.jsonl").read_text().splitlines()]
    assert len(listed) == 25
    assert (listed[-1]["origin"], listed[-1]["reason"]) == ("rows.jsonl:85", "not UTF-8")
    assert not (place / "run/data/rows").exists()
