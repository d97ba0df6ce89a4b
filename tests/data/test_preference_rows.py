"""Preferences in real formats: every row format, every bad row, and the encoded ids."""

import csv
import json

import pytest
import support.rows
from support.models import train_tokenizer
from support.rows import make_recipe, prepare, rows_of, write_jsonl
from support.templates import CHATML, tokenizer_with
from support.variants import PREFERENCE

from llmtune.data.column_mapping import rename
from llmtune.data.row_formats import parse_row
from llmtune.data.sources import resolve_inputs
from llmtune.recipe.task_sections import PreferenceSection
from llmtune.tasks.preference import encode_answers

QUESTION = {"role": "user", "content": "Which colour?"}
RED, BLUE = {"role": "assistant", "content": "Red."}, {"role": "assistant", "content": "Blue."}
PAIR = {"messages": [QUESTION], "chosen": "Red.", "rejected": "Blue."}
EARLIER = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
SYSTEM = {"role": "system", "content": "Be brief."}


def read(row):
    return support.rows.read_row(row, "preference")


def refusal(row):
    return support.rows.refusal(row, "preference")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Which colour?", "chosen": "Red.", "rejected": "Blue."},
        {"prompt": [QUESTION], "chosen": "Red.", "rejected": "Blue."},
        {"prompt": [QUESTION], "chosen": [RED], "rejected": [BLUE]},
        {"prompt": [QUESTION], "chosen": RED, "rejected": BLUE},
        {"prompt": "Which colour?", "chosen": [RED], "rejected": [BLUE]},
        {"prompt": "Which colour?", "chosen": [QUESTION, RED], "rejected": [QUESTION, BLUE]},
        {"prompt": [QUESTION], "chosen": [QUESTION, RED], "rejected": [QUESTION, BLUE]},
        {"prompt": None, "chosen": [QUESTION, RED], "rejected": [QUESTION, BLUE]},
        {"chosen": [QUESTION, RED], "rejected": [QUESTION, BLUE]},
        {"chosen": [{**QUESTION, "weight": 0}, RED], "rejected": [QUESTION, {**BLUE, "train": True}]},
        {
            "conversations": [{"from": "human", "value": "Which colour?"}],
            "chosen": {"from": "gpt", "value": "Red."},
            "rejected": {"from": "gpt", "value": "Blue."},
        },
        {"conversations": [QUESTION], "chosen": {"content": "Red."}, "rejected": "Blue."},
    ],
)
def test_a_pair_is_read_from_texts_and_from_messages(row):
    assert read(row) == PAIR


def test_openais_form_is_read_with_the_tools_in_its_input(tmp_path):
    tool = {"type": "function", "function": {"name": "weather"}}
    asked = {"messages": [QUESTION], "tools": [tool], "parallel_tool_calls": True}
    row = {"input": asked, "preferred_output": [RED], "non_preferred_output": [BLUE]}
    file = write_jsonl(tmp_path / "rows.jsonl", [row] * 2)
    recipe = make_recipe(tmp_path, str(file), "preference")
    (detected,) = resolve_inputs(recipe.data, "preference")
    assert {*detected.unused} == {"parallel_tool_calls (in a prompt)"}
    assert parse_row(rename(row, detected.columns), detected.row_format, "preference") == {**PAIR, "tools": [tool]}


def test_a_pair_may_end_a_conversation_with_system_message_and_tools():
    tool = {"type": "function", "function": {"name": "weather"}}
    asked = [SYSTEM, *EARLIER, QUESTION]
    wanted = {**PAIR, "messages": asked, "tools": [tool]}
    whole = {"chosen": [*asked, RED], "rejected": [*asked, BLUE], "tools": [tool]}
    assert read(whole) == wanted
    assert read({"prompt": "Which colour?", **whole}) == wanted  # the last question's text
    outside = {"prompt": [*EARLIER, QUESTION], "chosen": "Red.", "rejected": "Blue.", "system": "Be brief."}
    assert read({**outside, "tools": json.dumps([tool])}) == wanted


def test_a_pair_may_be_two_transcripts():
    start = "\n\nHuman: Hello\n\nAssistant: Good day\n\nHuman: Which colour?\n\nAssistant:"
    assert read({"chosen": f"{start} Red.\n\nHuman-made.", "rejected": f"{start} Blue."}) == {
        "messages": [*EARLIER, QUESTION],
        "chosen": "Red.\n\nHuman-made.",
        "rejected": "Blue.",
    }
    assert refusal({"chosen": f"{start} Red.", "rejected": start}) == "no answer: 'rejected' is empty"


def test_answers_of_several_messages_share_all_but_the_last():
    more = [{"role": "assistant", "content": "Of what?"}, {"role": "user", "content": "The sky."}]
    row = {"prompt": [QUESTION], "chosen": [*more, RED], "rejected": [*more, BLUE]}
    assert read(row) == {**PAIR, "messages": [QUESTION, *more]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Which colour?", "completion": "Red.", "label": True},
        {"prompt": [QUESTION], "completion": [RED], "label": True},
        {"prompt": [QUESTION], "completion": RED, "label": True},
        {"messages": [QUESTION, RED], "label": True},
        {"messages": json.dumps([QUESTION, RED]), "label": "true"},
    ],
)
def test_an_answer_with_a_thumb_is_read_from_texts_and_from_messages(row):
    assert read(row) == {"messages": [QUESTION], "answer": "Red.", "good": True}


