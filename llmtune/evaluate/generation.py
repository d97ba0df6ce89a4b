"""Generate answers to many prompts: greedy ones by our own loop, others by that of transformers, or all by vLLM."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch.nn import functional
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.utils import GenerationMixin

from llmtune.data.answer_parser import ParsedAnswer, parse_answer
from llmtune.data.chat_template import ChatTemplate, Tools, read_template, stop_ids
from llmtune.data.tokenization import decode
from llmtune.evaluate.greedy_decoding import cache_argument, column_bytes_of, decode_greedily, read_virtual_tokens
from llmtune.evaluate.token_batches import GENERATION_BUDGET, batch_size, budget_for, over_processes, run_in_batches
from llmtune.evaluate.vllm_completions import VllmModel
from llmtune.model.causal_lm_loss import unwrap, virtual_logits, virtual_tokens
from llmtune.model.device import SuppressRefusal, computing_dtype, device_memory
from llmtune.model.image_models import TOKEN_TYPES, join_media
from llmtune.model.self_checks import logits_agree, positions_depend_on_neighbours
from llmtune.model.tensor_parallel import same_everywhere
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import Prompt

CACHE_SHARE = 1 / 8
"""Share of the device's memory for the keys and values of one batch."""
MOST_ROWS = {"cpu": 256, "cuda": 512}
"""Largest batch: more rows do not make matrix products faster per row."""
PROMPT_END = 64
"""Tokens at the end of a prompt that contain everything a template adds to begin an answer."""
FEW_PROMPTS = 2
"""Up to this many prompts use transformers' loop: trying ours on the model first would cost more."""


def generation_settings(model: torch.nn.Module, processor: PreTrainedTokenizerBase, recipe: Recipe) -> GenerationConfig:
    """Return the recipe's generation settings for transformers, with every token that ends an answer.

    Settings from the model repository (a temperature, a repetition penalty) are ignored: the recipe decides.
    """
    options = {key: value for key, value in recipe.generation.model_dump().items() if value is not None}
    if options["do_sample"]:
        options.setdefault("top_k", 0)  # the default of transformers is 50
    stops = answer_ends(model, processor, recipe)
    pad = processor.pad_token_id if processor.pad_token_id is not None else (stops or [0])[0]
    return GenerationConfig(**options, eos_token_id=stops or None, pad_token_id=pad, use_cache=True)


def answer_ends(model: torch.nn.Module, processor: PreTrainedTokenizerBase, recipe: Recipe | None = None) -> list[int]:
    """Return the ids that end an answer.

    These are the tokenizer's end of text and the model's own end tokens. If `recipe` has a task with a chat template,
    the template's end of turn is added.
    """
    named = getattr(unwrap(model), "generation_config", None)
    stated = getattr(named, "eos_token_id", None)
    turn = stop_ids(processor, recipe) if recipe is not None and TASK_FACTS[recipe.task].templated else []
    ids = [processor.eos_token_id, *(stated if isinstance(stated, list) else [stated]), *turn]
    return sorted({int(i) for i in ids if i is not None})


def answer_template(processor: PreTrainedTokenizerBase, recipe: Recipe) -> ChatTemplate | None:
    """Return the template of answers; None if answers are plain text."""
    return read_template(processor, recipe) if TASK_FACTS[recipe.task].templated and processor.chat_template else None


def answer_reader(processor: PreTrainedTokenizerBase, recipe: Recipe) -> AnswerReader:
    """Return a reader for generated ids."""
    return AnswerReader(processor, answer_template(processor, recipe))


def prompt_end(processor: PreTrainedTokenizerBase, prompt: Sequence[int]) -> str | None:
    """Return the end of a prompt as text, in case the template began the answer there; None without a prompt."""
    return decode(processor, prompt[-PROMPT_END:]) if len(prompt) else None


@dataclass(frozen=True)
class AnswerReader:
    """Reads generated ids."""

    processor: PreTrainedTokenizerBase
    template: ChatTemplate | None
    """None if answers are plain text."""

    def __call__(
        self, ids: Sequence[int], tools: Tools, prompt: Sequence[int] = (), truncated: bool | None = None
    ) -> ParsedAnswer:
        """Return an answer in its parts, from the tools that may be called and the prompt's ids.

        Without `truncated` it is complete if it has its end token.
        """
        if self.template is None:
            parsed = ParsedAnswer(text := decode(self.processor, ids, skips_special=True), sampled=text)
        else:
            parsed = parse_answer(ids, self.template, tools, prompt_end(self.processor, prompt))
        return parsed if truncated is None else replace(parsed, complete=not truncated)


