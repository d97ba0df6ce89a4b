"""Keys whose lack of effect only the model or the rows show are refused before anything is encoded."""

import pytest
from support import families
from support.models import build_llama
from support.pairs import run_recipe

from llmtune.errors import RecipeError

WORDS = [f"{word} number {i} is here" for i, word in enumerate(["cat", "dog", "fox", "bird"] * 10)]
ANSWERS = [{"question": text, "context": f"{text} now", "answer": text[:3]} for text in WORDS]
GERMAN = [{"source": text, "target": text[::-1]} for text in WORDS]
PAIRS = [{"query": text, "passage": text[::-1]} for text in WORDS]
CLASSES = [{"text": text, "label": text[:3]} for text in WORDS]
LANGUAGES = {"source_language": "English", "target_language": "German"}
SYSTEM = {"translate": LANGUAGES, "data": {"system_prompt": "Short."}}
NO_TEXT = {"generation": {"max_new_tokens": None}}


@pytest.mark.parametrize(
    ("build", "task", "rows", "sections", "keys"),
    [
        (families.build_t5, "translate", GERMAN, SYSTEM, ["data.system_prompt"]),
        (
            families.build_t5,
            "qa",
            ANSWERS,
            {"qa": {"stride": 8}, "model": {"chat_template": "builtin:chatml"}},
            ["model.chat_template", "qa.stride"],
        ),
        (
            build_llama,
            "qa",
            ANSWERS,
            {"qa": {"max_answer_length": 5, "stride": 8}},
            ["qa.max_answer_length", "qa.stride"],
        ),
        (
            families.build_bert,
            "qa",
            ANSWERS,
            {"qa": {"no_answer": "nothing", "stride": 8}},
            ["generation.max_new_tokens", "qa.no_answer"],
        ),
        (families.build_bert, "embed", PAIRS, {"embed": {"margin": 0.5, "scale": 10.0}, **NO_TEXT}, ["embed.margin"]),
        (families.build_bert, "embed", CLASSES, {"embed": {"margin": 0.5, "scale": 10.0}, **NO_TEXT}, ["embed.scale"]),
    ],
)
def test_a_key_that_this_model_or_these_rows_do_not_use_is_refused(tmp_path, build, task, rows, sections, keys):
    with pytest.raises(RecipeError) as refused:
        run_recipe(tmp_path, build(tmp_path / "model"), rows, task, **sections)
    assert sorted(problem.where for problem in refused.value.problems) == keys
    assert not (tmp_path / "run" / "data" / "examples").exists()
