"""Rotations follow `rope_parameters`, where transformers 5 writes their base and scale."""

from copy import deepcopy

from conformance.case import Case
from conformance.conversations import ALL, learns, llama, row

ANSWER = "Blue, if it is day, and black at night, with white dots; red in the morning, and grey if it rains."
TURNS = [("user", "Which colour is the sky?"), ("assistant", ANSWER)]


def rotated(way, base):
    """Return the gradient of rotations with another base, and without scaling."""

    def gradient(reference):
        decoder, config = reference.model.model, deepcopy(reference.model.config)
        kept, config.rope_parameters = decoder.rotary_emb, {"rope_type": "default", "rope_theta": base}
        decoder.rotary_emb = type(kept)(config)
        try:
            return reference.gradient([llama(*TURNS, learn=ALL[way])])
        finally:
            decoder.rotary_emb = kept

    return gradient


CASE = Case(
    title="The rotations of the model",
    group="what is computed",
    question="The configuration has the base and the scale of Llama 3.1's rotations in `rope_parameters`, as "
    "transformers 5 saves it. Is the gradient that of these rotations?",
    threads=["https://github.com/ml-explore/mlx-lm/pull/953", "https://github.com/THUDM/slime/pull/1720"],
    rows=[row(*TURNS)],
    settings={"model": "llama3-scaled"},
    reason=r"rope_(parameters|theta|scaling)\b.{0,60}\b(not?|unknown|unsupported|ignored|missing)\b",
    right=learns(llama, [TURNS], ALL),
    wrong={
        **{f"base 500000, not scaled: {way}": rotated(way, 500000.0) for way in ALL},
        **{f"base 10000, not scaled: {way}": rotated(way, 10000.0) for way in ALL},
    },
)
