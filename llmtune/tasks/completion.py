"""Task completion: continue a prompt, or generate from nothing, without a chat template; or fill in masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import MaskedLMOutput

from llmtune.data.chat_rows import CompletionRow
from llmtune.data.collators import encoder_batch, require_offsets
from llmtune.data.completion_encoding import encode_completion, prompt_ids
from llmtune.data.example import Example
from llmtune.data.long_texts import count_tokens, tokenize
from llmtune.data.overlong import Lost, too_long
from llmtune.data.task_interface import Encoded
from llmtune.errors import EnvironmentProblem
from llmtune.evaluate.evaluated_task import LoadedModel
from llmtune.evaluate.token_batches import run_encoder
from llmtune.model.causal_lm_loss import causal_loss
from llmtune.recipe.model_kind import CAUSAL, MASKED
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_sections import CompletionSection
from llmtune.records import Batch, Loss, Row
from llmtune.tasks.base import Endpoint, Task

IdArray: TypeAlias = npt.NDArray[np.int64]


class Completion(Task[CompletionRow, str]):
    """A decoder that continues a text."""

    name = "completion"
    model_kind = CAUSAL
    free_prompt = True

    def matches(self, recipe: Recipe) -> bool:
        """Whether the objective is predicting the next token."""
        return not recipe.variant.is_masked

    def make_row(self, given: Mapping[str, str | None]) -> CompletionRow:
        """Return the row of a text to continue."""
        return {"prompt": given["prompt"] or "", "completion": ""}

    def split_answer(self, row: CompletionRow) -> tuple[CompletionRow, str]:
        """Return the row without its completion, and the completion."""
        return {**row, "completion": ""}, row["completion"]

    def encode(
        self, rows: Sequence[CompletionRow], processor: PreTrainedTokenizerBase, recipe: Recipe
    ) -> list[Encoded]:
        """Return the examples of each text."""
        return encode_completion(rows, processor, recipe)

    def prompt_ids(self, row: CompletionRow, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
        """Return the token ids to generate a completion from."""
        return prompt_ids(row["prompt"], processor)


class MaskedCompletion(Task[CompletionRow, str]):
    """An encoder that fills in masked tokens."""

    name = "completion"
    endpoint = Endpoint("/v1/fill", "the text with its masks filled in")
    model_kind = MASKED

    def matches(self, recipe: Recipe) -> bool:
        """Whether the objective is predicting masked tokens."""
        return recipe.variant.is_masked

    def make_row(self, given: Mapping[str, str | None]) -> CompletionRow:
        """Return the row of a text with masks."""
        return {"prompt": given["prompt"] or "", "completion": ""}

    def split_answer(self, row: CompletionRow) -> tuple[CompletionRow, str]:
        """Return the row itself: a plain text has no separate answer."""
        return row, ""

    def can_answer(self, row: Row, processor: PreTrainedTokenizerBase) -> bool:
        """Return whether a row has a mask to fill in."""
        return str(processor.mask_token) in row["prompt"] + row["completion"]

    def encode_row(self, row: CompletionRow, processor: PreTrainedTokenizerBase, recipe: Recipe) -> Encoded:
        """Return examples of plain text; a share of the tokens is masked when a batch is made.

        With `data.on_overlong: split` a long text makes several examples; with `truncate` only its start is used.
        """
        if processor.mask_token_id is None:
            what = "the tokenizer has no mask token, so nothing can be masked"
            fix = "Name an encoder, or use objective: causal."
            raise EnvironmentProblem.of(what, str(processor.name_or_path), fix)
        section, room = recipe.completion or CompletionSection(), recipe.data.max_length
        text = row["prompt"] + row["completion"]
        whole = processor(text, return_special_tokens_mask=True, return_attention_mask=False)
        parts = [(whole["input_ids"], whole["special_tokens_mask"])]
        if len(whole["input_ids"]) > room:
            if recipe.data.on_overlong in ("error", "drop"):
                return too_long(len(whole["input_ids"]), room)
            cut = processor(
                text,
                truncation=True,
                max_length=room,
                return_overflowing_tokens=True,
                return_special_tokens_mask=True,
            )
            parts = list(zip(cut["input_ids"], cut["special_tokens_mask"], strict=True))
            parts = parts[:1] if recipe.data.on_overlong == "truncate" else parts
        examples = [hidden_example(ids, special, section.mask_probability) for ids, special in parts]
        kept = [example for example in examples if example is not None]
        if kept and recipe.data.on_overlong == "truncate" and len(whole["input_ids"]) > room:
            kept = [replace(kept[0], lost=Lost(len(whole["input_ids"]) - room))]
        return kept or "nothing to learn: the text has fewer than two tokens"

    def collate(
        self, examples: Sequence[Example], processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool, draw: int
    ) -> Batch:
        """Mask a share of each text's tokens, drawn from the text, and in training from the seed and the draw.

        In evaluation all models see the same masks, whatever the seed of their training.
        """
        seed = (recipe.seed, draw) if draw else (0, 0)
        hidden = [hide_tokens(example, processor, seed) for example in examples]
        shown = [replace(e, input_ids=ids.tolist()) for e, (ids, _) in zip(examples, hidden, strict=True)]
        batch, starts = encoder_batch(shown, processor.pad_token_id, packs)
        chosen = [at for _, at in hidden]
        predict = np.concatenate([start + at for start, at in zip(starts, chosen, strict=True)])
        targets = [np.asarray(e.input_ids)[at] for e, at in zip(examples, chosen, strict=True)]
        rows = np.repeat(np.arange(len(examples)), [len(at) for at in chosen])
        named = {"predict_S": predict, "targets_S": np.concatenate(targets), "rows_S": rows}
        return batch | {name: torch.from_numpy(values.astype(np.int64)) for name, values in named.items()}

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Sum the cross entropy of the masked tokens."""
        return causal_loss(model, batch, by_row)

    def count_tokens(self, row: CompletionRow, processor: PreTrainedTokenizerBase, recipe: Recipe, limit: int) -> int:
        """Return the tokens of the text; of a long one, some number above `limit`."""
        return count_tokens(row["prompt"] + row["completion"], processor, limit)

    def predict(self, rows: Sequence[CompletionRow], loaded: LoadedModel) -> list[str]:
        """Return each text with its masks replaced by the most likely tokens, all at once; other texts are unchanged.

        The part of a text beyond `data.max_length` tokens is unchanged, including its masks.
        """
        processor = loaded.processor
        texts = [row["prompt"] + row["completion"] for row in rows]
        masked = [i for i, text in enumerate(texts) if str(processor.mask_token) in text]
        cut = [_cut_text(texts[i], processor, loaded.recipe.data.max_length) for i in masked]

        def fill(at: int, output: MaskedLMOutput, row: int) -> str:
            (ids, rest), best = cut[at], output.logits[row].argmax(-1).tolist()
            tokens = [best[i] if token == processor.mask_token_id else token for i, token in enumerate(ids)]
            return str(processor.decode(tokens, skip_special_tokens=True)) + rest

        examples = [Example(ids, [], 0) for ids, _ in cut]
        filled = run_encoder(loaded.model, examples, processor.pad_token_id, loaded.device, fill)
        loaded.advance(len(rows))
        by_row = dict(zip(masked, filled, strict=True))
        return [by_row.get(i, text) for i, text in enumerate(texts)]


