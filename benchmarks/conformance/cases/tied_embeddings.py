"""Embeddings that are also the output head are one matrix, in training and in the saved folder."""

from conformance.case import Case, Finding
from conformance.conversations import ALL, learns, qwen, row
from conformance.reference import distance, read_weights

TURNS = [("system", "You are brief."), ("user", "Which colour is the sky?"), ("assistant", "Blue.")]
NAME = "model.embed_tokens.weight"


def judge(case, reference, results):
    [result] = results.values()
    saved = read_weights(result.model)[NAME].float()
    step = {NAME: (reference.start[NAME] - saved) / result.job["learning_rate"]}
    if not step[NAME].any():
        return Finding("silently wrong", "the embeddings are not trained")
    with reference.allowing(result.found):
        far = min(distance(step, reference.of(gradient)) for gradient in case.right.values())
    return Finding("right", "", far) if far < 1e-3 else Finding("unexplained", "another step of the embeddings", far)


CASE = Case(
    title="Tied embeddings stay tied",
    group="what ships",
    question="The input embeddings are also the output head. After full fine-tuning, does the saved matrix have both "
    "gradients?",
    threads=[
        "https://github.com/Lightning-AI/litgpt/issues/1727",
        "https://github.com/NVIDIA-NeMo/Automodel/pull/2511",
    ],
    rows=[row(*TURNS)],
    right=learns(qwen, [TURNS], ALL),
    judge=judge,
)
