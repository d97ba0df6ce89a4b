"""Write sft.jsonl and rewards.jsonl from the shipped rows of home-tools: a request, and its call as one JSON object.

    python rows.py

24 rows teach the form; the other 75 have a column `json_schema`, which the reward of that name reads.
"""

import json
import random
from pathlib import Path
from typing import Any

from llmtune.recipe.builtin import recipes_folder

SFT_ROWS = 24


def main() -> None:
    """Write both files into the working folder."""
    lines = (recipes_folder() / "data" / "home-tools.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(convert, map(json.loads, lines)) if row]
    random.Random(0).shuffle(rows)  # noqa: S311  # only an order
    for row in rows[:SFT_ROWS]:
        del row["json_schema"]
    for name, part in (("sft", rows[:SFT_ROWS]), ("rewards", rows[SFT_ROWS:])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def convert(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return a row without tools whose answer is the call as JSON; None unless the row is one request and one call."""
    request, answer, *rest = row["messages"]
    calls = answer.get("tool_calls") or []
    if rest or len(calls) != 1:
        return None
    call = calls[0]["function"]
    text = json.dumps({"tool": call["name"], **call["arguments"]})
    messages = [{"role": "user", "content": request["content"]}, {"role": "assistant", "content": text}]
    return {"messages": messages, "json_schema": {"oneOf": [describe(tool["function"]) for tool in row["tools"]]}}


def describe(tool: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of a call of this tool."""
    parameters = tool["parameters"]
    return {
        "type": "object",
        "properties": {"tool": {"const": tool["name"]}, **parameters["properties"]},
        "required": ["tool", *parameters["required"]],
        "additionalProperties": False,
    }


if __name__ == "__main__":
    main()
