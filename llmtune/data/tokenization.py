"""Tokenizes texts in batches, tokenizes shared pieces once, and finds text that a tokenizer does not know.

Tokenizers first cut a text at their added tokens (such as `<|im_end|>`), then tokenize each piece separately. The ids
of a text are therefore those of its pieces, joined: a conversation of n turns costs n turns, not n². Byte-level
tokenizers also cut before each word, so a piece may be a word with its space; few pieces are new after the first texts.
Both shortcuts are checked against the tokenizer itself, on probes and on some texts of every call.
"""

from __future__ import annotations

import json
import random
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain, groupby
from typing import NamedTuple, TypeAlias, cast
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import BatchEncoding, PreTrainedTokenizerBase

from llmtune.data.example import Example
from llmtune.data.row_hash import iterate_strings
from llmtune.recipe.schema import Recipe

LOCAL_PRE_TOKENIZERS = re.compile(
    "BertPreTokenizer|ByteLevel|CharDelimiterSplit|Digits|Metaspace|Punctuation|Sequence|Split|UnicodeScripts"
    "|Whitespace|WhitespaceSplit"
)
"""Pre-tokenizers that process one piece at a time; `Metaspace` does unless it marks the first word of a text."""
CHECKED_TEXTS = 8
"""How many texts of a call are also tokenized in one piece, to compare the results."""
FEWEST_TEXTS = 16
"""Shorter texts gain nothing from pieces."""
MOST_PIECES = 2**17
"""Size of the cache of piece ids, some 30 MB; a full cache is emptied."""
JOINED_PIECES = 256
"""How many new pieces are tokenized as one text."""
WORD_START = r" (?<=[A-Za-z,.;:!?] )(?=[A-Za-z])"
"""A space at which byte-level tokenizers cut: it belongs to the following word."""
PROBE_PARTS = (
    *"aBéß家'1½.,;:_-(“’–…$ \t\n\xa0\u0301",
    *("'s", "'RE", "'ll", "20", "!?", "  ", "\r\n", "Word", " the", " Of", " x", "a b", ". So", ", it"),
)
PROBES = 1000
ID_BYTES = array("i").itemsize
SHOWN_CHARACTERS = 2000
Bordered: TypeAlias = tuple[list[int], list[int | None]]
"""The ids of a text, and the number of ids before each border; None if a token crosses the border."""


class Segment(NamedTuple):
    """A part of a text, and whether it is supervised."""

    text: str
    learned: bool


def encode_texts(processor: PreTrainedTokenizerBase, texts: Sequence[str], special: bool = False) -> BatchEncoding:
    """Tokenize texts in one call, with offsets if the tokenizer has them (`.encodings`)."""
    return processor(
        list(texts),
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning about lengths: data.max_length is checked by us
    )


