"""Tokenizers in GGUF files: fields that llama.cpp's converter cannot determine, scored pieces, and reading back.

The converter identifies a tokenizer by a fingerprint of a text's ids, which a start token or new words change. It reads
sentencepiece's scores from a file that transformers 5 no longer saves. This module determines only the name of the
pre-tokenizer, these scores and the ids of special tokens; the converter writes the rest.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from gguf import GGUFReader, GGUFValueType, Keys, SpecialVocab, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llmtune.errors import EnvironmentProblem

MERGE_INSTEAD = "Use: llmtune deploy merge RUN."
PHI3_TOKENS = {"</s>", "<unk>", "<s>", "<|endoftext|>"}
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""sentencepiece's character for a space."""


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
"""Pre-tokenizers by llama.cpp's name; with `llama-bpe`, words that are tokens are not merged."""
SENTENCEPIECE = "default"
"""The name for sentencepiece tokenizers with byte fallback, which do not split text."""
DECISIVE = ("type", "add_prefix_space", "use_regex", "individual_digits", "pattern")
"""Keys of a pre-tokenizer step that determine how it splits text."""
NAMES = Keys.Tokenizer
SPECIAL = {"bos": NAMES.BOS_ID, "eos": NAMES.EOS_ID, "unk": NAMES.UNK_ID, "pad": NAMES.PAD_ID}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
VALUE_TYPES = {str: GGUFValueType.STRING, bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32}

TokenizerJson = dict[str, Any]
"""The content of a tokenizer.json, or a step of it."""
TokenizerFacts = dict[str, Any]
"""A file's tokenizer fields, by the names of `gguf.Keys.Tokenizer`."""


def find_pre_tokenizer(processor: PreTrainedTokenizerBase, encoder: bool = False) -> str:
    """Return `tokenizer.ggml.pre` of a tokenizer.

    The name follows from how the tokenizer splits text, which also works for newly trained tokenizers. If that
    is not one of `PRE_TOKENIZERS`, it follows from the fingerprints of llama.cpp's converter.

    Raises EnvironmentProblem if neither knows the tokenizer.
    """
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is None:
        what = f"a tokenizer of class {type(processor).__name__} cannot be written"
        raise EnvironmentProblem.of(what, None, MERGE_INSTEAD)
    content: TokenizerJson = json.loads(backend.to_str())
    kind = content["model"].get("type")
    if kind in ("WordPiece", "Unigram") and encoder:
        return "default"  # llama.cpp splits text for these tokenizers in one way
    if kind != "BPE":
        raise EnvironmentProblem.of(f"a tokenizer of type {kind} cannot be written as GGUF", None, MERGE_INSTEAD)
    if content["model"].get("byte_fallback"):
        return SENTENCEPIECE
    steps = _list_steps(content.get("pre_tokenizer"))
    names = [
        name
        for name, pre_tokenizer in PRE_TOKENIZERS.items()
        if _list_steps(json.loads(pre_tokenizer.__getstate__())) == steps
    ]
    if names:
        return names[0 if content["model"].get("ignore_merges") else -1]
    from conversion.base import TextModel

    logging.getLogger("hf-to-gguf").setLevel(logging.ERROR)  # it logs a box of stars around the error's text
    try:
        return cast(str, TextModel.get_vocab_base_pre(None, processor))
    except NotImplementedError as error:
        kinds = " and ".join(step["type"] for step in steps) or "not at all"
        what = f"llama.cpp does not know how this tokenizer splits text: {kinds}"
        raise EnvironmentProblem.of(what, None, MERGE_INSTEAD) from error


def _list_steps(node: TokenizerJson | None) -> list[TokenizerJson]:
    """Return the splitting settings of a pre-tokenizer step by step, including nested steps."""
    if node is None:
        return []
    steps = [step for inner in node.get("pretokenizers", ()) for step in _list_steps(inner)]
    return steps or [{key: node[key] for key in DECISIVE if key in node}]


def describe_tokenizer(
    processor: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], stops: Sequence[int]
) -> TokenizerFacts:
    """Return fields that the converter cannot determine: pre-tokenizer, special tokens' ids, and who writes them.

    `prompts`, the ids as in training, decide whether a program writes the start token. `stops`
    are the ids that end an answer; an id that does not end a text ends a turn.

    Raises EnvironmentProblem if llama.cpp cannot split text as this tokenizer does.
    """
    bos = processor.bos_token_id
    writes_bos = bos is not None and processor("a")["input_ids"][:1] == [bos]
    facts = {
        NAMES.PRE: find_pre_tokenizer(processor),
        **{key: getattr(processor, f"{name}_token_id", None) for name, key in SPECIAL.items()},
        NAMES.EOT_ID: next((stop for stop in stops if stop != processor.eos_token_id), None),
        NAMES.ADD_BOS: writes_bos and all(ids[0] == bos for ids in prompts),
        NAMES.ADD_EOS: False,
    }
    return {key: value for key, value in facts.items() if value is not None}


