"""Tokens as readable text: each token's text, whether it continues a word, and whether it is special."""

from __future__ import annotations

import codecs
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import regex  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode


@dataclass(frozen=True)
class Token:
    """One token of a text."""

    id: int
    text: str
    """Its text with leading spaces. Incomplete characters are shown as bytes: `<0xE2>`."""
    special: bool
    """Whether it is not part of the text: [CLS], </s>, <|im_start|>."""
    continues: bool
    """Whether it continues the previous token's word."""


@dataclass(frozen=True)
class _Piece:
    """A token as stored in its vocabulary."""

    content: bytes
    special: bool = False
    continues: bool | None = None
    """Whether the vocabulary marks it as a continuation (WordPiece: `##`); None if spaces decide."""


LONGEST = 16
"""Maximum characters of a label."""
MOST_STRETCHES, FRAMES = 60, 5
"""Maximum rows for a recording, and minimum frames per row: a tenth of a second."""
ONE_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
BYTES = re.compile(r"(?:<0x[0-9A-F]{2}>)+")
MARK = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\d*\]")
"""Added tokens that are not text, such as Whisper's `<|0.02|>`."""
SIGNS = {"\n": "⏎", "\r": "␍", "\t": "⇥", " ": "␣", "\u00a0": "⍽"}
"""Visible signs for white space."""
BYTE_OF_LETTER = {letter: byte for byte, letter in bytes_to_unicode().items()}
"""The byte of each letter of a byte-level vocabulary (GPT-2)."""
JOINERS = ("\u200c", "\u200d")
_LETTER = r"[[\p{L}\p{N}\p{M}\u200c\u200d]--[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}]]"
WORD = regex.compile(rf"{_LETTER}+(?:['’]{_LETTER}+)*", regex.V1)
"""Letters with the apostrophes between them. Each ideograph or kana is a word, since no spaces separate them."""


def name_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[Token]:
    """Return a token for each of `ids`."""
    pieces = _read_pieces(tokenizer, [int(i) for i in ids])
    texts = [piece.content.decode(errors="llmtune.bytes") for piece in pieces]
    inside = _inside_words(
        ["\n" if piece.special else BYTES.sub("x", text) for piece, text in zip(pieces, texts, strict=True)]
    )
    tokens: list[Token] = []
    for at, (i, piece, text) in enumerate(zip(ids, pieces, texts, strict=True)):
        within = 0x80 <= (piece.content[:1] or b" ")[0] < 0xC0  # in the middle of a character
        continues = within or (inside[at] if piece.continues is None else piece.continues)
        apart = at == 0 or piece.special or pieces[at - 1].special
        tokens.append(Token(int(i), text, piece.special, continues and not apart))
    return tokens


def token_namer(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], Token]:
    """Return a cached function from an id to its token."""
    return cache(lambda token: name_tokens(tokenizer, [token])[0])


def _inside_words(texts: Sequence[str]) -> list[bool]:
    """Return for each text whether it begins inside a word of the joined texts."""
    within = {at for word in WORD.finditer("".join(texts)) for at in range(word.start() + 1, word.end())}
    starts, at = [], 0
    for text in texts:
        starts.append(bool(text) and at in within)
        at += len(text)
    return starts


def _read_pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[_Piece]:
    """Look up each token in the vocabulary: byte-level BPE, SentencePiece, WordPiece, or letters (CTC)."""
    added = {int(i): token for i, token in tokenizer.added_tokens_decoder.items()}
    special = {int(i) for i in tokenizer.all_special_ids} | {i for i, token in added.items() if token.special}
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    unknown = {tokenizer.unk_token_id} - ends  # represents a word of the text
    read, delimiter = _reader(tokenizer), getattr(tokenizer, "word_delimiter_token", None)
    pieces = []
    for i, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if isinstance(piece, bytes):
            pieces.append(_Piece(piece, i in special))
        elif piece is None:  # an id without a token: the embedding is larger than the vocabulary
            pieces.append(_Piece(f"<{i}>".encode(), special=True))
        elif piece == delimiter:
            pieces.append(_Piece(b" "))
        elif i in special or i in added:
            marked = i not in unknown and (i in special or MARK.fullmatch(piece) is not None)
            pieces.append(_Piece(piece.encode(), special=marked))
        else:
            pieces.append(read(piece))
    return pieces


