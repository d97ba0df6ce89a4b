"""A tokenizer as llama.cpp reads it: tokens with their types, merges or scores, pre-tokenizer; and back again.

The `gguf` package's own vocabulary helpers trust the files for pre-tokenizer and start token, and score no pieces; here
all three follow from the tokenizer, so that the file makes the ids of training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import GGUFReader, GGUFWriter, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmtune.deploy.gguf_tensors import MERGE_INSTEAD
from llmtune.errors import EnvironmentProblem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What sentencepiece writes for a space."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {"llama-bpe": f"{_WORDS}\\p{{N}}{{1,3}}{_REST}", "qwen2": f"{_WORDS}\\p{{N}}{_REST}"}
"""The pattern that splits text into words, by llama.cpp's name for it."""
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot"}
"""Special tokens by transformers' and the writer's name, and by that in files (`..._token_id`)."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_MARKER = re.compile(r"<\|.*\|>")

TokenizerJson = dict[str, Any]
"""The content of a tokenizer.json, or a step of it."""


@dataclass(frozen=True)
class Vocabulary:
    """All that a GGUF file says about a tokenizer."""

    model: str
    """gpt2: merges of bytes; llama: sentencepiece, where a score says which pieces are joined first."""
    pre: str
    """llama.cpp's name for how text is split into words."""
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
    """Describe a tokenizer for a model of `size` tokens.

    Whether a program writes the start token by itself follows from `prompts`, the ids as the model was trained on them;
    `stops` are the ids that end an answer.

    Raises:
        EnvironmentProblem: llama.cpp has nothing that splits text as this tokenizer does.
    """
    content = read_tokenizer(processor)
    model, pre = find_pre_tokenizer(content)
    tokens_by_id = {index: token for token, index in processor.get_vocab().items()}
    if max(tokens_by_id) >= size:
        what = f"the tokenizer has {max(tokens_by_id) + 1} tokens, and the model {size}"
        raise EnvironmentProblem.of(what, None, "Their folder is damaged.")
    tokens = tuple(tokens_by_id.get(index, f"[PAD{index}]") for index in range(size))
    merges = [_as_pair(merge) for merge in content["model"]["merges"]]
    special = {name: getattr(processor, f"{name}_token_id", None) for name in SPECIAL}
    special["eot"] = next((stop for stop in stops if stop != processor.eos_token_id), None)
    writes_bos = processor.bos_token_id is not None and processor("a")["input_ids"][:1] == [processor.bos_token_id]
    template = processor.chat_template
    return Vocabulary(
        model=model,
        pre=pre,
        tokens=tokens,
        types=tuple(int(_type(processor, index, tokens_by_id, model)) for index in range(size)),
        merges=tuple(f"{left} {right}" for left, right in merges) if model == "gpt2" else (),
        scores=tuple(_scores(tokens, merges)) if model == "llama" else (),
        special={name: index for name, index in special.items() if index is not None},
        add_bos=writes_bos and all(ids[0] == processor.bos_token_id for ids in prompts),
        add_space=_prepends_space(content),
        chat_template=template if isinstance(template, str) else (template or {}).get("default"),
    )


def read_tokenizer(processor: PreTrainedTokenizerBase) -> TokenizerJson:
    """Return the content of tokenizer.json; raises EnvironmentProblem for one not of the library `tokenizers`."""
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is None:
        what = f"a tokenizer of class {type(processor).__name__} cannot be written"
        raise EnvironmentProblem.of(what, None, MERGE_INSTEAD)
    content: TokenizerJson = json.loads(backend.to_str())
    return content


def find_pre_tokenizer(content: TokenizerJson) -> tuple[str, str]:
    """Return `tokenizer.ggml.model` and `tokenizer.ggml.pre` for the content of a tokenizer.json.

    The name follows from how the tokenizer splits text, as llama.cpp's own table of fingerprints does, but it holds for
    tokenizers that no table has.
    """
    kind = content["model"].get("type")
    if kind != "BPE":
        raise EnvironmentProblem.of(f"a tokenizer of type {kind} cannot be written as GGUF", None, MERGE_INSTEAD)
    if content["model"].get("byte_fallback"):
        return "llama", "default"
    steps = _steps(content.get("pre_tokenizer"))
    kinds = [step["type"] for step in steps]
    last = steps[-1] if steps else {}
    plain, splits = last.get("type") == "ByteLevel" and not last.get("add_prefix_space"), last.get("use_regex", True)
    if plain and splits and kinds == ["ByteLevel"]:
        return "gpt2", "gpt-2"
    if plain and splits and kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "gpt2", "smollm"
    if plain and not splits and kinds == ["Split", "ByteLevel"]:
        names = [name for name, pattern in PATTERNS.items() if steps[0]["pattern"].get("Regex") == pattern]
        if names == ["llama-bpe"] and not content["model"].get("ignore_merges"):
            return "gpt2", "smaug-bpe"  # the same pattern, and words that are tokens are joined from their pieces
        if names:
            return "gpt2", names[0]
    what = f"the tokenizer cuts text in a way that GGUF files have no name for: {' and '.join(kinds) or 'not at all'}"
    raise EnvironmentProblem.of(what, None, MERGE_INSTEAD)


