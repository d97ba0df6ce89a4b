"""The table: for each model family and kind of conversation, the supervised text is the text to generate.

Two sources confirm this: prompts and renderings of transformers' own `apply_chat_template`, and each family's format,
stated by hand in `support.conversation_table`. The parser gives back the row's content, and a row that takes a
teacher's text supervises the same tokens.
"""

import pytest
from support.conversation_table import DOCS, FAMILIES, MARKS, SHAPES, rendered_table, tools_of
from support.templates import FAMILY_FILES, family_tokenizer, recipe_for

from llmtune.data.answer_parser import parse_answer
from llmtune.data.chat_encoding import encode_chat
from llmtune.data.chat_rows import canonical_messages
from llmtune.data.chat_template import CUT_THOUGHTS, read_template, render_prompt, stop_ids
from llmtune.evaluate.generation import prompt_end
from llmtune.tasks.chat import Chat


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_supervised_text_equals_the_text_to_generate(name, shape):
    writes, messages, tools = FAMILIES[name], SHAPES[shape], tools_of(shape)
    tokenizer, recipe = family_tokenizer(writes.file or name), recipe_for(kwargs=writes.kwargs)
    row = canonical_messages(messages, tools)
    (result,) = encode_chat([row], tokenizer, recipe)
    if shape in writes.refuses:
        assert isinstance(result, str)
        assert writes.refuses[shape] in result
        return
    assert not isinstance(result, str), result
    learned = {}
    for example in result:
        for start, end in zip(example.spans[::2], example.spans[1::2], strict=True):
            learned[tuple(example.input_ids[:start])] = list(example.input_ids[start:end])
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(learned) == len(answers)
    for i in answers:
        given = {"tools": tools, "add_generation_prompt": True, **writes.kwargs}
        prompt = tokenizer.apply_chat_template(messages[:i], **given)["input_ids"]
        expected = writes.text(shape, messages[i])
        assert learned[tuple(prompt)] == tokenizer(expected)["input_ids"]
        assert tokenizer(tokenizer.decode(prompt) + expected)["input_ids"] == prompt + learned[tuple(prompt)]
        assert learned[tuple(prompt)][-1] in stop_ids(tokenizer, recipe)
        assert prompt == render_prompt(row["messages"][:i], tokenizer, recipe, tools=tools)
        whole = tokenizer.apply_chat_template(messages[: i + 1], tools=tools, **writes.kwargs)["input_ids"]
        thinks = shape in ("thoughts", "empty thoughts")
        if whole[: len(prompt)] == prompt and not thinks:  # the template's own rendering agrees
            body = learned[tuple(prompt)][:-1]
            assert whole[len(prompt) : len(prompt) + len(body)] == body


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, shape) for name, writes in FAMILIES.items() for shape in SHAPES if shape not in writes.refuses],
)
def test_an_answer_is_parsed_back_into_the_rows_message(name, shape):
    writes, messages, tools = FAMILIES[name], SHAPES[shape], tools_of(shape)
    tokenizer = family_tokenizer(writes.file or name)
    template = read_template(tokenizer, recipe_for(kwargs=writes.kwargs))
    answer = canonical_messages(messages, tools)["messages"][-1]
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tools=tools, add_generation_prompt=True, tokenize=False, **writes.kwargs
    )
    read = parse_answer(tokenizer(writes.text(shape, messages[-1]))["input_ids"], template, tools, prompt)
    assert (read.text, read.reasoning or None) == (answer["content"].strip(), answer.get("reasoning") or None)
    assert [call["function"] for call in read.tool_calls] == [call["function"] for call in answer.get("tool_calls", [])]
    assert (read.complete, read.error) == (True, None)


def take_written(name, messages, tools, text):
    """Return a teacher's prompt, the ids of its text, and the examples of the row that takes it as last answer."""
    writes = FAMILIES[name]
    tokenizer, recipe = family_tokenizer(writes.file or name), recipe_for(kwargs=writes.kwargs)
    row = canonical_messages(messages, tools)
    prompt = render_prompt(row["messages"][:-1], tokenizer, recipe, tools=tools)
    written = tokenizer(text)["input_ids"]
    answer = parse_answer(written, read_template(tokenizer, recipe), tools, prompt_end(tokenizer, prompt))
    (encoded,) = encode_chat([Chat().take_answer(row, answer)], tokenizer, recipe)
    return prompt, written, encoded


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (name, shape)
        for name, writes in FAMILIES.items()
        for shape in SHAPES
        if shape not in writes.refuses and shape != "trailing blanks"  # blanks around an answer are not learned
    ],
)
def test_an_answer_of_a_teacher_is_learned_as_it_wrote_it(name, shape):
    text = FAMILIES[name].text(shape, SHAPES[shape][-1])
    if name == "mistral-v3":  # calls get new ids
        text = text.replace("oslocall1", "call00000").replace("romecall2", "call00001")
    prompt, written, (*_, example) = take_written(name, SHAPES[shape], tools_of(shape), text)
    start = example.spans[-2]
    assert (list(example.input_ids[:start]), list(example.input_ids[start:])) == (prompt, written)


@pytest.mark.parametrize("name", [name for name, writes in FAMILIES.items() if "thoughts" not in writes.refuses])
def test_an_answer_that_ends_in_its_thoughts_is_refused_by_that_name(name):
    text = FAMILIES[name].text("thoughts", SHAPES["thoughts"][-1])
    thought = SHAPES["thoughts"][-1]["reasoning_content"]
    for end in (text.index(thought) + 4, text.index(thought) + len(thought)):
        _, _, encoded = take_written(name, SHAPES["thoughts"], None, text[:end])
        assert encoded == CUT_THOUGHTS


def test_every_template_is_in_the_table_and_in_the_documentation():
    assert {writes.file or name for name, writes in FAMILIES.items()} == {*FAMILY_FILES}
    assert len(FAMILY_FILES) >= 25
    found = MARKS.search(DOCS.read_text("utf-8"))
    assert found[0] == f"{found[1]}{rendered_table()}{found[2]}", "run python tests/support/conversation_table.py"
