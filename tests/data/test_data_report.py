"""The data report: its printed form, and its part of the run's report."""

import io
import json
import string

import pytest
from rich.console import Console
from support.templates import CHATML, conversation, recipe_for, tokenizer_with
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmtune.data.data_report import describe_examples, find_vanishing
from llmtune.data.examples import ExampleReader, encode_rows
from llmtune.data.preparation import prepare_rows
from llmtune.data.row_store import iterate_texts
from llmtune.tasks.registry import get_task


def describe(rows, tmp_path, console, **data):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_for(**{"train": str(path), "validation": 0, "test": 0, "deduplicate": "exact", **data})
    tokenizer = tokenizer_with(CHATML)
    prepared = prepare_rows(recipe, tmp_path / "rows", console)
    examples = encode_rows(prepared, get_task("chat"), tokenizer, recipe, tmp_path / "examples", console)
    return describe_examples(prepared, examples, tokenizer, console, get_task("chat"), recipe), examples


def rows(count, words=1):
    return [conversation(f"question {i} " + "cat " * (i * words % 37), f"answer {i}") for i in range(count)]


def test_the_report_is_json_and_its_histogram_counts_every_example_once_within_its_edges(tmp_path, console):
    facts, examples = describe(rows(40, words=3), tmp_path, console)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["rows_in"] == 40
    assert facts["examples"] == {"train": 40}
    assert facts["supervised_share"] == pytest.approx(examples.supervised["train"] / examples.tokens["train"])
    edges, counts = facts["histogram"]["edges"], facts["histogram"]["counts"]
    lengths = ExampleReader(examples, "train").lengths
    assert sum(counts) == 40
    assert len(edges) == len(counts) + 1
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        assert count == sum(low <= length < high for length in lengths)


def test_the_example_is_shown_with_special_tokens_and_supervised_text(tmp_path, console):
    facts, _ = describe([conversation("[bold]one[/bold]", "two", "three", "four")], tmp_path, console)
    assert facts["example"] == [
        ["<|im_start|>user\n[bold]one[/bold]<|im_end|>\n<|im_start|>assistant\n", False],
        ["two<|im_end|>", True],
        ["\n<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n", False],
        ["four<|im_end|>", True],
    ]
    assert "[bold]one[/bold]<|im_end|>" in console.file.getvalue()
    assert "one example: >>>text<<< is learned" in console.file.getvalue()
    assert ">>>four<|im_end|><<<" in console.file.getvalue()


def test_colour_marks_the_learned_text_on_a_terminal(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    describe([conversation("one", "two")], tmp_path, console)
    assert "one example: green is learned" in console.file.getvalue()
    assert "<<<" not in console.file.getvalue()


def test_a_long_example_is_cut_in_the_middle(tmp_path, console):
    facts, _ = describe([conversation("one " * 2000, "two")], tmp_path, console, max_length=20_000)
    text = facts["example"][0][0]
    assert len(text) < 2100
    assert "characters ..." in text


def test_rows_left_out_are_shown_with_their_reasons(tmp_path, console):
    chats = [*rows(40), conversation("question 3", "answer 3" + "cat " * 300), rows(1)[0]]
    facts, _ = describe(chats, tmp_path, console, max_length=300, on_overlong="drop")
    assert facts["dropped"]["too long"] == 1
    assert facts["dropped"]["exact duplicate"] == 1
    shown = console.file.getvalue()
    assert "too long" in shown
    assert "exact duplicate" in shown
    assert "42 rows read; left out:" in shown


def byteless_tokenizer(unknown):
    """A tokenizer of single letters without control characters, with or without `<unk>`."""
    letters = ["<|im_start|>", "<|im_end|>", *string.ascii_letters, *string.digits, " ", "\n", "."]
    vocabulary = {letter: i for i, letter in enumerate(["<unk>", *letters] if unknown else letters)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>" if unknown else None))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    if unknown:
        tokenizer.unk_token = "<unk>"
    tokenizer.chat_template = CHATML
    return tokenizer


def test_characters_that_vanish_without_an_unk_token_are_counted(tmp_path, console):
    texts = [conversation("a\x07b\x07", "c"), conversation("d", "e\x07\u200b"), conversation("plain", "é. f\n")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    recipe = recipe_for(train=str(tmp_path / "rows.jsonl"), validation=0, test=0, deduplicate="exact")
    prepared, task = prepare_rows(recipe, tmp_path / "rows", console), get_task("chat")
    tokenizer = byteless_tokenizer(unknown=False)
    examples = encode_rows(prepared, task, tokenizer, recipe, tmp_path / "examples", console)
    facts = describe_examples(prepared, examples, tokenizer, console, task, recipe)
    assert facts["vanishing"] == {"\x07": 2, "é": 1, "\u200b": 1}
    assert "The tokenizer drops these characters" in console.file.getvalue()
    assert "U+0007 (2 rows)" in " ".join(console.file.getvalue().split())
    read = [text for split in prepared.files for _, text in iterate_texts(prepared, split)]
    assert find_vanishing(read, byteless_tokenizer(unknown=True)) == {}
    assert find_vanishing(read, tokenizer_with(CHATML)) == {}


def test_a_character_vanishes_also_between_letters_that_are_one_token_without_it():
    alphabet = [letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter != "\u0104"]  # byte 4
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*sorted(alphabet), "ab"])}, [("a", "b")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert [len(tokenizer(text)["input_ids"]) for text in ("a\x04b", "ab")] == [2, 1]
    assert find_vanishing([json.dumps("one\x04two\x05"), json.dumps("\x04é")], tokenizer) == {"\x04": 2}
