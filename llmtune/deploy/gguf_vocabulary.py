"""A tokenizer as llama.cpp wants it: tokens with their types, merges or scores, how text is cut; and back again."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gguf import GGUFReader, GGUFWriter, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmtune.errors import EnvironmentProblem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What sentencepiece writes for a space."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {"llama-bpe": f"{_WORDS}\\p{{N}}{{1,3}}{_REST}", "qwen2": f"{_WORDS}\\p{{N}}{_REST}"}
"""The pattern that cuts text into words, by llama.cpp's name for it."""
SPECIAL = ("bos", "eos", "unk", "pad")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_MARKER = re.compile(r"<\|.*\|>")
_CURE = "Use: llmtune deploy merge RUN."


@dataclass(frozen=True)
class Vocabulary:
    """All that a GGUF file says of a tokenizer."""

    model: str
    """gpt2: merges of bytes; llama: sentencepiece, where a score says which pieces are joined first."""
    pre: str
    """llama.cpp's name for how text is cut into words."""
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    special: dict[str, int] = field(default_factory=dict)
    """Ids by name: bos, eos, unk, pad, and eot where answers end in another token than texts."""
    add_bos: bool = False
    add_space: bool = False
    """Whether a space goes before text, as in Llama 2."""
    chat_template: str | None = None


def describe_vocabulary(
    processor: PreTrainedTokenizerBase, size: int, prompts: Sequence[Sequence[int]], stops: Sequence[int]
) -> Vocabulary:
    """Read a tokenizer for a model of `size` tokens.

    Whether a program is to write the start token by itself follows from `prompts`, the ids as the model was trained on
    them; `stops` are the ids that end an answer.

    Raises:
        EnvironmentProblem: llama.cpp has nothing that cuts text as this tokenizer does.
    """
    described = read_description(processor)
    model, pre = find_cut(described)
    known = {index: token for token, index in processor.get_vocab().items()}
    if max(known) >= size:
        what = f"the tokenizer has {max(known) + 1} tokens, and the model {size}"
        raise EnvironmentProblem.of(what, None, "Their folder is damaged.")
    tokens = tuple(known.get(index, f"[PAD{index}]") for index in range(size))
    merges = [_as_pair(merge) for merge in described["model"]["merges"]]
    template = processor.chat_template
    return Vocabulary(
        model=model,
        pre=pre,
        tokens=tokens,
        types=tuple(_types(processor, known, size, model)),
        merges=tuple(f"{left} {right}" for left, right in merges) if model == "gpt2" else (),
        scores=tuple(_scores(tokens, merges)) if model == "llama" else (),
        special=_special_ids(processor, stops),
        add_bos=_writes_start(processor) and all(ids[0] == processor.bos_token_id for ids in prompts),
        add_space=_prepends_space(described),
        chat_template=template if isinstance(template, str) else (template or {}).get("default"),
    )


