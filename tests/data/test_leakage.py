"""Training rows that repeat the input of a held-out row, for every task; and rows that look alike but are not."""

import random

import pytest
from support.rows import prepare, write_jsonl

from llmtune.data.contamination import find_overlap
from llmtune.data.row_text import plain_form

ALPHABET = [f"{a}{b}{c}" for a in ("ka", "lo", "mi", "tu") for b in ("ra", "to", "ne") for c in ("s", "n", "ly")]
PAIR = {"passage": "The passage that answers it."}


def words(seed: str, count: int) -> str:
    return " ".join(random.Random(seed).choices(ALPHABET, k=count))


def asked(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


INPUTS = {
    "chat": lambda text, n: asked(text, f"answer {n}"),
    "reinforce": lambda text, n: asked(text, f"answer {n}"),
    "completion": lambda text, n: {"prompt": text, "completion": f" answer {n}"},
    "translate": lambda text, n: {"source": text, "target": f"Antwort {n}"},
    "summarize": lambda text, n: {"document": text, "summary": f"summary {n}"},
    "qa": lambda text, n: {"question": text, "context": "Ada wrote it in 1843.", "answer": ("Ada", "1843")[n % 2]},
    "classify": lambda text, n: {"text": text, "label": "ab"[n % 2]},
    "token-classify": lambda text, n: {"tokens": text.split(), "tags": [("O", "B-X")[n % 2]] * len(text.split())},
    "preference": lambda text, n: {"prompt": text, "chosen": f"good {n}", "rejected": f"bad {n}"},
    "embed": lambda text, n: {"query": text, "passage": f"passage {n}"},
    "rerank": lambda text, n: {"query": text, "passage": f"passage {n}", "relevance": n % 2},
}
"""By task, a row with this input and an answer by number."""
QUESTION = "How do I reset the password"
SPELLINGS = {
    "question mark": "How do I reset the password?",
    "case": "how do i RESET the password",
    "zero width": "How do I re\u200bset the pass\u00adword\ufeff",
    "Markdown": "**How** do I _reset_ the `password`",
    "quote": "> How do I reset the password",
    "spaces": "How  do I\u00a0reset the\npassword.",
    "width": "Ｈow do I reset the password",
}


def split(tmp_path, task, train, test, **data):
    for name, rows in (("train", train), ("test", test)):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    return prepare(tmp_path, "train.jsonl", task, test="test.jsonl", **{"deduplicate": "near", **data})


def others(make):
    return [make(words(f"other {n}", 8), n) for n in range(6)]


@pytest.mark.promise(
    "rows", "leakage", by="task", equal="the same input is dropped from train in seven spellings, or counted"
)
@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("task", INPUTS)
def test_a_training_row_with_the_input_of_a_test_row_is_dropped_in_any_spelling(tmp_path, task, spelling):
    make = INPUTS[task]
    rows = split(tmp_path, task, [make(spelling, 1), *others(make)], [make(QUESTION, 0)])
    assert (rows.counts["train"], rows.dropped) == (6, {"near a test row": 1})
    kept = split(tmp_path, task, [make(spelling, 1), *others(make)], [make(QUESTION, 0)], deduplicate="exact")
    assert find_overlap(kept, near=True).rows == {0}, "counted if it is not dropped"


@pytest.mark.promise(
    "rows", "leakage by a word", by="task", equal="an input one word away is dropped from train, or counted"
)
@pytest.mark.parametrize(
    "other", ["How do I reset the old password", "How do I reset password", "How do I resets the password"]
)
@pytest.mark.parametrize("task", INPUTS)
def test_a_short_training_input_one_word_from_a_test_input_is_dropped(tmp_path, task, other):
    make = INPUTS[task]
    rows = split(tmp_path, task, [make(other, 0), *others(make)], [make(QUESTION, 0)])
    assert (rows.counts["train"], rows.dropped) == (6, {"near a test row": 1})
    kept = split(tmp_path, task, [make(other, 0), *others(make)], [make(QUESTION, 0)], deduplicate="exact")
    assert find_overlap(kept, near=True).rows == {0}, "counted if it is not dropped"


@pytest.mark.parametrize("task", INPUTS)
def test_a_long_training_input_near_a_test_input_is_dropped_whatever_its_answer(tmp_path, task):
    make, long = INPUTS[task], words("long", 90)
    changed = long.replace(long.split()[40], "other", 1)
    number = 0 if task in ("classify", "token-classify") else 1
    rows = split(tmp_path, task, [make(changed, number), *others(make)], [make(long, 0)])
    assert rows.dropped == {"near a test row": 1}


@pytest.mark.parametrize("task", INPUTS)
def test_a_validation_row_with_the_input_of_a_test_row_is_dropped(tmp_path, task):
    make = INPUTS[task]
    write_jsonl(tmp_path / "validation.jsonl", [make(SPELLINGS["case"], 1), *others(make)[:1]])
    rows = split(tmp_path, task, others(make)[1:], [make(QUESTION, 0)], validation="validation.jsonl")
    assert rows.counts == {"train": 5, "validation": 1, "test": 1}
    assert rows.dropped == {"near a test row": 1}


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("What is 2 + 3", "What is 2 - 3"),
        ("What is 12 * 3 in total", "What is 12 / 3 in total"),
        ("How much is 1.5 of it", "How much is 15 of it"),
        ("Who maintains C# on the server", "Who maintains C++ on the server"),
        ("Is -5 a number of that kind", "Is 5 a number of that kind"),
        ("What is the capital of France", "What is the capital of Spain"),
        ("Show me order 17 of that customer", "Show me order 18 of that customer"),
        ("Show me the orders of March", "Show me the orders"),
        ("Ruby interface to the Twitter API", "Interface to the Twitter API"),
        ("आप कैसे हैं और घर कैसा है", "आप कैसी हैं और घर कैसे है"),
    ],
)
@pytest.mark.parametrize("task", INPUTS)
def test_inputs_with_other_numbers_signs_and_names_are_kept(tmp_path, task, train, test):
    make = INPUTS[task]
    rows = split(tmp_path, task, [make(train, 1), *others(make)], [make(test, 0)])
    assert (rows.counts["train"], rows.dropped) == (7, {})


