"""Long conversations under `data.on_overlong`: the same parts as a search one exchange at a time, with less work."""

import random
from itertools import chain

import pytest
from support.encoding import encode
from support.templates import CHATML, FAMILY_FILES, THINKING, family_tokenizer, recipe_for, tokenizer_with

from llmtune.data import chat_encoding
from llmtune.data.chat_encoding import encode_chat
from llmtune.data.chat_template import ChatTemplate
from llmtune.data.overlong import ChatFit

NUMBERED = CHATML.replace("message['role'] + '\\n'", "message['role'] + ' of turn ' ~ loop.index ~ '\\n'")
MERGED = (
    "{% set before = namespace(text='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set before.text = message['content'] + '\n\n' %}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + before.text + message['content'] + '<|im_end|>\n' }}"
    "{% set before.text = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COUNTING = CHATML.replace("message['content']", "message['content'] ~ (' So:' if messages|length == 6 else '')")
LATE = CHATML.replace("message['content']", "(message['content'] ~ (' Well.' if messages|length > 29 else ''))")
TRIMMING = CHATML.replace("message['content']", "(message['content'] if loop.last else message['content'] | trim)")
QUICK = ("gemma-3", "llama-2", "qwen-3")
OWN = {"numbered": NUMBERED, "merged": MERGED, "thinking": THINKING}
WORDS = ["cat", "the quick brown fox", "Ä", "1234567", "jumps", "over\n\nthe", "lazy.", "dog's", "of", "it"]


def words(draw, most=12):
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))


def random_row(draw, system=True, thoughts=False):
    """Up to nine exchanges; some answers are not trained, some have a thought, some questions have two messages."""
    messages = [{"role": "system", "content": words(draw)}] if system and draw.random() < 0.5 else []
    for _ in range(draw.randint(1, 9)):
        messages.append({"role": "user", "content": words(draw, draw.choice([4, 12, 40]))})
        answer = {"role": "assistant", "content": words(draw)}
        if draw.random() < 0.15:
            answer["train"] = False
        if thoughts and draw.random() < 0.5:
            answer["reasoning_content"] = words(draw, 30)
        messages.append(answer)
    if draw.random() < 0.1:
        messages.append({"role": "user", "content": words(draw)})
    return {"messages": messages}


def exchanges_of(row):
    system = [message for message in row["messages"] if message["role"] == "system"]
    rest = row["messages"][len(system) :]
    starts = [i for i, message in enumerate(rest) if message["role"] == "user"]
    return system, [rest[start:end] for start, end in zip(starts, [*starts[1:], len(rest)], strict=True)]


def one_by_one(row, tokenizer, max_length, on_overlong, **data):
    """The exchanges to keep, found by encoding one exchange less (or more) at a time: ids and spans, or None."""

    def look(messages):
        return encode({"messages": [*messages]}, tokenizer, max_length=100_000, **data)

    def fits(examples):
        return max(len(example.input_ids) for example in examples) <= max_length

    whole = look(row["messages"])
    if isinstance(whole, str) or fits(whole):
        return shown(whole)
    system, exchanges = exchanges_of(row)
    if on_overlong == "truncate":
        for first in range(1, len(exchanges)):
            examples = look([*system, *chain(*exchanges[first:])])
            if isinstance(examples, str) or fits(examples):
                return shown(examples)
        return "question"
    kept, first = [], 0
    while first < len(exchanges):
        best, end = [], first
        for stop in range(first + 1, len(exchanges) + 1):
            examples = look([*system, *chain(*exchanges[first:stop])])
            if isinstance(examples, str):
                if not examples.startswith("nothing to learn"):
                    return None
            elif fits(examples):
                best = examples
            else:
                break
            end = stop
        if end == first:
            return None
        kept, first = [*kept, *best], end
    return shown(kept or "nothing to learn")


def shown(examples):
    return None if isinstance(examples, str) else [(list(e.input_ids), list(e.spans)) for e in examples]


@pytest.mark.parametrize("on_overlong", ["truncate", "split"])
@pytest.mark.parametrize(
    "family",
    [*OWN, *(name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILY_FILES)],
)
def test_the_kept_exchanges_match_a_search_one_by_one(family, on_overlong):
    tokenizer = tokenizer_with(OWN[family]) if family in OWN else family_tokenizer(family)
    draw = random.Random(f"{family} {on_overlong}")
    lengths = []
    for thoughts in (True, False):  # not every template accepts thoughts
        rows = [random_row(draw, thoughts=thoughts) for _ in range(8)]
        encoded = encode_chat(rows, tokenizer, recipe_for(max_length=100_000))
        lengths = [max(len(example.input_ids) for example in one) for one in encoded if not isinstance(one, str)]
        if len(lengths) > 2:
            break
    assert len(lengths) > 2
    for part in (0.3, 0.7):
        max_length = int(part * max(lengths))
        keys = {"max_length": max_length, "on_overlong": on_overlong}
        found = encode_chat(rows, tokenizer, recipe_for(**keys))
        for row, result in zip(rows, found, strict=True):
            wanted = one_by_one(row, tokenizer, max_length, on_overlong)
            if wanted != "question":
                assert shown(result) == wanted
            elif not isinstance(result, str):
                assert len(result[-1].input_ids) <= max_length


