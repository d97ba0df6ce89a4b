import hashlib
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rows import chat, prepare, questions, write_jsonl

from llmtune.data.deduplication import NEAR, find_near, match_near
from llmtune.data.word_hash import MINIMA, hash_triples, take_minima

WORDS = [
    a + b + c for a in ("ka", "lo", "mi", "tu", "ser") for b in ("ra", "to", "ne", "bi") for c in ("", "s", "n", "ly")
]


def sentence(rng: random.Random, count: int) -> list[str]:
    return rng.choices(WORDS, k=count)


def near_of(texts: list[str], order: list[int] | None = None, queries: list[int] | None = None) -> dict[int, list[int]]:
    rows = np.array(order or range(len(texts)), dtype=np.int64)
    half = len(texts) // 2
    lines = pa.array([json.dumps({"tokens": [text]}) for text in texts], pa.string())
    batches = [(0, lines[:half]), (half, lines[half:])]
    with tempfile.TemporaryDirectory() as folder:
        if queries is None:
            found = find_near(rows, lambda: iter(batches), Path(folder))
        else:
            found = match_near(rows, np.array(queries), lambda: iter(batches), Path(folder))
        return {row: near.tolist() for row, near in found}


def overlap(one: str, other: str) -> float:
    a, b = (set(hash_triples([text])[0].tolist()) for text in (one, other))
    return len(a & b) / len(a | b)


def test_the_estimated_overlap_is_within_its_error_of_the_true_one():
    rng = random.Random(1)
    errors = []
    for changed in range(0, 40, 2):
        words = sentence(rng, 80)
        other = [*words[: 80 - changed], *sentence(rng, changed)]
        texts = [" ".join(words), " ".join(other)]
        triples, row = hash_triples(texts)
        minima = take_minima(triples, np.flatnonzero(np.diff(row, prepend=-1)))
        errors.append(float((minima[0] == minima[1]).mean()) - overlap(*texts))
    assert abs(np.mean(errors)) < 0.03, "the estimate is biased"
    assert np.std(errors) < 1.5 * 0.5 / MINIMA**0.5


def test_pairs_well_above_the_threshold_are_found_and_those_well_below_are_not():
    rng = random.Random(2)
    originals = [sentence(rng, 100) for _ in range(150)]
    near = [[*words[:97], *sentence(rng, 3)] for words in originals]
    far = [[*words[:75], *sentence(rng, 25)] for words in originals]
    texts = [" ".join(words) for words in (*originals, *near, *far)]
    assert min(overlap(texts[i], texts[150 + i]) for i in range(150)) > 0.9
    assert max(overlap(texts[i], texts[300 + i]) for i in range(150)) < NEAR - 0.1
    assert near_of(texts) == {150 + i: [i] for i in range(150)}


def test_words_are_compared_without_case_and_punctuation():
    text = "It was the best of times, it was the worst of times; it was the age of wisdom."
    other = "it was the BEST of times it was the worst of times “it was – the age of wisdom”!"
    assert overlap(text, other) == 1.0


def test_scripts_without_spaces_are_compared_by_character():
    text = "機械学習は人間が自然に行っている学習能力と同様の機能を計算機で実現しようとする技術である"
    assert len(hash_triples([text])[0]) == len(text)
    assert 0.8 < overlap(text, text[:-1]) < 1
    assert overlap("ab機cd", "ab 機 cd") == 1.0


def test_texts_without_words_have_no_near_duplicates():
    assert near_of(["!!!", "???", "!!!", ""]) == {}


def test_words_hash_the_same_in_every_batch():
    alone = hash_triples(["the quick brown fox"])[0].tolist()
    together, row = hash_triples(["some other text", "", "the quick brown fox"])
    assert together[row == 2].tolist() == alone


