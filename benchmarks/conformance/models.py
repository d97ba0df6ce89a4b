"""Tiny random models with the tokens and the chat templates of real families; the weights are float32."""

from __future__ import annotations

import json
from importlib.metadata import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

CORPUS = [
    "You are a helpful assistant. user asks a question and the assistant gives a short answer.",
    "Which colour is the sky? The sky is blue. How many legs has a cat? Four. What is the weather in Paris?",
    "one two three four five six seven eight nine ten red green blue cat dog bird fish system tool think",
]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
GEMMA = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
IMAGE = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
SIDE, IMAGE_TOKENS = 56, 16
"""The side of a picture in pixels, and the tokens that it takes."""
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"image_size": SIDE, "patch_size": 14, "vision_use_head": False}
PREPROCESSOR = {"do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3}
PREPROCESSOR |= {"image_std": [0.5] * 3, "resample": 2, "rescale_factor": 1 / 255}
PREPROCESSOR |= {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": SIDE, "width": SIDE}}
CALLS = ["<tool_call>", "</tool_call>"]
WORDS = [" red", " green", " blue", " cat", " dog", " bird", " fish"]
SETTINGS = {
    "ends": {"eos_token_id": ["<|im_end|>", "<|endoftext|>"]},
    "picky": {"do_sample": True, "temperature": 0.2, "top_k": 2, "top_p": 0.5, "repetition_penalty": 4.0},
}
"""Variant of a model that writes words -> what its `generation_config.json` adds; tokens stand for their ids."""
THOUGHTS = [*CALLS, "<tool_response>", "</tool_response>", "<think>", "</think>"]
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
}
SCALED: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""Llama 3.1's, except for the length: it scales rotations that a short text shows."""


def build_model(family: str, folder: Path, seed: int = 0) -> Path:
    """Save a model and its tokenizer in `folder`: qwen2.5, qwen3, llama3, t5 or gemma3, which also reads pictures.

    `llama3-unpadded` has no pad token, as the real one; `llama3-scaled` scales rotations as Llama 3.1 does;
    `qwen2.5-overflowing` has a norm that overflows float32; `qwen2.5-plain` has no chat template; `qwen2.5-words`
    samples a few words and ends; `qwen2.5-words-ends` and `qwen2.5-words-picky` have other generation settings.
    """
    torch.manual_seed(seed)
    if family == "t5":
        tokenizer = train_tokenizer(["<pad>", "</s>"], [], eos="</s>", pad="<pad>")
        tokenizer.backend_tokenizer.post_processor = ends_with(tokenizer, "</s>")
        shape = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
        model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **shape, **ids))
    elif family.startswith("llama3"):
        pad = None if family.endswith("-unpadded") else "<|end_of_text|>"
        tokenizer = train_tokenizer(LLAMA, [], bos=LLAMA[0], eos="<|eot_id|>", pad=pad)
        tokenizer.backend_tokenizer.post_processor = starts_with(tokenizer, LLAMA[0])
        tokenizer.chat_template = read_template("llama3")
        rope = {"rope_parameters": SCALED} if family.endswith("-scaled") else {}
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, **ids_of(tokenizer), **rope))
    elif family == "gemma3":
        tokenizer = train_tokenizer([*GEMMA, *IMAGE.values()], [], bos="<bos>", eos="<eos>", pad="<pad>")
        tokenizer.chat_template = read_template("gemma3")
        ids = {f"{name}_index": tokenizer.convert_tokens_to_ids(token) for name, token in IMAGE.items()}
        text = {**SHAPE, **ids_of(tokenizer), "num_hidden_layers": 6, "query_pre_attn_scalar": 16}
        shape = {"text_config": text, "vision_config": TOWER, "mm_tokens_per_image": IMAGE_TOKENS}
        model = Gemma3ForConditionalGeneration(Gemma3Config(**shape, **ids, initializer_range=0.1))
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)  # else zeros
    else:
        config, added = (Qwen3Config, THOUGHTS) if family == "qwen3" else (Qwen2Config, CALLS)
        tokenizer = train_tokenizer(CHATML, added, eos="<|im_end|>", pad="<|endoftext|>")
        tokenizer.chat_template = read_template("qwen3" if family == "qwen3" else "qwen2_5")
        tied = "-words" not in family
        model = AutoModelForCausalLM.from_config(config(**SHAPE, **ids_of(tokenizer), tie_word_embeddings=tied))
        if not tied:
            prefer_words(model, tokenizer, CHATML[::2] if family.endswith("-ends") else CHATML[2:])
        if family.endswith("-overflowing"):
            torch.nn.init.constant_(model.model.norm.weight, 3e38)
        if family.endswith("-plain"):
            tokenizer.chat_template = None
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The form that every tool reads, not only those with the newest transformers.
    add_settings(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    for name, value in SETTINGS.get(family.rpartition("-")[2], {}).items():
        ids = tokenizer.convert_tokens_to_ids(value) if name == "eos_token_id" else value
        add_settings(folder / "generation_config.json", **{name: ids})
    if family == "gemma3":
        finish_gemma(folder)
    elif family != "t5" and not family.endswith("-scaled"):
        add_settings(folder / "config.json", rope_theta=10000.0)
    return folder


def prefer_words(model: Any, tokenizer: Any, ends: list[str]) -> None:
    """Give all tokens one dimension in common, and the head a weight on it for a few words and the end tokens."""
    ids = [tokenizer(word)["input_ids"] for word in WORDS]
    assert all(len(one) == 1 for one in ids), "each word is one token"
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[[one[0] for one in ids], 0] = 4.0
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(ends), 0] = 4.0


def finish_gemma(folder: Path) -> None:
    """Add the processor's files, and name the tower's weights, as the released checkpoints have them."""
    add_settings(folder / "tokenizer_config.json", **IMAGE, extra_special_tokens=IMAGE)
    add_settings(folder / "preprocessor_config.json", **PREPROCESSOR, processor_class="Gemma3Processor")
    add_settings(folder / "processor_config.json", image_seq_length=IMAGE_TOKENS, processor_class="Gemma3Processor")
    weights = load_file(folder / "model.safetensors")
    named = {name.replace("vision_tower.", "vision_tower.vision_model."): weight for name, weight in weights.items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})


def add_settings(file: Path, **settings: Any) -> None:
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**before, **settings}, indent=2))


def train_tokenizer(special: list[str], added: list[str], eos: str, pad: str | None, bos: str | None = None) -> Any:
    """Train a byte-level BPE of about 500 tokens; it can encode any text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(added)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad, model_max_length=2048
    )


def starts_with(tokenizer: Any, token: str) -> Any:
    """Add `token` before each text, as Llama's tokenizers do."""
    special = [(token, tokenizer.convert_tokens_to_ids(token))]
    return processors.TemplateProcessing(f"{token} $A", f"{token} $A {token} $B", special)


def ends_with(tokenizer: Any, token: str) -> Any:
    """Add `token` after each text, as T5's tokenizers do."""
    special = [(token, tokenizer.convert_tokens_to_ids(token))]
    return processors.TemplateProcessing(f"$A {token}", f"$A {token} $B {token}", special)


def ids_of(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def read_template(name: str) -> str:
    """Return a chat template as its model has it; TRL's package ships verbatim copies, and is not imported."""
    [path] = [file for file in files("trl") or () if file.match(f"chat_templates/{name}.jinja")]
    return path.read_text(encoding="utf-8")