def write_pieces(converter: Any) -> None:
    """Write sentencepiece's tokens: earlier merges get higher scores; letters come last."""
    content: TokenizerJson = json.loads((converter.dir_model / "tokenizer.json").read_text("utf-8"))
    tokens, types, _ = converter.get_vocab_base()
    for index, token in enumerate(tokens):
        if token == content["model"]["unk_token"]:
            types[index] = TokenType.UNKNOWN
        elif types[index] == TokenType.NORMAL and _BYTE.fullmatch(token):
            types[index] = TokenType.BYTE
    merges, ranks = content["model"]["merges"], dict[str, int]()
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "") if isinstance(merge, str) else "".join(merge), rank)
    writer = converter.gguf_writer
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_scores([-float(ranks.get(token, len(merges))) for token in tokens])
    writer.add_add_space_prefix(_prepends_space(content))
    SpecialVocab(converter.dir_model, n_vocab=len(tokens)).add_to_gguf(writer)


def _prepends_space(content: TokenizerJson) -> bool:
    """Whether a normaliser or a sentencepiece pre-tokenizer puts a space before the text."""
    normalizer = content.get("normalizer") or {}
    before = [step["type"] for step in normalizer.get("normalizers", [normalizer]) if step]
    before_words = content.get("pre_tokenizer") or {}
    schemes = [step.get("prepend_scheme", "never") for step in before_words.get("pretokenizers", [before_words])]
    return "Prepend" in before or any(scheme != "never" for scheme in schemes)


def model_name(name: str, processor: PreTrainedTokenizerBase) -> str:
    """Return the model's name in its file; "phi-3" makes llama.cpp take spaces after special tokens.

    llama.cpp looks only at the name, and then needs `PHI3_TOKENS` to load the file.
    """
    plain = re.sub("phi-?3", "phi_3", name, flags=re.IGNORECASE)
    strips = any(token.rstrip for token in processor.added_tokens_decoder.values())
    return f"{plain} phi-3" if strips and processor.get_vocab().keys() >= PHI3_TOKENS else plain


# Read back


def read_tokenizer(file: Path) -> TokenizerFacts:
    """Read the tokenizer fields of a GGUF file."""
    return {key: field.contents() for key, field in GGUFReader(file).fields.items() if key.startswith("tokenizer.")}


def build_tokenizer(facts: TokenizerFacts) -> PreTrainedTokenizerFast:
    """Return a tokenizer that splits text as llama.cpp does with this vocabulary, without adding tokens.

    With a pre-tokenizer outside `PRE_TOKENIZERS` it only decodes and renders.
    """
    tokens, types, pre = facts[NAMES.LIST], facts[NAMES.TOKEN_TYPE], facts[NAMES.PRE]
    ids = {token: index for index, token in enumerate(tokens)}
    if facts[NAMES.MODEL] == "gpt2":
        merges = [tuple(merge.split(" ", 1)) for merge in facts.get(NAMES.MERGES, ())]
        tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=pre == "llama-bpe"))
        tokenizer.pre_tokenizer = PRE_TOKENIZERS.get(pre)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.BPE(ids, _rank_merges(facts, ids), byte_fallback=True, fuse_unk=True))
        prepend = [normalizers.Prepend(SPACE)] if facts.get(NAMES.ADD_PREFIX) else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
        tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    added = [index for index, kind in enumerate(types) if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)]
    tokenizer.add_tokens(
        [AddedToken(tokens[i], normalized=False, special=types[i] == TokenType.CONTROL) for i in added]
    )
    named = {f"{name}_token": tokens[facts[key]] for name, key in SPECIAL.items() if key in facts}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = facts.get(NAMES.CHAT_TEMPLATE)
    return fast


def _rank_merges(facts: TokenizerFacts, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that form a token, highest score first."""
    pairs = []
    parts = (facts[key] for key in (NAMES.LIST, NAMES.SCORES, NAMES.TOKEN_TYPE))
    for token, score, kind in zip(*parts, strict=True):
        if kind == TokenType.NORMAL:
            halves = ((token[:at], token[at:]) for at in range(1, len(token)))
            pairs += [(-score, left, right) for left, right in halves if left in ids and right in ids]
    return [(left, right) for _, left, right in sorted(pairs, key=lambda pair: pair[0])]