def test_a_shared_template_makes_rows_near_only_if_at_most_one_word_differs():
    rng = random.Random(3)
    template = " ".join(sentence(rng, 400))
    texts = [f"{template} {' '.join(sentence(rng, 30))}" for _ in range(100)]
    assert min(overlap(texts[0], text) for text in texts) > NEAR
    assert near_of(texts) == {}
    assert near_of([*texts, texts[7] + " x"]) == {100: [7]}
    assert near_of([f"{template} {number}" for number in range(100)]).keys() == set(range(1, 100))


def test_kept_rows_are_not_near_each_other_and_every_dropped_row_is_near_a_kept_one():
    rng = random.Random(4)
    words = sentence(rng, 60)
    chain = []
    for _ in range(30):  # each is near the previous one, but the ends are not near each other
        words = words[1:] + sentence(rng, 1)
        chain.append(" ".join(words))
    dropped = near_of(chain + [" ".join(sentence(rng, 60)) for _ in range(400)])
    kept = set(range(30)) - dropped.keys()
    assert 1 < len(kept) < 30
    assert all(set(near) <= kept and all(other < row for other in near) for row, near in dropped.items())
    assert max(overlap(chain[i], chain[j]) for i in kept for j in kept if i < j) < NEAR + 0.1


def test_many_near_rows_leave_one_in_linear_time():
    rng = random.Random(5)
    words = sentence(rng, 300)
    crowd = [" ".join([*words, str(number)]) for number in range(3000)]
    noise = [" ".join(sentence(rng, 30)) for _ in range(12_000)]
    assert len(near_of([*crowd, *noise])) == 2999


