"""The tools of a request: shown to the model, and where a call is asked for, how the answer has to begin."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from llmtune.serve.schemas import ApiError, ChatRequest, NamedToolChoice

if TYPE_CHECKING:
    from llmtune.records import Row
    from llmtune.serve.served_model import ServedModel

ARGUMENTS: Sequence[dict[str, object]] = ({}, {"a": 1}, {"b": ""})
"""What calls are written with, to see where their arguments begin."""
ANY_LENGTH = 1 << 30


def shown_tools(request: ChatRequest) -> list[dict[str, object]]:
    """Return the tools that the model sees; raises ApiError for a choice among none, or of another."""
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
    choice = request.tool_choice
    if choice not in (None, "none", "auto") and not tools:
        raise ApiError(400, "tool_choice asks for a call, and there are no tools.", param="tool_choice")
    named = choice.function.name if isinstance(choice, NamedToolChoice) else None
    if named is not None and named not in (tool["function"]["name"] for tool in tools):
        raise ApiError(400, f"tool_choice names {named!r}, which is none of the tools.", param="tool_choice")
    return [] if choice == "none" else tools


def check_shown(row: Row, ids: Sequence[int], served: ServedModel) -> None:
    """Raise ApiError where the prompt is the same without the tools."""
    without = {key: value for key, value in row.items() if key != "tools"}
    if row.get("tools") and served.task.prompt_ids(without, served.processor, served.recipe) == ids:
        raise ApiError(400, "The chat template of this model shows it no tools.", param="tools")


def begin_call(row: Row, request: ChatRequest, served: ServedModel) -> list[int]:
    """Return the token ids that the answer begins with, so that it calls a tool; none where the model may choose.

    They are what all calls that are asked for have in common: up to the arguments of the tool that is named, or up to
    the name of one of several. Raises ApiError where the chat template writes no calls.
    """
    choice = request.tool_choice
    if choice in (None, "none", "auto"):
        return []
    names = [tool.function.name for tool in request.tools or ()]
    names = [choice.function.name] if isinstance(choice, NamedToolChoice) else names
    calls = [{"name": name, "arguments": arguments} for name in names for arguments in ARGUMENTS]
    answers = [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]} for call in calls
    ]
    rows = [{**row, "messages": [*row["messages"], answer]} for answer in answers]
    data = served.recipe.data.model_copy(update={"train_on": "last", "max_length": ANY_LENGTH})
    encoded = served.task.encode(rows, served.processor, served.recipe.model_copy(update={"data": data}))
    refused = [examples for examples in encoded if isinstance(examples, str)]
    if refused:
        raise ApiError(400, f"tool_choice: {refused[0]}", param="tool_choice")
    targets = [list(one[-1].input_ids[one[-1].spans[-2] :]) for one in encoded if not isinstance(one, str)]
    begun = [token for token, *_ in takewhile(lambda same: len({*same}) == 1, zip(*targets, strict=False))]
    if not begun:
        message = "This model's calls begin in no common way: tool_choice may be none or auto."
        raise ApiError(400, message, param="tool_choice")
    return begun
