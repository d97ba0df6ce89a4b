"""Compare the peak memory of training in llmtune and TRL, packed: the standard case, and one with a large vocabulary.

    python benchmarks/memory.py [--pairs 3] [--json FILE]

The second case is a small Llama shape (8 layers of 512) with random weights, 150,000 words and packs of 4,096 tokens:
its logits dominate memory. Rows and tokenizer are the same; most of its words never occur. The measured values are the
peak resident memory of the process (on CUDA: of its tensors) since the model was loaded, and its increase since then.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from training import ask, find_model, read_options, take_turns, tell

WORDS, WIDTH, LAYERS, PACK = 150_000, 512, 8, 4096


def main() -> int:
    parser = read_options(__doc__)
    parser.set_defaults(pairs=3, steps=1, tools=["llmtune", "trl-packed"])
    parser.add_argument("--vocabulary", type=int, default=WORDS)
    parser.add_argument("--large-pack", type=int, default=PACK)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = replace(ask(options, folder), measure_limit=False)
        found["as in training"] = take_turns(plain, options.tools, options.pairs, options.llamafactory, folder)
        options.model = write_large(folder / "large", options.vocabulary)
        options.tokens = options.pack = options.large_pack
        large = replace(ask(options, folder), measure_limit=False)
        found["large vocabulary"] = take_turns(large, options.tools, options.pairs, options.llamafactory, folder)
    tell(found, options.json)
    return 0


def write_large(folder: Path, words: int) -> str:
    """Write a random model with so many words, and the packaged tokenizer, whose words are the first of them."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=PACK,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(find_model("builtin:smollm2-135m-instruct")).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    sys.exit(main())
