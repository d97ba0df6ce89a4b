import json
import random
import re

import pytest
from support.rows import prepare as prepare_split
from support.rows import write_jsonl

from llmtune.data.contamination import COMMON_ROWS, WORDS, find_overlap
from llmtune.data.preparation import prepare_rows
from llmtune.data.row_kind import compared_text, prompt_row
from llmtune.data.row_store import iterate_texts
from llmtune.recipe.loader import load_recipe

RECIPE = """
recipe_version: 1
name: overlap
task: {task}
data: {{train: {train}, test: {test}, validation: 0, deduplicate: {deduplicate}}}
model: {{name: builtin:smollm2-135m-instruct}}
"""


@pytest.fixture
def prepare(tmp_path, console):
    def run(train, test, task="completion", deduplicate="none", weight=None):
        for name, rows in (("train", train), ("test", test)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        named = ["train.jsonl"]
        if weight:
            (tmp_path / "more.jsonl").write_text(json.dumps(text(30, 5000)) + "\n")
            named = [{"path": "train.jsonl", "weight": weight}, "more.jsonl"]
        recipe = RECIPE.format(train=json.dumps(named), test="test.jsonl", task=task, deduplicate=deduplicate)
        (tmp_path / "recipe.yaml").write_text(recipe)
        return prepare_rows(load_recipe(str(tmp_path / "recipe.yaml")).recipe, tmp_path / "rows", console)

    return run


def text(words, start=0):
    return {"text": " ".join(f"word{start + i}" for i in range(words))}


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def test_a_run_of_thirteen_words_is_found_in_any_surroundings(prepare):
    shared = text(WORDS)["text"]
    train = [text(40, 100), {"text": f"Before, it said: {shared.upper()}! And more of that came after it."}]
    test = [
        text(40, 200),
        {"text": f"{shared} otherwise"},
        {"text": f"Nothing: {text(WORDS - 1)['text']} is common here"},
    ]
    found = find_overlap(prepare(train, test), near=False)
    assert found.shared == {1: 1}
    assert found.runs == {1: shared}
    assert found.rows == {1}
    assert (found.test_rows, found.train_rows, found.short) == (3, 2, frozenset())


def test_a_run_may_span_prompt_and_answer(prepare):
    train = [pair("a b c d e f g ", "h i j k l m n o p q r s")]
    test = [pair("z a b c d e f g h i ", "j k l m n"), pair("a b c d e f g x ", "h i j k l m n o p q r y s")]
    assert find_overlap(prepare(train, test), near=False).shared == {0: 0}


def test_a_short_row_overlaps_if_a_training_row_has_all_its_words(prepare):
    train = [pair("Which colour is the sky? ", "blue"), pair("Two and two? ", "four"), pair("", text(30)["text"])]
    test = [
        pair("which colour is the SKY: ", "Blue."),
        pair("Two and two? ", "five"),
        pair("?! ", "..."),
        pair("", text(40, 50)["text"]),
    ]
    found = find_overlap(prepare(train, test), near=False)
    assert found.worded == {0: 0}
    assert found.short == {0, 1, 2}
    assert found.shared == {}


@pytest.mark.parametrize(
    "written", ["what is h2o?", "What\u00a0is\u2003H2O?", "Ｗｈａｔ is Ｈ２Ｏ？", "What  is\nH2O?", "WHAT IS H₂O?"]
)
def test_a_short_question_is_found_in_any_case_width_and_spacing(prepare, written):
    found = find_overlap(prepare([pair(written, "water")], [pair("What is H2O?", "Ice.")]), near=False)
    assert found.prompted == {0: 0}
    found = find_overlap(prepare([{"text": written}], [{"text": "What is H2O?"}]), near=False)
    assert found.worded == {0: 0}


def test_long_texts_are_found_in_any_width_and_spacing(prepare):
    shared = text(WORDS)["text"]
    wide = "".join(chr(ord(c) + 0xFEE0) if c.isalnum() else "\u00a0" for c in shared)
    found = find_overlap(prepare([{"text": f"So: {wide} and more"}], [{"text": f"{shared} otherwise"}]), near=False)
    assert found.runs == {0: shared}


def test_template_runs_are_ignored_and_counted(prepare):
    template = "read the text below with care and say in one word what it is about here"
    rows = [{"text": f"{template} {' '.join(f'w{i}x{j}' for j in range(20))}"} for i in range(COMMON_ROWS + 3)]
    found = find_overlap(prepare(rows[:-2], rows[-2:]), near=False)
    assert found.shared == {}
    assert found.common == 16 - WORDS + 1
    few = find_overlap(prepare(rows[:COMMON_ROWS], rows[-2:]), near=False)
    assert few.shared == {0: 0, 1: 0}
    assert few.common == 0


def test_copies_of_a_row_by_weight_and_by_repetition_are_one_row(prepare):
    row = text(30)
    train = [row, *[text(30, 1000 + 50 * i) for i in range(5)], row]
    found = find_overlap(prepare(train, [{"text": row["text"] + " but"}], weight=COMMON_ROWS + 5.0), near=False)
    assert found.train_rows == 7
    assert found.shared == {0: 0}


def test_nearly_equal_rows_are_found_without_deduplication(prepare):
    rng = random.Random(0)
    words = [f"w{i}" for i in range(500)]
    test = [{"text": " ".join(rng.choices(words, k=100))} for _ in range(6)]
    changed = [" ".join(["other", *one["text"].split()[1:50], "new", *one["text"].split()[51:]]) for one in test[:3]]
    train = [{"text": " ".join(rng.choices(words, k=100))} for _ in range(30)] + [{"text": one} for one in changed]
    assert find_overlap(prepare(train, test), near=True).near == {0: 30, 1: 31, 2: 32}
    assert find_overlap(prepare(train, test), near=False).near == {}
    rows = prepare(train, test, deduplicate="near")
    assert rows.dropped == {"near a test row": 3}
    found = find_overlap(rows, near=True)
    assert (found.near, found.shared) == ({}, {})


def test_nearly_equal_test_rows_are_each_found_near_a_training_row(prepare):
    words = [f"w{i}" for i in range(60)]
    test = [{"text": " ".join([*words[:-1], f"end{i}"])} for i in range(3)]
    assert find_overlap(prepare([{"text": " ".join(words)}], test), near=True).near == {0: 0, 1: 0, 2: 0}


def test_the_comparison_covers_the_text_of_a_row():
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    chat = {"messages": [*turns, {"role": "assistant", "content": "Hello"}]}
    assert compared_text(chat) == "Hi Hello"
    question = {"question": "Who?", "context": "Ada was here.", "answers": [{"text": "Ada", "start": 0}]}
    assert compared_text(question) == "Who? Ada"
    assert compared_text({"audio": "a.wav", "content": "ab", "text": "one two"}) == "one two"
    assert compared_text({"text": "good film", "pair": None, "label": "yes"}) == "good film"


def test_results_match_a_plain_comparison(prepare):
    rng = random.Random(3)
    words = ["ä", "bee", "c3", "dee", "été", "x"]

    def row():
        size = rng.randrange(1, 40)
        return {"text": rng.choice([" ", ", ", "-"]).join(rng.choices(words, k=size))}

    train, test = [row() for _ in range(700)], [row() for _ in range(60)]
    shared = [" ".join(rng.choices(words, k=20)) for _ in range(12)]
    train += [{"text": f"{row()['text']} {one} {row()['text']}"} for one in shared]
    test += [{"text": f"{row()['text']} {one[6:]}"} for one in shared]
    test += [{"text": f"<{one['text']}>"} for one in train[:40]]
    rows = prepare(train, test)
    found = find_overlap(rows, near=False)
    sides = {
        side: [re.findall(r"\w+", json.loads(line)["completion"]) for _, line in iterate_texts(rows, side)]
        for side in ("train", "test")
    }
    runs = [{tuple(said[i : i + WORDS]) for i in range(len(said) - WORDS + 1)} for said in sides["train"]]
    for number, said in enumerate(sides["test"]):
        own = [tuple(said[i : i + WORDS]) for i in range(len(said) - WORDS + 1)]
        rare = [run for run in own if 0 < sum(run in there for there in runs) <= COMMON_ROWS]
        assert (number in found.shared) == bool(rare), said
        if rare:
            assert re.findall(r"\w+", found.runs[number]) == list(rare[0])
            assert rare[0] in runs[found.shared[number]]
        assert (number in found.worded) == (len(said) < WORDS and said in sides["train"])
    assert len(found.shared) >= 12
    assert found.worded


def asked(question, answer, system="Answer briefly."):
    said = (("system", system), ("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def test_questions_with_several_answers_are_found_on_both_sides_unless_split_by_question(tmp_path):
    numbers = [(question, answer) for question in range(50) for answer in range(8)]
    rows = [{**asked(f"What is question {q}?", f"Answer{q}x{a} to it"), "question": q} for q, a in numbers]
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    found = find_overlap(prepare_split(tmp_path, path, test=0.2), near=False)
    assert found.test_rows > 50
    assert len(found.prompted) > 0.95 * found.test_rows
    assert found.rows == set(found.prompted)
    apart = find_overlap(prepare_split(tmp_path, path, out="apart", test=0.2, split_by="question"), near=False)
    assert apart.test_rows == 40
    assert apart.rows == set()


def test_prompts_match_only_completely(prepare):
    train = [asked("Good or bad? A fine film", "good"), asked("Which?", "this"), asked("Who?", "Ada")]
    train.append({"messages": [*asked("First?", "One")["messages"], *asked("Then?", "Two")["messages"][1:]]})
    test = [
        asked("Good or bad? A poor film", "bad"),
        asked("Which?", "that", system="Answer at length."),
        asked(" Who? ", "Bob"),
        asked("First?", "Uno"),
        {"messages": [*asked("First?", "One")["messages"], *asked("Then?", "Due")["messages"][1:]]},
    ]
    assert find_overlap(prepare(train, test, task="chat"), near=False).prompted == {2: 2, 4: 3}


def test_texts_without_a_prompt_share_no_prompt(prepare):
    assert find_overlap(prepare([text(30)], [text(30, 100)]), near=False).prompted == {}
    pairs = prepare([pair("Say it:", " one"), pair("Or this:", " two")], [pair("Say it:", " three")])
    assert find_overlap(pairs, near=False).prompted == {0: 0}


def test_a_prompt_shared_by_many_rows_is_not_an_overlap(prepare):
    train, test = [asked("A joke, please", f"joke{i}") for i in range(COMMON_ROWS + 1)], [asked("A joke, please", "x")]
    assert find_overlap(prepare(train, test, task="chat"), near=False).prompted == {}
    more = [asked(f"Question {i}?", f"answer{i}") for i in range(100)]
    assert find_overlap(prepare(train + more, test, task="chat"), near=False).prompted == {0: 0}


def test_prompts_of_context_questions_and_labels_are_not_compared():
    assert (
        prompt_row({"question": "Who?", "context": "Ada was here.", "answers": [{"text": "Ada", "start": 0}]}) is None
    )
    assert prompt_row({"text": "good film", "pair": None, "label": "yes"}) is None
    pairs = {"messages": asked("Who?", "Ada")["messages"], "chosen": "Bob", "rejected": "Eve"}
    assert prompt_row(pairs) == {**pairs, "chosen": "", "rejected": ""}
