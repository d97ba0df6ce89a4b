import pytest

from llmtune.report.row_sections import LONGEST_SHOWN, cut, present_samples, read_tags
from llmtune.store.score_records import Evaluation


def shown(task, baseline=None, **sample):
    evaluation = Evaluation({}, {}, {}, (), 1, baseline=baseline)
    return present_samples([{"origin": "rows.jsonl:1", **sample}], evaluation, task)[0]


def rights(found):
    return [answer.right for answer in found.answers]


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ("B-person I-person O O B-place", "Ada Lovelace (person), Paris (place)"),
        ("B-person B-person O O O", "Ada (person), Lovelace (person)"),
        ("I-person I-place O O O", "Ada (person), Lovelace (place)"),
        ("O O O O O", "(none)"),
        ("B-person O", "B-person O"),
    ],
)
def test_tags_are_read_as_the_entities_they_mark(tags, wanted):
    assert read_tags("Ada Lovelace lives in Paris", tags) == wanted


def test_entities_that_are_the_reference_are_marked_right():
    found = shown(
        "token-classify",
        prompt="Ada went to Paris",
        reference="Ada (person), Paris (place)",
        base="O O O O",
        tuned="B-person O O B-place",
    )
    assert [answer.text for answer in found.answers] == ["(none)", "Ada (person), Paris (place)"]
    assert rights(found) == [False, True]


def test_labels_are_right_in_any_order():
    assert rights(shown("classify", prompt="x", reference="b, a", base="a", tuned="a, b")) == [False, True]


def test_ratings_are_never_marked_right():
    found = shown("preference", prompt="Hi", reference="chosen 1", base="chosen 1", tuned="chosen 1, rejected 0")
    assert rights(found) == [False, False]
    assert found.reference_name == "chosen answer"
    assert shown("preference", prompt="Hi", reference="x", tuned="answer -3").reference_name == "judged answer"
    ranked = shown("rerank", prompt="a query", reference="1, 0", tuned="1, 0")
    assert (ranked.reference_name, [answer.right for answer in ranked.answers]) == ("relevances", [False])


@pytest.mark.parametrize(("baseline", "name"), [(None, "base"), ("an empty transcript", "baseline")])
def test_a_baseline_is_not_called_the_base_model(baseline, name):
    found = shown("speech", baseline, prompt="a.wav", reference="hello", base="", tuned="hello")
    assert [answer.name for answer in found.answers] == [name, "tuned"]
    assert found.prompt_name == "recording"


def test_a_long_context_is_truncated_with_the_number_of_characters():
    text = "who?\n" + "x" * 10_000 + " the end"
    found = shown("qa", prompt=text, reference="x", tuned="x").prompt
    assert len(found) < LONGEST_SHOWN
    assert found.startswith("who?")
    assert found.endswith("the end")
    assert f"[… {len(text) - 1400:,} characters …]" in found
    assert cut("x" * LONGEST_SHOWN) == "x" * LONGEST_SHOWN