def _steps(node: TokenizerJson | None) -> list[TokenizerJson]:
    if node is None:
        return []
    return [step for inner in node.get("pretokenizers", []) for step in _steps(inner)] or [node]


def _as_pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _type(processor: PreTrainedTokenizerBase, index: int, tokens_by_id: dict[int, str], model: str) -> TokenType:
    """Return the type of a token: those of text stay visible in answers, control tokens do not."""
    token, added = tokens_by_id.get(index), processor.added_tokens_decoder
    if token is None:
        return TokenType.UNUSED
    if model == "llama" and index == processor.unk_token_id:
        return TokenType.UNKNOWN
    if index in added:
        return TokenType.CONTROL if added[index].special or _MARKER.fullmatch(token) else TokenType.USER_DEFINED
    return TokenType.BYTE if model == "llama" and _BYTE.fullmatch(token) else TokenType.NORMAL


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> list[float]:
    """Return the score of each token: what is merged earlier has the higher one; letters come last."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _prepends_space(content: TokenizerJson) -> bool:
    """Whether a space goes before text: by a normaliser, or by a pre-tokenizer of sentencepiece."""
    normalizer = content.get("normalizer") or {}
    before = [step["type"] for step in normalizer.get("normalizers", [normalizer]) if step]
    schemes = [step.get("prepend_scheme", "never") for step in _steps(content.get("pre_tokenizer"))]
    return "Prepend" in before or any(scheme != "never" for scheme in schemes)


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
    values: TokenizerJson = {
        name.rpartition(".")[2]: fields[name].contents() for name in fields if "tokenizer." in name
    }
    ids = {name: values.get(f"{named}_token_id") for name, named in SPECIAL.items()}
    return Vocabulary(
        model=values["model"],
        pre=values["pre"],
        tokens=tuple(values["tokens"]),
        types=tuple(values["token_type"]),
        merges=tuple(values.get("merges", ())),
        scores=tuple(values.get("scores", ())),
        special={name: index for name, index in ids.items() if index is not None},
        add_bos=values["add_bos_token"],
        add_space=values["add_space_prefix"],
        chat_template=values.get("chat_template"),
    )


def build_tokenizer(vocabulary: Vocabulary) -> PreTrainedTokenizerFast:
    """Return a tokenizer that reads text as llama.cpp does with this vocabulary; nothing is added to a text."""
    tokens, types = vocabulary.tokens, vocabulary.types
    ids = {token: index for index, token in enumerate(tokens)}
    if vocabulary.model == "gpt2":
        merges = [_as_pair(merge) for merge in vocabulary.merges]
        tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=vocabulary.pre == "llama-bpe"))
        tokenizer.pre_tokenizer = _build_pre_tokenizer(vocabulary.pre)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.BPE(ids, _rank_merges(vocabulary, ids), byte_fallback=True, fuse_unk=True))
        prepend = [normalizers.Prepend(SPACE)] if vocabulary.add_space else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
        tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    added = [index for index, kind in enumerate(types) if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)]
    tokenizer.add_tokens(
        [AddedToken(tokens[i], normalized=False, special=types[i] == TokenType.CONTROL) for i in added]
    )
    named = {f"{name}_token": tokens[index] for name, index in vocabulary.special.items() if name != "eot"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = vocabulary.chat_template
    return fast


def _build_pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    """Return what splits text into words, by llama.cpp's name for it."""
    if pre == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    first: pre_tokenizers.PreTokenizer
    if pre == "smollm":
        first, splits = pre_tokenizers.Digits(individual_digits=True), True
    else:
        pattern = PATTERNS["llama-bpe" if pre == "smaug-bpe" else pre]
        first, splits = pre_tokenizers.Split(Regex(pattern), "isolated"), False
    return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits)])


def _rank_merges(vocabulary: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that make a token, those with the highest score first."""
    pairs = []
    for token, score, kind in zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True):
        if kind == TokenType.NORMAL:
            halves = ((token[:at], token[at:]) for at in range(1, len(token)))
            pairs += [(-score, left, right) for left, right in halves if left in ids and right in ids]
    return [(left, right) for _, left, right in sorted(pairs, key=lambda pair: pair[0])]
