"""Rows with tools, and how Qwen writes them, by hand from its template."""

from __future__ import annotations

import json
from typing import Any

OWN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def tool(name: str, *arguments: str) -> dict[str, Any]:
    """Return the JSON schema of a tool whose arguments are text."""
    properties = {argument: {"type": "string"} for argument in arguments}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": f"Use {name}.", "parameters": parameters}}


def system_with(*tools: Any) -> str:
    """Return Qwen 2.5's system message that lists tools."""
    lines = "".join(f"\n{json.dumps(entry)}" for entry in tools)
    return (
        f"{OWN}\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>{lines}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        "XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def written(name: str, arguments: str) -> str:
    """Return a call as the template writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def calling(question: str, name: str, arguments: Any, tools: list[Any]) -> dict[str, Any]:
    """Return a row whose answer is one call."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    return {"messages": [{"role": "user", "content": question}, answer], "tools": tools}
