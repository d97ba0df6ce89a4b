"""The system message of conversations without one: the template's own is reported, the recipe's replaces it."""

from pathlib import Path

import pytest
from support.runs import invoke, write_colours, write_recipe
from support.templates import CHATML, DEFAULT_SYSTEM, LLAMA2, NO_SYSTEM, recipe_for, tokenizer_with

from llmtune import load_run
from llmtune.data.chat_template import read_template
from llmtune.data.template_text import with_system_prompt
from llmtune.errors import RecipeError

FAMILIES = Path(__file__).parent.parent / "support" / "chat_families"
PROMPT = 'Say "yes" or\n{{ no }} \\ übrigens.'
QUESTION = {"role": "user", "content": "Why?"}


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM, LLAMA2, (FAMILIES / "smollm-2.jinja").read_text()])
def test_the_recipes_system_prompt_renders_like_a_rows_message_and_yields_to_one(template: str) -> None:
    stated = [{"role": "system", "content": PROMPT}, QUESTION]
    render = tokenizer_with(with_system_prompt(template, PROMPT)).apply_chat_template
    assert render([QUESTION], tokenize=False) == tokenizer_with(template).apply_chat_template(stated, tokenize=False)
    other = [{"role": "system", "content": "Be brief."}, QUESTION]
    assert render(other, tokenize=False) == tokenizer_with(template).apply_chat_template(other, tokenize=False)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML, None),
        (NO_SYSTEM, None),
        (DEFAULT_SYSTEM, "You are kind."),
        (with_system_prompt(LLAMA2, "Be brief."), "Be brief."),
        ((FAMILIES / "smollm-2.jinja").read_text(), "You are a helpful AI assistant."),
    ],
)
def test_a_templates_default_system_message_is_found(template: str, message: str | None) -> None:
    assert read_template(tokenizer_with(template), recipe_for()).facts.added_system == message


def test_a_template_without_system_messages_refuses_the_key() -> None:
    deaf = with_system_prompt(CHATML.replace("in messages", "in messages if message.role != 'system'"), "Be brief.")
    with pytest.raises(RecipeError, match="omits system messages"):
        read_template(tokenizer_with(deaf), recipe_for(system_prompt="Be brief."))


def test_a_template_that_rejects_system_messages_refuses_the_key() -> None:
    strict = with_system_prompt(NO_SYSTEM, "Be brief.")
    with pytest.raises(RecipeError, match="refuses system messages: System role not supported") as caught:
        read_template(tokenizer_with(strict), recipe_for(system_prompt="Be brief."))
    (problem,) = caught.value.problems
    assert problem.where == "data.system_prompt"
    assert problem.fix == "Omit it, and write its content into the questions."


def test_the_tuned_model_uses_the_system_prompt_from_its_template(here: Path, tiny_llama: Path) -> None:
    train = {"max_steps": 2, "num_train_epochs": None}
    data = {"system_prompt": "Name a colour."}
    rows = write_colours(here / "rows.jsonl")
    write_recipe(here / "tiny.yaml", tiny_llama, rows, train=train, data=data)
    done = invoke("run", "tiny.yaml", "--out", "run")
    assert done.exit_code == 0, done.stderr
    assert "Name a colour." in done.stderr
    assert "Name a colour." in Path("run/adapter/chat_template.jinja").read_text()
    rendered = load_run("run").tokenizer.apply_chat_template([QUESTION], tokenize=False)
    assert rendered.startswith("<|im_start|>system\nName a colour.<|im_end|>\n")
