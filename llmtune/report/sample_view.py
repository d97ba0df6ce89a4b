"""Sample rows made ready for the page: each task's prompt, reference and answers as a person reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PROMPT_NAMES = {
    "translate": "source",
    "summarize": "document",
    "qa": "question and context",
    "classify": "text",
    "token-classify": "text",
    "speech": "recording",
}
"""What a task's prompt is, where it is not a prompt."""
LONGEST_SHOWN, HEAD, TAIL = 1600, 1000, 400
"""Characters of a text that is shown whole, and what of a longer one is."""


def samples(evaluation: Mapping[str, Any] | None, task: str | None) -> list[dict[str, Any]]:
    """Rows side by side, each answer marked right where it is the reference."""
    return [sample_view(sample, evaluation or {}, task) for sample in (evaluation or {}).get("samples") or []]


def sample_view(sample: Mapping[str, Any], evaluation: Mapping[str, Any], task: str | None) -> dict[str, Any]:
    """Make one row ready: prompt, reference, and what either model said."""
    reference, prompt = str(sample.get("reference", "")), str(sample.get("prompt", ""))
    names = {"base": base_name(evaluation), "tuned": "tuned"}
    answers = []
    for who in (side for side in names if side in sample):
        said = read_tags(prompt, str(sample[who])) if task == "token-classify" else str(sample[who])
        right = task != "preference" and same(said, reference, task)
        answers.append({"who": names[who], "text": cut(said), "right": right})
    chosen = [
        {"who": names[who], "text": str(sample[f"{who}_choice"]), "right": sample[f"{who}_choice"] == reference}
        for who in names
        if sample.get(f"{who}_choice")
    ]
    return {
        "origin": str(sample.get("origin", "")).rsplit("/", 1)[-1],
        "prompt_name": PROMPT_NAMES.get(task or "", "prompt"),
        "prompt": cut(prompt),
        "reference_name": judged(sample) if task == "preference" else "reference",
        "reference": cut(reference),
        "answers": answers,
        "chosen": chosen,
    }


def base_name(evaluation: Mapping[str, Any]) -> str:
    """What the column beside the tuned model is called: nobody is to take a trivial baseline for the base model."""
    return "baseline" if evaluation.get("baseline") else "base"


def judged(sample: Mapping[str, Any]) -> str:
    """Say what the shown answer of a preference row is: the better of two, or the only one."""
    return "chosen answer" if str(sample.get("tuned", "")).startswith("chosen") else "judged answer"


def same(said: str, reference: str, task: str | None) -> bool:
    """Whether an answer is the reference; of several labels the order does not count."""
    if task == "classify":
        return sorted(said.split(", ")) == sorted(reference.split(", "))
    return said.strip() == reference.strip()


def read_tags(text: str, tags: str) -> str:
    """Write the entities that the tags of a text's words mark, as references are written: `Ada Lovelace (person)`.

    Tags are IOB2; an I- that continues nothing starts an entity. What does not fit the words stays as it is.
    """
    words, marks = text.split(" "), tags.split(" ")
    if len(words) != len(marks):
        return tags
    found: list[tuple[str, list[str]]] = []
    before = "O"
    for word, tag in zip(words, marks, strict=True):
        if tag.startswith("I-") and before[2:] == tag[2:]:
            found[-1][1].append(word)
        elif tag != "O":
            found.append((tag[2:], [word]))
        before = tag
    return ", ".join(f"{' '.join(entity)} ({kind})" for kind, entity in found) or "(none)"


def cut(text: str) -> str:
    """Leave most of a very long text out, and say how much that is."""
    if len(text) <= LONGEST_SHOWN:
        return text
    return f"{text[:HEAD]} [… {len(text) - HEAD - TAIL:,} characters …] {text[-TAIL:]}"
