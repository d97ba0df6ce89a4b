"""Tiny random models with a tokenizer trained on the spot; real classes, no mocks."""

from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "A recipe describes how a model is tuned, step by step, from data to evaluation.",
    "user asks a question and the assistant gives a short answer.",
    "one two three four five six seven eight nine ten red green blue cat dog bird fish",
    "Which colour is the sky? The sky is blue. How many legs has a cat? Four.",
]


def train_tokenizer(
    chat_template: str | None = CHATML, vocab_size: int = 512, named_tokens: Mapping[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on CORPUS; it can encode any text. `named_tokens` become attributes: image_token, ..."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(tokens, vocab_size),
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>" if chat_template else "<|endoftext|>",
        pad_token="<pad>",
        model_max_length=2048,
        extra_special_tokens=dict(named_tokens or {}),
    )
    fast.chat_template = chat_template
    return fast


def byte_level_tokenizer(special_tokens: list[str], vocab_size: int = 512) -> Tokenizer:
    """Return the same tokenizer without transformers' wrapper."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def build_llama(
    folder: Path, chat_template: str | None = CHATML, seed: int = 0, layers: int = 2, **config: int
) -> Path:
    """A Llama of two layers, width 64, four heads (two for keys and values), saved with its tokenizer."""
    tokenizer = train_tokenizer(chat_template)
    torch.manual_seed(seed)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    LlamaForCausalLM(LlamaConfig(**{**shape, **config})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_gpt2(folder: Path, seed: int = 0) -> Path:
    """A GPT-2 of two layers, width 64: learned positions, Conv1D projections, no chat template."""
    tokenizer = train_tokenizer(chat_template=None)
    torch.manual_seed(seed)
    shape = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
