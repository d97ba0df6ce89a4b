"""Encoded rows on disk."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console
from support.families import build_t5
from support.rows import write_jsonl
from support.templates import CHATML, NO_SYSTEM, conversation, recipe_for, tokenizer_with
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmtune.data.data_report import describe_examples
from llmtune.data.examples import ExampleReader, encode_rows, load_examples
from llmtune.data.preparation import prepare_rows
from llmtune.errors import DataError, EnvironmentProblem
from llmtune.tasks import translate
from llmtune.tasks.registry import get_task


def encode_file(path, folder, console, template=CHATML, **data):
    keys = {"train": str(path), "validation": 0, "test": 0, "deduplicate": "none", **data}
    recipe = recipe_for(**keys)
    rows = prepare_rows(recipe, folder / "rows", console)
    return rows, encode_rows(rows, get_task("chat"), tokenizer_with(template), recipe, folder / "examples", console)


def plain_rows(count):
    return [conversation(f"question {i}", f"answer {'cat ' * (i % 5)}{i}") for i in range(count)]


def test_examples_are_read_in_the_order_of_the_rows(chat_rows, tmp_path, console):
    tokenizer = tokenizer_with(CHATML)
    _, examples = encode_file(chat_rows, tmp_path, console)
    reader = ExampleReader(examples, "train")
    rows = [json.loads(line) for line in chat_rows.read_text().splitlines()]
    assert len(reader) == len(rows) == examples.counts["train"]
    for row, example in zip(rows, reader, strict=True):
        (start, end) = example.spans
        assert tokenizer.decode(example.input_ids[start:end]) == row["messages"][1]["content"] + "<|im_end|>"
        assert row["messages"][0]["content"] in tokenizer.decode(example.input_ids[:start])


def test_examples_of_another_version_are_refused_and_recreated(chat_rows, tmp_path, console):
    _, examples = encode_file(chat_rows, tmp_path, console)
    with pa.OSFile(str(examples.files["train"]), "rb") as source:
        table = pa.ipc.open_file(source).read_all()
    names = ["other_ids" if name == "token_type_ids" else name for name in table.column_names]
    with pa.OSFile(str(examples.files["train"]), "wb") as sink:
        renamed = table.rename_columns(names)
        with pa.ipc.new_file(sink, renamed.schema) as file:
            file.write_table(renamed)
    with pytest.raises(EnvironmentProblem, match="written by another version") as found:
        ExampleReader(examples, "train")
    assert "Run the recipe again" in str(found.value)


def test_counts_and_columns_agree_with_the_examples(chat_rows, tmp_path, console):
    _, examples = encode_file(chat_rows, tmp_path, console, test=0.2, validation=0.1)
    assert set(examples.counts) == {"train", "validation", "test"}
    for side in examples.files:
        reader = ExampleReader(examples, side)
        assert reader.lengths.tolist() == [len(example.input_ids) for example in reader]
        assert reader.supervised.tolist() == [example.supervised for example in reader]
        assert reader.rows.tolist() == list(range(len(reader)))
        assert reader.lengths.dtype == reader.supervised.dtype == np.int32
        assert examples.tokens[side] == reader.lengths.sum()
        assert examples.supervised[side] == reader.supervised.sum()
        assert examples.longest[side] == reader.lengths.max()


def test_examples_in_many_batches_can_be_accessed_at_random(tmp_path, console):
    path = write_jsonl(tmp_path / "rows.jsonl", plain_rows(1400))
    _, examples = encode_file(path, tmp_path, console)
    reader = ExampleReader(examples, "train")
    assert len(reader._batches) > 2
    tokenizer = tokenizer_with(CHATML)
    for i in (0, 511, 512, 1023, 1024, 1399, -1):
        assert f"question {i % 1400}<" in tokenizer.decode(reader[i].input_ids)
    with pytest.raises(IndexError):
        reader[1400]


@pytest.mark.slow
def test_the_progress_bar_moves_during_long_conversations(tmp_path, console):
    long = [conversation(*(f"{i} and {turn} " + "cat " * 20 for turn in range(400))) for i in range(6)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*long, *plain_rows(200)])
    _, examples = encode_file(path, tmp_path, console, max_length=100_000)
    reader = ExampleReader(examples, "train")
    sizes = [batch.num_rows for batch in reader._batches]
    assert sum(sizes) == len(reader) == 206
    assert max(sizes) > 200 or len(sizes) < 206, "short conversations share a batch"
    assert len(sizes) >= 4, "long ones are a batch of one or two, after which the bar moves"


def test_the_folder_can_be_moved_and_read_again_but_not_without_its_files(chat_rows, tmp_path, console):
    _, examples = encode_file(chat_rows, tmp_path, console)
    moved = (tmp_path / "examples").rename(tmp_path / "moved")
    again = load_examples(moved)
    assert (again.content_hash, again.counts, again.dropped) == (
        examples.content_hash,
        examples.counts,
        examples.dropped,
    )
    assert ExampleReader(again, "train")[3].input_ids
    again.files["train"].unlink()
    with pytest.raises(DataError, match="missing"):
        load_examples(moved)
    with pytest.raises(DataError, match="no encoded examples"):
        load_examples(tmp_path)


def test_the_hash_says_whether_examples_are_the_same(chat_rows, tmp_path, console):
    hashes = [
        encode_file(chat_rows, tmp_path / str(i), console, **data)[1].content_hash
        for i, data in enumerate([{}, {}, {"train_on": "all"}])
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def long_rows(count, long):
    rows = plain_rows(count)
    for i in long:
        rows[i] = conversation(f"question {i} " + "cat " * 200, "dog")
    return rows


@pytest.mark.parametrize("long", [[3, 7], range(30)])
def test_at_most_twenty_overlong_rows_are_named_and_all_are_listed(tmp_path, console, long):
    path = write_jsonl(tmp_path / "rows.jsonl", long_rows(40, long))
    with pytest.raises(DataError) as caught:
        encode_file(path, tmp_path, console, max_length=100)
    head, *problems = caught.value.problems
    assert f"{len(long)} of the rows have more tokens than data.max_length = 100" in head.what
    assert "data.on_overlong" in head.fix
    places = [f"{path}:{i + 1}" for i in long]
    assert [problem.where for problem in problems] == places[:20]
    assert "data.max_length is 100" in problems[0].what
    listed = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    assert [entry["where"] for entry in listed] == places


def test_any_number_of_rows_dropped_for_length_is_counted(tmp_path, console):
    path = write_jsonl(tmp_path / "rows.jsonl", long_rows(40, range(30)))
    _, examples = encode_file(path, tmp_path, console, max_length=100, on_overlong="drop")
    assert examples.counts["train"] == 10
    assert examples.dropped == {"too long": 30}
    assert ExampleReader(examples, "train").rows.tolist() == list(range(30, 40))


def test_rows_that_truncation_cannot_save_count_as_bad(tmp_path, console):
    rows = plain_rows(40)
    rows[5] = conversation("question 5", "dog " * 200)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    _, examples = encode_file(path, tmp_path, console, max_length=100, on_overlong="truncate")
    assert examples.dropped == {"too long": 1}
    with pytest.raises(DataError, match=r"data\.max_dropped allows 1\.0%") as caught:
        encode_file(path, tmp_path, console, max_length=100, on_overlong="truncate", max_dropped=0.01)
    assert caught.value.problems[1].where == f"{path}:6"


def test_parts_of_a_split_row_name_their_row(tmp_path, console):
    texts = [text for i in range(6) for text in (f"question {i} " + "cat " * 12, f"answer {i}")]
    path = write_jsonl(tmp_path / "rows.jsonl", [*plain_rows(3), conversation(*texts)])
    _, examples = encode_file(path, tmp_path, console, max_length=100, on_overlong="split")
    rows = ExampleReader(examples, "train").rows.tolist()
    assert rows[:3] == [0, 1, 2]
    assert len(rows) > 4
    assert set(rows[3:]) == {3}


def test_another_template_makes_other_examples_even_if_no_row_shows_it(tmp_path, console):
    """Other branches of the template are saved and served with the model, so training must run again."""
    path = write_jsonl(tmp_path / "rows.jsonl", [conversation("Hi?", "Yes."), conversation("Why?", "So.")])
    with_tools = CHATML + "{% if tools %}{{ tools }}{% endif %}"
    found = [encode_file(path, tmp_path, console, template)[1] for template in (CHATML, CHATML, with_tools)]
    assert found[0].tokens == found[2].tokens
    assert found[0].content_hash == found[1].content_hash != found[2].content_hash


def test_a_few_rows_refused_by_the_template_are_left_out_and_many_stop_the_run(tmp_path, console):
    refused = [conversation(f"question {i}", f"answer {i}", system="be kind") for i in range(10)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*refused[:1], *plain_rows(40)[1:]])
    _, examples = encode_file(path, tmp_path, console, template=NO_SYSTEM)
    assert examples.dropped == {"the chat template refuses it: System role not supported": 1}
    write_jsonl(path, refused)
    with pytest.raises(DataError, match="System role not supported") as caught:
        encode_file(path, tmp_path, console, template=NO_SYSTEM)
    assert f"{path}:1" in str(caught.value)


def test_an_empty_split_is_refused(tmp_path, console):
    path = write_jsonl(tmp_path / "rows.jsonl", long_rows(5, range(5)))
    with pytest.raises(DataError, match="no row is left for train"):
        encode_file(path, tmp_path, console, max_length=50, on_overlong="drop")


def test_incomplete_examples_are_not_used_after_an_error(tmp_path, console):
    path = write_jsonl(tmp_path / "rows.jsonl", plain_rows(5))
    encode_file(path, tmp_path, console)
    with pytest.raises(EnvironmentProblem):
        encode_file(path, tmp_path, console, template="{{ messages[0]['content'] }}")
    with pytest.raises(DataError, match="no encoded examples"):
        load_examples(tmp_path / "examples")


def test_an_unwritable_folder_is_an_environment_problem(tmp_path, console):
    path = write_jsonl(tmp_path / "rows.jsonl", plain_rows(5))
    recipe = recipe_for(train=str(path), validation=0, test=0)
    rows = prepare_rows(recipe, tmp_path / "rows", console)
    read_only = Path("/sys/llmtune")  # also for root
    with pytest.raises(EnvironmentProblem):
        encode_rows(rows, get_task("chat"), tokenizer_with(CHATML), recipe, read_only, console)


def test_losses_from_truncation_are_counted_and_reported(tmp_path):
    console = Console(record=True, width=200)
    texts = [part for i in range(4) for part in (f"question {i} {'cat ' * 20}", f"answer {i}")]
    path = write_jsonl(tmp_path / "rows.jsonl", [conversation(*texts), *plain_rows(3)])
    rows, examples = encode_file(path, tmp_path, console, max_length=60, on_overlong="truncate")
    assert (examples.lost["rows"], examples.lost["answers"]) == (1, 3)
    assert 0 < examples.lost["supervised"] < examples.lost["tokens"]
    assert load_examples(examples.folder).lost == examples.lost
    recipe, tokenizer = recipe_for(max_length=60, on_overlong="truncate"), tokenizer_with(CHATML)
    facts = describe_examples(rows, examples, tokenizer, console, get_task("chat"), recipe)
    assert facts["lost"] == examples.lost
    assert "1 examples were truncated to data.max_length" in console.export_text()


def word_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A tokenizer that knows only the words of a text."""
    words = {word: i for i, word in enumerate(["<unk>", "<|im_start|>", "<|im_end|>", *dict.fromkeys(text.split())])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    return tokenizer


def test_an_unknown_target_is_a_bad_row_unless_allowed(tmp_path, console):
    tokenizer = word_tokenizer("user assistant one two three . What is the probe ? The answer of 4217")
    path = write_jsonl(tmp_path / "rows.jsonl", [conversation("one {", "two"), conversation("one", "two { three")])
    keys = {"train": str(path), "validation": 0, "test": 0, "max_dropped": 1}
    rows = prepare_rows(recipe_for(**keys), tmp_path / "rows", console)
    encode_one = partial(encode_rows, rows, get_task("chat"), tokenizer)
    examples = encode_one(recipe_for(**keys), tmp_path / "examples", console)
    assert examples.counts["train"] == 1
    assert examples.dropped == {"text that the tokenizer does not know (<unk>) in the supervised part": 1}
    (line,) = (tmp_path / "left_out.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"].endswith(": '{'")
    assert json.loads(line)["where"].endswith(":2")
    allowed = encode_one(recipe_for(**keys, unknown_tokens="allow"), tmp_path / "allowed", console)
    assert allowed.counts["train"] == 2


def test_targets_of_an_encoder_decoder_are_checked_against_its_vocabulary(tmp_path, console):
    tokenizer = AutoTokenizer.from_pretrained(build_t5(tmp_path / "t5"))
    targets = ["Le ciel est bleu.", "Le ciel { est bleu.", "Le <ciel> est.", "家"]
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{"source": f"The sky {i}", "target": t} for i, t in enumerate(targets)]
    )
    recipe = recipe_for(task="translate", train=str(path), validation=0, test=0, deduplicate="none", max_dropped=1)
    rows = prepare_rows(recipe, tmp_path / "rows", console)
    examples = encode_rows(rows, translate.VARIANTS[0], tokenizer, recipe, tmp_path / "examples", console)
    unknown = sum(tokenizer.unk_token_id in tokenizer(text_target=text)["input_ids"] for text in targets)
    assert unknown >= 1
    assert examples.counts["train"] == len(targets) - unknown
