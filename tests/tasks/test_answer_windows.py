"""Windows with the ends of answers, tags at the first tokens of words, and texts with masked words."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.variants import EXTRACTIVE_QA, MASKED, TOKEN_CLASSIFY
from transformers import AutoTokenizer

from llmtune.data.collators import IGNORED
from llmtune.errors import EnvironmentProblem
from llmtune.recipe.schema import Recipe
from llmtune.tasks import qa
from llmtune.tasks.qa import find_span
from llmtune.tasks.token_classify import tag_names, tokenize_words

ENCODERS = ("bert", "roberta", "deberta", "modernbert")
CONTEXT = " ".join(f"The house number {n} has a {c} door." for n, c in enumerate(("red", "blue", "green") * 8))
SECTION = {"qa": "qa", "token-classify": "token_classify", "completion": "completion"}


@pytest.fixture(scope="module")
def tokenizers(built):
    """`tokenizers("bert")`: the tokenizer of a tiny model, loaded from its folder."""
    return cache(lambda family: AutoTokenizer.from_pretrained(built(family)))


def recipe(task, max_length=64, on_overlong="error", **section):
    content = {"task": task, "seed": 3, "model": {"name": "tiny"}}
    content["data"] = {"train": "rows.jsonl", "max_length": max_length, "on_overlong": on_overlong}
    content[SECTION[task]] = section or None
    return Recipe.model_validate(content)


def ask(question, context, *answers):
    found = [{"text": text, "start": context.index(text)} for text in answers]
    return {"question": question, "context": context, "answers": found}


def windows_of(row, tokenizer, about):
    windows = qa.windows_of(row, tokenizer, about)
    assert not isinstance(windows, str)
    return windows


def said(window, first, last, context):
    return context[window.characters[first][0] : window.characters[last][1]]


# Answers


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("answer", ["house number 0", "1 has a blue", "green", "number 23 has a green door.", "The"])
def test_an_answer_is_found_only_in_windows_that_contain_it_completely(tokenizers, family, answer):
    tokenizer, about = tokenizers(family), recipe("qa", 72, stride=24)
    row = ask("Which door?", CONTEXT, answer)
    (examples,) = EXTRACTIVE_QA.encode([row], tokenizer, about)
    windows = windows_of(row, tokenizer, about)
    assert len(examples) == len(windows) > 4
    start = row["answers"][0]["start"]
    held = 0
    for example, window in zip(examples, windows, strict=True):
        places = [place for place in window.characters if place]
        whole = places[0][0] <= start and start + len(answer) <= places[-1][1]
        if whole:
            held += 1
            assert said(window, *example.answer, CONTEXT) == answer
        else:
            assert example.answer == [window.null, window.null]
        assert len(window.ids) <= 72
        assert example.counted == 1
    assert held >= 1


@pytest.mark.parametrize("family", ENCODERS)
def test_windows_overlap_by_the_stride_and_cover_every_letter(tokenizers, family):
    tokenizer, about = tokenizers(family), recipe("qa", 72, stride=24)
    windows = windows_of(ask("Which door?", CONTEXT), tokenizer, about)
    reach = 0
    for window, following in zip(windows, [*windows[1:], None], strict=True):
        places = [place for place in window.characters if place]
        assert CONTEXT[reach : places[0][0]].strip() == "" or places[0][0] < reach
        reach = places[-1][1]
        if following:
            shared = sum(place in places for place in following.characters if place)
            assert shared == 24
    assert reach == len(CONTEXT)
    assert [window.opens for window in windows] == [True, *[False] * (len(windows) - 1)]
    assert [window.closes for window in windows] == [*[False] * (len(windows) - 1), True]


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize(
    ("context", "answer"),
    [
        ("  The sky is  blue ", "blue"),
        ("The sky is blue and red", " blue "),  # SQuAD answers sometimes have spaces around them
        ("Größe: naïve Straße 5 (rue)", "naïve Straße"),
        ("a 🦊 fox", "🦊"),
        ("one\ttwo\n\nthree", "two\n\nthree"),
        ("the (10) cats", "10"),
    ],
)
def test_the_position_of_an_answer_is_exact_to_the_letter(tokenizers, family, context, answer):
    tokenizer, about = tokenizers(family), recipe("qa", stride=4)
    row = ask("which?", context, answer)
    ((example,),) = EXTRACTIVE_QA.encode([row], tokenizer, about)
    (window,) = windows_of(row, tokenizer, about)
    assert said(window, *example.answer, context) == answer.strip()


@pytest.mark.parametrize("family", ENCODERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_stretch_of_words_comes_back_from_its_tokens(tokenizers, family, data):
    words = data.draw(st.lists(st.sampled_from(["red", "The", "été", "x1", "(a)", "cats'", "10.5", "ß"]), min_size=1))
    gaps = data.draw(st.lists(st.sampled_from([" ", "  ", "\n"]), min_size=len(words), max_size=len(words)))
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, len(words) - 1))
    context, starts = "", []
    for gap, word in zip(gaps, words, strict=True):
        starts.append(len(context) + len(gap))
        context += gap + word
    answer = context[starts[first] : starts[last] + len(words[last])]
    row = {"question": "which?", "context": context, "answers": [{"text": answer, "start": starts[first]}]}
    tokenizer, about = tokenizers(family), recipe("qa", 256, stride=8)
    ((example,),) = EXTRACTIVE_QA.encode([row], tokenizer, about)
    (window,) = windows_of(row, tokenizer, about)
    assert said(window, *example.answer, context) == answer


@pytest.mark.parametrize("family", ENCODERS)
def test_a_question_without_an_answer_points_at_the_first_token_in_every_window(tokenizers, family):
    tokenizer = tokenizers(family)
    (examples,) = EXTRACTIVE_QA.encode([ask("Why?", CONTEXT)], tokenizer, recipe("qa", 72, stride=24))
    assert len(examples) > 4
    for example in examples:
        assert example.answer == [0, 0]
        assert example.input_ids[0] == tokenizer.cls_token_id


def test_letters_that_the_tokenizer_drops_do_not_hide_an_answer(tokenizers):
    """BERT's tokenizer drops layout controls; an answer may begin or end with one."""
    tokenizer, about = tokenizers("bert"), recipe("qa", stride=4)
    answer = "\N{ZERO WIDTH SPACE}blue\N{ZERO WIDTH SPACE}"
    row = ask("which?", f"red {answer} green", answer)
    ((example,),) = EXTRACTIVE_QA.encode([row], tokenizer, about)
    (window,) = windows_of(row, tokenizer, about)
    assert said(window, *example.answer, row["context"]) == "blue"
    row = ask("which?", "red \N{ZERO WIDTH SPACE} green", "\N{ZERO WIDTH SPACE}")
    assert EXTRACTIVE_QA.encode([row], tokenizer, about) == ["the tokenizer makes no token of the answer"]


