"""Vectors as sentence-transformers has them: its folder's files, how token vectors become one vector, and its losses.

Shapes: T tokens of a text, B and N texts, R rows of a step, C candidate passages, P pairs of an anchor with a text of
its class, D numbers of a vector.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from llmtune.data.example import Example
from llmtune.data.long_texts import start_of, tokenize
from llmtune.errors import DataError
from llmtune.evaluate.evaluated_task import LoadedModel
from llmtune.evaluate.ranking_metrics import measure_vectors
from llmtune.evaluate.token_batches import run_encoder
from llmtune.model.causal_lm_loss import accepted_arguments, model_inputs, unwrap
from llmtune.model.config import is_encoder
from llmtune.model.sentence_folder import read_settings
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_sections import EmbedSection
from llmtune.records import Advance, Batch, Loss

SPREAD = ("random_cosine", "effective_rank")
"""Metrics of how the vectors are spread; collapsed vectors are nearly equal."""
STEP_LOSSES = ("cosent", "triplet")
"""Losses of a step that are no sums over its rows."""


def embed_section(recipe: Recipe) -> EmbedSection:
    """Return the recipe's section, or its defaults."""
    return recipe.embed or EmbedSection()


def resolve_settings(section: EmbedSection, config: PretrainedConfig) -> EmbedSection:
    """Return the section with the base's own pooling, normalisation and prompts where the recipe sets none.

    Raises as `read_settings` does.
    """
    base_settings = read_settings(Path(config.name_or_path))
    return section.model_copy(
        update={
            "pooling": section.pooling
            if section.pooling != "auto"
            else base_settings.pooling or ("mean" if is_encoder(config) else "lasttoken"),
            "normalize": section.normalize if section.normalize is not None else base_settings.normalize is not False,
            "query_prompt": section.query_prompt
            if section.query_prompt is not None
            else base_settings.query_prompt or "",
            "passage_prompt": section.passage_prompt
            if section.passage_prompt is not None
            else base_settings.passage_prompt or "",
        }
    )


def describe_settings(section: EmbedSection) -> str:
    """Describe how vectors are made, for the report."""
    parts = [f"{section.pooling} pooling", "length 1" if section.normalize else "not normalised"]
    prompts = (("queries", section.query_prompt), ("passages", section.passage_prompt))
    parts += [f"{json.dumps(prompt, ensure_ascii=False)} before {name}" for name, prompt in prompts if prompt]
    return ", ".join(parts)


# From texts to vectors


def tokenize_prompted(
    name: str, text: str, processor: PreTrainedTokenizerBase, recipe: Recipe, limit: int | None = None
) -> list[int]:
    """Return the tokens of a text of this name after its prompt, cut to `limit`."""
    section = embed_section(recipe)
    text = ((section.query_prompt if name == "query" else section.passage_prompt) or "") + text
    if limit is None:
        return list(tokenize(processor, text)["input_ids"])
    return list(tokenize(processor, start_of(text, processor, limit), truncation=True, max_length=limit)["input_ids"])


