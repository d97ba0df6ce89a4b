"""A row without a system message gets the template's own, as it will at inference."""

from conformance.case import Case
from conformance.conversations import ALL, learns, qwen, row
from conformance.qwen_tools import OWN

TURNS = [("user", "Which colour is the sky?"), ("assistant", "Blue.")]

CASE = Case(
    title="The template's own system message",
    group="what is learned",
    question="Qwen's template adds a system message to a conversation without one. Is the prompt of training the same "
    "as the prompt of inference?",
    threads=["https://github.com/xusenlinzy/api-for-open-llm/issues/240", "https://github.com/QwenLM/Qwen/issues/1089"],
    rows=[row(*TURNS)],
    right=learns(qwen, [[("system", OWN), *TURNS]], ALL),
    wrong={
        **learns(qwen, [TURNS], ALL, "no system message: {}"),
        **learns(qwen, [[("system", "You are a helpful assistant."), *TURNS]], ALL, "another system message: {}"),
    },
)