def test_an_answer_longer_than_the_overlap_may_be_in_no_window(tokenizers):
    row = ask("Which door?", CONTEXT, CONTEXT[100:600])
    (reason,) = EXTRACTIVE_QA.encode([row], tokenizers("bert"), recipe("qa", 48, stride=8))
    assert reason == "no window contains the complete answer: raise qa.stride or data.max_length"


def test_long_contexts_are_dropped_on_request_and_long_questions_always(tokenizers):
    tokenizer, row = tokenizers("bert"), ask("Which door?", CONTEXT, "green")
    (reason,) = EXTRACTIVE_QA.encode([row], tokenizer, recipe("qa", 72, "drop", stride=24))
    assert reason.startswith("too long: ")
    (reason,) = EXTRACTIVE_QA.encode([ask("why " * 50, "because", "because")], tokenizer, recipe("qa", stride=24))
    assert reason.startswith("too long: the question takes")


# The search for an answer


@settings(max_examples=200, deadline=None)
@given(data=st.data(), longest=st.integers(1, 12))
def test_the_best_span_is_the_best_of_all_spans(tokenizers, data, longest):
    row = ask("Which door?", CONTEXT[: data.draw(st.integers(1, 200))] + " end")
    (window,) = windows_of(row, tokenizers("bert"), recipe("qa", 256, stride=4))
    seed = data.draw(st.integers(0, 2**30))
    generator = torch.Generator().manual_seed(seed)
    starts, ends = torch.randn(2, len(window.ids), generator=generator)
    inside = [i for i, place in enumerate(window.characters) if place is not None and place[1] > place[0]]
    pairs = [(i, j) for i in inside for j in inside if i <= j < i + longest]
    best = max(pairs, key=lambda pair: float(starts[pair[0]] + ends[pair[1]]))
    score, left, right = find_span(starts, ends, window, longest)
    assert score == float(starts[best[0]] + ends[best[1]])
    assert (left, right) == (window.characters[best[0]][0], window.characters[best[1]][1])


