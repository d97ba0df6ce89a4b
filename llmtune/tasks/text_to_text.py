"""The common part of translate, summarize and generative qa: read one text, write another.

Shapes: B rows of a batch, T positions, S predicted tokens, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmtune.data.chat_encoding import encode_chat
from llmtune.data.chat_template import render_prompt
from llmtune.data.collators import IGNORED, pad, pad_texts
from llmtune.data.completion_encoding import encode_completion, prompt_ids
from llmtune.data.example import Example
from llmtune.data.long_texts import count_tokens
from llmtune.data.overlong import Lost, too_long
from llmtune.data.task_interface import Encoded
from llmtune.data.text_pairs import TextPair, first_token, source_ids, starts_with_language, target_ids
from llmtune.data.tokenization import Segment, cut_start, decode_shortened, highlight
from llmtune.errors import EnvironmentProblem, Problem
from llmtune.evaluate.decoder_generation import decoder_settings, run_generation
from llmtune.evaluate.evaluated_task import EvalPrediction, LoadedModel
from llmtune.evaluate.generation import only_these_settings
from llmtune.evaluate.metric import Measure
from llmtune.evaluate.text_metrics import TEXT_MEASURES
from llmtune.evaluate.token_batches import GENERATION_BUDGET, budget_for, run_in_batches
from llmtune.model.causal_lm_loss import accepted_arguments, decoder_inputs, model_inputs, token_losses, unwrap
from llmtune.model.memory_plan import context_length
from llmtune.recipe.model_kind import CAUSAL, SEQ2SEQ
from llmtune.recipe.schema import Recipe
from llmtune.records import Batch, Loss, Row
from llmtune.tasks.base import RowT, Task

PROMPT_CUTS = 6
"""How often a prompt is cut: a cut text may take one token more than counted."""


def measure_texts(metric: str, output: EvalPrediction[str]) -> Measure | None:
    """Measure generated texts; token metrics are computed elsewhere."""
    return TEXT_MEASURES[metric](output.predictions, output.references) if metric in TEXT_MEASURES else None


def fill_template(template: str, **fields: str | None) -> str:
    """Fill the fields of a prompt; other braces stay, including those within a field's value."""
    named = "|".join(map(re.escape, fields))
    return re.sub(f"{{({named})}}", lambda match: fields[match[1]] or "", template)


# Encoder-decoders


@dataclass(frozen=True)
class TargetExample(Example):
    """The input of an encoder, and what its decoder writes."""

    target_ids: Sequence[int] = ()
    """The decoder's output."""
    target_spans: Sequence[int] = ()
    """Supervised ranges of `target_ids`, as in `spans`."""

    @property
    def sequences(self) -> list[tuple[Sequence[int], Sequence[int]]]:
        """Input and output."""
        return [*super().sequences, (self.target_ids, self.target_spans)]


