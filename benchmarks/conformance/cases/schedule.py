"""A linear schedule ends with the last step, with accumulation and two processes."""

from conformance.case import Case
from conformance.conversations import ALL, qwen, row

TURNS = [("system", "You are brief."), ("user", "Which colour is the sky?"), ("assistant", "Blue.")]
RATE = 0.1
SPEEDS = {"": (1, 0.75, 0.5, 0.25), "twice as fast": (1, 0.5, 0, 0), "four times as fast": (1, 0, 0, 0)}


def steps(way, factors):
    return lambda reference: reference.after_steps(
        [[qwen(*TURNS, learn=ALL[way])]] * 4, [RATE * factor for factor in factors]
    )


CASE = Case(
    title="The learning rate's schedule",
    group="what is computed",
    question="Four steps on two processes with two micro-batches each: does a linear schedule fall once per step?",
    threads=[
        "https://github.com/huggingface/accelerate/issues/2926",
        "https://github.com/huggingface/transformers/pull/24088",
    ],
    rows=[row(*TURNS)] * 4,
    settings={
        "batch_size": 4,
        "micro_batch_size": 1,
        "processes": 2,
        "steps": 4,
        "learning_rate": RATE,
        "schedule": "linear",
    },
    right={way: steps(way, SPEEDS[""]) for way in ALL},
    wrong={f"{name}: {way}": steps(way, factors) for name, factors in SPEEDS.items() if name for way in ALL},
)
