"""Examples into micro-batches, packed or padded, where what is predicted is not simply the next token.

Shape legend: B rows of a batch, T positions, S predictions of the batch, K classes, R examples (= B unless said).

Beside what `llmtune.data.collators` names, a batch may hold:

    token_type_ids  int64 [B, T]     which of two texts a token belongs to
    labels          int64 [B, T]     a decoder's or CTC's targets, -100 where there is none
    classes_R       int64 [R]        the class of each row
    values_RK       float32 [R, K]   a number, or 0 and 1 for each of many classes (`many`)
    weights_R       float32 [R]      how much each row counts
    first_R, last_R int64 [R]        the first and last token of an answer
    input_features, input_values     what a feature extractor makes of sound; samples_R int64 [R] says how long it is
    kl_*                             prompts with the answers of others (KTO), desirable_R bool [R] the thumbs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

from llmtune.data.audio import to_float
from llmtune.data.collators import collate_padded, documents_of
from llmtune.records import Batch, Collate, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


def pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Put rows of numbers side by side, padded on the right: int64 [B, T]."""
    padded = np.full((len(rows), max(1, *map(len, rows)) if rows else 1), value, dtype=np.int64)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = row
    return torch.from_numpy(padded)


def read_text(examples: Sequence[Example], pad_id: int | None) -> Batch:
    """Return what an encoder reads, padded: ids, mask, and kinds of tokens where the examples have them."""
    ids = [example.input_ids for example in examples]
    batch: Batch = {
        "input_ids": pad(ids, pad_id or 0),
        "attention_mask": pad([[1] * len(row) for row in ids], 0),
        "n_rows": len(examples),
    }
    if kinds := kinds_of_tokens(examples):
        batch["token_type_ids"] = pad(kinds, 0)
    return batch


def read_packed(examples: Sequence[Example]) -> Batch:
    """Return what an encoder reads, end to end in one row, positions from 0 in each text."""
    batch: Batch = {**documents_of([np.asarray(e.input_ids, dtype=np.int64) for e in examples])}
    batch["n_rows"] = len(examples)
    if kinds := kinds_of_tokens(examples):
        batch["token_type_ids"] = torch.tensor([kind for row in kinds for kind in row], dtype=torch.int64)[None]
    return batch


def kinds_of_tokens(examples: Sequence[Example]) -> list[list[int]]:
    """Return which of two texts each token belongs to; nothing where no example says."""
    if not any(len(example.third_ids) for example in examples):
        return []
    return [list(example.third_ids) or [0] * len(example.input_ids) for example in examples]


def read(examples: Sequence[Example], pad_id: int | None, packs: bool) -> tuple[Batch, list[int]]:
    """Return what an encoder reads, and the flat index in B * T of each text's first token."""
    if packs:
        batch = read_packed(examples)
        return batch, batch["cu_seq_lens_q"][:-1].tolist()
    batch = read_text(examples, pad_id)
    width = batch["input_ids"].shape[1]
    return batch, [row * width for row in range(len(examples))]


def predict_targets(examples: Sequence[Example], width: int) -> Batch:
    """Return predict_S, targets_S and rows_S for the supervised ranges of `target_ids`, in rows of `width` positions.

    The target at a position is predicted from the same one: a decoder reads it moved right.
    """
    predict: list[int] = []
    targets: list[int] = []
    rows: list[int] = []
    for row, example in enumerate(examples):
        for start, end in zip(example.target_spans[::2], example.target_spans[1::2], strict=True):
            predict += range(row * width + start, row * width + end)
            targets += example.target_ids[start:end]
            rows += [row] * (end - start)
    named = {"predict_S": predict, "targets_S": targets, "rows_S": rows}
    return {name: torch.tensor(values, dtype=torch.int64) for name, values in named.items()}


