"""A tokenizer as llama.cpp reads it: tokens with their types, merges or scores, pre-tokenizer; and back again.

llama.cpp's converter finds the pre-tokenizer by a fingerprint, trusts the files for the start token, and reads pieces
from a file that tokenizers of transformers 5 no longer have. Here all three follow from the tokenizer itself, so a
tokenizer with new tokens gives the ids of training too.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFWriter, Keys, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llmtune.errors import EnvironmentProblem

MERGE_INSTEAD = "Use: llmtune deploy merge RUN."
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What sentencepiece writes for a space."""


def _split_words(digits: str) -> pre_tokenizers.PreTokenizer:
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(words + digits + rest), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": _split_words(r"\p{N}"),
    "llama-bpe": _split_words(r"\p{N}{1,3}"),
    "smaug-bpe": _split_words(r"\p{N}{1,3}"),
}
"""What splits text into words, by llama.cpp's name for it; of `llama-bpe`, words that are tokens are not merged."""
DECISIVE = ("type", "add_prefix_space", "use_regex", "individual_digits", "pattern")
"""Keys of a step of a pre-tokenizer that decide how text is split."""
NAMES = Keys.Tokenizer
SPECIAL = {"bos": NAMES.BOS_ID, "eos": NAMES.EOS_ID, "unk": NAMES.UNK_ID, "pad": NAMES.PAD_ID}
PER_TOKEN = (NAMES.LIST, NAMES.TOKEN_TYPE, NAMES.SCORES)
"""What has one entry per token."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_MARKER = re.compile(r"<\|.*\|>")

TokenizerJson = dict[str, Any]
"""The content of a tokenizer.json, or a step of it."""
Vocabulary = dict[str, Any]
"""What a GGUF file says about a tokenizer, by the names of `gguf.Keys.Tokenizer`. The model is `gpt2` for merges of
bytes and `llama` for sentencepiece, where a score says which pieces are joined first; `eot` is there where answers end
in another token than texts."""


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
    model, pre = find_pre_tokenizer(processor)
    tokens_by_id = {index: token for token, index in processor.get_vocab().items()}
    if max(tokens_by_id) >= size:
        what = f"the tokenizer has {max(tokens_by_id) + 1} tokens, and the model {size}"
        raise EnvironmentProblem.of(what, None, "Their folder is damaged.")
    tokens = [tokens_by_id.get(index, f"[PAD{index}]") for index in range(size)]
    merges = [_as_pair(merge) for merge in content["model"]["merges"]]
    special = {key: getattr(processor, f"{name}_token_id", None) for name, key in SPECIAL.items()}
    special[NAMES.EOT_ID] = next((stop for stop in stops if stop != processor.eos_token_id), None)
    bos, template = processor.bos_token_id, processor.chat_template
    writes_bos = bos is not None and processor("a")["input_ids"][:1] == [bos]
    values = {
        NAMES.MODEL: model,
        NAMES.PRE: pre,
        NAMES.LIST: tokens,
        NAMES.TOKEN_TYPE: [int(_type(processor, index, tokens_by_id, model)) for index in range(size)],
        NAMES.MERGES: [f"{left} {right}" for left, right in merges] if model == "gpt2" else None,
        NAMES.SCORES: _scores(tokens, merges) if model == "llama" else None,
        **special,
        NAMES.ADD_BOS: writes_bos and all(ids[0] == bos for ids in prompts),
        NAMES.ADD_EOS: False,
        NAMES.ADD_PREFIX: _prepends_space(content),
        NAMES.CHAT_TEMPLATE: template if isinstance(template, str) else (template or {}).get("default"),
    }
    return {key: value for key, value in values.items() if value is not None and value != []}


def read_tokenizer(processor: PreTrainedTokenizerBase) -> TokenizerJson:
    """Return the content of tokenizer.json; raises EnvironmentProblem for one not of the library `tokenizers`."""
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is None:
        what = f"a tokenizer of class {type(processor).__name__} cannot be written"
        raise EnvironmentProblem.of(what, None, MERGE_INSTEAD)
    content: TokenizerJson = json.loads(backend.to_str())
    return content


def find_pre_tokenizer(processor: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return `tokenizer.ggml.model` and `tokenizer.ggml.pre` of a tokenizer.

    The name follows from how the tokenizer splits text, so that it holds for tokenizers trained on the spot; where that
    is not one of `PRE_TOKENIZERS`, from the fingerprints of llama.cpp's converter.

    Raises EnvironmentProblem where neither knows the tokenizer.
    """
    content = read_tokenizer(processor)
    kind = content["model"].get("type")
    if kind != "BPE":
        raise EnvironmentProblem.of(f"a tokenizer of type {kind} cannot be written as GGUF", None, MERGE_INSTEAD)
    if content["model"].get("byte_fallback"):
        return "llama", "default"
    steps = _list_steps(content.get("pre_tokenizer"))
    names = [name for name, known in PRE_TOKENIZERS.items() if _list_steps(json.loads(known.__getstate__())) == steps]
    if names:
        return "gpt2", names[0 if content["model"].get("ignore_merges") else -1]
    from conversion.base import TextModel

    logging.getLogger("hf-to-gguf").setLevel(logging.ERROR)  # it draws a box of stars around what the error says
    try:
        return "gpt2", TextModel.get_vocab_base_pre(None, processor)
    except NotImplementedError as error:
        kinds = " and ".join(step["type"] for step in steps) or "not at all"
        what = f"llama.cpp does not know how this tokenizer splits text: {kinds}"
        raise EnvironmentProblem.of(what, None, MERGE_INSTEAD) from error


