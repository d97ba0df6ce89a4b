"""Readers that verify a GGUF file: llama.cpp if installed, otherwise transformers.

Shapes: T positions, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from gguf import GGUFReader
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput

from llmtune.data.row_kind import write_prompt
from llmtune.deploy.exported_model import TRANSFORMERS, ExportedModel, ModelSource, borrow_class
from llmtune.deploy.gguf_converter import has_llama
from llmtune.deploy.gguf_tokenizer import (
    NAMES,
    PRE_TOKENIZERS,
    SENTENCEPIECE,
    TokenizerFacts,
    build_tokenizer,
    read_tokenizer,
)
from llmtune.deploy.parity import Limits, load_product
from llmtune.deploy.tuned_model import TransformersReader, TunedModel, render_chats, render_prompts
from llmtune.errors import EnvironmentProblem
from llmtune.model.config import find_class
from llmtune.recipe.model_kind import CAUSAL

NOT_READ = (
    "head_dim",
    "rope_parameters",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "layer_types",
)
"""Settings that transformers 5 does not read from GGUF files of some model types; taken from the model instead."""
PROJECTOR = "mmproj-"
"""Start of the name of a file with towers."""
READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text")

FORMAT_LIMITS = {
    "f32": Limits(kl_floor=1e-3, kl_cap=1e-3, top1=0.98, noise=1e-4),
    "f16": Limits(kl_floor=1e-3, kl_cap=1e-3, top1=0.98, noise=1e-4),
    "bf16": Limits(kl_floor=1e-2, kl_cap=2e-2, top1=0.95, noise=1e-3),
    "q8_0": Limits(kl_floor=3e-2, kl_cap=3e-2, top1=0.9),
    "q4_k_m": Limits(kl_floor=2.5e-1, kl_cap=2.5e-1, top1=0.75),
}
"""Limits for a format's rounding: at least twice its effect on SmolLM2 135M, since small models suffer most.
Its mean KL in llama.cpp is 5e-6 in F16, 2e-4 in BF16, 0.011 in Q8_0 (0.003 from the weights, the rest from inputs of
products, which llama.cpp rounds too) and 0.11 in Q4_K_M. F32 has F16's limits, since llama.cpp keeps keys and
values in F16 and looks up functions in tables. `find_lost_adapter` detects a missing adapter."""
FILE_TYPES = {0: "f32", 1: "f16", 32: "bf16", 7: "q8_0", 15: "q4_k_m"}
"""By `general.file_type` of a file."""
END_IDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
COARSEST = "q4_k_m"
"""The type whose limits hold for unknown ones."""


def check_reader(model_type: str, pre_tokenizer: str) -> None:
    """Raise EnvironmentProblem if no installed program can read, and so certify, a file of this type."""
    transformers_reads = model_type in READ_BY_TRANSFORMERS and pre_tokenizer in (*PRE_TOKENIZERS, SENTENCEPIECE)
    if not has_llama() and not transformers_reads:
        what = f"only llama.cpp reads GGUF files of type {model_type!r} with pre-tokenizer {pre_tokenizer!r}"
        raise EnvironmentProblem.of(what, None, "Run: pip install llama-cpp-python")


class LlamaReader:
    """llama.cpp as installed by users, on the CPU, where a file gives the same numbers everywhere."""

    name = "llama.cpp"

    def __init__(self, file: Path, length: int, **options: Any) -> None:
        import llama_cpp

        threads = {"n_threads": torch.get_num_threads(), "n_threads_batch": torch.get_num_threads()}
        lengths = {"n_ctx": length, "n_batch": length, "n_ubatch": length}
        try:
            self.llm = llama_cpp.Llama(
                str(file), n_gpu_layers=0, logits_all=True, verbose=False, **lengths, **threads, **options
            )
        except (ValueError, RuntimeError) as error:
            raise EnvironmentProblem.of(f"llama.cpp cannot read the GGUF file: {error}", str(file)) from error

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, with a leading start token if the file adds one."""
        return list(self.llm.tokenize(text.encode(), add_bos=True, special=True))

    def ends(self) -> list[int]:
        """Return the ids at which llama.cpp ends an answer."""
        import llama_cpp

        vocabulary = llama_cpp.llama_model_get_vocab(self.llm.model)
        return [token for token in range(self.llm.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocabulary, token)]

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits [T, V] of every position, in float32; the start that the last text shares is cached."""
        cached_ids = self.llm.input_ids[: self.llm.n_tokens].tolist()
        pairs = enumerate(zip(cached_ids, ids[:-1], strict=False))
        shared = next((at for at, (one, other) in pairs if one != other), min(len(cached_ids), len(ids) - 1))
        self.llm.n_tokens = shared
        self.llm.eval(list(ids[shared:]))
        return torch.from_numpy(self.llm.scores[: len(ids)].copy()).float()


class LlamaClassifier(LlamaReader):
    """llama.cpp for an encoder with a classification head."""

    def __init__(self, file: Path, length: int, outputs: int) -> None:
        super().__init__(file, length, embedding=True)
        self.outputs = outputs

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits [1, K] of a text, in float32."""
        import llama_cpp

        tokens = (llama_cpp.llama_token * len(ids))(*ids)  # kept alive here, since the batch only points to them
        batch = llama_cpp.llama_batch_get_one(tokens, len(ids))
        batch.logits = (ctypes.c_int8 * len(ids))(*[1] * len(ids))  # an encoder outputs every token
        llama_cpp.llama_encode(self.llm.ctx, batch)
        return torch.tensor([llama_cpp.llama_get_embeddings_seq(self.llm.ctx, 0)[: self.outputs]])


