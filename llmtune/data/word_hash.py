"""Hashes of words and word triples. Equal minima under scrambled orders estimate the overlap of texts.

Legend: B bytes, W words (and word triples, as many), R rows of a batch, P minima, L bands.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

BANDS = 20
BAND_SIZE = 6
MINIMA = BANDS * BAND_SIZE
TRIPLES_OF_A_WORD = 3
BLOCK_WORDS = 2**15
"""How many word triples are hashed at a time: they fit in the CPU cache."""

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

POWERS = np.multiply.accumulate(np.full(2**12, 0x9E3779B97F4A7C15, dtype=np.uint64))
"""Powers of an odd number modulo 2**64: a factor for each position in a word."""
LETTERS = np.isin(np.arange(256), [*b"0123456789abcdefghijklmnopqrstuvwxyz", *range(0x80, 0x100)])


def mix(values: U64, salt: int) -> U64:
    """Scatter 64-bit numbers; results with different salts are independent.

    The finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    mixed = values + np.uint64((salt * 0x9E3779B97F4A7C15) % 2**64)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def fraction(values: U64, salt: int) -> npt.NDArray[np.float64]:
    """Map 64-bit hashes to numbers in [0, 1)."""
    return (mix(values, salt) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def hash_triples(texts: list[str]) -> tuple[U32, I64]:
    """Hash every run of three words; the last two words of a text start shorter runs, so short texts have some too.

    Words are runs of letters and digits in lower case; Chinese, Japanese, Thai, Lao, Burmese and Khmer characters,
    which are written without spaces, are words of their own.

    Returns:
        [W] hash of each run, [W] which text it is from.
    """
    word_W, row_W, _ = hash_words(texts)
    padded = np.zeros(len(word_W) + 2 * len(texts) + 2, dtype=np.uint64)
    place_W = np.arange(len(word_W)) + 2 * row_W
    padded[place_W] = word_W
    run_W = padded[place_W] + mix(padded[place_W + 1], 1) + mix(padded[place_W + 2], 2)
    return (mix(run_W, 3) >> np.uint64(32)).astype(np.uint32), row_W


def hash_words(texts: list[str]) -> tuple[U64, I64, I64]:
    """Hash every word, as a polynomial of its bytes modulo 2**64.

    Returns:
        [W] the hash of each word, [W] which text it is from, [W] the byte of that text, in lower case, it begins at.
    """
    coded = [text.lower().encode() for text in texts]
    byte_B = np.frombuffer(b"\n".join(coded), dtype=np.uint8)
    begins = np.cumsum([0, *(len(text) + 1 for text in coded)])
    inside_B, alone_B = _classify(byte_B)
    start_B = inside_B.copy()
    start_B[1:] &= ~inside_B[:-1] | alone_B[1:]
    start_B[3:] |= inside_B[3:] & alone_B[:-3]
    start_W = np.flatnonzero(start_B)
    if not len(start_W):
        return np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64)
    place_B = np.arange(len(byte_B)) - np.repeat(np.append(0, start_W), np.diff(start_W, prepend=0, append=len(byte_B)))
    term_B = POWERS[place_B % len(POWERS)] * (byte_B + np.uint64(1))
    term_B[~inside_B] = 0
    word_W = mix(np.add.reduceat(term_B, start_W), 4)
    row_W = np.searchsorted(begins, start_W, side="right") - 1
    return word_W, row_W.astype(np.int64), (start_W - begins[row_W]).astype(np.int64)