def hidden_states(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the model's last hidden states [B, T, D]."""
    inputs = model_inputs(model, batch)
    if "use_cache" in accepted_arguments(type(unwrap(model))):  # type: ignore[arg-type]
        inputs["use_cache"] = False
    hidden_BTD: torch.Tensor = model(**inputs).last_hidden_state
    return hidden_BTD


def embed_texts(
    texts: Sequence[tuple[bool, str]], loaded: LoadedModel, advance: Advance = lambda rows: None
) -> NDArray[np.float32]:
    """Return the vectors [N, D] of texts, each with whether it is a query."""
    section, limit = embed_section(loaded.recipe), loaded.recipe.data.max_length
    ids = [
        tokenize_prompted("query" if is_query else "passage", text, loaded.processor, loaded.recipe, limit)
        for is_query, text in texts
    ]

    def read(i: int, output: ModelOutput, row: int) -> NDArray[np.float32]:
        vector_D = pool(output.last_hidden_state[row, : len(ids[i])], section.pooling)
        kept_D = functional.normalize(vector_D, dim=-1) if section.normalize else vector_D
        return np.asarray(kept_D.cpu().numpy())

    examples = [Example(text, [], 0) for text in ids]
    vectors = run_encoder(loaded.model, examples, loaded.processor.pad_token_id, loaded.device, read, advance)
    return np.stack(vectors) if vectors else np.zeros((0, 0), dtype=np.float32)


def pool(hidden_TD: torch.Tensor, mode: str) -> torch.Tensor:
    """Return one vector [D] of a text's token vectors, in float32."""
    hidden_TD = hidden_TD.float()
    if mode == "cls":
        return hidden_TD[0]
    if mode == "lasttoken":
        return hidden_TD[-1]
    return hidden_TD.amax(0) if mode == "max" else hidden_TD.mean(0)


@dataclass(frozen=True)
class VectorExample(Example):
    """Texts that become vectors: a query, a passage, and negatives."""

    texts: Sequence[int] = ()
    """The range of each text in `input_ids`, flat: start, end, start, end."""
    text_hashes: Sequence[int] = ()
    """A hash of each text: equal texts are no negatives of one another."""
    label_hash: Sequence[int] = ()
    """A hash of the row's label, as a one-element list."""
    score: Sequence[float] = ()
    """How similar two texts are, as a one-element list."""

    @property
    def sequences(self) -> list[tuple[Sequence[int], Sequence[int]]]:
        """The texts, which are learned completely."""
        return [(self.input_ids, self.texts)]


def split_texts(example: VectorExample) -> list[Example]:
    """Return each text of an example as an example of its own."""
    ranges = zip(example.texts[::2], example.texts[1::2], strict=True)
    return [Example(example.input_ids[start:end], (), 0) for start, end in ranges]


def hash_text(text: str) -> int:
    """Return a hash of a text as a signed 32-bit number."""
    return zlib.crc32(text.encode()) - 2**31


def measure_last_texts(features: Sequence[torch.Tensor]) -> dict[str, float]:
    """Return the mean cosine and the effective rank of the vectors of each example's last text."""
    vectors_ND = functional.normalize(torch.stack([one[-1] for one in features]).double(), dim=-1)
    return dict(zip(SPREAD, measure_vectors(vectors_ND.cpu().numpy()), strict=True))


# Losses over the vectors of a complete step; each is that of the same name in sentence-transformers


def require_triplets(labels: Iterable[str]) -> None:
    """Raise DataError unless a class has two of the training rows, and another class has one."""
    counts = Counter(labels)
    if counts and (len(counts) < 2 or max(counts.values()) < 2):
        what = f"all training rows have the class {max(counts)!r}"
        what = what if len(counts) < 2 else "no class has two training rows"
        raise DataError.of(f"{what}, so there are no triplets to learn from", "data.train", "Check the column label.")


def embedding_loss(vectors: Sequence[torch.Tensor], examples: Sequence[VectorExample], section: EmbedSection) -> Loss:
    """Return the loss of a step from the vectors [texts, D] of each example, before normalisation.

    With `dimensions` the losses of all lengths are added, as in Kusupati et al., "Matryoshka Representation Learning",
    2022. A loss that is no sum over rows counts once per row: its mean is then the loss.
    """
    compute = LOSSES[section.loss]
    sizes = section.dimensions or (vectors[0].shape[1],)
    parts = [compute([one[:, :size] for one in vectors], examples, section) for size in sizes]
    losses = torch.stack(parts).sum(0)
    if section.loss in STEP_LOSSES:
        return Loss(losses * len(examples), len(examples))
    return Loss(losses.sum(), len(examples), row_sums=losses)


def ranking_loss(
    vectors: Sequence[torch.Tensor], examples: Sequence[VectorExample], section: EmbedSection
) -> torch.Tensor:
    """Return the cross entropy [R] of each query's passage among the passages and negatives of all rows.

    Other passages of the same query, and texts equal to the query or to one of its passages, are no negatives.
    """
    texts = [list(example.text_hashes) for example in examples]
    queries_RD = functional.normalize(torch.stack([one[0] for one in vectors]), dim=-1)
    passages = [*(one[1] for one in vectors), *(part for one in vectors for part in one[2:])]
    passages_CD = functional.normalize(torch.stack(passages), dim=-1)
    device = queries_RD.device
    names_C = torch.tensor(
        [*(hashes[1] for hashes in texts), *(name for hashes in texts for name in hashes[2:])], device=device
    )
    query_R, passage_R = (torch.tensor([hashes[place] for hashes in texts], device=device) for place in (0, 1))
    same_query_RR = query_R[:, None] == query_R
    masked_RC = (same_query_RR[:, :, None] & (passage_R[:, None] == names_C)).any(1) | (query_R[:, None] == names_C)
    row_R = torch.arange(len(examples), device=device)
    masked_RC[row_R, row_R] = False  # the row's own passage comes first
    scores_RC = (section.scale * queries_RD @ passages_CD.T).masked_fill(masked_RC, -torch.inf)
    return functional.cross_entropy(scores_RC, row_R, reduction="none")


def cosines(vectors: Sequence[torch.Tensor], examples: Sequence[VectorExample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosine [R] of each row's two texts, and its score [R]."""
    first_RD, second_RD = (torch.stack([one[place] for one in vectors]) for place in (0, 1))
    cosine_R = functional.cosine_similarity(first_RD, second_RD)
    return cosine_R, torch.tensor([example.score[0] for example in examples], device=cosine_R.device)


def cosine_loss(
    vectors: Sequence[torch.Tensor], examples: Sequence[VectorExample], section: EmbedSection
) -> torch.Tensor:
    """Return the squared difference [R] of cosine and score."""
    cosine_R, score_R = cosines(vectors, examples)
    return (cosine_R - score_R).square()


def cosent_loss(
    vectors: Sequence[torch.Tensor], examples: Sequence[VectorExample], section: EmbedSection
) -> torch.Tensor:
    """Return the loss of all pairs of rows whose cosines are in another order than their scores (CoSENT)."""
    cosine_R, score_R = cosines(vectors, examples)
    scaled_R = section.scale * cosine_R
    wrong_RR = (scaled_R[:, None] - scaled_R)[score_R[:, None] < score_R]
    return torch.cat([wrong_RR.new_zeros(1), wrong_RR]).logsumexp(0)


def triplet_loss(
    vectors: Sequence[torch.Tensor], examples: Sequence[VectorExample], section: EmbedSection
) -> torch.Tensor:
    """Return the mean loss of all triplets with a loss: the batch-all loss of Hermans et al., 2017.

    The distance is 1 - cosine.
    """
    vectors_RD = functional.normalize(torch.cat(list(vectors)), dim=-1)
    distance_RR = 1 - vectors_RD @ vectors_RD.T
    label_R = torch.tensor([example.label_hash[0] for example in examples], device=distance_RR.device)
    same_RR = label_R[:, None] == label_R
    anchor_P, near_P = (same_RR & ~torch.eye(len(examples), dtype=torch.bool, device=label_R.device)).nonzero().T
    losses_PR = distance_RR[anchor_P, near_P][:, None] - distance_RR[anchor_P] + section.margin
    losses_PR = losses_PR.clamp_min(0) * ~same_RR[anchor_P]
    return losses_PR.sum() / (losses_PR.detach() > 1e-16).sum().clamp_min(1)


LOSSES: dict[str, Callable[[Sequence[torch.Tensor], Sequence[VectorExample], EmbedSection], torch.Tensor]] = {
    "ranking": ranking_loss,
    "cosent": cosent_loss,
    "cosine": cosine_loss,
    "triplet": triplet_loss,
}
