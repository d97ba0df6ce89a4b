"""Every answer of a conversation is learned with its reasoning, although the template drops earlier thoughts."""

from conformance.case import Case
from conformance.conversations import ALL, RIGHT, last_only, learns, qwen

FIRST, SECOND = ("user", "What is 2 + 3?"), ("user", "And one more?")
THOUGHTS = "Two and three more.", "Five and one."
ANSWERS = "5", "6"
THINKING = [
    ("assistant", f"<think>\n{thought}\n</think>\n\n{words}") for thought, words in zip(THOUGHTS, ANSWERS, strict=True)
]
RENDERED = [FIRST, ("assistant", "5"), SECOND, THINKING[1]]


ROW = {
    "messages": [
        {"role": "user", "content": FIRST[1]},
        {"role": "assistant", "reasoning_content": THOUGHTS[0], "content": ANSWERS[0]},
        {"role": "user", "content": SECOND[1]},
        {"role": "assistant", "reasoning_content": THOUGHTS[1], "content": ANSWERS[1]},
    ]
}


def separately(*_, learn):
    """Write the first answer after its own prompt; the second one is `last_only`."""
    return qwen(FIRST, THINKING[0], learn=learn)


def both(way):
    def gradient(reference):
        learn = RIGHT[way]
        before = [(text, False) for text, _ in qwen(*RENDERED[:-1], learn=learn)]
        second = [*before, *qwen(*RENDERED, learn=learn)[len(before) :]]
        return reference.gradient([separately(learn=learn), second])

    return gradient


CASE = Case(
    title="Reasoning of earlier answers",
    group="what is learned",
    question="Qwen 3's template drops the thoughts of all answers but the last. Is the first answer learned with its "
    "thoughts, as the model has to write it, or is the model taught to answer without?",
    threads=["https://github.com/fw-ai/cookbook/pull/386", "https://github.com/axolotl-ai-cloud/axolotl/issues/3088"],
    rows=[ROW, ROW],
    settings={"model": "qwen3", "batch_size": 2},
    reason=r"(reasoning|thought|think)\w*.*(earlier|drop|lost|leaves? out|last)",
    right={
        **{f"two examples: {way}": both(way) for way in RIGHT},
        **learns(qwen, [[FIRST, THINKING[0], SECOND, THINKING[1]]], RIGHT, "all thoughts in one text: {}"),
        **last_only(qwen, RENDERED, RIGHT),
        **learns(qwen, [[FIRST, THINKING[0]]], RIGHT, "the first answer with its thoughts: {}"),
    },
    wrong=learns(qwen, [RENDERED], ALL, "the first answer without its thoughts: {}"),
)