def _classify(byte_B: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return masks of the UTF-8 bytes that belong to words, and of those that begin a three-byte one-character word."""
    inside_B = LETTERS[byte_B]
    next_B = np.append(byte_B[1:], np.uint8(0))
    mark_B = (byte_B == 0xE2) & ((next_B == 0x80) | (next_B == 0x81))  # U+2000 to U+207F: dashes, quotes, spaces
    for behind in range(3):
        inside_B[behind:] &= ~mark_B[: len(mark_B) - behind]
    alone_B = (byte_B >= 0xE3) & (byte_B <= 0xE9)  # U+3000 to U+9FFF: kana and Han
    alone_B |= (byte_B == 0xE0) & (next_B >= 0xB8) & (next_B <= 0xBB)  # Thai and Lao
    alone_B |= (byte_B == 0xE1) & (next_B >= 0x80) & (next_B <= 0x82)  # Burmese
    alone_B |= (byte_B == 0xE1) & (next_B >= 0x9E) & (next_B <= 0x9F)  # Khmer
    return inside_B, alone_B


def different_triples(triple_W: U32, row_W: I64) -> tuple[U32, I64]:
    """Return each row's triples once, sorted."""
    pairs = np.sort((row_W.astype(np.uint64) << np.uint64(32)) | triple_W)
    pairs = pairs[np.diff(pairs, prepend=~pairs[:1]) != 0]
    return pairs.astype(np.uint32), (pairs >> np.uint64(32)).astype(np.int64)


def without_common(common: U32, triple_W: U32, row_W: I64) -> tuple[U32, I64]:
    """Drop a template's triples, except from rows with at most one word of their own."""
    if not len(common) or not len(triple_W):
        return triple_W, row_W
    place_W = np.minimum(np.searchsorted(common, triple_W), len(common) - 1)
    own_W = common[place_W] != triple_W
    own_R = np.bincount(row_W[own_W], minlength=row_W[-1] + 1) > TRIPLES_OF_A_WORD
    stays_W = own_W | ~own_R[row_W]
    return triple_W[stays_W], row_W[stays_W]


def tag_triples(triple_W: U32, row_W: I64, tags: Sequence[str]) -> U32:
    """Mix the tag of its row into each triple.

    Return each triple with the tag of its row: equal triples of rows with other tags differ. An empty tag does nothing.
    """
    hash_R = np.array([xxhash.xxh3_64_intdigest(tag.encode()) if tag else 0 for tag in tags], dtype=np.uint64)
    tag_W = hash_R[row_W]
    tagged: U32 = np.where(tag_W == 0, triple_W, (mix(tag_W ^ triple_W, 8) >> np.uint64(32)).astype(np.uint32))
    return tagged


def take_minima(triple_W: U32, begins: I64) -> U32:
    """Return [R, P] the smallest value of each row's triples under each of P scrambled orders.

    Args:
        triple_W: Hashes, row after row.
        begins: [R] where each row begins; no row is empty.
    """
    minimum_RP = np.empty((len(begins), MINIMA), dtype=np.uint32)
    factors = (mix(np.arange(MINIMA, dtype=np.uint64), 5) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    offsets = (mix(np.arange(MINIMA, dtype=np.uint64), 6) >> np.uint64(32)).astype(np.uint32)
    ends = np.append(begins[1:], len(triple_W))
    first = 0
    while first < len(begins):
        upto = max(int(np.searchsorted(ends, begins[first] + BLOCK_WORDS, side="right")), first + 1)
        block = triple_W[begins[first] : ends[upto - 1]]
        inside = begins[first:upto] - begins[first]
        scrambled = np.empty_like(block)
        for place in range(MINIMA):
            np.multiply(block, factors[place], out=scrambled)
            np.add(scrambled, offsets[place], out=scrambled)
            minimum_RP[first:upto, place] = np.minimum.reduceat(scrambled, inside)
        first = upto
    return minimum_RP


def band_keys(minimum_RP: U32) -> U64:
    """Return [R, L] a hash of the minima of each complete band."""
    key_RL = np.zeros((len(minimum_RP), minimum_RP.shape[1] // BAND_SIZE), dtype=np.uint64)
    for place in range(BAND_SIZE):
        key_RL = mix(key_RL ^ minimum_RP[:, place::BAND_SIZE], 7)
    return key_RL