@pytest.mark.parametrize(
    ("thumb", "good"),
    [
        *((value, True) for value in (True, 1, 1.0, "true", "True", " TRUE ", "1", "up", "yes", "good", "👍")),
        *((value, False) for value in (False, 0, 0.0, "false", "False", "0", "down", "No", "bad", "👎")),
    ],
)
def test_a_thumb_has_many_spellings(thumb, good):
    assert read({"prompt": "a", "completion": "b", "label": thumb})["good"] is good


@pytest.mark.parametrize("thumb", [None, "", "maybe", 2, -1, 0.5, [], "truee"])
def test_an_invalid_thumb_is_named(thumb):
    assert refusal({"prompt": "a", "completion": "b", "label": thumb}).startswith("no thumb: 'label' is ")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": " b "}, "chosen equals rejected: both answers are the same"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "no answer: 'chosen' is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "no answer: 'rejected' is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": []}, "no answer: 'rejected' is an empty list"),
        ({"prompt": "a", "chosen": [{**RED, "content": " "}], "rejected": [BLUE]}, "no answer: 'chosen' is empty"),
        ({"prompt": " ", "chosen": "b", "rejected": "c"}, "empty content: 'prompt' is empty"),
        ({"prompt": None, "chosen": "b", "rejected": "c"}, "missing column: 'prompt' is missing"),
        ({"chosen": "b", "rejected": "c"}, "missing column: 'prompt' is missing"),
        ({"chosen": [RED], "rejected": [BLUE]}, "no question: the answer in 'chosen' follows nothing"),
        ({"prompt": [SYSTEM], "chosen": "b", "rejected": "c"}, "no question: the answer in 'chosen' follows the"),
        ({"prompt": EARLIER, "chosen": "b", "rejected": "c"}, "no question: the answer in 'chosen' follows the"),
        ({"chosen": [QUESTION, RED], "rejected": [EARLIER[0], BLUE]}, "two prompts: 'chosen' and 'rejected' differ"),
        ({"prompt": "a", "chosen": [RED], "rejected": [EARLIER[0], BLUE]}, "two prompts: 'rejected' begins with"),
        ({"prompt": "a", "chosen": [QUESTION, RED], "rejected": [QUESTION, BLUE]}, "two prompts: 'chosen' begins with"),
        ({"prompt": [EARLIER[0]], "chosen": [QUESTION, RED], "rejected": [QUESTION, BLUE]}, "two prompts: 'chosen'"),
        ({"chosen": [QUESTION], "rejected": [QUESTION, BLUE]}, "no assistant answer: 'chosen': no message is from"),
        ({"prompt": "a", "chosen": [RED, QUESTION], "rejected": [BLUE]}, "does not end with an answer: 'chosen'"),
        ({"prompt": "a", "chosen": {"from": "human", "value": "b"}, "rejected": "c"}, "no assistant answer: 'chosen'"),
        ({"prompt": "a", "chosen": {"role": "judge", "content": "b"}, "rejected": "c"}, "unknown role: 'chosen'"),
        ({"prompt": "a", "chosen": 5, "rejected": "c"}, "wrong type: 'chosen' is a number"),
        ({"prompt": 5, "chosen": "b", "rejected": "c"}, "wrong type: 'prompt' is a number"),
        ({"conversations": "a", "chosen": "b", "rejected": "c"}, "wrong type: 'conversations' is text"),
        ({"prompt": "a", "completion": "", "label": 1}, "no answer: 'completion' is empty"),
        ({"messages": [QUESTION], "label": 1}, "no assistant answer: 'messages'"),
        ({"messages": [RED], "label": 1}, "no question: the answer in 'messages' follows nothing"),
        ({"messages": "hello", "label": 1}, "wrong type: 'messages' is text"),
        ({"messages": [], "label": 1}, "no answer: 'messages' is an empty list"),
    ],
)
def test_a_bad_row_gets_a_reason(row, reason):
    assert refusal(row).startswith(reason)


def test_an_answer_that_calls_a_tool_is_refused():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]}
    assert refusal({"prompt": "a", "chosen": [call], "rejected": [BLUE]}).startswith("a tool call as answer: 'chosen'")


def test_a_table_may_contain_messages_as_json_and_texts_that_only_look_like_it(tmp_path):
    rows = [(json.dumps([QUESTION]), json.dumps([RED]), json.dumps(BLUE)), ("[1, 2] or {3}?", '{"answer": 3}', "[]")]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "chosen", "rejected"), *rows])
    found = rows_of(prepare(tmp_path, "rows.csv", "preference"))
    asked = {"role": "user", "content": "[1, 2] or {3}?"}
    assert found == [PAIR, {"messages": [asked], "chosen": '{"answer": 3}', "rejected": "[]"}]


