"""Ids and supervised spans of conversations and completions."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.encoding import complete, encode, learned, with_start_token
from support.models import CHATML, train_tokenizer
from support.templates import (
    EMPTY_THOUGHTS,
    ENDS_TWICE,
    LLAMA2,
    MARKED,
    NO_SYSTEM,
    STABLE,
    THINKING,
    WRONGLY_MARKED,
    conversation,
    family_tokenizer,
    recipe_for,
    tokenizer_with,
)

from llmtune.data.chat_encoding import encode_chat
from llmtune.data.chat_rows import canonical_messages
from llmtune.data.chat_template import render_prompt, stop_ids
from llmtune.data.completion_encoding import prompt_ids
from llmtune.errors import EnvironmentProblem

CHAT = conversation("one two", "three", "four five", "six")


@pytest.mark.parametrize("template", [*STABLE.values(), THINKING, ENDS_TWICE])
@settings(max_examples=25, deadline=None)
@example(texts=["\0"])
@given(texts=st.lists(st.text(min_size=1, max_size=30).filter(str.strip), min_size=1, max_size=3))
def test_an_answer_is_trained_after_the_exact_ids_of_its_generation_prompt(template, texts):
    tokenizer = tokenizer_with(template)
    row = conversation(*(part for text in texts for part in ("ask", text)))
    examples = encode(row, tokenizer)
    assert not isinstance(examples, str)
    prompts = [render_prompt(row["messages"][:i], tokenizer, recipe_for()) for i in range(1, len(row["messages"]), 2)]
    seen = [example.input_ids[:start] for example in examples for start in example.spans[::2]]
    assert sorted(seen) == sorted(prompts)
    ends = {example.input_ids[end - 1] for example in examples for end in example.spans[1::2]}
    assert len(ends) == 1
    assert ends <= set(stop_ids(tokenizer, recipe_for()))


def test_thoughts_removed_later_by_the_template_give_each_answer_its_own_example():
    tokenizer = tokenizer_with(THINKING)
    row = canonical_messages(conversation("one", "<think>hm</think>two", "three", "<think>so</think>four")["messages"])
    first, second = encode(row, tokenizer)
    assert learned(first, tokenizer) == ["<think>\nhm\n</think>\n\ntwo<|im_end|>"]
    assert learned(second, tokenizer) == ["<think>\nso\n</think>\n\nfour<|im_end|>"]
    assert "hm" not in tokenizer.decode(second.input_ids)


@pytest.mark.parametrize(("kwargs", "head"), [({}, "<think>\n\n</think>\n\n"), ({"enable_thinking": False}, "")])
def test_thoughts_are_supervised_unless_the_prompt_supplies_them(kwargs, head):
    tokenizer = tokenizer_with(EMPTY_THOUGHTS)
    (examples,) = encode_chat([CHAT], tokenizer, recipe_for(kwargs=kwargs))
    texts = [text for example in examples for text in learned(example, tokenizer)]
    assert texts == [f"{head}three<|im_end|>", f"{head}six<|im_end|>"]


def test_train_on_last_supervises_only_the_last_answer():
    tokenizer = tokenizer_with(CHATML)
    (example,) = encode(CHAT, tokenizer, train_on="last")
    assert learned(example, tokenizer) == ["six<|im_end|>"]
    assert example.input_ids == encode(CHAT, tokenizer)[0].input_ids


def test_train_on_all_supervises_every_token_but_the_first():
    tokenizer = tokenizer_with(CHATML)
    (example,) = encode(CHAT, tokenizer, train_on="all")
    assert example.spans == [1, len(example.input_ids)]
    assert example.target_bytes == len("one two" + "three" + "four five" + "six")


def test_a_message_with_train_false_is_context_only():
    tokenizer = tokenizer_with(CHATML)
    row = conversation("one two", "three", "four five", "six")
    row["messages"][1]["train"] = False
    (example,) = encode(row, tokenizer)
    assert learned(example, tokenizer) == ["six<|im_end|>"]
    assert "three" in tokenizer.decode(example.input_ids)
    (example,) = encode(row, tokenizer, train_on="all")
    assert "three" not in "".join(learned(example, tokenizer))
    assert "six" in "".join(learned(example, tokenizer))
    assert example.target_bytes == len("one two" + "four five" + "six")


def test_a_greeting_before_any_question_is_context_only():
    tokenizer = tokenizer_with(CHATML)
    row = {"messages": [{"role": "assistant", "content": "hello"}, *CHAT["messages"]]}
    (example,) = encode(row, tokenizer)
    assert learned(example, tokenizer) == ["three<|im_end|>", "six<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "template", "reason"),
    [
        (conversation("one"), CHATML, "nothing to learn: no answer after a question"),
        (
            {"messages": [{"role": "assistant", "content": "hello"}]},
            CHATML,
            "nothing to learn: no answer after a question",
        ),
        (conversation("one", " "), CHATML, "an answer is empty"),
        (conversation("one", "two", system="x"), NO_SYSTEM, "the chat template refuses it: System role not supported"),
        (conversation("one", "two"), WRONGLY_MARKED, "marks are not where its answers are"),
        (
            {"messages": [{"role": "user", "content": "a"}, *CHAT["messages"]]},
            LLAMA2,
            "the chat template refuses it: Conversation roles must alternate",
        ),
    ],
)
def test_an_unusable_row_gets_a_reason(row, template, reason):
    tokenizer = tokenizer_with(template)
    good, bad = encode_chat([CHAT, row], tokenizer, recipe_for())
    assert reason in bad
    assert isinstance(good, list) or template == WRONGLY_MARKED


def test_a_row_with_train_false_on_every_answer_has_nothing_to_learn():
    row = conversation("one", "two")
    row["messages"][1]["train"] = False
    assert encode(row, tokenizer_with(CHATML)) == "nothing to learn: every answer says train: false"
    row["messages"][0]["train"] = False
    assert encode(row, tokenizer_with(CHATML), train_on="all") == "nothing to learn: every message says train: false"
    row = conversation("one", system="be kind")
    row["messages"][1]["train"] = False  # LLAMA2 writes the system message inside the question
    assert "nothing to learn" in encode(row, tokenizer_with(LLAMA2), train_on="all")


def test_marks_that_include_the_header_are_distinguished_from_the_answer():
    early = MARKED.replace("{{ '<|im_start|>' + message['role'] + '\n' }}", "", 1).replace(
        "{% generation %}", "{% generation %}{{ '<|im_start|>assistant\n' }}"
    )
    early = early.replace("{% else %}{{ message", "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message")
    assert "marks are not where its answers are" in encode(CHAT, tokenizer_with(early))


@pytest.mark.parametrize("reasoning", ["learn", "keep", "drop"])
@pytest.mark.parametrize("prompt", ["assistant\n", "assistant\n<think>\n", "assistant\n<think>"])
@pytest.mark.parametrize("content", ["message['content']", "message['content'].split('</think>')[-1]"])
def test_marks_change_nothing_whether_the_template_writes_thoughts_or_leaves_them_out(content, prompt, reasoning):
    marked = MARKED.replace("generation %}{{ message['content']", f"generation %}}{{{{ {content}").replace(
        "add_generation_prompt %}{{ '<|im_start|>assistant\n'", f"add_generation_prompt %}}{{{{ '<|im_start|>{prompt}'"
    )
    plain = marked.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    for answer in ("two", "<think>many words before the answer</think>two"):
        row = canonical_messages([*conversation("one", answer)["messages"], *conversation("three", answer)["messages"]])
        with_marks, without = (encode(row, tokenizer_with(one), reasoning=reasoning) for one in (marked, plain))
        assert with_marks == without
        assert not isinstance(without, str)


def test_an_answer_whose_first_token_would_merge_with_the_prompt_is_encoded_separately():
    tokenizer = tokenizer_with(CHATML.replace("assistant\n' }}", "assistant\nsk' }}"))
    with pytest.raises(EnvironmentProblem, match="cannot be split"):
        encode(CHAT, tokenizer)
    tokenizer = tokenizer_with(CHATML.replace("'\n' + message['content']", "'\ns' + message['content']"))
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n' }}", "assistant\ns' }}")
    row = conversation("one", "ky is blue", "two", "ix")
    examples = encode(row, tokenizer)
    prompts = [render_prompt(row["messages"][:i], tokenizer, recipe_for()) for i in (1, 3)]
    assert tokenizer("sky", add_special_tokens=False)["input_ids"] != tokenizer(["s", "ky"])["input_ids"]
    seen = [example.input_ids[:start] for example in examples for start in example.spans[::2]]
    assert sorted(seen) == sorted(prompts)
    assert sorted(text for example in examples for text in learned(example, tokenizer)) == [
        "ix<|im_end|>",
        "ky is blue<|im_end|>",
    ]


def test_thoughts_are_supervised_kept_or_dropped_by_recipe_or_row():
    tokenizer = family_tokenizer("qwen-3.5")
    row = canonical_messages(conversation("one", "<think>hm</think>two")["messages"])
    (learns,), (keeps,), (drops,) = (encode(row, tokenizer, reasoning=how) for how in ("learn", "keep", "drop"))
    assert learned(learns, tokenizer) == ["hm\n</think>\n\ntwo<|im_end|>"]
    assert learned(keeps, tokenizer) == ["two<|im_end|>"]
    assert keeps.input_ids == learns.input_ids
    assert learned(drops, tokenizer) == ["\n</think>\n\ntwo<|im_end|>"]
    (kept,) = encode({**row, "train_reasoning": "keep"}, tokenizer)
    assert kept == keeps


def test_a_row_that_the_template_renders_incompletely_names_the_loss():
    lost = encode(conversation("one", "so </think> two"), family_tokenizer("deepseek-v3"))
    assert "leaves out or changes the text of message 2" in lost
    once = "{% set said = message['content'] if loop.first or message['content'] != messages[0]['content'] else '' %}"
    tokenizer = tokenizer_with(CHATML.replace("%}", "%}" + once, 1).replace("+ message['content']", "+ said"))
    assert "leaves out one of 2 messages that say 'yes'" in encode(conversation("yes", "a", "yes", "b"), tokenizer)
    assert isinstance(encode(conversation("yes", "a", "no", "b"), tokenizer), list)


def test_a_lost_message_is_detected_even_if_a_longer_one_contains_it():
    late = "{% set said = '' if loop.first and messages|length > 4 else message['content'] %}"
    tokenizer = tokenizer_with(CHATML.replace("%}", "%}" + late, 1).replace("+ message['content']", "+ said"))
    says = "yes", "a", "no", "b", "yes, please", "c"
    assert "leaves out one of 2 messages that say 'yes'" in encode(conversation(*says), tokenizer)
    assert isinstance(encode(conversation(*says[:4]), tokenizer), list)


# Completion


def test_a_completion_is_supervised_with_its_end_but_not_its_prompt():
    tokenizer = train_tokenizer(None)
    (example,) = complete("The sky is", " blue.", tokenizer)
    assert learned(example, tokenizer) == [" blue.<|endoftext|>"]
    assert example.input_ids[: example.spans[0]] == prompt_ids("The sky is", tokenizer)
    assert example.target_bytes == len(" blue.")


@pytest.mark.parametrize("start", [False, True])
@settings(max_examples=50, deadline=None)
@given(prompt=st.text(max_size=20), completion=st.text(min_size=1, max_size=20).filter(str.strip))
def test_a_completion_follows_the_exact_ids_of_its_generation_prompt(start, prompt, completion):
    tokenizer = train_tokenizer(None)
    tokenizer = with_start_token(tokenizer) if start else tokenizer
    result = complete(prompt, completion, tokenizer)
    if not prompt and not start and (len(completion) == 1 or len(tokenizer(completion)["input_ids"]) == 1):
        assert result == "nothing to learn: the text is a single token or character"
        return
    (example,) = result
    assert example.input_ids[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(example.input_ids, skip_special_tokens=True)
    assert text == prompt + completion
    if prompt:
        assert example.input_ids[: example.spans[0]] == prompt_ids(prompt, tokenizer)
        assert example.target_bytes == len(completion.encode())
    else:
        assert example.spans == [1, len(example.input_ids)]


def test_plain_text_is_supervised_from_its_second_token_or_after_a_start_token():
    tokenizer = train_tokenizer(None)
    (example,) = complete("", "The quick brown fox", tokenizer)
    assert learned(example, tokenizer) == [" quick brown fox<|endoftext|>"]
    assert example.target_bytes == len(" quick brown fox")
    tokenizer = with_start_token(train_tokenizer(CHATML))
    (example,) = complete("", "The quick brown fox", tokenizer)
    assert example.input_ids[0] == tokenizer.bos_token_id
    assert learned(example, tokenizer) == ["The quick brown fox<|im_end|>"]
    assert example.target_bytes == len("The quick brown fox")


def test_start_and_end_tokens_in_the_text_are_not_doubled():
    tokenizer = with_start_token(train_tokenizer(CHATML))
    (example,) = complete("", "<|endoftext|>one two<|im_end|>", tokenizer)
    assert tokenizer.decode(example.input_ids) == "<|endoftext|>one two<|im_end|>"


def test_an_empty_prompt_is_generated_from_the_start_token():
    assert prompt_ids("", train_tokenizer(CHATML)) == [0]


@pytest.mark.parametrize(("prompt", "reason"), [("a", "the completion is empty"), ("", "the text is empty")])
def test_an_empty_completion_gives_a_reason(prompt, reason):
    assert complete(prompt, " \n", train_tokenizer(None)) == reason


# A tokenizer without offsets, and one that puts a space before every text


def byte_tokenizer():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "</s>").replace("<|im_start|>", "# ")
    assert not tokenizer.is_fast
    return tokenizer


def test_a_tokenizer_without_offsets_finds_the_same_turns():
    tokenizer = byte_tokenizer()
    (example,) = encode(CHAT, tokenizer)
    assert learned(example, tokenizer) == ["three</s>", "six</s>"]


def test_a_tokenizer_without_offsets_counts_each_byte_once():
    tokenizer = byte_tokenizer()
    text = "héllo wörld " * 5
    (whole,) = complete("say: ", text, tokenizer)
    windows = complete("say: ", text, tokenizer, max_length=12, on_overlong="split")
    assert whole.target_bytes == sum(window.target_bytes for window in windows) == len(text.encode())
    (cut,) = encode(conversation("one " * 40, "two"), tokenizer, max_length=60, on_overlong="truncate")
    assert len(cut.input_ids) == 60


def spaced_tokenizer():
    """A tokenizer like SentencePiece's: one word per segment, with a space before the first."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = sorted({*"▁abcdefghijklmnopqrstuvwxyz0123456789.,:?[]/INSTO\n "})
    pieces = ["<unk>", "<s>", "</s>", *characters, "▁o", "ne", "▁one", "tw", "two", "▁two"]
    merges = [("▁", "o"), ("n", "e"), ("▁o", "ne"), ("t", "w"), ("tw", "o"), ("▁", "two")]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = LLAMA2
    return fast