def hidden_example(ids: list[int], special: list[int], share: float) -> Example | None:
    """Return a text's example; its spans are the stretches between special tokens.

    At least one token is masked and one stays visible. Returns None for fewer than two tokens.
    """

    def is_word(at: int) -> bool:
        return 0 <= at < len(special) and not special[at]

    borders = [i for i in range(len(ids) + 1) if is_word(i) != is_word(i - 1)]
    words = len(ids) - sum(special)
    if words < 2:
        return None
    return Example(ids, borders, 0, counted=min(max(1, round(share * words)), words - 1))


def hide_tokens(example: Example, processor: PreTrainedTokenizerBase, seed: tuple[int, int]) -> tuple[IdArray, IdArray]:
    """Return the ids after masking, and the masked positions.

    80 % of these become the mask, 10 % a random token, 10 % stay (Devlin et al., "BERT", 2019, section 3.1).
    """
    ids = np.asarray(example.input_ids, dtype=np.int64)
    generator = np.random.default_rng((*seed, xxhash.xxh3_64_intdigest(ids.tobytes())))
    borders = zip(example.spans[::2], example.spans[1::2], strict=True)
    candidates = np.concatenate([np.arange(start, end) for start, end in borders])
    chosen = np.sort(generator.choice(candidates, example.supervised, replace=False))
    fate = generator.random(len(chosen))
    ids[chosen[fate < 0.8]] = processor.mask_token_id
    anything = chosen[(fate >= 0.8) & (fate < 0.9)]
    ids[anything] = generator.integers(0, len(processor), len(anything))
    return ids, chosen


def _cut_text(text: str, processor: PreTrainedTokenizerBase, room: int) -> tuple[list[int], str]:
    """Return the ids of the first `room` tokens of a text, and the text after them."""
    ids: list[int] = tokenize(processor, text)["input_ids"]
    if len(ids) <= room:
        return ids, ""
    require_offsets(processor)
    cut = tokenize(processor, text, truncation=True, max_length=room, return_offsets_mapping=True)
    return cut["input_ids"], text[max(right for _, right in cut["offset_mapping"]) :]


VARIANTS = (Completion(), MaskedCompletion())
