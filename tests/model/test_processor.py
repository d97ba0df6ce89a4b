"""The tokenizer as the recipe sets it, saved to work the same in transformers 4 and 5."""

import json
import shutil

import pytest
from support.adapting import quiet, recipe_with
from support.models import CHATML, build_llama
from support.templates import EMPTY_THOUGHTS, LLAMA3, OWN_TOKENS, conversation
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from llmtune.data.chat_encoding import encode_chat
from llmtune.data.chat_template import render_prompt
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.model.processor import load_processor, save_tokenizer
from llmtune.model.resolve import resolve_model


def load(folder, **model):
    recipe = recipe_with(folder, model=model)
    return load_processor(resolve_model(str(folder), recipe.model, quiet()), recipe.model)


def test_padding_falls_back_to_the_end_token(tiny_gpt2, tmp_path):
    folder = shutil.copytree(tiny_gpt2, tmp_path / "m")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_template_file_replaces_the_models_own(tiny_llama, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages[0]['content'] }}!")
    tokenizer = load(tiny_llama, chat_template=str(tmp_path / "own.jinja"))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "so"}], tokenize=False) == "so!"


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_an_unreadable_template_is_reported(tiny_llama, tmp_path, content):
    if content is not None:
        (tmp_path / "own.jinja").write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load(tiny_llama, chat_template=str(tmp_path / "own.jinja"))
    assert caught.value.problems[0].where == "model.chat_template"


def test_template_values_are_saved_in_the_template(tmp_path):
    folder = build_llama(tmp_path / "m", EMPTY_THOUGHTS)
    tokenizer = load(folder, chat_template_kwargs={"enable_thinking": False})
    save_tokenizer(tokenizer, tmp_path / "saved")
    asked = {"conversation": [{"role": "user", "content": "two?"}], "add_generation_prompt": True, "tokenize": False}
    saved, plain = AutoTokenizer.from_pretrained(tmp_path / "saved"), AutoTokenizer.from_pretrained(folder)
    assert saved.apply_chat_template(**asked) == plain.apply_chat_template(**asked, enable_thinking=False)
    assert saved.apply_chat_template(**asked) != plain.apply_chat_template(**asked)
    assert saved.apply_chat_template(**asked, enable_thinking=True) == plain.apply_chat_template(**asked)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path / "saved")
    again = load(tmp_path / "saved", chat_template_kwargs={"enable_thinking": False})
    assert again.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("name", ["enable_thinkin", "eos_token"])
def test_values_that_the_template_never_reads_or_already_has_are_refused(tmp_path, name):
    folder = build_llama(tmp_path / "m", "{{ eos_token if false }}" + EMPTY_THOUGHTS)
    with pytest.raises(RecipeError) as caught:
        load(folder, chat_template_kwargs={name: False})
    assert caught.value.problems[0].where == f"model.chat_template_kwargs.{name}"


def test_tokens_are_added_and_existing_ones_are_reported(tiny_llama):
    before = len(load(tiny_llama))
    tokenizer = load(tiny_llama, add_tokens=["<tool>", "</tool>"])
    assert len(tokenizer) == before + 2
    assert tokenizer.tokenize("a<tool>b")[1] == "<tool>"
    with pytest.raises(RecipeError) as caught:
        load(tiny_llama, add_tokens=["<tool>", "<|im_end|>", "<pad>"])
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, r"tokenizer\.json"),
        ("tokenizer.json", '{"version": ', "tokenizer"),
        ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast"}', "eos_token"),
    ],
)
def test_a_missing_or_damaged_tokenizer_or_one_without_an_end_is_refused(tiny_llama, tmp_path, name, content, message):
    folder = shutil.copytree(tiny_llama, tmp_path / "m")
    if content is None:
        for path in folder.glob("tokenizer*"):
            path.unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(EnvironmentProblem, match=message):
        load(folder)


