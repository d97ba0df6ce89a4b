"""Make movie-sentences.jsonl: sentences of film reviews, each with the mean of the scores that people gave it.

pip download --no-deps --no-binary :all: --dest /tmp vaderSentiment==3.3.2
python recipes/data/make_movie_sentences.py --sdist /tmp/vaderSentiment-3.3.2.tar.gz recipes/data/movie-sentences.jsonl
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from debian_packages import write_rows
from make_debian_sections import arguments, content_words, digest, is_known

INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SENTENCES = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
ROWS_A_LABEL = 1500
NEUTRAL_BELOW = 0.5
MIN_WORDS, MAX_WORDS = 4, 45


def main() -> None:
    """Read the sentences, choose rows, write them."""
    given = arguments(__doc__, "sdist", "the source archive of vaderSentiment")
    write_rows(given.out, list(choose(read_sentences(given.sdist))))


def read_sentences(archive: Path) -> list[dict[str, object]]:
    """Read all scored sentences from the archive within the archive, in the order of a hash of their text."""
    with tarfile.open(archive) as outer, tarfile.open(fileobj=io.BytesIO(unpack(outer, INNER))) as inner:
        lines = unpack(inner, SENTENCES).decode("utf-8").splitlines()
    rows = [to_row(*line.split("\t")) for line in lines]
    return sorted(rows, key=lambda row: digest(str(row["text"])))


def unpack(archive: tarfile.TarFile, name: str) -> bytes:
    """Read one file of an archive."""
    member = archive.extractfile(name)
    assert member
    return member.read()


def to_row(review: str, score: str, text: str) -> dict[str, object]:
    """One row; a score goes from -4 to 4, and its sign is the label."""
    label = "positive" if float(score) > 0 else "negative"
    return {
        "text": re.sub(r"\s+", " ", text).strip(),
        "label": label,
        "score": round(float(score), 3),
        "review": review,
    }


def choose(rows: list[dict[str, object]]) -> Iterator[dict[str, object]]:
    """Yield as many rows of each label, without neutral ones, fragments and near-duplicates."""
    left = {"negative": ROWS_A_LABEL, "positive": ROWS_A_LABEL}
    seen: list[frozenset[str]] = []
    for row in rows:
        text, label, score = str(row["text"]), str(row["label"]), float(str(row["score"]))
        words = content_words(text)
        if not left[label] or abs(score) < NEUTRAL_BELOW or not MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            continue
        if len(words) >= 3 and not is_known(words, seen):
            left[label] -= 1
            seen.append(words)
            yield row


if __name__ == "__main__":
    main()