PASSAGES = ("Ada wrote it in 1843.", "Ada  wrote\n\nit in 1843. ")


def test_white_space_in_a_passage_makes_it_no_other_passage(tmp_path):
    questions = (words("question", 40), words("question", 40) + " really")
    rows = [
        {"question": question, "context": context, "answer": "Ada"}
        for question, context in zip(questions, PASSAGES, strict=True)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert prepare(tmp_path, "rows.jsonl", "qa", deduplicate="near").dropped == {"near duplicate": 1}


def test_texts_with_a_short_one_that_differs_in_white_space_overlap(tmp_path):
    long = words("long", 60)
    train, test = (
        [{"text": f"{long} {end}", "pair": short, "label": "a"}] for end, short in zip("xy", PASSAGES, strict=True)
    )
    kept = split(tmp_path, "classify", train, test, deduplicate="exact")
    assert find_overlap(kept, near=False).shared == {0: 0}


def test_a_template_with_a_variable_word_is_no_leak(tmp_path):
    rows = [asked(f"please tell me about the {name} package now", words(name, 20)) for name in ALPHABET]
    assert split(tmp_path, "chat", rows[4:], rows[:4]).dropped == {}


def test_an_input_of_most_rows_is_the_task_itself(tmp_path):
    rows = [asked("A joke, please", f"joke {n} {words(str(n), 20)}") for n in range(40)]
    assert split(tmp_path, "chat", rows[4:], rows[:4]).dropped == {}


@pytest.mark.promise("rows", "leakage", place="speech", equal="the same recording is dropped from train")
@pytest.mark.promise("rows", "contrast pairs", place="speech", equal="other recordings with one text are kept")
def test_other_recordings_with_one_text_are_kept_and_the_same_recording_is_dropped(tmp_path):
    np, soundfile = pytest.importorskip("numpy"), pytest.importorskip("soundfile")
    for name in ("a", "b", "c"):
        noise = np.random.default_rng(ord(name)).normal(0, 0.1, 4000)
        soundfile.write(tmp_path / f"{name}.wav", noise, 16_000)
    (tmp_path / "again.wav").write_bytes((tmp_path / "a.wav").read_bytes())
    train = [{"audio": "again.wav", "text": "another transcript"}, {"audio": "b.wav", "text": "one text"}]
    rows = split(tmp_path, "speech", train, [{"audio": "a.wav", "text": "one text"}])
    assert (rows.counts["train"], rows.dropped) == (1, {"near a test row": 1})


# Contrast pairs: almost equal rows with other answers


CONTRASTS = {
    "classify": lambda text, n: {"text": text, "label": "ab"[n]},
    "token-classify": lambda text, n: {"tokens": text.split(), "tags": ["O"] * 30 + ["B-X" if n else "B-Y"] * 10},
    "qa": lambda text, n: {"question": text, "context": "Ada wrote it in 1843.", "answer": ("Ada", "1843")[n]},
    "chat": lambda text, n: asked(text, ("yes", "no")[n]),
    "reinforce": lambda text, n: asked(text, ("yes", "no")[n]),
    "completion": lambda text, n: {"prompt": text, "completion": (" yes", " no")[n]},
    "translate": lambda text, n: {"source": text, "target": ("ja", "nein")[n]},
    "summarize": lambda text, n: {"document": text, "summary": ("good", "bad")[n]},
    "preference": lambda text, n: {"prompt": text, "chosen": ("yes", "no")[n], "rejected": ("no", "yes")[n]},
    "embed": lambda text, n: {"query": text, "passage": words("same", 40), "score": (0.1, 0.9)[n]},
    "rerank": lambda text, n: {"query": "which one", "passage": text, "relevance": n},
}


@pytest.mark.promise(
    "rows",
    "contrast pairs",
    by="task",
    equal="20 of 20 pairs with other answers are kept; with one answer, one of each",
)
@pytest.mark.parametrize("task", CONTRASTS)
def test_rows_with_other_labels_are_no_near_duplicates(tmp_path, task):
    make, texts = CONTRASTS[task], [words(f"text {n}", 40) for n in range(20)]
    pairs = [make(f"{text.rsplit(' ', 1)[0]} {last}", n) for text in texts for n, last in enumerate(("miras", "lotos"))]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    rows = prepare(tmp_path, "pairs.jsonl", task, deduplicate="near")
    assert (rows.counts["train"], rows.dropped) == (40, {})
    same = [make(f"{text.rsplit(' ', 1)[0]} {last}", 0) for text in texts for last in ("miras", "lotos")]
    write_jsonl(tmp_path / "same.jsonl", same)
    assert prepare(tmp_path, "same.jsonl", task, deduplicate="near").dropped == {"near duplicate": 20}


def test_classes_of_texts_to_embed_are_labels_too(tmp_path):
    pairs = [{"text": words(f"text {n}", 40) + last, "label": last} for n in range(20) for last in (" x", " y")]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    assert prepare(tmp_path, "pairs.jsonl", "embed", deduplicate="near").dropped == {}


def test_thumbs_of_one_answer_that_differ_are_no_near_duplicates(tmp_path):
    rows = [{"prompt": words(str(n), 30), "completion": words("a", 20), "label": n % 2 == 0} for n in range(10)]
    rows += [{**row, "prompt": row["prompt"] + " x", "label": not row["label"]} for row in rows]
    write_jsonl(tmp_path / "thumbs.jsonl", rows)
    assert prepare(tmp_path, "thumbs.jsonl", "preference", deduplicate="near").dropped == {}


@pytest.mark.parametrize("task", ["classify", "embed"])
def test_a_contrast_pair_may_lie_on_both_sides(tmp_path, task):
    train = [{"text": f"{words(str(n), 6)} was bad", "label": "bad"} for n in range(20)]
    test = [{**row, "text": row["text"].replace("bad", "good"), "label": "good"} for row in train]
    rows = split(tmp_path, task, train, test)
    assert (rows.counts["train"], rows.dropped) == (20, {})


def test_equal_texts_with_other_labels_are_reported_as_contradictions(tmp_path, console):
    from support.rows import make_recipe

    from llmtune.data.preparation import prepare_rows

    rows = [{"text": words(str(n // 2), 30), "label": "ab"[n % 2]} for n in range(20)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe = make_recipe(tmp_path, "rows.jsonl", "classify", deduplicate="near")
    assert prepare_rows(recipe, tmp_path / "out", console).counts["train"] == 20
    assert "questions with different answers in different rows: 10" in console.file.getvalue()


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("**Bold** and _it_, `code`!", "bold and it code"),
        ("What's up?", "whats up"),
        ("don\u2019t", "dont"),
        ("C++, C# and F#", "c++ c# and f#"),
        ("3.5 - 2", "3 . 5 - 2"),
        ("- one\n* two\n> three\n# four", "one two three four"),
        ("soft\u00adhyphen zero\u200bwidth \u2066bidi\u2069", "softhyphen zerowidth bidi"),
        ("ＦＵＬＬ\u3000width ﬁ", "full width fi"),
        ("?!", "?!"),
        ("", ""),
    ],
)
def test_the_plain_form_of_a_text(text, form):
    assert plain_form(text) == form
    assert plain_form(form) == form
