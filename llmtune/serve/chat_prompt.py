"""Turn a chat request into a prompt: its messages, values for the template, and the call that `tool_choice` forces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from llmtune.data.chat_rows import MESSAGE_KEYS, open_conversation
from llmtune.data.chat_template import Tools
from llmtune.data.long_texts import count_tokens, start_of
from llmtune.data.pictures import PICTURE_PARTS
from llmtune.data.rejected_rows import RowError
from llmtune.errors import LlmtuneError, nearest
from llmtune.evaluate.generation import answer_template
from llmtune.recipe.schema import Recipe
from llmtune.records import Prompt, Row
from llmtune.serve.schemas import ApiError, ChatRequest, ToolDefinition
from llmtune.serve.served_model import ServedModel

ARGUMENTS: Sequence[dict[str, object]] = ({}, {"a": 1}, {"b": ""})
"""Arguments for sample calls; their common prefix ends before any argument."""
ANY_LENGTH = 1 << 30
MAX_PICTURES = 16
"""Pictures in one request: each may take a second to decode."""
MAX_POSITIONS = 1 << 15
"""Tokens of prompt and answer for a model that does not state a limit."""


@dataclass(frozen=True)
class ServedPrompt:
    """The prompt of a request, and how its answer is read."""

    prompt: Prompt
    begun: Sequence[int] = ()
    """Ids after the prompt that begin the answer with a call; none if the model may choose."""
    tools: Tools = None
    turn: int = 0
    """Number of messages, without the system message."""


def chat_prompt(request: ChatRequest, served: ServedModel) -> ServedPrompt:
    """Return the prompt of a conversation, made by the same function as in training.

    Raises ApiError that names the invalid parameter.
    """
    conversation, recipe = read_messages(request, served), override_template_values(request, served)
    task, processor = served.task, served.processor
    refuse_long("\n".join(str(message.get("content") or "") for message in conversation["messages"]), served)
    try:
        prompt = task.prompt(conversation, processor, recipe)
        require_room(served, len(prompt), None)  # a forced call costs as many readings of the prompt as there are tools
        without = {key: value for key, value in conversation.items() if key != "tools"}
        if conversation.get("tools") and task.prompt_ids(without, processor, recipe) == prompt.ids:
            raise ApiError(400, "The chat template of this model does not support tools.", param="tools")
        begun = begin_call(conversation, request, served, recipe)
    except LlmtuneError as error:
        raise ApiError.of(error, param="messages") from error
    turn = sum(message["role"] != "system" for message in conversation["messages"])
    return ServedPrompt(prompt, begun, conversation.get("tools"), turn)


def refuse_long(text: str, served: ServedModel) -> None:
    """Raise ApiError for a text that the context cannot hold, at the cost of its start: others wait meanwhile."""
    context = served.context or MAX_POSITIONS
    start = start_of(text, served.processor, context)
    if len(start) < len(text) and count_tokens(start, served.processor, context) > context:
        message = f"The prompt is longer than the model's context holds: {context} tokens."
        raise ApiError(400, message, code="context_length_exceeded")


def require_room(served: ServedModel, tokens: int, max_tokens: int | None) -> int:
    """Return how many tokens fit after a prompt; raises ApiError if none do, or fewer than `max_tokens`."""
    context = served.context or MAX_POSITIONS
    room = context - tokens
    if room < (max_tokens or 1):
        answer = f" and the answer may have {max_tokens}" if max_tokens else ""
        message = f"The prompt has {tokens} tokens{answer}, but the model's context holds {context}."
        raise ApiError(400, message, param="max_tokens" if room > 0 else None, code="context_length_exceeded")
    return room


def read_messages(request: ChatRequest, served: ServedModel) -> Row:
    """Return the row of a conversation that awaits an answer.

    Messages are checked as rows are, and so is their order. Pictures must be in the request: no address and no file of
    this machine is read.
    """
    _check_pictures(request)
    for number, message in enumerate(request.messages, 1):
        for key, value in message.items():
            if value is not None and key not in MESSAGE_KEYS:
                what = f"messages: message {number} has an unknown key {key!r}.{nearest(key, [*MESSAGE_KEYS])}"
                raise ApiError(400, what, param="messages")
    if request.messages[-1].get("role") == "assistant":
        raise ApiError(400, "The last message is the assistant's. Add a user message.", param="messages")
    tools = shown_tools(request)
    try:
        return dict(open_conversation(request.messages, tools, reads_pictures=served.task.model_kind.takes_images))
    except RowError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from error


def _check_pictures(request: ChatRequest) -> None:
    """Raise ApiError for too many pictures, and for a `detail` that training did not have."""
    contents = [content for message in request.messages if isinstance(content := message.get("content"), list)]
    parts = [part for content in contents for part in content if isinstance(part, dict)]
    pictures = [part for part in parts if part.get("type") in PICTURE_PARTS]
    if len(pictures) > MAX_PICTURES:
        what = f"messages: {len(pictures)} pictures; a request may have {MAX_PICTURES}"
        raise ApiError(400, what, param="messages")
    for part in pictures:
        stated = part.get("image_url")
        detail = part.get("detail") or (stated.get("detail") if isinstance(stated, dict) else None)
        if detail not in (None, "auto"):
            what = f"messages: detail {detail!r} is not supported: pictures are scaled as in training"
            raise ApiError(400, what, param="messages", code="unsupported_parameter")


def override_template_values(request: ChatRequest, served: ServedModel) -> Recipe:
    """Return the recipe with the client's chat template values; raises ApiError if the template ignores one."""
    if not request.chat_template_kwargs:
        return served.recipe
    model = served.recipe.model
    values = {**model.chat_template_kwargs, **request.chat_template_kwargs}
    section = model.model_copy(update={"chat_template_kwargs": values})
    recipe = served.recipe.model_copy(update={"model": section})
    try:
        answer_template(served.processor, recipe)
    except LlmtuneError as error:
        raise ApiError.of(error, param="chat_template_kwargs") from error
    return recipe