def test_a_tokenizer_that_prepends_a_space_trains_on_the_generated_ids():
    tokenizer = spaced_tokenizer()
    row = conversation("one", "two", "what", "one two")
    (example,) = encode(row, tokenizer)
    assert example.input_ids == tokenizer.apply_chat_template(row["messages"])["input_ids"]
    prompts = [render_prompt(row["messages"][:i], tokenizer, recipe_for()) for i in (1, 3)]
    assert [example.input_ids[:start] for start in example.spans[::2]] == prompts
    assert [text.split() for text in learned(example, tokenizer)] == [["two", "</s>"], ["one", "two", "</s>"]]


@pytest.mark.parametrize(
    ("prompt", "completion"), [("what ", "two"), ("what", " two"), ("what t", "wo"), ("what\n", "two")]
)
def test_no_space_comes_between_a_prompt_and_its_completion(prompt, completion):
    tokenizer = with_start_token(spaced_tokenizer())
    (example,) = complete(prompt, completion, tokenizer)
    assert example.input_ids[: example.spans[0]] == prompt_ids(prompt, tokenizer)
    assert tokenizer.decode(example.input_ids[1:-1]) == prompt + completion


# Rows encoded in batches, compared with rows encoded alone

TOOL = {"type": "function", "function": {"name": "sum", "parameters": {}}}
SAID = st.one_of(
    st.text(min_size=1, max_size=25),
    st.sampled_from(
        ["two<|im_end|>", "<|im_start|>user\nhi", " sky", "ky is blue\n", "<think>hm</think>so", "1 2", "家"]
    ),
)


