"""A row with an image is not trained as if it had none."""

from conformance.case import Case
from conformance.conversations import ALL, learns, qwen, row
from conformance.qwen_tools import OWN

TEXT = "Which animal is in the picture?"
PARTS = [{"type": "text", "text": TEXT}, {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}]
GOOD = [("user", "Which colour is the sky?"), ("assistant", "Blue.")]
SYSTEM = ("system", OWN)


def with_question(words):
    return [[SYSTEM, *GOOD], [SYSTEM, ("user", words), ("assistant", "A cat.")]]


CASE = Case(
    title="An image for a text model",
    group="what is learned",
    question="One of two rows asks about an image; the model reads text only. Is the row refused, or is an answer "
    "about an unseen image learned?",
    threads=["https://github.com/hiyouga/LlamaFactory/issues/6703"],
    rows=[row(*GOOD), {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "A cat."}]}],
    settings={"batch_size": 2},
    # llmtune reads pictures from files, and refuses this row for its address. In a file, the picture is refused for the
    # model: tests/tasks/test_image_chat.py.
    reason=r"image (input|part|content)|(no|not support|without).*image|\bvision\b|\bmultimodal\b|not text"
    r"|picture at an address",
    left_out=learns(qwen, [[SYSTEM, *GOOD]], ALL, "the other row only: {}"),
    wrong={
        **learns(qwen, with_question(TEXT), ALL, "the image dropped: {}"),
        **learns(qwen, with_question(str(PARTS)), ALL, "the part written as Python: {}"),
        **learns(qwen, with_question(""), ALL, "the question dropped: {}"),
    },
)
