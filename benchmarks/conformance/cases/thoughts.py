"""The reasoning of an answer is learned before it."""

from conformance.case import Case
from conformance.conversations import ALL, learns, qwen

ASKED = ("user", "What is 2 + 3?")
THOUGHT = "Two and three more."

CASE = Case(
    title="Reasoning is learned",
    group="what is learned",
    question="Rows for Qwen 3 have `reasoning_content` next to `content`. Is it learned, as the template writes it?",
    threads=["https://github.com/fw-ai/cookbook/pull/386", "https://github.com/axolotl-ai-cloud/axolotl/issues/3088"],
    rows=[
        {
            "messages": [
                {"role": "user", "content": ASKED[1]},
                {"role": "assistant", "reasoning_content": THOUGHT, "content": "5"},
            ]
        }
    ],
    settings={"model": "qwen3"},
    right=learns(qwen, [[ASKED, ("assistant", f"<think>\n{THOUGHT}\n</think>\n\n5")]], ALL),
    wrong={
        **learns(qwen, [[ASKED, ("assistant", "<think>\n\n</think>\n\n5")]], ALL, "empty thoughts: {}"),
        **learns(qwen, [[ASKED, ("assistant", "5")]], ALL, "no thoughts: {}"),
    },
)
