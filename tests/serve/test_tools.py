"""Tools and thoughts through OpenAI's client: a call, its arguments, its result, and the answer."""

import json
import time

import openai
import pytest
from support.learning import LOOKS_LIKE_A_CALL, WEATHER, weather_row
from support.models import build_llama
from support.serving import serving
from support.templates import EMPTY_THOUGHTS, HERMES, recipe_for, tokenizer_with
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtune.data.template_text import with_defaults
from llmtune.serve.served_model import ServedModel
from llmtune.tasks.registry import get_task


@pytest.fixture
def client(learned_url):
    """OpenAI's client of a server whose model memorised rows with tools."""
    with openai.OpenAI(base_url=f"{learned_url}/v1", api_key="none") as opened:
        yield opened


def ask(client, messages, *, stream, **options):
    """Return the message of an answer, its finish reason, and its number of chunks."""
    made = client.chat.completions.create(model="tiny", messages=messages, stream=stream, **options)
    if not stream:
        message = made.choices[0].message
        calls = [(call.function.name, call.function.arguments, call.id) for call in message.tool_calls or ()]
        thoughts = getattr(message, "reasoning_content", "")
        return message.content or "", thoughts, calls, made.choices[0].finish_reason
    content, thoughts, calls, reason = "", "", [], None
    for chunk in made:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        thoughts += getattr(choice.delta, "reasoning_content", "")
        for call in choice.delta.tool_calls or ():
            assert call.index == len(calls)
            calls.append((call.function.name, call.function.arguments, call.id))
        reason = choice.finish_reason or reason
    return content, thoughts, calls, reason


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("city", ["Paris", "Rome"])
def test_the_openai_client_makes_a_call_sends_its_result_and_gets_the_answer(client, city, stream):
    row = weather_row(city)
    messages = row["messages"][:1]
    content, thoughts, calls, reason = ask(client, messages, stream=stream, tools=[WEATHER])
    assert (content, thoughts, reason) == ("", "", "tool_calls")
    ((name, arguments, call_id),) = calls
    assert (name, json.loads(arguments)) == ("weather", {"city": city})
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    messages.append({"role": "tool", "tool_call_id": call_id, "content": row["messages"][2]["content"]})
    answered = ask(client, messages, stream=stream, tools=[WEATHER])
    assert answered == (row["messages"][3]["content"], "", [], "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_arrive_as_reasoning_content(client, stream):
    found = ask(client, [{"role": "user", "content": "Think!"}], stream=stream)
    assert found == ("Four.", "two and two", [], "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_looks_like_a_call_is_content_if_the_request_has_no_tools(client, stream):
    found = ask(client, [{"role": "user", "content": "How is a call written?"}], stream=stream)
    assert found == (LOOKS_LIKE_A_CALL, "", [], "stop")


def test_a_client_may_override_the_template_values_of_the_recipe(tmp_path):
    folder = build_llama(tmp_path / "m", EMPTY_THOUGHTS)
    recipe = recipe_for(kwargs={"enable_thinking": False})
    processor = AutoTokenizer.from_pretrained(folder)
    processor.chat_template = with_defaults(processor.chat_template, {"enable_thinking": False})
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    served = ServedModel("tiny", model, processor, recipe, get_task("chat"))
    messages = [{"role": "user", "content": "four"}]

    def prompt_of(client, **values):
        extra = {"return_token_ids": True, "chat_template_kwargs": values or None}
        made = client.chat.completions.create(model="tiny", messages=messages, max_tokens=2, extra_body=extra)
        return processor.decode(made.prompt_token_ids)

    with serving(served) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        assert prompt_of(client).endswith("<think>\n\n</think>\n\n")
        assert prompt_of(client, enable_thinking=True).endswith("assistant\n")
        assert prompt_of(client).endswith("<think>\n\n</think>\n\n")
        with pytest.raises(openai.BadRequestError, match="enable_thinkin'"):
            prompt_of(client, enable_thinkin=True)


def test_a_prompt_beyond_the_context_is_refused_before_calls_are_tried(client):
    """Each tool costs three readings of the prompt: 100 tools and 240 kB of text took half a minute."""
    tools = [{"type": "function", "function": {"name": f"tool_{i}"}} for i in range(200)]
    started = time.monotonic()
    messages = [{"role": "user", "content": "red cat " * 20_000}]
    with pytest.raises(openai.BadRequestError, match="context holds"):
        ask(client, messages, stream=False, tools=tools, tool_choice="required")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_required_call_begins_the_answer(client, choice):
    asked = {"messages": [{"role": "user", "content": "four"}], "tools": [WEATHER], "tool_choice": choice}
    made = client.chat.completions.create(model="tiny", **asked, extra_body={"return_token_ids": True})
    written = tokenizer_with(HERMES).decode(made.choices[0].token_ids)
    assert written.startswith('<tool_call>\n{"name": "weather", "arguments": {')
    assert made.usage.completion_tokens == len(made.choices[0].token_ids)
    free = client.chat.completions.create(model="tiny", messages=asked["messages"], tools=[WEATHER])
    assert made.usage.prompt_tokens == free.usage.prompt_tokens


def test_hidden_tools_are_never_called(client):
    messages = weather_row("Paris")["messages"][:1]
    made = client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER], tool_choice="none")
    plain = client.chat.completions.create(model="tiny", messages=messages)
    assert made.usage.prompt_tokens == plain.usage.prompt_tokens
