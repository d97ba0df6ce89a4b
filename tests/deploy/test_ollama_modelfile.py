import json
import shutil
import subprocess
from pathlib import Path

import pytest
from support import templates
from support.models import CHATML, train_tokenizer
from support.runs import write_recipe
from support.templates import DEFAULT_SYSTEM, EMPTY_THOUGHTS

from llmtune.deploy.ollama_modelfile import (
    go_template,
    sample_conversations,
    sampling_parameters,
    split_template,
    write_chat,
)
from llmtune.recipe.loader import load_recipe

LLAMA3 = templates.LLAMA3.replace("<|eot_id|>", "<|im_end|>")
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Turns must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ (first if loop.first else '') + message['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TEMPLATES = {
    "ChatML": CHATML,
    "a default system message": DEFAULT_SYSTEM.replace("kind", '"kind"'),
    "Llama 3": LLAMA3,
    "Gemma 3": GEMMA,
    "Gemma 2": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + GEMMA,
}
COUNTS = CHATML.replace("message['content']", "(loop.index | string) + message['content']")
REPEATS = "{{ messages[0]['content'] }}" + CHATML


@pytest.fixture
def describe(tmp_path, chat_rows):
    def look(template, *, add_bos=False, model=None, **generation):
        processor = train_tokenizer(template)
        sections = {"generation": generation, "model": model or {}}
        recipe = load_recipe(write_recipe(tmp_path / "r.yaml", "model", chat_rows, **sections)).recipe
        return split_template(processor, recipe, add_bos), processor, recipe

    (tmp_path / "model").mkdir()
    return look


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_template_parts_render_like_the_chat_template(describe, name):
    parts, processor, _ = describe(TEMPLATES[name])
    for messages in sample_conversations(parts):
        wanted = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert write_chat(parts, messages) == wanted
    assert (("", "system") in parts) == (name != "Gemma 2")


@pytest.mark.parametrize("template", [COUNTS, REPEATS])
def test_a_template_that_changes_messages_has_no_parts(describe, template):
    assert describe(template)[0] is None


def test_the_start_token_is_omitted_if_the_reader_adds_it(describe):
    with_start, without = describe(LLAMA3)[0], describe(LLAMA3, add_bos=True)[0]
    assert with_start["", "user"] == "<|endoftext|>" + without["", "user"]


def test_the_text_before_a_new_answer_may_exceed_that_before_an_old_one(describe):
    parts = describe(EMPTY_THOUGHTS, model={"chat_template_kwargs": {"enable_thinking": False}})[0]
    assert parts["user", ""] == parts["user", "assistant"] + "<think>\n\n</think>\n\n"


def test_sampling_overrides_all_of_ollamas_defaults(describe):
    assert sampling_parameters(describe(CHATML)[2]) == {"temperature": 0.0, "repeat_penalty": 1.0}
    drawn = describe(CHATML, do_sample=True, top_p=0.9, repetition_penalty=1.2)[2]
    wanted = {"temperature": 1.0, "top_k": 0, "top_p": 0.9, "min_p": 0.0, "repeat_penalty": 1.2}
    assert sampling_parameters(drawn) == wanted


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go, whose templates Ollama renders")
def test_gos_template_engine_renders_like_the_chat_templates(describe, tmp_path):
    asked, wanted = [], []
    for template in TEMPLATES.values():
        parts, processor, _ = describe(template)
        for messages in sample_conversations(parts):
            asked.append({"Template": go_template(parts), "Messages": messages})
            wanted.append(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    program = Path(__file__).with_name("ollama_template.go")
    done = subprocess.run(
        ["go", "run", program], cwd=tmp_path, input=json.dumps(asked), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == wanted