def test_the_question_and_special_tokens_are_never_an_answer(tokenizers):
    (window,) = windows_of(ask("Which door?", "A blue fox"), tokenizers("roberta"), recipe("qa", stride=4))
    outside = torch.tensor([50.0 if place is None else 0.0 for place in window.characters])
    outside[window.characters.index((2, 6))] = 1.0
    assert find_span(outside, outside, window, 5) == (2.0, 2, 6)
    nothing = torch.zeros(2)
    blank = type(window)([0, 1], [], [None, None], 0, True, True)
    assert find_span(nothing, nothing, blank, 5) is None


# Tags


WORDS = ["Ada", "Lovelace", "'s", "naïve", "🦊", "Straße-5", "unbelievably", "(", "x"]


@pytest.mark.parametrize("family", ENCODERS)
def test_each_word_is_mapped_to_its_first_token(tokenizers, family):
    tokenizer = tokenizers(family)
    ((ids, places),) = tokenize_words([WORDS], tokenizer)
    assert ids == tokenizer(" ".join(WORDS))["input_ids"]
    assert places == sorted(set(places))
    offsets = tokenizer(" ".join(WORDS), return_offsets_mapping=True)["offset_mapping"]
    at = 0
    for word, place in zip(WORDS, places, strict=True):
        assert offsets[place][0] in (at, at - 1)  # byte-level tokens include the space
        assert offsets[place - 1][1] <= at
        at += len(word) + 1


@pytest.mark.parametrize("family", ENCODERS)
@settings(max_examples=40, deadline=None)
@given(words=st.lists(st.text("abcXYZ019'-.,éß(", min_size=1, max_size=12), min_size=1, max_size=12))
def test_words_have_increasing_positions(tokenizers, family, words):
    ((ids, places),) = tokenize_words([words], tokenizers(family))
    assert None not in places
    assert places == sorted(set(places))
    assert places[0] > 0
    assert places[-1] < len(ids) - 1


@pytest.mark.parametrize("family", ENCODERS)
def test_a_tag_is_at_its_words_first_token_and_the_others_are_ignored(tokenizers, family):
    tokenizer = tokenizers(family)
    about = recipe("token-classify", labels=["PERSON", "PLACE"])
    row = {"tokens": ["Ada", "Lovelace", "in", "London"], "tags": ["B-PERSON", "I-PERSON", "O", "B-PLACE"]}
    ((example,),) = TOKEN_CLASSIFY.encode([row], tokenizer, about)
    assert [tag for tag in example.tag_ids if tag != IGNORED] == [1, 2, 0, 3]
    assert example.counted == 4
    assert len(example.tag_ids) == len(example.input_ids)
    ((_, places),) = tokenize_words([row["tokens"]], tokenizer)
    assert [example.tag_ids[place] for place in places] == [1, 2, 0, 3]
    assert tag_names(["PERSON", "PLACE"]) == ["O", "B-PERSON", "I-PERSON", "B-PLACE", "I-PLACE"]


def test_untaggable_rows_give_a_reason(tokenizers):
    tokenizer, about = tokenizers("bert"), recipe("token-classify", 8, labels=["A"])
    rows = [
        {"tokens": ["x", "y"], "tags": ["B-B", "O"]},
        {"tokens": ["x", "\N{ZERO WIDTH SPACE}", "y"], "tags": ["O", "B-A", "O"]},
        {"tokens": ["x"] * 20, "tags": ["O"] * 20},
    ]
    unknown, dropped, long = TOKEN_CLASSIFY.encode(rows, tokenizer, about)
    assert unknown == "label unknown: 'B-B' is none of O, B-A, I-A"
    assert dropped == "the tokenizer makes no token of the word '\\u200b'"
    assert long == "too long: 22 tokens, data.max_length is 8"


# Masked words


def text(words):
    return {"prompt": "", "completion": words}


LONG = " ".join(["The sky is blue and the quick brown fox jumps over the lazy dog."] * 10)


