"""Models that memorise a few rows, and rows with tools for them."""

from collections.abc import Sequence
from typing import Any

import torch

from llmtune.data.collators import collate_padded
from llmtune.data.example import Example
from llmtune.tasks.base import AnyTask

LOOKS_LIKE_A_CALL = '<tool_call>\n{"name": "sum", "arguments": {"a": 1}}\n</tool_call>'
"""In the format of Hermes and Qwen."""
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SKIES = {"Paris": "rain", "Rome": "sun"}


def learn_by_heart(
    model: torch.nn.Module, examples: Sequence[Example], task: AnyTask, pad_id: int, steps: int = 80
) -> None:
    """Train all weights on the examples, as one batch."""
    batch = collate_padded(list(examples), pad_id)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = task.loss(model, batch, False)
        (loss.sum / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()


def weather_row(city: str, reasoning: str | None = None) -> dict[str, Any]:
    """Return a row with a question, an optional thought, a tool call, its result, and the answer."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
    calling: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
    return {
        "messages": [
            {"role": "user", "content": f"And in {city}?"},
            calling | ({"reasoning": reasoning} if reasoning else {}),
            {"role": "tool", "content": SKIES[city]},
            {"role": "assistant", "content": f"In {city}: {SKIES[city]}."},
        ],
        "tools": [WEATHER],
    }