def seq2seq_collator(processor: PreTrainedTokenizerBase, recipe: Any, packs: bool = False) -> Collate:
    """Make batches for encoder-decoders that read text."""

    def collate(examples: Sequence[Example], draw: int = 0) -> Batch:
        labels_BT = pad([example.target_ids for example in examples], IGNORED)
        batch = read_text(examples, processor.pad_token_id)
        return batch | {"labels": labels_BT} | predict_targets(examples, labels_BT.shape[1])

    return collate


def classes_collator(processor: PreTrainedTokenizerBase, recipe: Any, packs: bool = False) -> Collate:
    """Make batches of texts with one class (`target_ids`), several or a number (`values`)."""
    kind = recipe.classify.kind if recipe.classify else "single"

    def collate(examples: Sequence[Example], draw: int = 0) -> Batch:
        batch, _ = read(examples, processor.pad_token_id, packs)
        if kind == "single":
            batch["classes_R"] = torch.tensor([example.target_ids[0] for example in examples])
            if any(len(example.values) for example in examples):
                batch["weights_R"] = torch.tensor([example.values[0] for example in examples])
            return batch
        values_RK = torch.tensor([list(example.values) for example in examples], dtype=torch.float32)
        return batch | {"values_RK": values_RK, "many": kind == "multi"}

    return collate


def tags_collator(processor: PreTrainedTokenizerBase, recipe: Any, packs: bool = False) -> Collate:
    """Make batches of texts whose tokens have tags; those of a word's other tokens are ignored."""

    def collate(examples: Sequence[Example], draw: int = 0) -> Batch:
        batch, starts = read(examples, processor.pad_token_id, packs)
        marked = [
            (start + at, tag, row)
            for row, (start, example) in enumerate(zip(starts, examples, strict=True))
            for at, tag in enumerate(example.target_ids)
            if tag != IGNORED
        ]
        predict_S, targets_S, rows_S = torch.tensor(marked, dtype=torch.int64).reshape(-1, 3).T
        return batch | {"predict_S": predict_S, "targets_S": targets_S, "rows_S": rows_S}

    return collate


def ends_collator(processor: PreTrainedTokenizerBase, recipe: Any, packs: bool = False) -> Collate:
    """Make batches of windows with the first and last token of their answers, counted within the window."""

    def collate(examples: Sequence[Example], draw: int = 0) -> Batch:
        first_R, last_R = torch.tensor([list(example.target_ids) for example in examples], dtype=torch.int64).T
        return read(examples, processor.pad_token_id, packs)[0] | {"first_R": first_R, "last_R": last_R}

    return collate