@pytest.mark.parametrize("family", ENCODERS)
def test_special_tokens_are_never_masked_and_the_share_follows_the_recipe(tokenizers, family):
    tokenizer, about = tokenizers(family), recipe("completion", 256, objective="masked", mask_probability=0.3)
    ((example,),) = MASKED.encode([text(LONG)], tokenizer, about)
    words = len(example.input_ids) - 2
    assert example.supervised == round(0.3 * words)
    collate = MASKED.collator(tokenizer, about)
    for draw in range(5):
        batch = collate([example], draw)
        assert len(set(batch["predict_S"].tolist())) == example.supervised
        assert 0 not in batch["predict_S"]
        assert len(example.input_ids) - 1 not in batch["predict_S"]
        assert batch["targets_S"].tolist() == [example.input_ids[i] for i in batch["predict_S"].tolist()]
        unchanged = [i for i in range(len(example.input_ids)) if i not in set(batch["predict_S"].tolist())]
        assert batch["input_ids"][0, unchanged].tolist() == [example.input_ids[i] for i in unchanged]


def test_masks_depend_only_on_text_seed_and_draw(tokenizers):
    tokenizer, about = tokenizers("bert"), recipe("completion", 256, objective="masked")
    ((one,), (two,)) = MASKED.encode([text(LONG), text("A fox and a dog, and a cat.")], tokenizer, about)
    collate = MASKED.collator(tokenizer, about)

    def look(batch, row):
        return batch["input_ids"][row][batch["attention_mask"][row] > 0].tolist()

    assert look(collate([one], 4), 0) == look(collate([two, one], 4), 1)
    assert look(collate([one], 4), 0) == look(MASKED.collator(tokenizer, about)([one], 4), 0)
    assert len({tuple(look(collate([one], draw), 0)) for draw in range(6)}) == 6
    other = MASKED.collator(tokenizer, about.model_copy(update={"seed": 4}))
    assert look(collate([one], 4), 0) != look(other([one], 4), 0)


def test_masked_tokens_are_eighty_percent_masks_ten_random_and_ten_unchanged(tokenizers):
    tokenizer, about = tokenizers("roberta"), recipe("completion", 256, objective="masked", mask_probability=0.5)
    ((example,),) = MASKED.encode([text(LONG)], tokenizer, about)
    collate = MASKED.collator(tokenizer, about)
    masked = kept = changed = 0
    for draw in range(200):
        batch = collate([example], draw)
        shown = batch["input_ids"].flatten()[batch["predict_S"]]
        masked += int((shown == tokenizer.mask_token_id).sum())
        kept += int((shown == batch["targets_S"]).sum())
        changed += int(((shown != tokenizer.mask_token_id) & (shown != batch["targets_S"])).sum())
    total = 200 * example.supervised
    assert total > 10_000
    assert masked / total == pytest.approx(0.8, abs=0.02)
    assert kept / total == pytest.approx(0.1, abs=0.02)
    assert changed / total == pytest.approx(0.1, abs=0.02)


def test_long_texts_are_split_cut_dropped_or_refused(tokenizers):
    tokenizer = tokenizers("bert")

    def encode(how):
        (found,) = MASKED.encode([text(LONG)], tokenizer, recipe("completion", 64, how, objective="masked"))
        return found

    parts, whole = encode("split"), tokenizer(LONG)["input_ids"]
    assert [token for part in parts for token in part.input_ids[1:-1]] == whole[1:-1]
    assert all(len(part.input_ids) <= 64 for part in parts)
    assert [part.input_ids for part in encode("truncate")] == [parts[0].input_ids]
    assert encode("drop") == encode("error") == f"too long: {len(whole)} tokens, data.max_length is 64"


def test_a_text_keeps_at_least_one_visible_and_one_masked_token(tokenizers):
    tokenizer = tokenizers("bert")
    about = recipe("completion", objective="masked", mask_probability=0.99)
    (one, (two,)) = MASKED.encode([text("fox"), text("fox dog")], tokenizer, about)
    assert one.startswith("nothing to learn")
    assert two.supervised == 1


def test_a_tokenizer_without_a_mask_token_is_refused(tokenizers):
    about = recipe("completion", objective="masked")
    with pytest.raises(EnvironmentProblem, match="has no mask token"):
        MASKED.encode([text("fox")], tokenizers("t5"), about)