class TransformersGgufReader(TransformersReader):
    """transformers in float32, with the tokenizer described by the file."""

    def __init__(self, file: Path, facts: TokenizerFacts, model_config: PretrainedConfig) -> None:
        transformers.utils.logging.disable_progress_bar()
        files: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}

        def load() -> Any:
            config = AutoConfig.from_pretrained(str(file.parent), **files)
            for name in NOT_READ:
                if hasattr(model_config, name):
                    setattr(config, name, getattr(model_config, name))
            options = {**files, "config": config, "dtype": torch.float32, "output_loading_info": True}
            return getattr(transformers, CAUSAL.auto_class).from_pretrained(str(file.parent), **options)

        super().__init__(load_product(load, "the GGUF file"))
        self.tokenizer = build_tokenizer(facts)
        self.start = [facts[NAMES.BOS_ID]] if facts[NAMES.ADD_BOS] else []

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, with a leading start token if the file adds one."""
        return [*self.start, *cast(list[int], self.tokenizer(text, add_special_tokens=False)["input_ids"])]


GgufReader = LlamaReader | TransformersGgufReader


def served_by_file(tuned: TunedModel, facts: TokenizerFacts, reader: GgufReader) -> list[list[int]]:
    """Return the prompts' ids as a server makes them from the file alone.

    It renders with the file's template, and the reader adds the start token if the file says so.
    """
    tokenizer = build_tokenizer(facts)
    texts = render_chats(tuned, tokenizer)
    if texts is None and tuned.task.free_prompt and not tuned.task.is_conversational:
        texts = [*map(write_prompt, tuned.questions)]
    elif texts is None:  # the client of such a model writes the prompt
        texts = [tokenizer.decode(ids) for ids in render_prompts(tuned, tokenizer)]
        texts = [text.removeprefix(" ") for text in texts] if facts.get(NAMES.ADD_PREFIX) else texts
    start = facts[NAMES.LIST][facts[NAMES.BOS_ID]] if facts[NAMES.ADD_BOS] else ""
    return [reader.encode(text.removeprefix(start)) for text in texts]


# A GGUF file as a transformers model


def longest_text(tuned: TunedModel) -> int:
    """Return the tokens of the longest row of a run, with an answer; 0 without encoded rows."""
    return max(tuned.examples.longest.values()) + tuned.recipe.generation.max_new_tokens if tuned.examples else 0


def open_gguf_export(path: Path, source: ModelSource, length: int, adapter: Path | None = None) -> ExportedModel:
    """Open a GGUF file of a model, or the folder with it, for texts of up to `length` tokens.

    `adapter` is a LoRA file to put on it, for llama.cpp only.

    Raises:
        EnvironmentProblem: the file cannot be read.
        GateFailed: weights are missing in the file.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    file = next(one for one in files if not one.name.startswith(PROJECTOR) or one == path)
    kind, config = find_class(source.model_ref, source.recipe, source.task)
    try:
        facts, stated = read_tokenizer(file), GGUFReader(file).get_field("general.file_type")
    except (ValueError, IndexError, KeyError) as error:
        raise EnvironmentProblem.of(f"not a readable GGUF file: {error}", str(file), "Export it again.") from error
    limits = FORMAT_LIMITS[FILE_TYPES.get(int(stated.contents()), COARSEST) if stated else COARSEST]
    processor = source.processor
    if not has_llama():
        ours = TransformersGgufReader(file, facts, config.get_text_config())
        served = partial(served_by_file, facts=facts, reader=ours)
        ends = [facts[key] for key in END_IDS if key in facts]
        return ExportedModel("gguf", TRANSFORMERS, ours.model, processor, file, limits, served, ends)
    if not source.task.model_kind.decodes:
        classifier = LlamaClassifier(file, length, config.num_labels)
        model = borrow_class(kind, config, _classify_texts(classifier))
        served, encode = partial(render_prompts, processor=processor), classifier.encode
        return ExportedModel("gguf", name_llama(), model, processor, file, limits, served, encode=encode)
    reader = LlamaReader(file, length, lora_path=str(adapter) if adapter else None)
    model = borrow_class(kind, config, _read_texts(reader), prepare_inputs_for_generation=_all)
    served = partial(served_by_file, facts=facts, reader=reader)
    return ExportedModel("gguf", name_llama(), model, processor, file, limits, served, reader.ends())