@dataclass(frozen=True)
class CompletionOutput:
    """The completion of one prompt."""

    token_ids: list[int]
    """Without the end token."""
    finish_reason: Literal["stop", "length"]
    """`length` if `generation.max_new_tokens` ended it."""


def generate_completions(
    model: torch.nn.Module,
    prompts: Sequence[Prompt],
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    device: str,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[CompletionOutput]:
    """Generate an answer to each prompt, in batches of similar length padded on the left.

    Sampling uses the recipe's seed and restores torch's random state. Processes share the prompts unless answers
    are sampled: a sample depends on the other prompts of its batch.
    """
    work = partial(_generate_here, model, processor=processor, recipe=recipe, device=device, advance=advance)
    return over_processes(model, prompts, work, divide=not recipe.generation.do_sample)


def _generate_here(
    model: torch.nn.Module,
    prompts: Sequence[Prompt],
    *,
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    device: str,
    advance: Callable[[int], None],
) -> list[CompletionOutput]:
    stops = set(answer_ends(model, processor, recipe))
    if isinstance(model, VllmModel):
        return [end_output(ids, stops) for ids in model.complete(prompts, recipe, stops, advance)]
    settings = generation_settings(model, processor, recipe)
    new = recipe.generation.max_new_tokens
    lengths = [len(prompt) + new for prompt in prompts]
    longest = max(lengths, default=0)
    alone = len(prompts) < 2 or positions_depend_on_neighbours(model, longest)  # a single prompt has no padding
    plain = all(prompt.media is None for prompt in prompts)
    ours = is_greedy(recipe) and len(prompts) > FEW_PROMPTS and plain and not alone
    column_bytes = column_bytes_of(model, device) if ours else None

    def work(batch: list[int]) -> list[CompletionOutput]:
        batch_prompts = [prompts[i] for i in batch]
        if column_bytes is None:
            answers = generate_batch(model, batch_prompts, settings, device)
        else:
            answers = decode_greedily(model, [prompt.ids for prompt in batch_prompts], new, stops, device)
        return [end_output(ids, stops) for ids in answers]

    if column_bytes is not None:
        most = budget_for(device, MOST_ROWS)
        return run_in_batches(lengths, cache_budget(device, column_bytes), work, advance, most=most)
    budget = budget_for(device, GENERATION_BUDGET) // recipe.generation.num_beams
    with torch.random.fork_rng(), only_these_settings(model):
        alone = alone or windows_count_padding(model, longest) or not ignores_padding(model, settings, device)
        torch.manual_seed(recipe.seed)
        return run_in_batches(lengths, budget, work, advance, most=1 if alone else None)


def end_output(ids: Sequence[int], stops: set[int]) -> CompletionOutput:
    """Cut generated ids before the first end token."""
    end = next((at for at, token in enumerate(ids) if token in stops), None)
    return CompletionOutput(list(ids[:end]), "length" if end is None else "stop")


def is_greedy(recipe: Recipe) -> bool:
    """Whether the recipe always picks the most likely token."""
    stated = recipe.generation.model_dump(exclude_none=True)
    return stated == {"max_new_tokens": recipe.generation.max_new_tokens, "do_sample": False, "num_beams": 1}


def cache_budget(device: str, column_bytes: int) -> int:
    """Return how many positions one batch may have, based on the device's total memory, not its free memory."""
    limit = same_everywhere(device_memory(device))
    if limit is None:
        return budget_for(device, GENERATION_BUDGET)
    return max(1, int(limit * CACHE_SHARE) // max(1, column_bytes))


def cache_rows(device: str, column_bytes: int, longest: int) -> int:
    """Return how many rows of `longest` positions one batch may have."""
    return min(budget_for(device, MOST_ROWS), batch_size(longest, cache_budget(device, column_bytes)))


def generate_batch(
    model: torch.nn.Module, prompts: Sequence[Prompt], settings: GenerationConfig, device: str, **options: Any
) -> list[list[int]]:
    """Generate from prompts in one batch; return the new ids of each, padding included."""
    out_BT = _generate(model, prompts, settings, device, **options)
    return cast(list[list[int]], out_BT[:, max(map(len, prompts)) :].tolist())


def _generate(
    model: torch.nn.Module, prompts: Sequence[Prompt], settings: GenerationConfig, device: str, **options: Any
) -> Any:
    width = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), width), int(settings.pad_token_id), dtype=torch.int64)
    mask_BT = torch.zeros((len(prompts), width), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = torch.tensor(prompt.ids)
        mask_BT[row, width - len(prompt) :] = 1
    media = read_media(model, prompts, width, device)
    return generate(model, ids_BT.to(device), mask_BT.to(device), generation_config=settings, **media, **options)


def read_media(model: torch.nn.Module, prompts: Sequence[Prompt], width: int, device: str) -> dict[str, torch.Tensor]:
    """Return the media of prompts, joined; numbers in the dtype of the model, kinds of tokens padded on the left."""
    dtype = unwrap(model).dtype
    media = [dict(prompt.media()) for prompt in prompts if prompt.media is not None]
    for one in media:
        one |= {name: functional.pad(one[name], (width - one[name].shape[1], 0)) for name in TOKEN_TYPES if name in one}
    joined = join_media(media)
    return {name: part.to(device, dtype if part.is_floating_point() else None) for name, part in joined.items()}


def extend_prompt(prompt: Prompt, ids: Sequence[int]) -> Prompt:
    """Return a prompt with further tokens of text, such as the beginning of its answer."""
    media = prompt.media

    def read() -> dict[str, torch.Tensor]:
        parts = media() if media else {}
        return {name: functional.pad(one, (0, len(ids))) if name in TOKEN_TYPES else one for name, one in parts.items()}

    return Prompt([*prompt.ids, *ids], read if media else None)


def generate(model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> Any:
    """Run transformers' `generate` on the forward pass that was trained; takes its options and returns its results.

    PEFT's `generate` repeats virtual tokens before every token, because it knows the KV cache by a former name. Here
    they are in the cache from the start. Models that cannot continue from it read all tokens again at each step.
    """
    count, inner = virtual_tokens(model), unwrap(model)
    options |= {"input_ids": input_ids, "attention_mask": attention_mask}
    if not count:
        return cast(Any, type(model)).generate(model, **options)
    settings = copy.copy(options.pop("generation_config", None) or GenerationConfig())
    settings.update(**{name: options.pop(name) for name in [*options] if hasattr(settings, name)})
    if virtual_logits(model) and column_bytes_of(model, str(input_ids.device)) is None:
        settings.use_cache = False
        return cast(Any, type(model)).generate(model, **options, generation_config=settings)
    with torch.no_grad():
        cache = DynamicCache(config=inner.config.get_text_config())
        cache = read_virtual_tokens(model, cache, len(input_ids) * (settings.num_beams or 1))
    options["attention_mask"] = torch.nn.functional.pad(attention_mask, (count, 0), value=1)
    return GenerationMixin.generate(
        inner, **options, **{cache_argument(type(inner)): cache}, generation_config=settings
    )


def ignores_padding(model: torch.nn.Module, settings: GenerationConfig, device: str) -> bool:
    """Whether a padded batch gives the same logits as each prompt alone; tested on a few tokens.

    It does not if a recurrent state runs over the padding.
    """
    size = unwrap(model).get_input_embeddings().weight.shape[0]
    ids = [[size * (7 * (i % 6) + 3 * length % 5 + 1) // 50 for i in range(length)] for length in (9, 4)]
    prompts = [*map(Prompt, ids)]
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "output_logits": True, "return_dict_in_generate": True}
    greedy = GenerationConfig(**options, pad_token_id=settings.pad_token_id, use_cache=True)
    batches = [prompts, *([prompt] for prompt in prompts)]
    with SuppressRefusal():
        together, *alone = (torch.stack(_generate(model, batch, greedy, device).logits, 1).float() for batch in batches)
        return logits_agree(torch.cat(alone), together, computing_dtype(model, device))
    return False


def windows_count_padding(model: torch.nn.Module, longest: int) -> bool:
    """Whether a window of attention may end between virtual tokens and the text of a row: padding is there."""
    config, count = unwrap(model).config.get_text_config(), virtual_tokens(model)
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return bool(count) and any(window and window < longest + count for window in windows)


@contextmanager
def only_these_settings(model: torch.nn.Module) -> Iterator[GenerationConfig | None]:
    """Clear the model's own generation settings, which `generate` uses as defaults; yields them."""
    holders = [holder for holder in (model, unwrap(model)) if hasattr(holder, "generation_config")]
    kept = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        yield kept[-1] if kept else None
    finally:
        for holder, settings in zip(holders, kept, strict=True):
            holder.generation_config = settings
