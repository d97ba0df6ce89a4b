"""Whether a GGUF file says what was trained: a reader of the file asked the same, held against limits of its format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch

from llmtune.data.chat_template import clean
from llmtune.deploy.gguf_readers import Reader
from llmtune.deploy.gguf_vocabulary import Vocabulary, build_tokenizer
from llmtune.deploy.parity import (
    LIMITS,
    PROMPTS,
    Distance,
    Limits,
    Parity,
    Trace,
    divergence,
    render_prompts,
)
from llmtune.records import Row
from llmtune.tasks import AnyTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llmtune.recipe import Recipe

FORMAT_LIMITS = {
    "f32": Limits(kl_floor=1e-3, kl_cap=1e-3, top1=0.98, noise=1e-4),
    "f16": Limits(kl_floor=1e-3, kl_cap=1e-3, top1=0.98, noise=1e-4),
    "bf16": Limits(kl_floor=1e-2, kl_cap=2e-2, top1=0.95, noise=1e-3),
    "q8_0": Limits(kl_floor=3e-2, kl_cap=3e-2, top1=0.9),
    "q4_k_m": Limits(kl_floor=2.5e-1, kl_cap=2.5e-1, top1=0.75),
}
"""What the rounding of a format may do: twice what it does to SmolLM2 of 135M or more, since small models suffer most.
There mean KL by llama.cpp is 5e-6 in F16, 2e-4 in BF16, 0.011 in Q8_0 (0.003 by the weights, the rest by the inputs of
products, which llama.cpp rounds as well) and 0.11 in Q4_K_M. F32 has F16's limits, since llama.cpp keeps keys and
values in F16 and takes functions from tables. Whether there is an adapter at all, `find_lost_adapter` asks."""
TELLING = 100
"""An effect of tuning that is so many times smaller than the rounding is not looked for."""


def limits_of(number_format: str, base: str | None) -> Limits:
    """Return the limits of a format; `base` names parity's limits for what lies between the adapter and the weights.

    That is `rounded` where an adapter was trained on 4-bit weights and goes onto them, `other base` where it goes onto
    others, None where nothing does.
    """
    own = FORMAT_LIMITS[number_format]
    if base is None:
        return own
    other = LIMITS[base]
    return Limits(
        kl_floor=max(own.kl_floor, other.kl_floor),
        kl_cap=max(own.kl_cap, other.kl_cap),
        top1=min(own.top1, other.top1),
    )


def serve_from_file(
    task: AnyTask, vocabulary: Vocabulary, reader: Reader, recipe: Recipe, rows: Sequence[Row]
) -> list[list[int]]:
    """Return the ids of parity's prompts, and of `rows`, as a server makes them that knows the file alone.

    It renders with the template in the file, and lets the reader write the start token where the file says so.
    """
    if task.free_prompt and not task.is_conversational:
        texts = [*PROMPTS, *(str(task.split_answer(row)[0]["prompt"]) for row in rows)]
    elif task.is_conversational:
        texts = _render_chats(task, build_tokenizer(vocabulary), recipe, rows)
    else:  # who asks such a model writes its prompt himself
        tokenizer = build_tokenizer(vocabulary)
        texts = [tokenizer.decode(ids) for ids in render_prompts(task, tokenizer, recipe, rows)]
        texts = [text.removeprefix(" ") for text in texts] if vocabulary.add_space else texts
    start = vocabulary.tokens[vocabulary.special["bos"]] if vocabulary.add_bos else ""
    return [reader.encode(text.removeprefix(start)) for text in texts]


def _render_chats(task: AnyTask, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, rows: Sequence[Row]) -> list[str]:
    questions: list[Row] = [{"messages": [{"role": "user", "content": text}]} for text in PROMPTS]
    return [
        cast(
            str,
            tokenizer.apply_chat_template(
                clean(row["messages"]),
                tools=row.get("tools"),
                add_generation_prompt=True,
                tokenize=False,
                **recipe.model.chat_template_kwargs,
            ),
        )
        for row in [*questions, *(task.split_answer(row)[0] for row in rows)]
    ]


def find_lost_adapter(near: float, base: float | None, effect: float | None) -> list[str]:
    """Say so if a file is nearer to the base than to what was trained, by their mean KL to it, however coarse it is.

    With its adapter a file is nearer to what was trained by the `effect` of tuning, and without it farther by as much;
    an effect that is far below the rounding cannot be told from it.
    """
    if base is None or effect is None or effect < near / TELLING or near - base <= effect / 2:
        return []
    said = f"mean KL {base:.2g} nats a position, and {near:.2g} to what was trained"
    return [f"the file is nearer to the base model ({said}): the adapter is lost"]


def mean_divergence(wanted: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> float:
    """Return the mean KL from logits [T, V] to others of the same texts."""
    return float(torch.cat([divergence(*pair) for pair in zip(wanted, got, strict=True)]).mean())


def measure_reader(
    traces: Sequence[Trace], reader: Reader, made: Sequence[list[int]], stops: Sequence[int], effect: float | None
) -> Parity:
    """Hold a reader, and the prompts `made` from its file, against what the tuned model said."""
    pairs = [(trace.logits, reader.logits([*trace.prompt, *trace.answer])) for trace in traces]
    same = [reader.answer(trace.prompt, stops) == list(trace.answer) for trace in traces]
    distance = Distance(
        kls=torch.cat([divergence(wanted_TV, got_TV) for wanted_TV, got_TV in pairs]),
        agreed=torch.cat([wanted_TV.argmax(-1) == got_TV.argmax(-1) for wanted_TV, got_TV in pairs]),
        largest=max(float((wanted_TV - got_TV).abs().max()) for wanted_TV, got_TV in pairs),
    )
    return distance.as_parity(
        prompts=len(traces),
        answer_agreement=sum(same) / len(same),
        same_ids=list(made) == [list(trace.prompt) for trace in traces],
        effect=effect,
    )