def tokenize_each(processor: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text without adding special tokens."""
    return cast(list[list[int]], encode_texts(processor, texts)["input_ids"])


def start_ids(processor: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer puts before every text, and before each piece of a split text."""
    marked, plain = (encode_texts(processor, ["a"], special=special)["input_ids"][0] for special in (True, False))
    before = range(len(marked) - len(plain) + 1)
    return list(marked[: next((i for i in before if marked[i : i + len(plain)] == plain), 0)])


def first_context(processor: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that a text's first token is predicted from.

    If a tokenizer puts none before a text, this is its start token, or else its end token, as in GPT-2's training.
    Without either it is empty.
    """
    ends = [token for token in (processor.bos_token_id, processor.eos_token_id) if token is not None]
    return start_ids(processor) or ends[:1]


def tokenize_with_borders(
    processor: PreTrainedTokenizerBase, texts: Sequence[str], borders: Sequence[Sequence[int]]
) -> list[Bordered]:
    """Return the ids of each text as `tokenize` does, and the number of ids before each of its borders."""
    by_pieces = tokenize_by_pieces(processor, texts, borders)
    if by_pieces is not None:
        return by_pieces
    heads = (text[:border] for text, places in zip(texts, borders, strict=True) for border in places)
    distinct = list(dict.fromkeys([*texts, *heads]))
    ids = dict(zip(distinct, tokenize_each(processor, distinct), strict=True)) if distinct else {}
    return [
        (ids[text], [count_shared(ids[text], ids[text[:border]]) for border in places])
        for text, places in zip(texts, borders, strict=True)
    ]


def count_shared(ids: Sequence[int], head: Sequence[int]) -> int | None:
    """Return the number of ids of a text's head; None if they are not a prefix of the text's ids."""
    return len(head) if ids[: len(head)] == head else None


def tokenize_by_pieces(
    processor: PreTrainedTokenizerBase, texts: Sequence[str], borders: Sequence[Sequence[int]]
) -> list[Bordered] | None:
    """Return the result of `tokenize_with_borders`, joined from pieces; None if this tokenizer needs complete texts.

    Tokenizers that may look beyond a piece are excluded. Some texts are tokenized completely as a check.
    """
    if not processor.is_fast or len(texts) + sum(map(len, borders)) < FEWEST_TEXTS:
        return None
    step = max(1, len(texts) // CHECKED_TEXTS)
    middles = [len(places) // 2 if places else None for places in borders[::step]]
    heads = [
        "" if middle is None else text[: places[middle]]
        for text, places, middle in zip(texts[::step], borders[::step], middles, strict=True)
    ]
    expected = tokenize_each(processor, [*texts[::step], *heads])  # also resets truncation and padding of other callers
    pieces = _pieces_of(processor)
    if not pieces.usable:
        return None
    joined = pieces.join(texts, borders)
    whole, before = expected[: len(heads)], expected[len(heads) :]
    for (ids, counts), wanted, head, middle in zip(joined[::step], whole, before, middles, strict=True):
        if ids != wanted or (middle is not None and counts[middle] != count_shared(wanted, head)):
            pieces.usable = False
            return None
    return joined


class _Pieces:
    """The ids of text pieces, for one tokenizer in one state."""

    def __init__(self, backend: Tokenizer, state: object) -> None:
        self.state = state
        self.usable = _tokenizes_pieces_alone(backend)
        self._backend = backend
        added = backend.get_added_tokens_decoder().items()
        self._added = {token.content: _to_bytes([number]) for number, token in added}
        self._separator = next(((number, token.content) for number, token in added if token.special), None)
        longest_first = sorted(self._added, key=lambda content: (-len(content), content))
        self._cut_added = re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else "(?!)").split
        words = self.usable and _cuts_before_words(backend)
        self._cut_words = re.compile(WORD_START if words else "(?!)").split
        self._first: dict[str, bytes] = {"": b""}
        """Ids of the first word of a piece, as int32 bytes: they join fast, and the garbage collector ignores them."""
        self._word: dict[str, bytes] = {}
        """Ids of a word with the space before it, by the bare word."""

    def join(self, texts: Sequence[str], borders: Sequence[Sequence[int]]) -> list[Bordered]:
        """Return the ids of each text, and the number of ids before each of its borders."""
        cut = [self._cut_added(text) for text in texts]
        placed = [_find_places(parts, ends) for parts, ends in zip(cut, borders, strict=True)]
        heads = (head for places in placed for _, head in places)
        ids = self._ids_of(dict.fromkeys(chain((piece for parts in cut for piece in parts[::2]), heads))) | self._added
        ids_and_counts = []
        for parts, places in zip(cut, placed, strict=True):
            part_ids = [ids[part] for part in parts]
            before = list(accumulate(map(len, part_ids), initial=0))
            counts = [
                (before[k] + len(ids[head])) // ID_BYTES if not head or part_ids[k].startswith(ids[head]) else None
                for k, head in places
            ]
            ids_and_counts.append((memoryview(b"".join(part_ids)).cast("i").tolist(), counts))
        return ids_and_counts

    def _ids_of(self, pieces: Iterable[str]) -> dict[str, bytes]:
        """Return the ids of each piece, joined from its words."""
        ids, new = dict[str, bytes](), dict[str, list[str]]()
        first, word = self._first, self._word.__getitem__
        for piece in pieces:
            start, *others = words = self._cut_words(piece)
            try:
                ids[piece] = first[start] + b"".join(map(word, others))
            except KeyError:
                new[piece] = words
        if new:
            self._learn([*new.values()])
            first, word = self._first, self._word.__getitem__
            ids |= {piece: first[words[0]] + b"".join(map(word, words[1:])) for piece, words in new.items()}
        return ids

    def _learn(self, pieces: list[list[str]]) -> None:
        """Tokenize new words."""
        if len(self._first) + len(self._word) > MOST_PIECES:
            self._first, self._word = {"": b""}, {}
        starts = {words[0] for words in pieces} - self._first.keys()
        others = set(chain.from_iterable(words[1:] for words in pieces)) - self._word.keys()
        new = [*starts, *(f" {word}" for word in others)]
        ids = self._encode(new)
        self._first.update(zip(starts, ids, strict=False))
        self._word.update(zip(others, ids[len(starts) :], strict=True))

    def _encode(self, pieces: Sequence[str]) -> list[bytes]:
        """Return the ids of each piece. Joining many pieces with a special token costs less than separate texts."""
        if self._separator is not None:
            number, content = self._separator
            texts = [content.join(pieces[i : i + JOINED_PIECES]) for i in range(0, len(pieces), JOINED_PIECES)]
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            ids = [piece for encoding in encodings for piece in _split_ids(encoding.ids, number)]
            if len(ids) == len(pieces):
                return ids
        encodings = self._backend.encode_batch_fast(pieces, add_special_tokens=False)
        return [_to_bytes(encoding.ids) for encoding in encodings]


def _find_places(parts: Sequence[str], borders: Sequence[int]) -> list[tuple[int, str]]:
    """Return the part that contains each border, and the start of that part up to the border."""
    starts = list(accumulate(map(len, parts), initial=0))
    places = [(bisect_right(starts, border) - 1, border) for border in borders]
    return [(k, parts[k][: border - starts[k]] if k < len(parts) else "") for k, border in places]


def _split_ids(ids: Sequence[int], separator: int) -> list[bytes]:
    """Return the ids between separators, as int32 bytes."""
    joined = memoryview(_to_bytes(ids)).cast("i")
    ends = [*(i for i, number in enumerate(ids) if number == separator), len(ids)]
    return [joined[start:end].tobytes() for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]


def _to_bytes(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()


_pieces: WeakKeyDictionary[PreTrainedTokenizerBase, _Pieces] = WeakKeyDictionary()


def _pieces_of(processor: PreTrainedTokenizerBase) -> _Pieces:
    """Return the cached pieces of a tokenizer; an empty cache once the tokenizer has changed."""
    backend = processor.backend_tokenizer
    parts = (backend.normalizer, backend.pre_tokenizer)
    state = (id(backend), backend.get_vocab_size(), len(backend.get_added_tokens_decoder()), *map(_state_of, parts))
    pieces = _pieces.get(processor)
    if pieces is None or pieces.state != state:
        pieces = _pieces[processor] = _Pieces(backend, state)
    return pieces


def _state_of(part: object) -> str | None:
    """Return a part of a tokenizer as in `tokenizer.json`; None for None."""
    return None if part is None else cast(bytes, part.__getstate__()).decode()


def _tokenizes_pieces_alone(backend: Tokenizer) -> bool:
    """Whether no part of a tokenizer looks beyond a piece between two added tokens."""
    for token in backend.get_added_tokens_decoder().values():
        if not token.content or token.normalized or token.lstrip or token.rstrip or token.single_word:
            return False
    if (
        backend.encode_special_tokens
        or backend.truncation
        or backend.padding
        or getattr(backend.model, "dropout", None)
    ):
        return False
    state = _state_of(backend.pre_tokenizer)
    return state is None or _sees_one_piece(json.loads(state))


def _cuts_before_words(backend: Tokenizer) -> bool:
    """Whether a tokenizer cuts, in all probes, before a space and letter that follow a letter or punctuation."""
    state, normalizer = _state_of(backend.pre_tokenizer), _state_of(backend.normalizer)
    if state is None or '"ByteLevel"' not in state or normalizer not in (None, '{"type":"NFC"}'):
        return False
    draw = random.Random(0)  # noqa: S311 - not for secrets
    for _ in range(PROBES):
        text = "".join(draw.choices(PROBE_PARTS, k=draw.randint(2, 12)))
        borders = {start for _, (start, _) in backend.pre_tokenizer.pre_tokenize_str(text)}
        if any(match.start() not in borders for match in re.finditer(WORD_START, text)):
            return False
    return True


def _sees_one_piece(pre_tokenizer: Mapping[str, object]) -> bool:
    """Whether a pre-tokenizer (as in `tokenizer.json`) looks only at the piece that it cuts."""
    if not LOCAL_PRE_TOKENIZERS.fullmatch(str(pre_tokenizer["type"])) or pre_tokenizer.get("prepend_scheme") == "first":
        return False
    steps = cast(list[Mapping[str, object]], pre_tokenizer.get("pretokenizers", []))
    return all(_sees_one_piece(step) for step in steps)


def decode(processor: PreTrainedTokenizerBase, ids: Sequence[int], *, skips_special: bool = False) -> str:
    """Return the text of ids with its white space, special tokens included unless they are skipped."""
    return str(processor.decode(ids, skip_special_tokens=skips_special, clean_up_tokenization_spaces=False))


def highlight(ids: Sequence[int], spans: Sequence[int], processor: PreTrainedTokenizerBase) -> list[Segment]:
    """Cut token ids into pieces of text, each with whether it is in `spans`."""
    learned = [False] * len(ids)
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        learned[start:end] = [True] * (end - start)
    pieces = []
    for flag, pairs in groupby(zip(ids, learned, strict=True), key=lambda pair: pair[1]):
        pieces.append(Segment(decode_shortened([token for token, _ in pairs], processor), flag))
    return pieces


def decode_shortened(ids: Sequence[int], processor: PreTrainedTokenizerBase) -> str:
    """Return the text of token ids with special tokens; shorten runs of one of those, and a long text in the middle."""
    added = processor.added_tokens_decoder
    special = "|".join(re.escape(added[token].content) for token in sorted({*ids} & added.keys()))
    run, text = re.compile(rf"({special or '$.'})\1{{3,}}"), decode(processor, list(ids))
    text = run.sub(lambda one: f"{one[1]} [... {len(one[0]) // len(one[1]) - 1:,} more ...] ", text)
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def cut_start(processor: PreTrainedTokenizerBase, text: str, tokens: int) -> str:
    """Cut at least this many tokens from the start of a text."""
    encoded = encode_texts(processor, [text])
    if not processor.is_fast:
        return decode(processor, encoded["input_ids"][0][tokens:])
    offsets = encoded.encodings[0].offsets[tokens:]
    return text[offsets[0][0] :].lstrip() if offsets else ""


def continue_ids(processor: PreTrainedTokenizerBase, prompt_ids: list[int], prompt: str, text: str) -> list[int] | None:
    """Return ids of `text` that continue the prompt's ids as if generated; None if that is impossible.

    Some tokenizers put a space before every text, but not after a line break.
    """
    line, alone, after_line, before, both = tokenize_each(processor, ["\n", text, f"\n{text}", prompt, prompt + text])
    expected = _added_text(processor, before, both)
    if expected is None:
        return None
    candidates = [alone]
    if after_line[: len(line)] == line:
        candidates.append(after_line[len(line) :])
    return next(
        (ids for ids in candidates if _added_text(processor, prompt_ids, [*prompt_ids, *ids]) == expected), None
    )


def _added_text(processor: PreTrainedTokenizerBase, before: list[int], both: list[int]) -> str | None:
    """Return the text of `both` beyond the text of `before`."""
    start, whole = decode(processor, before), decode(processor, both)
    return whole[len(start) :] if whole.startswith(start) else None


# Unknown text: a model trained on `<unk>` writes it; without `<unk>`, characters vanish


UNKNOWN = "text that the tokenizer does not know (<unk>) in the supervised part"
"""Prefix of the reason for a row with such a target."""
SHOWN_WORDS, LONGEST_SHOWN = 5, 24


def refused_token(processor: PreTrainedTokenizerBase, recipe: Recipe) -> int | None:
    """Return the id that no target may contain; None if the recipe allows it or the tokenizer knows every character.

    Some tokenizers that know every byte declare their end token as the unknown token.
    """
    if recipe.data.unknown_tokens == "allow" or not recipe.variant.generates or recipe.variant.facts.takes_audio:
        return None
    unknown = getattr(processor, "unk_token_id", None)
    return None if unknown in (processor.eos_token_id, processor.bos_token_id) else unknown


def find_unknown(examples: Sequence[Example], token: int, row: str, processor: PreTrainedTokenizerBase) -> str | None:
    """Return why a row's examples cannot be learned (the row is JSON); None if their targets are all known."""
    if not any(_learns(example, token) for example in examples):
        return None
    words = dict.fromkeys(word for text in iterate_strings(json.loads(row)) for word in text.split())
    unknown = [word for word in words if token in processor(word, add_special_tokens=False)["input_ids"]]
    listed = ", ".join(repr(word[:LONGEST_SHOWN]) for word in unknown[:SHOWN_WORDS]) or processor.unk_token
    return f"{UNKNOWN}: {listed}" + (" and others" if len(unknown) > SHOWN_WORDS else "")


def _learns(example: Example, token: int) -> bool:
    for ids, spans in example.sequences:
        if token in ids and any(token in ids[a:b] for a, b in zip(spans[::2], spans[1::2], strict=True)):
            return True
    return False