@st.composite
def chats(draw):
    texts = draw(st.lists(SAID, min_size=1, max_size=5))
    row = conversation(*texts, system=draw(st.sampled_from([None, None, "be kind", ""])))
    if draw(st.integers(0, 9)) == 0:
        row["tools"] = [TOOL]
    if draw(st.integers(0, 9)) == 0:
        row["messages"][-1]["train"] = False
    if draw(st.integers(0, 9)) == 0:
        row["messages"][-1]["name"] = "Ada"
    return row


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("template", [*STABLE.values(), THINKING, EMPTY_THOUGHTS, ENDS_TWICE])
@settings(max_examples=6, deadline=None)
@given(rows=st.lists(chats(), min_size=16, max_size=20))
def test_rows_encoded_together_equal_those_encoded_one_by_one(template, train_on, rows):
    tokenizer, recipe = tokenizer_with(template), recipe_for(train_on=train_on)
    assert encode_chat(rows, tokenizer, recipe) == [encode_chat([row], tokenizer, recipe)[0] for row in rows]


@pytest.mark.parametrize("make", [byte_tokenizer, spaced_tokenizer])
def test_other_tokenizers_encode_rows_together_as_one_by_one(make):
    tokenizer = make()
    rows = [conversation(f"one {k}", "two", f"what {k}", f"one {'two ' * k}") for k in range(20)]
    assert encode_chat(rows, tokenizer, recipe_for()) == [encode(row, tokenizer) for row in rows]


@pytest.mark.slow
def test_the_packaged_tokenizer_encodes_rows_together_as_one_by_one():
    from rich.console import Console

    from llmtune.model.processor import load_processor
    from llmtune.model.resolve import resolve_model

    recipe = recipe_for(max_length=8192)
    place = resolve_model("builtin:smollm2-135m-instruct", recipe.model, Console(stderr=True), True)
    tokenizer = load_processor(place, recipe.model)
    rows = [conversation(f"Say {k}:\n\nthe LORD's {k**3} ways", f"“Yes” – {k}½ … it's\n\n{k}") for k in range(300)]
    assert encode_chat(rows, tokenizer, recipe) == [encode_chat([row], tokenizer, recipe)[0] for row in rows]
