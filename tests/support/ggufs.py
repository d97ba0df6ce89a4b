"""Tiny models of the families that can become GGUF, with weights large enough for all of them to matter."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from support.models import CORPUS, train_tokenizer

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama-3.1": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, GEMMA),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {**GEMMA, "num_hidden_layers": 6}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, EXPERTS | {"num_local_experts": 4}),
    "qwen3-moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        EXPERTS | {"num_experts": 4, "head_dim": 32, "norm_topk_prob": True},
    ),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, EXPERTS | {"num_experts": 4, "num_key_value_heads": 4}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"original_max_position_embeddings": 2048}),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {"num_hidden_layers": 4}),
}


def make_family(name: str, **changes: Any) -> tuple[PreTrainedTokenizerFast, PreTrainedModel]:
    """Make a model of a family, and its tokenizer."""
    config_class, model_class, own = FAMILIES[name]
    tokenizer = train_tokenizer()
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    model = model_class(config_class(**{**shape, **own, **changes})).eval()
    for weight in model.parameters():
        if weight.dim() == 1:  # norms and biases start as ones and zeros, which would hide errors
            weight.data += 0.1 * torch.randn_like(weight)
    return tokenizer, model


def build_family(name: str, folder: Path, **changes: Any) -> Path:
    """Make and save a model of a family."""
    tokenizer, model = make_family(name, **changes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


CUTS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "qwen2": [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "llama-bpe": [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}
"""llama.cpp's name of a pre-tokenizer -> how tokenizers of these families split text, as in their tokenizer.json."""
CUTS["smaug-bpe"] = CUTS["llama-bpe"]
DIGITS = [f"{n} {n * 11} 1{n:03} it's I'LL\n\n  x" for n in range(100)]
TRICKY = (
    "The quick brown fox's 3 33 333 3333 33333 words, DOESN'T it?\n \n\n\t  two  spaces   \r\n\U0001f680 (ok) "
    "\u1780\u17b6\u1793\u17cb \u6211\u60f3\u5728apple\u5de5\u4f5c1314151\u5929 \u043d\u0435\u0449\u043e "
    "------=== ''''```` <|im_start|>user\nWe'Ve a'lL<|im_end|>\n"
)
"""Text that each pre-tokenizer splits differently, like llama.cpp's check text."""


def train_cut(name: str) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer that splits text like one of CUTS."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(CUTS[name])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, *DIGITS], trainer)
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def train_phi3() -> PreTrainedTokenizerFast:
    """Train a tokenizer like Phi-3's: pieces, and special tokens that include the white space after them."""
    tokenizer = train_pieces(True, ["<unk>", "<s>", "</s>", "<|endoftext|>"])
    tokens = [AddedToken(name, rstrip=True, normalized=False, special=True) for name in ("<|user|>", "<|end|>")]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens, "eos_token": tokens[1]})
    return tokenizer


PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "<|im_start|>", "<|im_end|>"]


def train_pieces(prefix: bool, special: list[str] = PIECES) -> PreTrainedTokenizerFast:
    """Train a tokenizer like sentencepiece's for Gemma, or with a space before text like that of Llama 2."""
    before = [normalizers.Prepend("\u2581")] if prefix else []
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=pieces, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, *DIGITS], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    names = {key: token for key, token in named.items() if token in special}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **names)
