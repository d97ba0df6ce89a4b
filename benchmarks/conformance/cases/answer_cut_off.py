"""A row that is too long does not teach a cut-off answer without a word."""

from conformance.case import Case
from conformance.conversations import ALL, learns, qwen, row
from conformance.qwen_tools import OWN

SHORT = [("system", OWN), ("user", "Which colour is the sky?"), ("assistant", "Blue.")]
LONG = [("system", OWN), ("user", "Count."), ("assistant", " ".join(f"{number}," for number in range(60)))]
LENGTH = 96


def short_and_cut(way):
    def gradient(reference):
        ids, labels = reference.encode(qwen(*LONG, learn=ALL[way]))
        whole = reference.encode(qwen(*SHORT, learn=ALL[way]))
        return reference.gradient_of([reference.loss(*whole), reference.loss(ids[:LENGTH], labels[:LENGTH])])

    return gradient


def cut_in_proportion(way):
    """Prompt and answer lose the same share, as LLaMA-Factory's `infer_seqlen` does if both are long."""

    def gradient(reference):
        ids, labels = reference.encode(qwen(*LONG, learn=ALL[way]))
        answer = len(reference.encode([*qwen(*LONG[:-1]), *qwen(LONG[-1])[:2]])[0])
        kept = int(LENGTH * (len(ids) - answer) / len(ids))
        places = [*range(LENGTH - kept), *range(answer, answer + kept)]
        cut = [ids[place] for place in places], [labels[place] for place in places]
        whole = reference.encode(qwen(*SHORT, learn=ALL[way]))
        return reference.gradient_of([reference.loss(*whole), reference.loss(*cut)])

    return gradient


CASE = Case(
    title="An answer that is cut off",
    group="what is learned",
    question="One of two rows is longer than the maximum, and its answer would be cut in the middle. Is it refused, or"
    " left out with a word, or is an answer without an end learned?",
    threads=["https://github.com/huggingface/trl/issues/6668", "https://github.com/hiyouga/LlamaFactory/issues/1494"],
    rows=[row(*SHORT[1:]), row(*LONG[1:])],
    settings={"batch_size": 2, "max_length": LENGTH},
    reason=r"too long|exceeds|(longer|larger) than|left out|dropped (\d+|lengthy)|\btruncated\b",
    left_out=learns(qwen, [SHORT], ALL, "the long row left out: {}"),
    wrong={
        **{f"an answer cut off: {way}": short_and_cut(way) for way in ALL},
        **{f"an answer cut off, and its prompt: {way}": cut_in_proportion(way) for way in ALL},
    },
)
