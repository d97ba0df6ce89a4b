"""Make asterisk-prompts/: short telephone recordings as FLAC with their transcripts in metadata.csv.

apt-get download asterisk-core-sounds-en-wav asterisk-core-sounds-en
for package in asterisk-core-sounds-*.deb; do dpkg-deb -x $package /tmp/asterisk; done
python recipes/data/make_asterisk_prompts.py --unpacked /tmp/asterisk recipes/data/asterisk-prompts
"""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Iterator
from pathlib import Path

import soundfile
from make_debian_sections import arguments, digest

SOUNDS = "usr/share/asterisk/sounds/en_US_f_Allison"
TRANSCRIPTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
COPYRIGHT = "usr/share/doc/asterisk-core-sounds-en/copyright"
SPELLED = ("digits/", "letters/", "phonetic/")
SOUND_LIKE_OTHERS = ("digits/oh",)
SHORT_PROMPTS = 60
MAX_SECONDS = 1.8
MIN_WORDS = 2
MENDED = {"fourtieth": "fortieth", "exclaimation-point": "exclamation point", "xray": "x-ray"}


def main() -> None:
    """Choose prompts, write their recordings, transcripts and credits."""
    given = arguments(__doc__, "unpacked", "folder with the two unpacked packages")
    given.out.mkdir(exist_ok=True)
    prompts = choose(given.unpacked)
    with (given.out / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["file_name", "text"])
        table.writerows(
            (convert(given.unpacked / SOUNDS / f"{name}.wav", given.out), prompts[name]) for name in prompts
        )
    (given.out / "CREDITS").write_text(credit_notice(given.unpacked / COPYRIGHT), encoding="utf-8")
    print(f"{len(prompts)} recordings, {sum(file.stat().st_size for file in given.out.iterdir()):,} bytes")


def choose(unpacked: Path) -> dict[str, str]:
    """Choose all spelled prompts and `SHORT_PROMPTS` others that are short: name -> transcript, in the order of a hash.

    No two transcripts are the same, and a spelled prompt goes before another with its words.
    """
    known = sorted(read_transcripts(unpacked / TRANSCRIPTS), key=lambda pair: digest(pair[0]))
    seen: set[str] = set()
    spelled: dict[str, str] = {}
    others: dict[str, str] = {}
    for name, text in sorted(known, key=lambda pair: not pair[0].startswith(SPELLED)):
        file, said = unpacked / SOUNDS / f"{name}.wav", text.lower().strip(".!")
        if said in seen or name in SOUND_LIKE_OTHERS or not file.is_file():
            continue
        if name.startswith(SPELLED):
            spelled[name] = text
        elif len(others) < SHORT_PROMPTS and is_short(text, file):
            others[name] = text
        seen.add(said)
    chosen = spelled | others
    return {name: chosen[name] for name in sorted(chosen, key=digest)}


def read_transcripts(file: Path) -> Iterator[tuple[str, str]]:
    """Yield name and words of each prompt that is said; notes in brackets, such as the sign itself, are left out."""
    for line in gzip.decompress(file.read_bytes()).decode("utf-8").splitlines():
        name, colon, text = line.partition(": ")
        text = " ".join(re.sub(r"\[.+\]|\.\.\.", "", text).split())
        if colon and text and not line.startswith(";") and not re.search(r"[<(]", text):
            yield name, MENDED.get(text, text)


def is_short(text: str, file: Path) -> bool:
    """Whether a prompt has words (no digits, which may be said in two ways) and lasts at most `MAX_SECONDS`."""
    return (
        len(text.split()) >= MIN_WORDS and not re.search(r"\d", text) and soundfile.info(file).duration <= MAX_SECONDS
    )


def convert(wav: Path, out: Path) -> str:
    """Write a recording as FLAC, sample for sample, and return the name of the file."""
    samples, rate = soundfile.read(wav, dtype="int16")
    folder = f"{wav.parent.name}-" if f"{wav.parent.name}/" in SPELLED else ""
    name = f"{folder}{wav.stem}.flac"
    soundfile.write(out / name, samples, rate, format="FLAC", subtype="PCM_16", compression_level=1.0)
    return name


def credit_notice(copyright_file: Path) -> str:
    """The notice and the whole licence of the English recordings, as their package states them."""
    text = copyright_file.read_text(encoding="utf-8")
    stanzas = re.split(r"\n\n(?=Files:|License:)", text)
    licence = next(stanza for stanza in stanzas if stanza.startswith("License: CC-BY-SA-3.0\n"))
    return "\n\n".join((CHANGED, stanzas[0].strip(), stanzas[1].strip(), licence.strip())) + "\n"


CHANGED = (
    "These recordings are a part of the work that is described below, under the same licence, CC-BY-SA-3.0\n"
    "(https://creativecommons.org/licenses/by-sa/3.0/). The original work has been modified: a part of it was chosen,\n"
    "and its WAV files were written as FLAC, sample for sample. In the transcripts notes are left out and spelling\n"
    "errors mended."
)


if __name__ == "__main__":
    main()
