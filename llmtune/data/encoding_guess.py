"""Guesses the encoding of a text file that is not UTF-8: by its marks, its zero bytes, its letters, or statistics."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

from llmtune.data.byte_streams import byte_order, open_bytes, skip_bom, wide_mark
from llmtune.data.object_store import RemoteFile

GUESSED_BYTES = 2**20
"""How many bytes of a file are read for a guess."""
WESTERN_SIGNS = "€‚„…†‡‰‹‘’“”•–—™›\xa0¡¢£§©ª«®°±²³´µ·º»¼½¾¿×÷"
FOREIGN = re.compile(r"(?<=[^\W\d_])[¡¢£¥ª¯¼½¾¿×](?=[^\W\d_])|(?<=[^\W\d_]{2})[¹³]|Ÿ")
"""Signs that no Western language writes in a word: letters of another code page, read as cp1252."""
MOST_RARE, MOST_RUNS, MOST_VALID = 0.1, 0.3, 0.1
"""Western text has at most these shares of rare signs, of signs three in a row, and of valid UTF-8 among them."""
CODE_PAGES = (
    ("cp1254", "ğışĞİŞ", "çöüâîûÇÖÜÂÎÛ", 0.3),
    ("cp1250", "őűŐŰ", "áéíóöúüÁÉÍÓÖÚÜ", 0.03),
    ("cp1250", "šžŠŽ", "áäćčďđéěíĺľňóôŕřťúůýÁÄĆČĎĐÉĚÍĹĽŇÓÔŔŘŤÚŮÝ", 0.05),
)
"""Code pages of Turkish, Hungarian, and Slavic languages, which decode as cp1252 too: letters that mark the language,
its other letters, and the least share of the first ones."""
SIGN_IN_WORD = re.compile(r"(?<=[a-z])[^\w\s\x00-\x7f’](?=[a-z])")
MOST_OTHERS = 0.05
"""A language has at most this share of letters beyond its own."""
OLD = ("cp850", "mac_roman")
"""Encodings of DOS and old Macs, whose accented letters are cp1252's quotes and dashes."""
IN_WORDS = re.compile(rb"(?<=[A-Za-z])[\x81-\x84\x86-\x90\x98\x9a-\x9f]|[\x81-\x84\x86-\x90\x98\x9a-\x9f](?=[a-z])")
"""Without those that are curly quotes, dashes, an ellipsis or a trade mark in cp1252."""
LEAST_IN_WORDS, LEAST_LETTERS = 0.4, 0.9
"""Such a text has at least this share of those bytes in words, and of letters that fit their word once decoded."""
FITTING = re.compile("(?<![a-z])[ÀÂÄÅÆÇÈÉÊËÍÎÏÑÓÔÖØÙÚÛÜ]|[àáâäåæçèéêëíîïñóôöøùúûüß]")
OTHERS = (
    *("cp932", "euc_jp", "gb18030", "big5", "cp949"),
    *("cp1251", "koi8_r", "cp1250", "cp1253", "cp1255", "cp1256"),
)
"""Encodings that statistics tell apart, by Python's names."""


def guess_encoding(path: Path | RemoteFile) -> str | None:
    """Return the encoding of a file by Python's name; None if it is UTF-8, or if the first MiB does not show it.

    Excel writes "Unicode text" as UTF-16 with a mark, and CSV files in the code page of Windows, without one.
    """
    with open_bytes(path) as stream:
        skip_bom(stream)
        start = stream.read(GUESSED_BYTES)
        if stream.peek(1):
            start = start[: start.rfind(b"\n") + 1] or start
    if marked := wide_mark(start):
        return marked
    if b"\0" in start:
        return byte_order(start, fewest=1)
    if b"\x1b$" in start and _decodes(start, "iso2022_jp"):
        return "iso2022_jp"
    text = start.decode(errors="surrogateescape")
    broken = sum("\udc80" <= sign <= "\udcff" for sign in text)
    valid = sum(not sign.isascii() for sign in text) - broken
    if broken <= valid:  # UTF-8, perhaps with damage
        return None
    if valid <= MOST_VALID * broken and (encoding := _code_page(start) or _old_encoding(start)):
        return encoding
    if _is_western(start) and valid <= MOST_VALID * broken:
        return "cp1252"
    words = b"\n".join(word for word in re.split(rb"[\s,;]+", start) if not word.isascii())
    import charset_normalizer  # late: few files need it

    best = charset_normalizer.from_bytes(words, cp_isolation=[*OTHERS], enable_fallback=False).best()
    return best.encoding if best else None


def _decodes(start: bytes, encoding: str) -> bool:
    try:
        start.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _code_page(start: bytes) -> str | None:
    """Return the code page in which the letters are those of a language; None if there is none."""
    for encoding, marks, others, least in CODE_PAGES:
        if not _decodes(start, encoding):
            continue
        text = start.decode(encoding)
        letters = [sign for sign in text if not sign.isascii() and sign.isalpha()]
        mark_count = sum(sign in marks for sign in letters)
        foreign = sum(sign not in marks + others for sign in letters)
        foreign += sum(one.islower() and sign.isupper() and sign in marks for one, sign in pairwise(text))
        foreign += len(SIGN_IN_WORD.findall(text))
        if letters and mark_count >= least * len(letters) and foreign <= MOST_OTHERS * len(letters):
            return encoding
    return None


def _old_encoding(start: bytes) -> str | None:
    """Return the encoding of DOS or of old Macs in which nearly all letters fit their words; None if none does."""
    number = sum(byte >= 0x80 for byte in start)
    if len(IN_WORDS.findall(start)) < LEAST_IN_WORDS * number:
        return None
    fitting = {name: len(FITTING.findall(start.decode(name))) for name in OLD}
    best = max(OLD, key=fitting.__getitem__)
    return best if fitting[best] >= LEAST_LETTERS * number else None


def _is_western(start: bytes) -> bool:
    """Whether bytes look like cp1252: single accented letters among ASCII, and signs that Western texts use."""
    if not _decodes(start, "cp1252"):
        return False
    text = start.decode("cp1252")
    signs = [sign for sign in text if not sign.isascii()]
    rare = sum(not (sign.isalpha() or sign in WESTERN_SIGNS) for sign in signs) + len(FOREIGN.findall(text))
    letters = sum(sign.isalpha() for sign in signs)
    runs = sum(len(run) for run in re.findall(r"[^\x00-\x7f\W]{3,}", text))
    return rare <= MOST_RARE * len(signs) and runs <= MOST_RUNS * letters
