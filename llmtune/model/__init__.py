"""Step 2: one model, found, planned for, ranked and loaded; its attention over packed rows and its loss."""

from llmtune.model import library_logging  # noqa: F401  # first: it mutes a library
from llmtune.model.causal_lm_loss import causal_loss, predicted_logits
from llmtune.model.device import compute_context, pick_device, resolve_dtype
from llmtune.model.kernels import check_kernels
from llmtune.model.loading import load_model
from llmtune.model.memory_plan import (
    check_context,
    check_memory,
    micro_batch_tokens,
    plan_memory,
    resolve_checkpointing,
)
from llmtune.model.model_selection import Ranking, rank_candidates
from llmtune.model.oom import is_out_of_memory
from llmtune.model.processor import load_processor, save_tokenizer
from llmtune.model.resolve import resolve_model

__all__ = [
    "Ranking",
    "causal_loss",
    "check_context",
    "check_kernels",
    "check_memory",
    "compute_context",
    "is_out_of_memory",
    "load_model",
    "load_processor",
    "micro_batch_tokens",
    "pick_device",
    "plan_memory",
    "predicted_logits",
    "rank_candidates",
    "resolve_checkpointing",
    "resolve_dtype",
    "resolve_model",
    "save_tokenizer",
]