def test_the_saved_tokenizer_names_a_class_of_version_4_and_reads_back_the_same(tiny_llama, tmp_path):
    tokenizer = load(tiny_llama, add_tokens=["<tool>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(config.get("extra_special_tokens"), list)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "one<tool>two<extra>three <|im_end|>"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.chat_template == tokenizer.chat_template
    assert again.all_special_ids == tokenizer.all_special_ids
    assert (again.pad_token, again.eos_token, again.bos_token) == ("<pad>", "<|im_end|>", "<|endoftext|>")


DATED_LLAMA3 = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}"
    "{% endif %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '<|eot_id|>' }}"
) + LLAMA3.replace("{{ bos_token }}", "")


@pytest.mark.parametrize("named", [False, True])
def test_the_saved_template_gives_the_ids_of_training_on_any_day(tmp_path, named):
    folder = build_llama(tmp_path / "m", chat_template=DATED_LLAMA3)
    if named:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = {"default": DATED_LLAMA3, "tool_use": DATED_LLAMA3}
        tokenizer.save_pretrained(folder)
    row = conversation("which day?", "that day")
    recipe = recipe_with(folder, model={"add_tokens": OWN_TOKENS})
    tokenizer = load(folder, add_tokens=OWN_TOKENS)
    ((example,),) = encode_chat([row], tokenizer, recipe)
    save_tokenizer(tokenizer, tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert "strftime_now(" not in json.dumps(saved.chat_template)
    assert "Today Date: 26 Jul 2024" in saved.apply_chat_template(row["messages"], tokenize=False)
    assert saved.apply_chat_template(row["messages"])["input_ids"] == example.input_ids
    asked = saved.apply_chat_template(row["messages"][:1], add_generation_prompt=True)["input_ids"]
    assert asked == render_prompt(row["messages"][:1], tokenizer, recipe)


PARTS = CHATML.replace(
    "message['content']",
    "(message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join)",
)
CHAT = [("system", "Be kind."), ("user", "two?"), ("assistant", "Two."), ("user", "three?")]


@pytest.mark.parametrize("template", [CHATML, PARTS])
@pytest.mark.parametrize("file", ["processor_config.json", "chat_template.json"])
def test_the_template_of_a_processor_of_pictures_makes_the_prompts_of_text_rows(tmp_path, file, template):
    folder = build_llama(tmp_path / "m", LLAMA3 if file == "processor_config.json" else None)
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / file).write_text(json.dumps({"chat_template": template}))
    expected = render_jinja_template(
        [[{"role": role, "content": [{"type": "text", "text": text}]} for role, text in CHAT]],
        chat_template=PARTS,
        add_generation_prompt=True,
    )[0][0]
    tokenizer, recipe = load(folder), recipe_with(folder)
    rows = [{"role": role, "content": text} for role, text in CHAT]
    assert tokenizer.decode(render_prompt(rows, tokenizer, recipe)) == expected
    (encoded,) = encode_chat([{"messages": rows[:3]}], tokenizer, recipe)
    assert "Two.<|im_end|>" in tokenizer.decode(encoded[0].input_ids)
    save_tokenizer(tokenizer, tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.apply_chat_template(rows, add_generation_prompt=True, tokenize=False) == expected


def test_a_system_prompt_reaches_a_template_that_takes_only_parts(tmp_path):
    folder = build_llama(tmp_path / "m", PARTS)
    recipe = recipe_with(folder)
    tokenizer = load_processor(resolve_model(str(folder), recipe.model, quiet()), recipe.model, "Be kind.")
    assert "Be kind." in tokenizer.decode(render_prompt([{"role": "user", "content": "two?"}], tokenizer, recipe))


def test_a_template_that_takes_texts_stays_as_it_is(tmp_path):
    either = CHATML.replace(
        "message['content'] +", "(message.content if message.content is string else message.content[0].text) +"
    )
    assert load(build_llama(tmp_path / "m", either)).chat_template == either