def _list_steps(node: TokenizerJson | None) -> list[TokenizerJson]:
    """Return what decides how a pre-tokenizer splits, step by step, those within others too."""
    if node is None:
        return []
    steps = [step for inner in node.get("pretokenizers", ()) for step in _list_steps(inner)]
    return steps or [{key: node[key] for key in DECISIVE if key in node}]


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
    before_words = content.get("pre_tokenizer") or {}
    schemes = [step.get("prepend_scheme", "never") for step in before_words.get("pretokenizers", [before_words])]
    return "Prepend" in before or any(scheme != "never" for scheme in schemes)


def write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Write the tokenizer's part of a file."""
    add: dict[type, Callable[[str, Any], None]] = {
        str: writer.add_string,
        bool: writer.add_bool,
        int: writer.add_uint32,
        list: writer.add_array,
    }
    for key, value in vocabulary.items():
        add[type(value)](key, value)


def read_vocabulary(file: Path) -> Vocabulary:
    """Read the tokenizer's part of a GGUF file."""
    return {key: field.contents() for key, field in GGUFReader(file).fields.items() if key.startswith("tokenizer.")}


def build_tokenizer(vocabulary: Vocabulary) -> PreTrainedTokenizerFast:
    """Return a tokenizer that reads text as llama.cpp does with this vocabulary; nothing is added to a text.

    With a pre-tokenizer that is not in `PRE_TOKENIZERS` it decodes and renders only.
    """
    tokens, types, pre = vocabulary[NAMES.LIST], vocabulary[NAMES.TOKEN_TYPE], vocabulary[NAMES.PRE]
    ids = {token: index for index, token in enumerate(tokens)}
    if vocabulary[NAMES.MODEL] == "gpt2":
        merges = [_as_pair(merge) for merge in vocabulary.get(NAMES.MERGES, ())]
        tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=pre == "llama-bpe"))
        tokenizer.pre_tokenizer = PRE_TOKENIZERS.get(pre)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.BPE(ids, _rank_merges(vocabulary, ids), byte_fallback=True, fuse_unk=True))
        prepend = [normalizers.Prepend(SPACE)] if vocabulary[NAMES.ADD_PREFIX] else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
        tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    added = [index for index, kind in enumerate(types) if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)]
    tokenizer.add_tokens(
        [AddedToken(tokens[i], normalized=False, special=types[i] == TokenType.CONTROL) for i in added]
    )
    named = {f"{name}_token": tokens[vocabulary[key]] for name, key in SPECIAL.items() if key in vocabulary}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = vocabulary.get(NAMES.CHAT_TEMPLATE)
    return fast


def _rank_merges(vocabulary: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that make a token, those with the highest score first."""
    pairs = []
    parts = (vocabulary[key] for key in (NAMES.LIST, NAMES.SCORES, NAMES.TOKEN_TYPE))
    for token, score, kind in zip(*parts, strict=True):
        if kind == TokenType.NORMAL:
            halves = ((token[:at], token[at:]) for at in range(1, len(token)))
            pairs += [(-score, left, right) for left, right in halves if left in ids and right in ids]
    return [(left, right) for _, left, right in sorted(pairs, key=lambda pair: pair[0])]