def name_llama() -> str:
    """Return the name and version of llama.cpp."""
    return f"llama.cpp of llama-cpp-python {version('llama-cpp-python')}"


def _all(self: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, **rest: Any) -> dict[str, Any]:
    """Return the complete texts as the next step's inputs: llama.cpp keeps the cache."""
    return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}


def _read_texts(reader: LlamaReader) -> Callable[..., CausalLMOutputWithPast]:
    """Return the forward pass of a decoder: texts [B, T] -> logits [B, T, V], or those of `logits_to_keep` alone."""

    def forward(
        self: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **rest: Any,
    ) -> CausalLMOutputWithPast:
        if (attention_mask is not None and attention_mask.dim() > 2) or rest.get("past_key_values"):
            raise ValueError("llama.cpp has its own mask and cache")
        if isinstance(logits_to_keep, int) and logits_to_keep == 1 < len(input_ids):
            raise ValueError("llama.cpp caches one text, and would read several anew for each token")
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        rows = []
        for row, ids_T in enumerate(input_ids):
            mask_T = torch.ones_like(ids_T) if attention_mask is None else attention_mask[row]
            logits_TV = reader.logits(ids_T[mask_T.bool()].tolist())
            places_T = (mask_T.cumsum(0) - 1).clamp(0, len(logits_TV) - 1)
            rows.append(logits_TV[places_T[kept]])  # at padding, those of a neighbour
        return CausalLMOutputWithPast(logits=torch.stack(rows))

    return forward


def _classify_texts(reader: LlamaClassifier) -> Callable[..., SequenceClassifierOutput]:
    """Return the forward pass of a classifier: texts [B, T] -> logits [B, K]."""

    def forward(
        self: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **rest: Any
    ) -> SequenceClassifierOutput:
        masks_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pairs = zip(input_ids, masks_BT, strict=True)
        return SequenceClassifierOutput(
            logits=torch.cat([reader.logits(ids[mask.bool()].tolist()) for ids, mask in pairs])
        )

    return forward