def read_description(processor: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the content of a tokenizer.json.

    Raises EnvironmentProblem where there is none: it is not of the `tokenizers` library.
    """
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is None:
        raise EnvironmentProblem.of(f"a tokenizer of class {type(processor).__name__} cannot be written", None, _CURE)
    return cast(dict[str, Any], json.loads(backend.to_str()))


def find_cut(described: dict[str, Any]) -> tuple[str, str]:
    """Return `tokenizer.ggml.model` and `tokenizer.ggml.pre` for the content of a tokenizer.json.

    The name follows from how the tokenizer cuts text, as llama.cpp's own table of fingerprints does, but it holds for
    tokenizers that no table has.
    """
    if described["model"].get("type") != "BPE":
        kind = described["model"].get("type")
        raise EnvironmentProblem.of(f"a tokenizer of type {kind} cannot be written as GGUF", None, _CURE)
    if described["model"].get("byte_fallback"):
        return "llama", "default"
    steps = _steps(described.get("pre_tokenizer"))
    kinds = [step["type"] for step in steps]
    last = steps[-1] if steps else {}
    plain = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    if plain and kinds == ["ByteLevel"] and last.get("use_regex", True):
        return "gpt2", "gpt-2"
    if plain and kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and last.get("use_regex", True):
        return "gpt2", "smollm"
    if plain and kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        name = next((name for name, cut in CUTS.items() if steps[0]["pattern"].get("Regex") == cut), None)
        if name == "llama-bpe" and not described["model"].get("ignore_merges"):
            return "gpt2", "smaug-bpe"  # the same cut, and words that are tokens are joined from their pieces
        if name is not None:
            return "gpt2", name
    what = f"the tokenizer cuts text in a way that GGUF files have no name for: {' and '.join(kinds) or 'not at all'}"
    raise EnvironmentProblem.of(what, None, _CURE)


def _steps(node: dict[str, Any] | None) -> list[dict[str, Any]]:
    if node is None:
        return []
    return [step for inner in node.get("pretokenizers", []) for step in _steps(inner)] or [node]


def _as_pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _types(processor: PreTrainedTokenizerBase, known: dict[int, str], size: int, model: str) -> list[int]:
    """Return what kind each token is; those of text stay visible in answers, control tokens do not."""
    added = processor.added_tokens_decoder
    types = []
    for index in range(size):
        token = known.get(index)
        if token is None:
            types.append(TokenType.UNUSED)
        elif index in added:
            control = added[index].special or _MARKER.fullmatch(token)
            types.append(TokenType.CONTROL if control else TokenType.USER_DEFINED)
        elif model == "llama" and _BYTE.fullmatch(token):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    if model == "llama" and processor.unk_token_id is not None:
        types[processor.unk_token_id] = TokenType.UNKNOWN
    return [int(kind) for kind in types]


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> list[float]:
    """Return the score of each token: what is merged earlier has the higher one; letters come last."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _special_ids(processor: PreTrainedTokenizerBase, stops: Sequence[int]) -> dict[str, int]:
    ids = {name: getattr(processor, f"{name}_token_id") for name in SPECIAL}
    ids["eot"] = next((stop for stop in stops if stop != processor.eos_token_id), None)
    return {name: index for name, index in ids.items() if index is not None}


def _writes_start(processor: PreTrainedTokenizerBase) -> bool:
    ids = processor("a")["input_ids"]
    return processor.bos_token_id is not None and ids[:1] == [processor.bos_token_id]


def _prepends_space(described: dict[str, Any]) -> bool:
    """Whether a space goes before text: by a normaliser, or by a pre-tokenizer of sentencepiece."""
    normalizer = described.get("normalizer") or {}
    before = [step["type"] for step in normalizer.get("normalizers", [normalizer]) if step]
    cut = [step.get("prepend_scheme", "never") for step in _steps(described.get("pre_tokenizer"))]
    return "Prepend" in before or any(scheme != "never" for scheme in cut)


def write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Write the tokenizer's part of a file."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    for name, index in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.add_space)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def read_vocabulary(file: Path) -> Vocabulary:
    """Read the tokenizer's part of a GGUF file."""
    fields = GGUFReader(file).fields
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name.startswith("tokenizer."):
            found[name.removeprefix("tokenizer.").removeprefix("ggml.")] = value.contents()
    names = {"unk": "unknown_token_id", "pad": "padding_token_id"}
    special = {name: found.get(names.get(name, f"{name}_token_id")) for name in (*SPECIAL, "eot")}
    return Vocabulary(
        model=found["model"],
        pre=found["pre"],
        tokens=tuple(found["tokens"]),
        types=tuple(found["token_type"]),
        merges=tuple(found.get("merges", ())),
        scores=tuple(found.get("scores", ())),
        special={name: index for name, index in special.items() if index is not None},
        add_bos=found["add_bos_token"],
        add_space=found["add_space_prefix"],
        chat_template=found.get("chat_template"),
    )


def build_tokenizer(vocabulary: Vocabulary) -> PreTrainedTokenizerFast:
    """Return a tokenizer that reads text as llama.cpp does with this vocabulary; nothing is added to a text."""
    tokens, types = vocabulary.tokens, vocabulary.types
    ids = {token: index for index, token in enumerate(tokens)}
    if vocabulary.model == "gpt2":
        merges = [_as_pair(merge) for merge in vocabulary.merges]
        tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=vocabulary.pre == "llama-bpe"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_cut_of(vocabulary.pre))
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.BPE(ids, _rank_merges(vocabulary, ids), byte_fallback=True, fuse_unk=True))
        replaced: list[Any] = [normalizers.Prepend(SPACE)] if vocabulary.add_space else []
        tokenizer.normalizer = normalizers.Sequence([*replaced, normalizers.Replace(" ", SPACE)])
        tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    apart = [index for index, kind in enumerate(types) if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)]
    tokenizer.add_tokens(
        [AddedToken(tokens[i], normalized=False, special=types[i] == TokenType.CONTROL) for i in apart]
    )
    named = {f"{name}_token": tokens[index] for name, index in vocabulary.special.items() if name in SPECIAL}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = vocabulary.chat_template
    return fast


def _cut_of(pre: str) -> list[Any]:
    """Return what cuts text into words, by llama.cpp's name for it."""
    if pre == "gpt-2":
        return [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if pre == "smollm":
        return [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    cut = CUTS["llama-bpe" if pre == "smaug-bpe" else pre]
    return [
        pre_tokenizers.Split(Regex(cut), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def _rank_merges(vocabulary: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that make a token, of those with the highest score first."""
    pairs = []
    for token, score, kind in zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True):
        if kind == TokenType.NORMAL:
            halves = ((token[:at], token[at:]) for at in range(1, len(token)))
            pairs += [(-score, left, right) for left, right in halves if left in ids and right in ids]
    return [(left, right) for _, left, right in sorted(pairs, key=lambda pair: pair[0])]