def shown_tools(request: ChatRequest) -> list[dict[str, object]]:
    """Return the tools that the model sees; raises ApiError if `tool_choice` does not fit them."""
    tools, choice = request.tools or [], request.tool_choice
    if choice not in (None, "none", "auto") and not tools:
        raise ApiError(400, "tool_choice asks for a call, but tools is empty.", param="tool_choice")
    if isinstance(choice, ToolDefinition) and choice.name not in [tool.name for tool in tools]:
        raise ApiError(400, f"tool_choice names {choice.name!r}, which is not in tools.", param="tool_choice")
    return [] if choice == "none" else [tool.model_dump(exclude_none=True) for tool in tools]


def begin_call(conversation: Row, request: ChatRequest, served: ServedModel, recipe: Recipe) -> list[int]:
    """Return the ids that begin the answer with a call; none if the model may choose.

    They are the common prefix of all allowed calls: up to the arguments if one tool is named, else up to the tool's
    name. Raises ApiError if the chat template does not write calls.
    """
    choice = request.tool_choice
    if choice in (None, "none", "auto"):
        return []
    names = [choice.name] if isinstance(choice, ToolDefinition) else [tool.name for tool in request.tools or ()]
    calls = [{"name": name, "arguments": arguments} for name in names for arguments in ARGUMENTS]
    answers = [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]} for call in calls
    ]
    rows = [{**conversation, "messages": [*conversation["messages"], answer]} for answer in answers]
    data = recipe.data.model_copy(update={"train_on": "last", "max_length": ANY_LENGTH})
    encoded = served.task.encode(rows, served.processor, recipe.model_copy(update={"data": data}))
    refused = [examples for examples in encoded if isinstance(examples, str)]
    if refused:
        raise ApiError(400, f"tool_choice: {refused[0]}", param="tool_choice")
    targets = [list(one[-1].input_ids[one[-1].spans[-2] :]) for one in encoded if not isinstance(one, str)]
    begun = [token for token, *_ in takewhile(lambda same: len({*same}) == 1, zip(*targets, strict=False))]
    if not begun:
        message = "This model's calls have no common prefix. Set tool_choice to none or auto."
        raise ApiError(400, message, param="tool_choice")
    return begun
