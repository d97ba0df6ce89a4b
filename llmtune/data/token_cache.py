"""Ids of many texts at the speed of a dictionary: cut at added tokens, each piece between them read once.

Tokenizers cut a text at their added tokens (such as `<|im_end|>`) first, and read what lies between them by itself. So
the ids of a text are those of its pieces, one after the other, and a piece that stands in several texts (a prompt, and
the prompt with its answer) is read once. Where words can be looked up (`words`), they are; else the tokenizer reads the
piece. A tokenizer that is known to look beyond a piece, or whose kind is not known, is left alone, and some texts of
every call are read whole as well, to see that both ways agree.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from llmtune.data.chat_template import encode_texts, tokenize
from llmtune.data.word_cache import WordIds, open_words, state_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = memoryview
"""Ids as int32 (format `i`): a part of them is not copied, and compares without becoming Python's numbers."""
Reading = tuple[Ids, Any]
"""The ids of a text, and the tokenizer's own record of it with offsets, or None."""

ALONE = frozenset(
    {
        "BertPreTokenizer",
        "ByteLevel",
        "CharDelimiterSplit",
        "Digits",
        "Metaspace",
        "Punctuation",
        "Sequence",
        "Split",
        "UnicodeScripts",
        "Whitespace",
        "WhitespaceSplit",
    }
)
"""Pre-tokenizers that cut a piece by what stands in it; `Metaspace` does unless it marks the first word of a text."""
CHECKED = 8
"""Texts of a call that are read whole as well."""
WORTH = 16
"""Texts below which the tokenizer reads them whole: there is too little to win."""


@dataclass
class PieceReader:
    """Reads texts with the ids of one tokenizer as it was when this was opened."""

    processor: PreTrainedTokenizerBase
    key: tuple[Any, ...]
    added: re.Pattern[str] | None
    """One group: the added tokens, of those that begin at the same place the longest."""
    ids: dict[str, bytes]
    """By added token, its id as int32."""
    words: WordIds | None
    trusted: bool = True

    def read(self, texts: Sequence[str]) -> list[Ids] | None:
        """Return the ids of each text, nothing added to it; None if they are not those of the tokenizer."""
        if not self.trusted:
            return None
        cut = [self.added.split(text) if self.added else [text] for text in texts]
        known = self._read_pieces(list(dict.fromkeys(piece for pieces in cut for piece in pieces[::2])))
        known.update(self.ids)
        read = [memoryview(b"".join(map(known.__getitem__, pieces))).cast("i") for pieces in cut]
        checked = range(0, len(texts), max(1, len(texts) // CHECKED))
        self.trusted = tokenize(self.processor, [texts[i] for i in checked]) == [read[i].tolist() for i in checked]
        return read if self.trusted else None

    def _read_pieces(self, pieces: list[str]) -> dict[str, bytes]:
        """Return the ids of texts without added tokens."""
        known: dict[str, bytes] = {}
        left = []
        for piece in pieces:
            ids = b"" if not piece else self.words.read(piece) if self.words else None
            if ids is None:
                left.append(piece)
            else:
                known[piece] = ids
        if left:
            backend: Any = self.processor.backend_tokenizer
            encodings = backend.encode_batch_fast(left, add_special_tokens=False)
            known |= {
                piece: array("i", encoding.ids).tobytes() for piece, encoding in zip(left, encodings, strict=True)
            }
        return known


_opened: WeakKeyDictionary[Any, PieceReader | None] = WeakKeyDictionary()


def read_pieces(processor: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Ids] | None:
    """Return the ids of each text, nothing added to it; None where this tokenizer has to read texts whole."""
    if not processor.is_fast or len(texts) < WORTH:
        return None
    tokenize(processor, texts[:1])  # sets back what another caller may have left: truncation, padding
    reader = _opened.get(processor)
    key = _key(processor)
    if reader is None or reader.key != key:
        reader = _opened[processor] = _open(processor, key)
    return reader.read(texts)


def read_ids(processor: PreTrainedTokenizerBase, texts: Sequence[str], parts: Sequence[str] = ()) -> dict[str, Reading]:
    """Return the ids of each text, nothing added to it, with the tokenizer's offsets where those are at hand.

    Where there are no offsets because texts were read by pieces, `parts` of them are read too, which costs little.
    """
    read = read_pieces(processor, [*texts, *parts])
    if read is not None:
        return {text: (ids, None) for text, ids in zip([*texts, *parts], read, strict=True)}
    if not texts:
        return {}
    tokenized = encode_texts(processor, texts)
    encodings = getattr(tokenized, "encodings", None) or [None] * len(texts)
    ids = (memoryview(array("i", found)) for found in tokenized["input_ids"])
    return dict(zip(texts, zip(ids, encodings, strict=True), strict=True))


def _key(processor: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    """Return what tells a tokenizer from the same one changed."""
    backend: Any = processor.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    states = (part and part.__getstate__() for part in (backend.normalizer, backend.pre_tokenizer))
    settings = (backend.encode_special_tokens, backend.truncation is None, backend.padding is None)
    return (id(backend), backend.get_vocab_size(False), len(added), *states, *settings)


def _open(processor: PreTrainedTokenizerBase, key: tuple[Any, ...]) -> PieceReader:
    backend: Any = processor.backend_tokenizer
    added = {token.content: (number, token) for number, token in backend.get_added_tokens_decoder().items()}
    plain = all(
        token.content and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        for _, token in added.values()
    )
    settled = not backend.encode_special_tokens and backend.truncation is None and backend.padding is None
    trusted = plain and settled and _cuts_alone(state_of(backend.pre_tokenizer))
    longest_first = sorted(added, key=lambda content: (-len(content), content))
    pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None
    ids = {content: array("i", [number]).tobytes() for content, (number, _) in added.items()}
    return PieceReader(processor, key, pattern, ids, open_words(backend) if trusted else None, trusted)


def _cuts_alone(state: Any) -> bool:
    """Whether a pre-tokenizer (as `tokenizer.json` has it) looks at nothing beyond the piece that it cuts."""
    if state is None:
        return True
    if state["type"] not in ALONE or state.get("prepend_scheme") == "first":
        return False
    return all(_cuts_alone(step) for step in state.get("pretokenizers", ()))