# Token ids


def recipe_of(tmp_path, loss="dpo", **data):
    write_jsonl(tmp_path / "rows.jsonl", [])
    recipe = make_recipe(tmp_path, "rows.jsonl", "preference", **data)
    return recipe.model_copy(update={"preference": PreferenceSection(loss=loss)})


def learned(ids, spans, tokenizer):
    return [tokenizer.decode(ids[a:b]) for a, b in zip(spans[::2], spans[1::2], strict=True)]


@pytest.mark.parametrize("template", [CHATML, None])
def test_both_answers_follow_the_generation_prompt(template, tmp_path):
    tokenizer, recipe = train_tokenizer(template), recipe_of(tmp_path)
    ((example,),) = PREFERENCE.encode([PAIR], tokenizer, recipe)
    prompt = PREFERENCE.prompt_ids(PAIR, tokenizer, recipe)
    start = len(prompt)
    assert example.input_ids[:start] == example.rejected_ids[:start] == prompt
    assert (example.spans[0], example.rejected_spans[0]) == (start, start)
    end = tokenizer.eos_token
    assert learned(example.input_ids, example.spans, tokenizer) == [f"Red.{end}"]
    assert learned(example.rejected_ids, example.rejected_spans, tokenizer) == [f"Blue.{end}"]
    assert example.supervised == 1
    assert example.tokens == len(example.input_ids) + len(example.rejected_ids)
    assert example.reach == max(len(example.input_ids), len(example.rejected_ids))


def test_a_conversation_without_a_template_is_plain_text(tmp_path):
    row = {**PAIR, "messages": [*EARLIER, QUESTION]}
    tokenizer = train_tokenizer(None)
    ids = PREFERENCE.prompt_ids(row, tokenizer, recipe_of(tmp_path))
    assert tokenizer.decode(ids) == "Hello\n\nGood day\n\nWhich colour?\n"


def test_answers_with_equal_tokens_are_refused(tmp_path):
    tokenizer = tokenizer_with(CHATML.replace("message['content']", "message['content'].strip()"))
    rows = [PAIR, {**PAIR, "rejected": " Red."}]
    good, bad = PREFERENCE.encode(rows, tokenizer, recipe_of(tmp_path))
    assert len(good) == 1
    assert bad == "chosen equals rejected: both answers have the same tokens"


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_a_pair_with_one_overlong_answer_is_left_out(column, tmp_path):
    long = {**PAIR, column: "fox " * 40}
    found = PREFERENCE.encode([PAIR, long], train_tokenizer(), recipe_of(tmp_path, max_length=40))
    assert len(found[0]) == 1
    assert found[1].startswith("too long: ")


THUMBS = [
    {"messages": [{"role": "user", "content": question}], "answer": answer, "good": good}
    for question, answer, good in (("one", "red", True), ("two", "red", False), ("three", "green", True))
]


def test_kto_pairs_each_prompt_with_the_next_differing_answer(tmp_path):
    tokenizer, recipe = train_tokenizer(), recipe_of(tmp_path, "kto")
    examples = [example for (example,) in PREFERENCE.encode(THUMBS, tokenizer, recipe)]
    own = [learned(example.input_ids, example.spans, tokenizer) for example in examples]
    others = [learned(example.mismatched_ids, example.mismatched_spans, tokenizer) for example in examples]
    assert own == [["red<|im_end|>"], ["red<|im_end|>"], ["green<|im_end|>"]]
    assert others == [["green<|im_end|>"], ["green<|im_end|>"], ["red<|im_end|>"]]
    assert [list(example.desirable) for example in examples] == [[1], [0], [1]]
    for example in examples:
        start = example.spans[0]
        assert example.input_ids[:start] == example.mismatched_ids[:start]


def test_kto_loses_no_row_because_of_another_rows_long_answer(tmp_path):
    rows = [{**THUMBS[0], "messages": [{"role": "user", "content": "dog " * 20}]}, {**THUMBS[2], "answer": "fox " * 20}]
    tokenizer, recipe = train_tokenizer(), recipe_of(tmp_path, "kto", max_length=45)
    alone = encode_answers(rows, [row["answer"] for row in rows], tokenizer, recipe)
    (first,), (_,) = PREFERENCE.encode(rows, tokenizer, recipe)
    assert [len(found) for found in alone] == [1, 1]
    assert len(first.input_ids) < len(first.mismatched_ids) == 45
    (text,) = learned(first.mismatched_ids, first.mismatched_spans, tokenizer)
    assert text.startswith("fox fox")
    assert not text.endswith("<|im_end|>")


@pytest.mark.parametrize(("loss", "good", "bad"), [("kto", THUMBS[0], PAIR), ("dpo", PAIR, THUMBS[0])])
def test_rows_of_the_other_kind_are_refused_one_by_one(loss, good, bad, tmp_path):
    found = PREFERENCE.encode([bad, good, bad], train_tokenizer(), recipe_of(tmp_path, loss))
    assert found[0] == found[2]
    assert found[0].startswith(f"preference.loss: {loss} learns from ")
    assert len(found[1]) == 1