def relatives(rng: random.Random) -> list[str]:
    """Texts with many near pairs: from one template, from one original, chains, a crowd, texts without words."""
    texts = ["", "!!!", "one", "one two"]
    for _ in range(120):
        words = sentence(rng, rng.randint(3, 90))
        for _ in range(rng.choice([1, 1, 2, 3, 9])):
            changed = rng.randint(0, max(len(words) // 5, 1))
            texts.append(" ".join([*words[changed:], *sentence(rng, rng.randint(0, changed))]))
    template = " ".join(sentence(rng, 60))
    texts += [f"{template} {' '.join(sentence(rng, rng.randint(1, 12)))}" for _ in range(420)]
    rng.shuffle(texts)
    return texts


def digest_of(found: dict[int, list[int]]) -> str:
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:16]


def test_near_rows_match_a_search_with_the_minima_of_all_rows():
    """The digests come from a search that kept the minima of all rows in memory."""
    rng = random.Random(7)
    for near, matches in (("f0e2f217b46624c0", "d7c6196f0762501d"), ("a733dba335e0d7e8", "58268a9ea73cd556")):
        texts = relatives(rng)
        order = rng.sample(range(len(texts)), len(texts) - 20)
        known = len(order) * 2 // 3
        assert digest_of(near_of(texts, order)) == near
        assert digest_of(near_of(texts, order[:known], order[known:])) == matches


@given(st.permutations(range(12)))
@settings(max_examples=25, deadline=None)
def test_the_kept_rows_do_not_depend_on_the_order_of_rows(order):
    rng = random.Random(6)
    rows = []
    for number in range(4):
        words = sentence(rng, 40)
        rows += [chat(" ".join([*words, more]), "yes") for more in ("", f"more{number}", f"much{number}")]
    kept = []
    for arrangement in (range(12), order):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_jsonl(folder / "a.jsonl", [rows[place] for place in arrangement][:5])
            write_jsonl(folder / "b.jsonl", [rows[place] for place in arrangement][5:])
            kept.append(questions(prepare(folder, ["a.jsonl", "b.jsonl"], deduplicate="near"))["train"])
    assert kept[0] == kept[1]
    assert len(kept[0]) == 4


@pytest.mark.parametrize(("method", "kept"), [("none", 4), ("exact", 2), ("near", 1)])
def test_each_deduplication_method_drops_the_documented_rows(tmp_path, method, kept):
    long = " ".join(WORDS[:60])
    twice = chat(long + " caf\u00e9")
    write_jsonl(tmp_path / "a.jsonl", [twice, twice, chat(long + " cafe\u0301 "), chat(long + " tea")])
    rows = prepare(tmp_path, "a.jsonl", deduplicate=method)
    assert rows.counts["train"] == kept
    want = {"none": {}, "exact": {"exact duplicate": 2}, "near": {"exact duplicate": 2, "near duplicate": 1}}
    assert rows.dropped == want[method]


def test_a_validation_row_near_a_test_row_is_dropped(tmp_path):
    long = " ".join(WORDS[:60])
    write_jsonl(tmp_path / "train.jsonl", [chat("a"), chat(long + " x")])
    write_jsonl(tmp_path / "validation.jsonl", [chat(long), chat("b")])
    write_jsonl(tmp_path / "test.jsonl", [chat(long + " more")])
    rows = prepare(tmp_path, "train.jsonl", validation="validation.jsonl", test="test.jsonl", deduplicate="near")
    assert questions(rows) == {"train": ["a"], "validation": ["b"], "test": [long + " more"]}
    assert rows.dropped == {"near a test row": 2}


def test_a_passage_that_answers_several_queries_makes_no_duplicates(tmp_path):
    """Passages are long and queries short: rows of other queries would look nearly equal."""
    rng = random.Random(0)
    passages = [" ".join(sentence(rng, 60)) for _ in range(40)]
    rows = [{"query": " ".join(sentence(rng, 6)), "passage": one} for one in passages for _ in range(3)]
    again = [{**row, "passage": f"{row['passage']} indeed"} for row in rows[:5]]
    write_jsonl(tmp_path / "rows.jsonl", rows + again)
    found = prepare(tmp_path, "rows.jsonl", "embed", deduplicate="near")
    assert (found.counts["train"], found.dropped) == (120, {"near duplicate": 5})
    scored = [{"query": row["query"], "passage": row["passage"], "score": 0.5} for row in rows]
    write_jsonl(tmp_path / "scored.jsonl", scored)
    assert prepare(tmp_path, "scored.jsonl", "embed", deduplicate="near").dropped, "a pair of texts is compared as one"


def test_a_long_text_with_several_short_ones_makes_no_duplicates(tmp_path):
    """As a premise with its hypotheses, which often have other labels."""
    rng = random.Random(0)
    texts = [" ".join(sentence(rng, 120)) for _ in range(30)]
    pairs = [{"text": text, "pair": " ".join(sentence(rng, 8)), "label": "abc"[i]} for text in texts for i in range(3)]
    again = [{**pair, "text": f"{pair['text']} indeed"} for pair in pairs[:4]]
    write_jsonl(tmp_path / "pairs.jsonl", pairs + again)
    found = prepare(tmp_path, "pairs.jsonl", "classify", deduplicate="near")
    assert (found.counts["train"], found.dropped) == (90, {"near duplicate": 4})
    short = [{"text": text[:300], "pair": f"{text[:300]} {i}", "label": "a"} for text in texts for i in range(3)]
    write_jsonl(tmp_path / "short.jsonl", short)
    assert prepare(tmp_path, "short.jsonl", "classify", deduplicate="near").dropped == {"near duplicate": 60}


@pytest.mark.parametrize(
    "text",
    [
        "猫在沙发上睡觉，狗在花园里跑步。",
        "猫はソファで寝て、犬は庭で走ります。",
        "แมวนอนบนโซฟาและสุนัขวิ่งในสวน",
        "ແມວນອນເທິງໂຊຟາແລະໝາແລ່ນໃນສວນ",
        "ကြောင်သည်ဆိုဖာပေါ်မှာအိပ်သည်",
        "ឆ្មាដេកលើសាឡុងហើយឆ្កែរត់ក្នុងសួន",
    ],
)
def test_characters_of_scripts_without_spaces_are_words_of_near_duplicates(text):
    triples, _ = hash_triples([text])
    other, _ = hash_triples([f"{text}{text[:2]}"])
    assert len(triples) > len(text) / 2
    assert len({*triples.tolist()} & {*other.tolist()}) > 0.8 * len({*triples.tolist()})