def masked_collator(processor: PreTrainedTokenizerBase, recipe: Any, packs: bool = False) -> Collate:
    """Make batches in which tokens are hidden: a share of each text, drawn by the text, the seed and the draw alone.

    80 % of them become the mask, 10 % any token, 10 % stay (Devlin et al., "BERT", 2019, section 3.1).
    """
    mask_id, size, seed = processor.mask_token_id, len(processor), recipe.seed

    def hide(example: Example, draw: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return the ids with some hidden, and where they are."""
        ids = np.asarray(example.input_ids, dtype=np.int64)
        words = (seed, draw, xxhash.xxh3_64_intdigest(ids.tobytes()))
        generator = np.random.default_rng(words)
        borders = zip(example.spans[::2], example.spans[1::2], strict=True)
        candidates = np.concatenate([np.arange(start, end) for start, end in borders])
        chosen = np.sort(generator.choice(candidates, example.supervised, replace=False))
        fate = generator.random(len(chosen))
        ids[chosen[fate < 0.8]] = mask_id
        anything = chosen[(fate >= 0.8) & (fate < 0.9)]
        ids[anything] = generator.integers(0, size, len(anything))
        return ids, chosen

    def collate(examples: Sequence[Example], draw: int = 0) -> Batch:
        hidden = [hide(example, draw) for example in examples]
        shown = [replace(e, input_ids=ids.tolist()) for e, (ids, _) in zip(examples, hidden, strict=True)]
        batch, starts = read(shown, processor.pad_token_id, packs)
        places = [chosen for _, chosen in hidden]
        predict = np.concatenate([start + chosen for start, chosen in zip(starts, places, strict=True)])
        targets = [np.asarray(e.input_ids)[chosen] for e, chosen in zip(examples, places, strict=True)]
        rows = np.repeat(np.arange(len(examples)), [len(chosen) for chosen in places])
        named = {"predict_S": predict, "targets_S": np.concatenate(targets), "rows_S": rows}
        return batch | {name: torch.from_numpy(values.astype(np.int64)) for name, values in named.items()}

    return collate


def preference_collator(processor: PreTrainedTokenizerBase, recipe: Any, packs: bool = False) -> Collate:
    """Make batches of answers: the chosen ones and then the rejected, or (KTO) single ones with the answers of others.

    Settings of the loss stand in the batch as `settings`.
    """
    settings = recipe.preference
    pad_id = processor.pad_token_id

    def second(example: Example) -> Example:
        return Example(example.target_ids, example.target_spans, 0)

    def collate(examples: Sequence[Example], draw: int = 0) -> Batch:
        if settings.loss == "kto":
            batch = collate_padded(examples, pad_id)
            others = collate_padded([second(example) for example in examples], pad_id)
            batch |= {f"kl_{name}": part for name, part in others.items()}
            batch["desirable_R"] = torch.tensor([example.values[0] > 0 for example in examples])
        else:
            batch = collate_padded([*examples, *(second(example) for example in examples)], pad_id)
        return batch | {"settings": settings, "pairs": len(examples)}

    return collate


def whisper_collator(processor: PreTrainedTokenizerBase, recipe: Any, packs: bool = False) -> Collate:
    """Make batches of log-mel spectrograms and transcripts."""
    extract = feature_extractor(processor)

    def collate(examples: Sequence[Example], draw: int = 0) -> Batch:
        labels_BT = pad([example.target_ids for example in examples], IGNORED)
        features = hear(extract, [example.audio for example in examples])["input_features"]
        batch: Batch = {"input_features": features, "labels": labels_BT, "n_rows": len(examples)}
        return batch | predict_targets(examples, labels_BT.shape[1])

    return collate


def ctc_collator(processor: PreTrainedTokenizerBase, recipe: Any, packs: bool = False) -> Collate:
    """Make batches of sound waves and transcripts; each wave is normed by itself before it is padded."""
    extract = feature_extractor(processor)

    def collate(examples: Sequence[Example], draw: int = 0) -> Batch:
        sounds = [example.audio for example in examples]
        heard = hear(extract, sounds, padding=True, return_attention_mask=True)
        return {
            "input_values": heard["input_values"],
            "attention_mask": heard["attention_mask"],
            "samples_R": torch.tensor([len(sound) for sound in sounds]),
            "labels": pad([example.target_ids for example in examples], IGNORED),
            "n_rows": len(examples),
        }

    return collate


def hear(extract: Any, sounds: Sequence[Any], **options: Any) -> dict[str, torch.Tensor]:
    """Make samples into what a model reads, in float32 whatever number format the model is computed in."""
    floats = [to_float(sound) for sound in sounds]
    with torch.autocast("cpu", enabled=False):
        return dict(extract(floats, sampling_rate=extract.sampling_rate, return_tensors="pt", **options))


def feature_extractor(processor: PreTrainedTokenizerBase) -> Any:
    """Return what turns sound into a model's input, from the folder that its tokenizer came from.

    Raises EnvironmentProblem where there is none.
    """
    from transformers import AutoFeatureExtractor

    from llmtune.errors import EnvironmentProblem

    folder = str(processor.name_or_path)
    try:
        return AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fix = "The folder needs preprocessor_config.json: get it from where the model comes from."
        raise EnvironmentProblem.of(f"there is no feature extractor that can be read: {first}", folder, fix) from error
