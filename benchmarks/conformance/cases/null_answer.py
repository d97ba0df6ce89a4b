"""An answer that is null is not learned as the word None."""

from conformance.case import Case
from conformance.conversations import ALL, learns, llama, row

GOOD = [("user", "Which colour is the sky?"), ("assistant", "Blue.")]
ASKED = ("user", "How many legs has a cat?")
EMPTY = {"messages": [{"role": "user", "content": ASKED[1]}, {"role": "assistant", "content": None}]}

TEXT, NOTHING = "(content|answer|message)", "(null|none|empty|missing)"

CASE = Case(
    title="An answer that is null",
    group="what is learned",
    question="One of two rows has a null where its answer should be. Is it refused or left out, or is a word learned?",
    threads=[
        "https://github.com/huggingface/transformers/pull/45422",
        "https://github.com/PrimeIntellect-ai/renderers/pull/131",
    ],
    rows=[row(*GOOD), EMPTY],
    settings={"model": "llama3", "batch_size": 2},
    reason=f"{TEXT}.{{0,40}}{NOTHING}|({NOTHING}|no) .{{0,20}}{TEXT}",
    left_out=learns(llama, [GOOD], ALL, "the other row only: {}"),
    wrong={
        **learns(llama, [GOOD, [ASKED, ("assistant", "None")]], ALL, "the word None: {}"),
        **learns(llama, [GOOD, [ASKED, ("assistant", "")]], ALL, "an empty answer: {}"),
    },
)
