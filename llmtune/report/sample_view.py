"""Formats sample rows for reading: prompt, reference and answers of each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmtune.display.blocks import ModelAnswer, Sample
from llmtune.recipe.task_facts import TASK_FACTS, answer_kind
from llmtune.store.score_records import Evaluation

LONGEST_SHOWN, HEAD, TAIL = 1600, 1000, 400
"""Maximum characters of a text shown in full, and the characters shown of the start and end of a longer text."""
NUMBERS = {
    "rating": "The numbers are log-likelihoods of the answers, or the scores of a reward model. ",
    "relevances": "Relevances and scores are in the order of the passages. ",
}
"""By kind of answer, the meaning of answers that are numbers; none equals its reference."""


def present_samples(samples: Sequence[Mapping[str, str]], evaluation: Evaluation, task: str | None) -> list[Sample]:
    """Return rows with both models' answers; an answer equal to the reference is marked right."""
    names = {"base": "baseline" if evaluation.baseline else "base", "tuned": "tuned"}
    return [read_sample(sample, names, task) for sample in samples]


def read_sample(sample: Mapping[str, str], names: Mapping[str, str], task: str | None) -> Sample:
    """Return one row; `names` has the shown name of each model."""
    reference, prompt = str(sample.get("reference", "")), str(sample.get("prompt", ""))
    kind = answer_kind(task)
    answers = []
    for model in (name for name in names if name in sample):
        text = read_tags(prompt, str(sample[model])) if kind == "tags" else str(sample[model])
        answers.append(ModelAnswer(names[model], cut(text), kind not in NUMBERS and is_same(text, reference, kind)))
    chosen = [
        ModelAnswer(names[model], str(sample[f"{model}_choice"]), sample[f"{model}_choice"] == reference)
        for model in names
        if sample.get(f"{model}_choice")
    ]
    reference_name = "relevances" if kind == "relevances" else "reference"
    if kind == "rating":  # the better of two answers, or the only one
        reference_name = "chosen answer" if str(sample.get("tuned", "")).startswith("chosen") else "judged answer"
    origin = str(sample.get("origin", "")).rsplit("/", 1)[-1]
    prompt_name = TASK_FACTS[task].prompt_name if task in TASK_FACTS else "prompt"
    return Sample(prompt_name, cut(prompt), reference_name, cut(reference), answers, chosen, origin)


def is_same(text: str, reference: str, kind: str) -> bool:
    """Return whether an answer equals the reference; several labels may be in any order."""
    if kind == "labels":
        return sorted(text.split(", ")) == sorted(reference.split(", "))
    return text.strip() == reference.strip()


def read_tags(text: str, tags: str) -> str:
    """Return the entities marked by IOB2 tags, written like references: `Ada Lovelace (person)`.

    An I- tag that continues nothing starts an entity. Tags that do not match the words are returned unchanged.
    """
    words, marks = text.split(" "), tags.split(" ")
    if len(words) != len(marks):
        return tags
    entities: list[tuple[str, list[str]]] = []
    before = "O"
    for word, tag in zip(words, marks, strict=True):
        if tag.startswith("I-") and before[2:] == tag[2:]:
            entities[-1][1].append(word)
        elif tag != "O":
            entities.append((tag[2:], [word]))
        before = tag
    return ", ".join(f"{' '.join(entity)} ({kind})" for kind, entity in entities) or "(none)"


def cut(text: str) -> str:
    """Shorten a very long text, and state the number of characters removed."""
    if len(text) <= LONGEST_SHOWN:
        return text
    return f"{text[:HEAD]} [… {len(text) - HEAD - TAIL:,} characters …] {text[-TAIL:]}"
