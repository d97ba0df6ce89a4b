"""A model under the name that clients use, with or without its adapter."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, cast

import torch
from peft import PeftModel
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from llmtune.data.chat_template import Tools
from llmtune.errors import DataError
from llmtune.evaluate.calibration import name_probabilities
from llmtune.evaluate.decision import decide_answer
from llmtune.evaluate.evaluated_task import LoadedModel
from llmtune.evaluate.generation import (
    answer_ends,
    answer_reader,
    answer_template,
    end_output,
    generate,
    generation_settings,
    only_these_settings,
    read_media,
)
from llmtune.evaluate.shared_prefix import choice_trees, score_choices
from llmtune.evaluate.vllm_completions import VllmModel
from llmtune.model.causal_lm_loss import unwrap, virtual_tokens
from llmtune.model.device import compute_context, resolve_dtype
from llmtune.model.layer_requests import own_passes
from llmtune.model.memory_plan import context_length
from llmtune.recipe.schema import Recipe
from llmtune.records import Json, Prompt, Row
from llmtune.serve.answer_stream import AnswerStream
from llmtune.store.score_records import Calibration, Decision
from llmtune.tasks.base import AnyTask

UNLIMITED = 1 << 30
DRAWS = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0}
"""Sampling settings, with the value at which each does not enable sampling."""


class Predicted(NamedTuple):
    """The prediction of a row, and the probability of each label for each of its choices: one, or one per word."""

    value: object
    probabilities: list[dict[str, float]]
    """Empty if the model does not choose among labels; for a word that the model cannot see, an empty dictionary."""
    decision: Json
    """The decision about the row, its prediction set, and whether it is out of scope, as far as the recipe asks."""

    @property
    def scores(self) -> Json:
        """The probabilities as `scores` next to an answer, unless its prediction has its own; and the decision."""
        named = {"scores": self.probabilities} if self.probabilities and not isinstance(self.value, dict) else {}
        return {**named, **self.decision}


@dataclass(eq=False)
class ServedModel:
    """A model with a name; a tuned model and its base may share `model`."""

    name: str
    model: PreTrainedModel | PeftModel | VllmModel
    processor: PreTrainedTokenizerBase
    recipe: Recipe
    task: AnyTask
    is_base: bool = False
    """Whether the adapter of `model`, if it has one, is off."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix time."""
    calibration: Calibration | None = None
    """The temperature of its probabilities; None for a base, or without one."""
    decision: Decision | None = None
    """The rules for its answers; None for a base, or without any."""

    release: str | None = None
    """The release that it is of, `NAME@HASH`; None for a run, or a base."""

    def __post_init__(self) -> None:
        inner = unwrap(self.model)
        self.stops = set(answer_ends(self.model, self.processor, self.recipe))
        self.template = answer_template(self.processor, self.recipe) if self.task.free_prompt else None
        with self._without_adapter():
            virtual, context = virtual_tokens(self.model), context_length(inner.config)
        self.context = context - virtual if context is not None else None
        """Maximum tokens of prompt and answer together; None if the model's configuration does not say."""
        if isinstance(self.model, VllmModel):
            self.context = self.model.context
        data = self.recipe.data
        if self.context is not None and not (self.generates or self.task.model_kind.takes_audio):
            data = data.model_copy(update={"max_length": min(data.max_length, self.context)})
        self.recipe = self.recipe.model_copy(update={"data": data})
        self.vocabulary = int(inner.get_input_embeddings().weight.shape[0]) if self.generates else 0

    @property
    def device(self) -> str:
        """The model's device."""
        return str(self.model.device)

    @property
    def generates(self) -> bool:
        """Whether answers are generated token by token; otherwise `task.predict` makes them."""
        return self.task.model_kind.decodes

    def check_length(self, row: Row) -> bool:
        """Return whether only the start of a row's text is read. Raises DataError if the row may not be cut."""
        limit = self.recipe.data.max_length
        count = partial(self.task.count_tokens, row, self.processor, self.recipe)
        if count(limit + 1) <= limit:
            return False
        if not self.task.cuts_texts(self.recipe):
            what = f"the text has {count(UNLIMITED):,} tokens, but the model reads {limit:,}"
            raise DataError.of(what, "data.max_length", "Shorten the text, or train with longer ones.")
        return True

    def predict(self, rows: Sequence[Row]) -> list[Predicted]:
        """Predict from rows as the evaluation does, with calibrated probabilities."""
        task, recipe, temperature = self.task, self.recipe, self.calibration.temperature if self.calibration else 1.0
        noted: dict[int, list[list[float]]] = {}
        loaded = LoadedModel(self.model, self.processor, recipe, self.device, temperature=temperature)
        with self._computing(), own_passes(self.model):
            values = task.predict(rows, replace(loaded, note_logits=noted.__setitem__))
        many = task.output_kind(recipe) == "yes-no"
        name = partial(name_probabilities, task.output_labels(recipe), many=many, temperature=temperature)
        logits = [noted.get(i, []) for i in range(len(values))]
        return [Predicted(value, name(of), self._decide(of)) for value, of in zip(values, logits, strict=True)]

    def choose(self, rows: Sequence[Row]) -> list[Json]:
        """Return `scores`, the calibrated probability of each choice of a model that generates answers, and decisions.

        A decision is about the likeliest `choice`. Rows have no answer. Empty for a row that is too long, and without
        calibrated or decided choices.
        """
        choices = self.calibration or self.decision
        if choices is None or self.task.predicts:
            return [{} for _ in rows]
        trees = choice_trees(rows, choices.labels, self.task, self.processor, self.recipe)
        limit = self.context or sys.maxsize
        fitting = {i: tree for i, tree in enumerate(trees) if tree is not None and tree.longest <= limit}
        with self._computing():
            scores = score_choices(
                self.model, list(fitting.values()), self.task, self.processor, self.recipe, device=self.device
            )
        scores_by_row = dict(zip(fitting, scores, strict=True))
        logits = [scores_by_row.get(i, []) for i in range(len(rows))]
        temperature = self.calibration.temperature if self.calibration else 1.0
        named = name_probabilities(choices.labels, logits, many=False, temperature=temperature)
        lines: list[Json] = [{"scores": one} if one else {} for one in named]
        if self.decision is not None:
            for line, of in zip(lines, logits, strict=True):
                line |= {"choice": max(line["scores"], key=line["scores"].get), **self._decide([of])} if of else {}
        return lines

    def _decide(self, logits: Sequence[Sequence[float]]) -> Json:
        return decide_answer(self.decision, logits) if self.decision and any(map(len, logits)) else {}

    @contextmanager
    def _computing(self) -> Iterator[None]:
        dtype = resolve_dtype(self.recipe.model.dtype, self.model.device.type)
        with torch.inference_mode(), compute_context(dtype, self.device), self._without_adapter():
            yield

    def _without_adapter(self) -> AbstractContextManager[None]:
        """Return a context in which the adapter is off, if this is the base."""
        off = self.is_base and isinstance(self.model, PeftModel)
        return cast(PeftModel, self.model).disable_adapter() if off else nullcontext()

    def read(self, ids: Sequence[int]) -> str:
        """Turn the ids of an answer into its text."""
        return answer_reader(self.processor, self.recipe)(end_output(ids, self.stops).token_ids, None).text

    def stream(
        self, prompt: Sequence[int], *, chat: bool, tools: Tools = None, stops: Sequence[str] = ()
    ) -> AnswerStream:
        """Return the stream of an answer; with `chat`, it separates thoughts, text and calls by the template."""
        return AnswerStream(self.processor, self.stops, self.template if chat else None, tools, stops, prompt)

    def request_settings(self, stated: Mapping[str, float], new_tokens: int) -> GenerationConfig:
        """Return the recipe's generation settings, overridden by those of a request.

        A temperature of 0 always takes the most likely token. Any other sampling setting enables sampling.
        """
        section = self.recipe.generation
        settings = {name: getattr(section, name) for name in DRAWS} | dict(stated)
        sampling = section.do_sample or any(stated.get(name, off) != off for name, off in DRAWS.items())
        do_sample = sampling and settings["temperature"] != 0
        changes = settings if do_sample else settings | dict.fromkeys(DRAWS)
        section = section.model_copy(update={**changes, "do_sample": do_sample, "max_new_tokens": new_tokens})
        return generation_settings(self.model, self.processor, self.recipe.model_copy(update={"generation": section}))

    def generate(
        self,
        prompt: Prompt,
        settings: GenerationConfig,
        seed: int,
        deliver: Callable[[list[int]], None],
        is_cancelled: Callable[[], bool],
    ) -> list[int]:
        """Generate one answer with transformers' own loop and return its ids.

        `deliver` gets the tokens one by one; with beam search it gets all of them at the end.
        """
        beams = settings.num_beams > 1
        ids_BT = torch.tensor([list(prompt.ids)], device=self.model.device)
        with torch.random.fork_rng(), only_these_settings(self.model), self._without_adapter():
            torch.manual_seed(seed)
            out_BT = generate(
                self.model,
                ids_BT,
                torch.ones_like(ids_BT),
                generation_config=settings,
                streamer=None if beams else _TokenStreamer(deliver),
                stopping_criteria=StoppingCriteriaList([_Cancelled(is_cancelled)]),
                **read_media(self.model, [prompt], len(prompt), self.device),
            )
        ids = cast(list[int], out_BT[0, len(prompt) :].tolist())
        if beams:
            stops = settings.eos_token_id or ()
            end = next((at for at, token in enumerate(ids) if token in stops), len(ids) - 1)
            ids = ids[: end + 1]  # the rest is padding
            deliver(ids)
        return ids


class _TokenStreamer(BaseStreamer):  # type: ignore[misc]
    """Deliver new tokens; the first call has the prompt."""

    def __init__(self, deliver: Callable[[list[int]], None]) -> None:
        self.deliver = deliver
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt, then one token at a time."""
        if self.prompt_seen:
            self.deliver(value.reshape(-1).tolist())
        self.prompt_seen = True

    def end(self) -> None:
        """Nothing to flush."""


class _Cancelled(StoppingCriteria):  # type: ignore[misc]
    """Stop generation once the answer is cancelled."""

    def __init__(self, is_cancelled: Callable[[], bool]) -> None:
        self.is_cancelled = is_cancelled

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.is_cancelled(), device=input_ids.device)
