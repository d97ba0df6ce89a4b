"""Chat templates like those of models, written on the spot, and recipes to encode with them."""

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AddedToken, PreTrainedTokenizerFast

from llmtune.recipe.schema import Recipe
from support.models import CHATML, byte_level_tokenizer, train_tokenizer

LLAMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.index0 == 0 else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WRONGLY_MARKED = MARKED.replace("== 'assistant'", "== 'user'")
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and '</think>' in message['content'] and not loop.last %}"
    "{{ message['content'].split('</think>')[-1].lstrip() }}{% else %}{{ message['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
EMPTY_THOUGHTS = THINKING.replace(
    "{{ message['content'] }}",
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] }}",
)
ALWAYS_THINKS = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
ENDS_TWICE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
NO_END = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
NO_PROMPT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
)
DOUBLED_START = "{{ bos_token }}{{ bos_token }}" + CHATML
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '<call>' + call['function']['name'] + call['function']['arguments'] | tojson }}{% endfor %}"
    "{{ ('<|eom_id|>' if message['tool_calls'] else '<|im_end|>') + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HERMES = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['reasoning_content'] or message['reasoning'] %}"
    "{{ '<think>\n' + (message['reasoning_content'] or message['reasoning']) + '\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] }}{% for call in message['tool_calls'] or [] %}"
    "{{ '<tool_call>\n{\"name\": \"' + call['function']['name'] + '\", \"arguments\": ' }}"
    "{{ call['function']['arguments'] | tojson + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Thoughts and tool calls in the format of Hermes and Qwen."""
DATED = "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML

STABLE = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "marked": MARKED,
    "default system": DEFAULT_SYSTEM,
    "tools": TOOLS,
    "no system": NO_SYSTEM,
}
"""Templates that write earlier turns in the same way as prompts."""

OWN_TOKENS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with `template`, and with the special tokens of all templates."""
    tokenizer = train_tokenizer(template)
    tokenizer.add_tokens(OWN_TOKENS, special_tokens=True)
    return tokenizer


def recipe_for(task: str = "chat", kwargs: dict[str, Any] | None = None, **data: Any) -> Recipe:
    """Return a recipe with these keys in its data section."""
    return Recipe.model_validate(
        {
            "recipe_version": 1,
            "name": "test",
            "task": task,
            "data": {"train": "rows.jsonl", **data},
            "model": {"name": "tiny", "chat_template_kwargs": kwargs or {}},
        }
    )


def conversation(*texts: str, system: str | None = None) -> dict[str, Any]:
    """Return a chat row: question, answer, question, answer and so on."""
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}] * (system is not None) + messages}


# Families of models: our own texts in their formats, each with the tokens that it needs

FAMILY_FILES = {path.stem: path for path in sorted((Path(__file__).parent / "chat_families").glob("*.jinja"))}


@cache
def _plain_tokenizer() -> str:
    return byte_level_tokenizer([]).to_str()


@cache
def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a family's template; the template's first line names the tokens."""
    text = FAMILY_FILES[name].read_text("utf-8")
    named = dict(part.strip().split(": ", 1) for part in text.splitlines()[0].strip("{#-} ").split("; "))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_plain_tokenizer()))
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in named["special"].split()])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in named.get("added", "").split()])
    tokenizer.bos_token, tokenizer.eos_token = named.get("bos"), named["eos"]
    tokenizer.pad_token = named["eos"]
    tokenizer.chat_template = text
    tokenizer.name_or_path = name
    return tokenizer