class EncoderDecoder(Task[RowT, str]):
    """The encoder-decoder's version: the encoder reads the source, the decoder writes the target."""

    model_kind = SEQ2SEQ
    example_type = TargetExample

    def supports(self, config: PretrainedConfig) -> bool:
        """Whether the model has both parts: some models of this class are decoder-only."""
        return bool(getattr(config, "is_encoder_decoder", False))

    def check_model(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        """Refuse a decoder without a start token."""
        check_decoder_start(model, processor)

    def encode_row(self, row: RowT, processor: PreTrainedTokenizerBase, recipe: Recipe) -> Encoded:
        """Return one example: the source for the encoder, the target with its end for the decoder."""
        pair = self.pair(row, recipe)
        if not pair.target.strip():
            return "the target is empty"
        source = source_ids(pair, processor, recipe)
        target, start, end = target_ids(pair, processor)
        longest = max(len(source), len(target))
        if longest > recipe.data.max_length:
            return too_long(longest, recipe.data.max_length)
        example = TargetExample(
            source,
            [],
            len(pair.target.encode()),
            target_ids=target,
            target_spans=[start, end],
            counted=end - start,
            cost=len(source) + len(target),
            lost=_lost(pair, source, processor, recipe),
        )
        return [example]

    def collate(
        self,
        examples: Sequence[TargetExample],
        processor: PreTrainedTokenizerBase,
        recipe: Recipe,
        packs: bool,
        draw: int,
    ) -> Batch:
        """Pad sources and targets."""
        return pad_texts(examples, processor.pad_token_id) | decoder_targets(examples)

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Sum the cross entropy of the supervised target tokens."""
        return encoder_decoder_loss(model, batch, by_row)

    def highlighted_text(
        self, example: TargetExample, processor: PreTrainedTokenizerBase, recipe: Recipe
    ) -> list[Segment]:
        """Show the source, and the supervised part of the target."""
        read = decode_shortened(example.input_ids, processor)
        return [Segment(f"{read}\n", False), *highlight(example.target_ids, example.target_spans, processor)]

    def count_tokens(self, row: RowT, processor: PreTrainedTokenizerBase, recipe: Recipe, limit: int) -> int:
        """Return the tokens of a source that may be cut; of a long one, some number above `limit`."""
        return count_tokens(self.pair(row, recipe).source, processor, limit) if self.cuts_texts(recipe) else 0

    def predict(self, rows: Sequence[RowT], loaded: LoadedModel) -> list[str]:
        """Return the decoder's text for each source."""
        return write_targets([self.pair(row, loaded.recipe) for row in rows], loaded)


def write_targets(pairs: Sequence[TextPair], loaded: LoadedModel) -> list[str]:
    """Return the decoder's text for each source, begun in the pair's language if the model requires it.

    A source is cut as in training; if it still exceeds the model's positions, its end is cut.
    """
    model, processor, recipe = loaded.model, loaded.processor, loaded.recipe
    limit = context_length(unwrap(model).config)
    sources = [_cut_end(source_ids(pair, processor, recipe), limit) for pair in pairs]
    firsts = [first_token(pair, processor) for pair in pairs]
    texts = [""] * len(pairs)
    with torch.random.fork_rng(), only_these_settings(model) as model_settings:
        torch.manual_seed(recipe.seed)
        for first in sorted(set(firsts), key=str):
            group = [i for i, token in enumerate(firsts) if token == first]
            settings = decoder_settings(model_settings, model, processor, recipe, first)

            def work(batch: list[int], group: list[int] = group, settings: GenerationConfig = settings) -> list[str]:
                ids = [sources[group[i]] for i in batch]
                read = {"input_ids": pad(ids, processor.pad_token_id or 0)}
                read["attention_mask"] = pad([[1] * len(row) for row in ids], 0)
                written_BT = run_generation(
                    model, {key: part.to(loaded.device) for key, part in read.items()}, settings
                )
                decoded = processor.batch_decode(written_BT, skip_special_tokens=True)
                for i, row in zip(batch, written_BT[:, 1:].tolist(), strict=True):
                    loaded.note_end(group[i], not {*settings.eos_token_id} & {*row})
                return [text.strip() for text in decoded]

            lengths = [len(sources[i]) + recipe.generation.max_new_tokens for i in group]
            budget = budget_for(loaded.device, GENERATION_BUDGET) // recipe.generation.num_beams
            for i, text in zip(group, run_in_batches(lengths, budget, work, loaded.advance), strict=True):
                texts[i] = text
    return texts


def _lost(pair: TextPair, source: Sequence[int], processor: PreTrainedTokenizerBase, recipe: Recipe) -> Lost | None:
    """Return what truncation removed from a source; None if nothing was removed."""
    if recipe.data.on_overlong != "truncate" or len(source) < recipe.data.max_length:
        return None
    cut = len(processor(pair.source, verbose=False)["input_ids"]) - len(source)
    return Lost(cut) if cut else None


def _cut_end(ids: list[int], limit: int | None) -> list[int]:
    return ids if limit is None or len(ids) <= limit else [*ids[: limit - 1], ids[-1]]


def decoder_targets(examples: Sequence[TargetExample]) -> Batch:
    """Return `labels` [B, T], and predict_S, targets_S and rows_S of the supervised tokens.

    The target at a position is predicted from the same position: the decoder's input is shifted right.
    """
    labels_BT = pad([example.target_ids for example in examples], IGNORED)
    width = labels_BT.shape[1]
    predict: list[int] = []
    targets: list[int] = []
    rows: list[int] = []
    for row, example in enumerate(examples):
        for start, end in zip(example.target_spans[::2], example.target_spans[1::2], strict=True):
            predict += range(row * width + start, row * width + end)
            targets += example.target_ids[start:end]
            rows += [row] * (end - start)
    named = {"predict_S": predict, "targets_S": targets, "rows_S": rows}
    return {"labels": labels_BT, **{name: torch.tensor(values, dtype=torch.int64) for name, values in named.items()}}


def encoder_decoder_loss(model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
    """Sum the cross entropy of the supervised target tokens of an encoder-decoder that reads text or sound."""
    inputs = model_inputs(model, batch)
    inputs["decoder_input_ids"] = decoder_inputs(model, batch["labels"])
    if "use_cache" in accepted_arguments(type(unwrap(model))):  # type: ignore[arg-type]
        inputs["use_cache"] = False
    logits_BTV = model(**inputs).logits
    return token_losses(logits_BTV.flatten(0, 1)[batch["predict_S"]], batch, by_row)


def check_decoder_start(model: PreTrainedModel, processor: PreTrainedTokenizerBase) -> None:
    """Raise EnvironmentProblem if the model's configuration does not define the decoder's start token.

    A missing padding token is set in place, to the tokenizer's.
    """
    config = model.config
    size = config.get_text_config(decoder=True).vocab_size
    problems = []
    for name in ("decoder_start_token_id", "pad_token_id"):
        token = getattr(config, name, None)
        if token is None and name == "pad_token_id":
            config.pad_token_id = processor.pad_token_id
        elif token is None and starts_with_language(processor):
            continue
        elif token is None:
            what = f"{name} is missing, so the decoder's first token is unknown"
            fix = "Set it in config.json: the padding token for T5, the end token for BART."
            problems.append(Problem(what, "config.json", fix))
        elif not 0 <= int(token) < size:
            problems.append(Problem(f"{name} is {token}, but the decoder has only {size:,} tokens", "config.json"))
    EnvironmentProblem.collect(problems)


# Prompted decoders


class PromptedDecoder(Task[RowT, str]):
    """The decoder's version: it answers a prompt, in its chat template if it has one."""

    model_kind = CAUSAL

    def encode(self, rows: Sequence[RowT], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
        """Return one example per row: the prompt, and the target as the model's answer."""
        prompts: list[Any] = [as_prompt(self.pair(row, recipe), processor) for row in rows]
        return (encode_chat if processor.chat_template else encode_completion)(prompts, processor, recipe)

    def prompt_ids(self, row: RowT, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
        """Return the token ids to generate the target from.

        With `data.on_overlong: truncate` the start of the prompt is cut as in training, to leave room for a complete
        answer.
        """
        prompt = as_prompt(self.pair(row, recipe), processor)
        ids = _prompt_tokens(prompt, processor, recipe)
        room = max(recipe.data.max_length - recipe.generation.max_new_tokens, recipe.data.max_length // 2)
        cuts = PROMPT_CUTS if recipe.data.on_overlong == "truncate" else 0
        while len(ids) > room and cuts:
            prompt = _shorten(prompt, len(ids) - room, processor)
            ids, cuts = _prompt_tokens(prompt, processor, recipe), cuts - 1
        return ids


def as_prompt(pair: TextPair, processor: PreTrainedTokenizerBase) -> Row:
    """Return a chat row if the model has a chat template, else a completion row; the target may be empty."""
    if processor.chat_template:
        answer = [{"role": "assistant", "content": pair.target}] if pair.target else []
        return {"messages": [{"role": "user", "content": pair.source}, *answer]}
    return {"prompt": f"{pair.source}\n", "completion": pair.target}


def _prompt_tokens(prompt: Row, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
    if "messages" in prompt:
        return render_prompt(prompt["messages"], processor, recipe)
    return prompt_ids(prompt["prompt"], processor)


def _shorten(prompt: Row, tokens: int, processor: PreTrainedTokenizerBase) -> Row:
    """Cut this many tokens from the start of a prompt."""
    if "messages" in prompt:
        (question,) = prompt["messages"]
        content = cut_start(processor, question["content"], tokens) or question["content"][-1:]
        return {"messages": [{**question, "content": content}]}
    return {**prompt, "prompt": cut_start(processor, prompt["prompt"], tokens)}
