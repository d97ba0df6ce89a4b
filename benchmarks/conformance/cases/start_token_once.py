"""A conversation starts with one start token, although the template and the tokenizer both add one."""

from conformance.case import Case
from conformance.conversations import ALL, learns, llama, row

TURNS = [("user", "Which colour is the sky?"), ("assistant", "Blue.")]


def doubled(*turns, learn):
    return [("<|begin_of_text|>", False), *llama(*turns, learn=learn)]


CASE = Case(
    title="One start token",
    group="what is learned",
    question="Template and tokenizer of Llama 3 both write the start token. Does a conversation get one, or two?",
    threads=[
        "https://github.com/OpenRLHF/OpenRLHF/issues/393",
        "https://github.com/deepseek-ai/DeepSeek-R1/issues/151",
    ],
    rows=[row(*TURNS)],
    settings={"model": "llama3"},
    right=learns(llama, [TURNS], ALL),
    wrong=learns(doubled, [TURNS], ALL, "two start tokens: {}"),
)