def _reader(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], _Piece]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    stated = decoder.__getstate__().decode() if decoder is not None else ""
    if '"ByteLevel"' in stated or hasattr(tokenizer, "byte_decoder"):
        return _read_byte_level
    return _read_word_piece if '"WordPiece"' in stated else _read_sentence_piece


def _read_byte_level(piece: str) -> _Piece:
    in_alphabet = all(letter in BYTE_OF_LETTER for letter in piece)
    return _Piece(bytes(BYTE_OF_LETTER[letter] for letter in piece) if in_alphabet else piece.encode())


def _read_word_piece(piece: str) -> _Piece:
    return _Piece(piece.removeprefix("##").encode(), continues=piece.startswith("##") and len(piece) > 2)


def _read_sentence_piece(piece: str) -> _Piece:
    byte = ONE_BYTE.fullmatch(piece)
    return _Piece(bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode())


def _write_bytes(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(f"<0x{byte:02X}>" for byte in error.object[error.start : error.end]), error.end


codecs.register_error("llmtune.bytes", _write_bytes)


def token_label(token: Token, longest: int = LONGEST) -> str:
    """Return a row's label: one line, truncated if long, with a leading `·` if it continues a word.

    White space is shown as signs, and characters that would reorder or hide text as numbers.
    """
    text = token.text
    if text.strip(" ") and not token.special:
        text = text.removeprefix(" ")
    shown = "".join(_show_character(character) for character in text)
    if shown and unicodedata.category(shown[0])[0] == "M":
        shown = f"◌{shown}"
    return ("·" if token.continues else "") + _cut_label(shown, longest)


def word_label(token: Token, longest: int = 14) -> str:
    """Return a token as a separate word: one line, a sign for a leading space, truncated if long."""
    text = token.text
    if text.startswith(" ") and text.strip():
        text = SIGNS[" "] + text[1:]
    return token_label(Token(token.id, text, token.special, continues=False), longest) or "∅"


def _show_character(character: str) -> str:
    if character in SIGNS:
        return SIGNS[character]
    hidden = unicodedata.category(character)[0] in "CZ" and character not in JOINERS
    return f"<U+{ord(character):04X}>" if hidden else character


def _cut_label(text: str, longest: int) -> str:
    """Truncate a long text, never between a letter and its combining marks."""
    if len(text) <= longest:
        return text
    end = longest - 1
    while end > 1 and (unicodedata.category(text[end])[0] == "M" or text[end] in JOINERS or text[end - 1] in JOINERS):
        end -= 1
    return f"{text[:end]}…"


@dataclass(frozen=True)
class TokenLine:
    """The labels of an axis: one token of a text, or stretch of a recording, per row."""

    tokens: tuple[Token, ...]
    sizes: tuple[int, ...]
    """Number of model positions that each row covers."""

    @classmethod
    def of(cls, tokens: Sequence[Token]) -> TokenLine:
        """Make one row per token."""
        return cls(tuple(tokens), (1,) * len(tokens))

    @property
    def labels(self) -> list[str]:
        """The text of each row."""
        return [token_label(token) for token in self.tokens]

    @property
    def special(self) -> list[bool]:
        """Whether each row is a special token."""
        return [token.special for token in self.tokens]

    def __len__(self) -> int:
        return len(self.tokens)


def time_line(seconds: float, filled: int, frames: int) -> TokenLine:
    """Label stretches of frames by start time; frames after the end of the recording are one row, "silence"."""
    size = max(FRAMES, math.ceil(filled / MOST_STRETCHES))
    starts = range(0, filled, size)
    digits = 1 if size * seconds / filled >= 0.1 else 2
    tokens = [Token(-1, f"{start * seconds / filled:.{digits}f}s", special=False, continues=False) for start in starts]
    sizes = [min(size, filled - start) for start in starts]
    if frames > filled:
        tokens.append(Token(-1, "silence", special=True, continues=False))
        sizes.append(frames - filled)
    return TokenLine(tuple(tokens), tuple(sizes))