@pytest.mark.parametrize("on_overlong", ["truncate", "split"])
@pytest.mark.parametrize("train_on", ["last", "all"])
def test_the_supervised_spans_match_a_search_one_by_one(train_on, on_overlong):
    tokenizer, draw = tokenizer_with(CHATML), random.Random(1)
    rows = [random_row(draw) for _ in range(20)]
    for row in rows if train_on == "last" else []:
        for message in row["messages"]:
            message.pop("train", None)
    keys = {"max_length": 100, "on_overlong": on_overlong, "train_on": train_on}
    for row, result in zip(rows, encode_chat(rows, tokenizer, recipe_for(**keys)), strict=True):
        last = max(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        alone = {"messages": [m if i == last else {**m, "train": False} for i, m in enumerate(row["messages"])]}
        asked, how = (alone, {}) if train_on == "last" else (row, {"train_on": train_on})
        wanted = one_by_one(asked, tokenizer, 100, on_overlong, **how)
        if wanted != "question":
            assert shown(result) == wanted


@pytest.mark.parametrize("on_overlong", ["truncate", "split"])
@pytest.mark.parametrize("family", ["chatml", "llama-3", "gemma-3", "qwen-3", "deepseek-r1"])
def test_a_long_conversation_is_encoded_only_twice_per_part(family, on_overlong, monkeypatch):
    draw, asked = random.Random(0), []
    messages = [{"role": role, "content": words(draw, 30)} for _ in range(60) for role in ("user", "assistant")]
    fit = ChatFit.fit

    def counted(self, rows, encoded):
        def encode_rows(shorter):
            asked.extend(shorter)
            return self.encode(shorter)

        return fit(type(self)(**{**vars(self), "encode": encode_rows}), rows, encoded)

    monkeypatch.setattr(ChatFit, "fit", counted)
    examples = encode({"messages": messages}, family_tokenizer(family), max_length=512, on_overlong=on_overlong)
    assert not isinstance(examples, str)
    parts = 1 if on_overlong == "truncate" else len(examples)
    assert parts > 4 or on_overlong == "truncate"
    assert len(asked) <= 2 * parts + 2
    assert sum(len(row["messages"]) for row in asked) <= 3 * len(messages)


def long_row(draw, exchanges, tools=(), thoughts=False):
    """Many exchanges; with tools, some call one (or three) before the answer."""
    messages = [{"role": "system", "content": words(draw)}]
    for number in range(exchanges):
        messages.append({"role": "user", "content": words(draw)})
        for call in range(draw.choice([0, 1, 3]) if tools else 0):
            function = {"name": "look_up", "arguments": {"word": words(draw, 2)}}
            made = {"id": f"call{number:04}{call}", "type": "function", "function": function}
            messages.append({"role": "assistant", "content": "", "tool_calls": [made]})
            messages.append({"role": "tool", "content": words(draw), "tool_call_id": made["id"], "name": "look_up"})
        answer = {"role": "assistant", "content": words(draw) + draw.choice(["", " \n"])}
        thinks = {"reasoning_content": words(draw)} if thoughts and draw.random() < 0.5 else {}
        messages.append({**answer, **thinks, "train": draw.random() < 0.8})
    return {"messages": messages, **({"tools": list(tools)} if tools else {})}


LOOK_UP = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}
ODD = {**OWN, "counting": COUNTING, "late": LATE, "trimming": TRIMMING}


@pytest.mark.parametrize("family", [*ODD, *FAMILY_FILES])
def test_spans_of_a_long_conversation_match_rendering_each_answer_after_its_history(family, monkeypatch):
    tokenizer = tokenizer_with(ODD[family]) if family in ODD else family_tokenizer(family)
    draw = random.Random(family)
    rows = [long_row(draw, 16, tools, thoughts) for tools in ((), (LOOK_UP,)) for thoughts in (False, True)]
    rows.append({"messages": long_row(draw, 16)["messages"][1:]})  # not every template accepts a system message
    found = encode_chat(rows, tokenizer, recipe_for(max_length=100_000))
    monkeypatch.setattr(chat_encoding, "FEW_ANSWERS", 1000)
    for result, wanted in zip(found, encode_chat(rows, tokenizer, recipe_for(max_length=100_000)), strict=True):
        assert (result if isinstance(result, str) else shown(result)) == (
            wanted if isinstance(wanted, str) else shown(wanted)
        )
    assert family == "counting" or not all(isinstance(result, str) for result in found)


@pytest.mark.parametrize("tools", [(), (LOOK_UP,)])
def test_the_work_per_message_does_not_grow_with_the_conversation(tools, monkeypatch):
    tokenizer, draw = family_tokenizer("qwen-2.5"), random.Random(0)
    written = []

    def counted(function, texts_of):
        def call(*given, **named):
            result = function(*given, **named)
            written.extend(len(text) for text in texts_of(given, result))
            return result

        return call

    monkeypatch.setattr(ChatTemplate, "render_batch", counted(ChatTemplate.render_batch, lambda _, result: result))
    borders = counted(chat_encoding.tokenize_with_borders, lambda given, _: given[1])
    monkeypatch.setattr(chat_encoding, "tokenize_with_borders", borders)
    work = {}
    for exchanges in (20, 500):
        row = long_row(draw, exchanges, tools)
        written.clear()
        assert len(encode(row, tokenizer, max_length=10**7)) == 1
        work[exchanges] = sum(written) / len(row["messages"])
    assert work[500] < 1.5 * work[20]
