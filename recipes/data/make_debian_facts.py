"""Make debian-facts.jsonl: questions about Debian packages, answered by a part of the text or by nothing in it.

python recipes/data/make_debian_facts.py --lists /tmp/lists recipes/data/debian-facts.jsonl
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TypeVar

from debian_packages import Package, is_prose, keep_distinct, names_somebody, read_share, sentences, write_rows
from debian_questions import FACTS, LANGUAGES, SAYINGS, Fact, Saying
from make_debian_sections import arguments, digest, fetch_lists

PACKAGES = 400
ROWS_A_SECTION = 40
FACTS_A_TEXT = 3
MIN_WORDS, MAX_WORDS = 15, 50
MAX_ANSWER = 16
SUBJECT = r"(?:This(?: [a-z]+)?|It|[A-Z][\w:+-]*(?:\.[a-z]+)?(?: [A-Z0-9][\w+-]*)?)"
ITSELF = re.compile(r"This(?: [a-z]+)?|It")
OTHERS = frozenset(
    re.findall(r"\w+", "There They These Those One You What Each If Most Some All Both Here That Such The")
)
END = (
    r"(?=[;(]|[.:!](?:\s|$)|,? (?:which|that|while|although|because|so that|when)\b"
    r"|, (?:but|and (?:is|can|it|has)|such|using)\b)"
)
# Words by which a description may answer a question for a fact after all.
HINTS = re.compile(
    r"\b(?:written|implemented|versions?|depends?|needs?|requires?|interfaces?|architectures?|recommends?|suggests?"
    rf"|command|scripts?|shell|makefile|terminal|graphical|web|{'|'.join(map(re.escape, LANGUAGES.values()))})(?!\w)",
    re.IGNORECASE,
)
T = TypeVar("T")


def main() -> None:
    """Fetch the package lists, write texts and questions, write them."""
    given = arguments(__doc__)
    fetch_lists(given.lists)
    usable = [package for package in read_share(given.lists, "facts") if find_sayings(package)]
    packages = list(islice(keep_distinct(usable, ROWS_A_SECTION), PACKAGES))
    rows = [
        row
        for place, package in enumerate(packages)
        for row in ask(package, other=packages[place - 1], doubt=place % 2 == 0)
    ]
    write_rows(given.out, sorted(rows, key=lambda row: digest(f"{row['package']} {row['question']}")))


def describe(package: Package) -> str:
    """As many sentences of the first paragraph as fit; empty if they are no prose, too short, or name somebody."""
    body = package.paragraphs[0] if package.paragraphs else ""
    taken = ""
    for sentence in sentences(body):
        if len(f"{taken} {sentence}".split()) > MAX_WORDS:
            break
        taken = f"{taken} {sentence}".strip()
    plain = taken.isascii() and is_prose(taken) and not names_somebody(taken) and "http" not in taken
    return taken if plain and len(taken.split()) >= MIN_WORDS and package.name not in taken else ""


def ask(package: Package, other: Package, doubt: bool) -> Iterator[dict[str, object]]:
    """Yield a row about a fact, one about what the description says, and with `doubt` one without an answer."""
    body = describe(package)
    known = {fact: value for fact in FACTS if (value := fact.read(package)) and not stands_in(value, body)}
    if re.search(r"\b(?:written|implemented) in\b", body):
        known = {fact: value for fact, value in known.items() if fact.name != "language"}
    order = sorted(known, key=lambda fact: digest(f"{package.name} {fact.name}"))
    stated = order[:FACTS_A_TEXT]
    context, found = write_context(package, body, {fact: known[fact] for fact in stated})
    asked = pick(stated, package, "asked")
    yield to_row(package, context, pick(asked.questions, package, "ask").format(name=package.name), found[asked])
    question, answer = pick(find_sayings(package), package, "said")
    yield to_row(package, context, question, (answer, context.index(body) + body.index(answer)))
    if doubt:
        yield to_row(package, context, ask_in_vain(package, other, stated, context), None)


def write_context(package: Package, body: str, facts: dict[Fact, str]) -> tuple[str, dict[Fact, tuple[str, int]]]:
    """Write facts and description as one text; returns it, and each fact's value with the place where it begins."""
    stay = int(digest(f"{package.name} place")[:8], 16) % (len(facts) + 1)
    text, found = "", {}
    for place, (fact, value) in enumerate(facts.items()):
        if place == stay:
            text += f"{body} "
        it = package.name if place == 0 else pick(("it", "the package", package.name), package, fact.name)
        statement = pick(fact.statements, package, f"state {fact.name}")
        if it != package.name and statement.startswith("{it}"):
            it = it[0].upper() + it[1:]
        before, after = (part.format(it=it) for part in statement.split("{value}"))
        found[fact] = (value, len(text) + len(before))
        text += f"{before}{value}{after} "
    return (text if stay < len(facts) else text + body).strip(), found


def find_sayings(package: Package) -> list[tuple[str, str]]:
    """Find what the description says of the package itself or of a thing that it names: questions and answers."""
    body = describe(package)
    found = []
    for saying in SAYINGS:
        matches = [match for sentence in sentences(body) if (match := match_saying(saying, sentence))]
        if len(matches) == 1 and len(re.findall(rf"\b{saying.said}\b", body)) == 1:
            subject, answer = matches[0]
            name = package.name if ITSELF.fullmatch(subject) else subject
            found.append((pick(saying.questions, package, saying.name).format(name=name), answer))
    return found


def match_saying(saying: Saying, sentence: str) -> tuple[str, str] | None:
    """Subject and answer of a sentence that begins with its subject and says it this way, in few enough words."""
    match = re.match(rf"({SUBJECT}) (?:also )?{saying.said} ((?:[^.;:()!?]|[.:](?=\S))+?) ?{END}", sentence)
    if not match or not 2 <= len(match[2].split()) <= MAX_ANSWER or match[1].split()[0] in OTHERS:
        return None
    return match[1], match[2]


def ask_in_vain(package: Package, other: Package, stated: Sequence[Fact], context: str) -> str:
    """A question whose answer is not in the text: of a fact that is left out, or of another package.

    All wordings are those of questions that have an answer elsewhere, so that the question alone tells nothing.
    """
    silent = [fact for fact in FACTS if fact not in stated and not stands_in(fact.read(package), context)]
    if HINTS.search(describe(package)):
        silent = [fact for fact in silent if fact.name in ("section", "installed", "download", "source")]
    if not silent or pick((True, False, False, False), package, "of another"):
        return pick(pick(stated, package, "vain").questions, package, "ask").format(name=other.name)
    return pick(pick(silent, package, "silent").questions, package, "ask").format(name=package.name)


def stands_in(value: str, text: str) -> bool:
    """Whether a value stands in a text, not as a part of a longer word."""
    return bool(value) and bool(re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text))


def pick(choices: Sequence[T], package: Package, purpose: str) -> T:
    """Choose one, for each package and purpose in another way, and always the same."""
    return choices[int(digest(f"{package.name} {purpose}")[:8], 16) % len(choices)]


def to_row(package: Package, context: str, question: str, answer: tuple[str, int] | None) -> dict[str, object]:
    """One row in the form of SQuAD 2; without an answer both lists are empty."""
    text, start = ([answer[0]], [answer[1]]) if answer else ([], [])
    assert all(context[place:].startswith(words) for words, place in zip(text, start, strict=True))
    answers = {"text": text, "answer_start": start}
    return {"question": question, "context": context, "answers": answers, "package": package.name}


if __name__ == "__main__":
    main()
