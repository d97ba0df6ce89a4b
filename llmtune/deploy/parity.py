"""Whether a product answers as the tuned model does: fixed prompts, distances between outputs, limits, certificates.

Shapes: T positions of a prompt and its answer, V vocabulary; N distributions over K outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from peft import PeftModel
from torch.nn.functional import logsigmoid
from transformers import AutoTokenizer, GenerationConfig

from llmtune.data.chat_template import clean
from llmtune.data.row_store import load_rows, read_rows
from llmtune.errors import GateFailed, Problem
from llmtune.evaluate.generation import answer_ends, generate_batch, only_these_settings
from llmtune.records import AdaptedModel, Row
from llmtune.session import Models, RunContext, trained_name
from llmtune.store.atomic_files import hash_folder, read_json, write_json
from llmtune.tasks.base import AnyTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe import Recipe
    from llmtune.records import ModelRef

PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that adds two numbers.",
    "List three things to pack for a walk in the rain.",
    "Translate into German: The train leaves at nine o'clock.",
    "12 apples cost 6 euros. How much do 30 apples cost?",
    "Summarize: The committee met on Tuesday, talked for three hours and decided nothing.",
    "Once upon a time there was a small town by the sea, and",
)
CONTEXT = "Paris is the capital of France. The train to Berlin leaves at nine o'clock, and 30 apples cost 15 euros."
"""What the fixed prompts are asked about, where a task finds answers in a text."""
ANSWER_TOKENS = 16
CERTIFIED_ROWS = 8
"""Rows of the run that a product is asked beside the fixed prompts."""
CERTIFICATE = "certificate.json"
SAME_NUMBER = 0.1
"""Two numbers count as the same first choice up to this share of the spread of all rows."""
EFFECT_SHARE = 0.05
"""A merge may undo this share of what tuning did."""

Onto = Literal["original", "dequantized"]
Certificate = dict[str, Any]
"""The JSON document `certificate.json`; docs/deploy.md has its keys."""


@dataclass(frozen=True)
class TunedModel:
    """The model that products are made from and held against, with the run's rows that it is asked."""

    adapted: AdaptedModel
    recipe: Recipe
    task: AnyTask
    rows: Sequence[Row] = ()
    trained_sha256: str | None = None
    """Hash of the run's folder of what was trained; None where that is in memory alone."""

    @property
    def model(self) -> PreTrainedModel:
        """The model with its adapter."""
        return cast("PreTrainedModel", self.adapted.model)

    @property
    def processor(self) -> PreTrainedTokenizerBase:
        """The tokenizer (or processor) it was trained with."""
        return cast("PreTrainedTokenizerBase", self.adapted.selected.processor)

    def certificate(self, breaches: Sequence[str]) -> Certificate:
        """Return what every certificate begins with."""
        ref = self.adapted.selected.model_ref
        return {
            "passed": not breaches,
            "breaches": list(breaches),
            "base": ref.name,
            "revision": ref.revision,
            "base_sha256": ref.content_hash,
            "trained_sha256": self.trained_sha256,
        }


def load_tuned(
    context: RunContext,
    model_ref: ModelRef,
    processor: PreTrainedTokenizerBase,
    splits: Sequence[str] = ("test",),
) -> TunedModel:
    """Load the model of a finished run, and a few rows of the first of `splits` that has any."""
    rows = load_rows(context.folder.path / "data" / "rows")
    split = next((name for name in splits if rows.counts[name]), splits[0])
    return TunedModel(
        Models(context, model_ref, processor).adapted,
        context.recipe,
        context.task,
        read_rows(rows, split, range(min(CERTIFIED_ROWS, rows.counts[split]))),
        hash_folder(context.folder.path / trained_name(context.recipe)),
    )


def training_base(recipe: Recipe) -> Onto:
    """Return the weights that the adapter was trained on, as `--onto` calls them: there both models agree best."""
    return "dequantized" if recipe.adapter.method == "qlora" else "original"


# Distances and limits


@dataclass(frozen=True)
class Distance:
    """How far the outputs of one model are from those of another; KL in nats per position."""

    largest_logit_difference: float
    kl_mean: float
    kl_max: float
    top1_agreement: float
    """Share of positions where both have the same first choice."""


@dataclass(frozen=True)
class Parity(Distance):
    """How far a product is from the tuned model."""

    prompts: int
    positions: int
    answer_agreement: float
    """Share of prompts with the same greedy answer."""
    same_ids: bool
    """Whether the saved tokenizer and template make the same token ids."""
    effect_kl: float | None
    """How far tuning had moved the model from its base on the same positions; None where that cannot be measured."""


@dataclass(frozen=True)
class Limits:
    """What is allowed: a mean KL of a share of what tuning did, but at least `kl_floor` and at most `kl_cap`.

    With `noise`, at most half of what tuning did, or `noise` if that is more: otherwise a product that lost the adapter
    of a gentle tuning would pass.
    """

    kl_floor: float
    kl_cap: float
    top1: float
    logit_difference: float | None = None
    noise: float | None = None

    def kl(self, effect: float | None) -> float:
        """The limit of `kl_mean` for a tuning that moved the model by `effect`."""
        limit = max(self.kl_floor, min(self.kl_cap, EFFECT_SHARE * (effect or 0.0)))
        if effect is None or self.noise is None:
            return limit
        return min(limit, max(self.noise, effect / 2))


LIMITS = {
    "exact": Limits(kl_floor=1e-5, kl_cap=1e-4, top1=0.99, logit_difference=0.05),
    "rounded": Limits(kl_floor=1e-2, kl_cap=2e-2, top1=0.9, noise=5e-3),
    "other base": Limits(kl_floor=2e-2, kl_cap=1e-1, top1=0.85),
}
"""exact: float32 throughout. rounded: 16 bits in one of them, which alone moves SmolLM2 in bfloat16 by 3e-3 to 5e-3.
other base: a 4-bit adapter on the original weights."""


def kl_divergence(expected_TV: torch.Tensor, actual_TV: torch.Tensor) -> torch.Tensor:
    """Return KL(expected || actual) of each position, in nats [T]."""
    expected_TV, actual_TV = expected_TV.log_softmax(-1), actual_TV.log_softmax(-1)
    return (expected_TV.exp() * (expected_TV - actual_TV)).sum(-1).clamp_min(0)


def compare_outputs(expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor], kind: str = "choice") -> Distance:
    """Compare logits [N, K] with others of the same inputs.

    `kind` is a task's `output_kind`. The KL of numbers is that of two normal distributions around them, as wide as the
    numbers of all rows are spread.
    """
    largest = max(float((one - other).abs().max()) for one, other in zip(expected, actual, strict=True))
    if kind == "choice":
        pairs = list(zip(expected, actual, strict=True))
        kls = torch.cat([kl_divergence(*pair) for pair in pairs])
        agreed = torch.cat([one.argmax(-1) == other.argmax(-1) for one, other in pairs])
    else:
        measure = _compare_labels if kind == "yes-no" else _compare_numbers
        kls, agreed = measure(torch.cat(tuple(expected)), torch.cat(tuple(actual)))
    return Distance(largest, float(kls.mean()), float(kls.max()), float(agreed.float().mean()))


def _compare_labels(expected_NK: torch.Tensor, actual_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    yes, no = expected_NK.sigmoid(), (-expected_NK).sigmoid()
    kl_NK = yes * (logsigmoid(expected_NK) - logsigmoid(actual_NK))
    kl_NK += no * (logsigmoid(-expected_NK) - logsigmoid(-actual_NK))
    return kl_NK.clamp_min(0).mean(-1), ((expected_NK > 0) == (actual_NK > 0)).all(-1)


def _compare_numbers(expected_NK: torch.Tensor, actual_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    size = float(expected_NK.square().mean().sqrt())
    spread = max(float(expected_NK.std(correction=0)), 1e-3 * size, 1e-6) if len(expected_NK) > 1 else max(size, 1e-6)
    difference_N = (expected_NK - actual_NK).abs()[:, 0] / spread
    return difference_N.square() / 2, difference_N <= SAME_NUMBER


def tuning_effect(model: torch.nn.Module, compare: Callable[[PreTrainedModel], Distance]) -> float | None:
    """Return the mean KL from the tuned model to its own base; None if there is no adapter that can be switched off."""
    if not isinstance(model, PeftModel) or any(config.bias != "none" for config in model.peft_config.values()):
        return None  # trained biases stay when adapters are switched off
    with model.disable_adapter():
        return compare(cast("PreTrainedModel", model)).kl_mean


def find_breaches(parity: Parity, limits: Limits) -> list[str]:
    """Describe the limits that are broken."""
    breaches = []
    if not parity.same_ids:
        breaches.append("the saved tokenizer and chat template make other token ids")
    kl = limits.kl(parity.effect_kl)
    if not parity.kl_mean <= kl:  # NaN is a breach
        breaches.append(f"mean KL is {parity.kl_mean:.2g} nats per position; the limit is {kl:.2g}")
    if not parity.top1_agreement >= limits.top1:
        share = f"the first choice agrees at {parity.top1_agreement:.1%} of positions"
        breaches.append(f"{share}; at least {limits.top1:.0%} is required")
    highest = limits.logit_difference
    if highest is not None and not parity.largest_logit_difference <= highest:
        difference = f"the largest logit difference is {parity.largest_logit_difference:.2g}"
        breaches.append(f"{difference}; the limit is {highest:.2g}")
    return breaches


def describe_parity(measured: Certificate) -> str:
    """Return a certificate's numbers as a line for a person."""
    effect = "" if measured.get("effect_kl") is None else f" (tuning had moved it by {measured['effect_kl']:.2g})"
    return (
        f"over {measured['positions']} positions mean KL {measured['kl_mean']:.2g} nats{effect}, largest logit "
        f"difference {measured['largest_logit_difference']:.2g}, same first choice {measured['top1_agreement']:.1%}, "
        f"same answers {measured['answer_agreement']:.0%}, token ids {'equal' if measured['same_ids'] else 'not equal'}"
    )


# Models that continue a text


class TransformersReader:
    """A model of transformers or PEFT that continues a text."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits [T, V] of every position, on the CPU in float32."""
        ids_BT = torch.tensor([list(ids)], device=self.model.device)
        logits_BTV: torch.Tensor = self.model(input_ids=ids_BT, use_cache=False).logits
        return logits_BTV[0].float().cpu()

    def answer(self, prompt: Sequence[int], stops: Sequence[int], tokens: int = ANSWER_TOKENS) -> list[int]:
        """Return the first `tokens` ids of the greedy answer, up to one of `stops`, which is included."""
        settings = GenerationConfig(
            max_new_tokens=tokens, do_sample=False, eos_token_id=list(stops) or None, pad_token_id=[*stops, 0][0]
        )
        with only_these_settings(self.model):
            return generate_batch(self.model, [prompt], settings, str(self.model.device))[0]


@dataclass(frozen=True)
class Trace:
    """A prompt, the tuned model's greedy answer, and its logits [T, V] over both, on the CPU in float32."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    logits: torch.Tensor

    @property
    def ids(self) -> list[int]:
        """Prompt and answer."""
        return [*self.prompt, *self.answer]


class TextReference:
    """What the tuned model answers to prompts, and with which logits; products are compared with it."""

    def __init__(self, tuned: TunedModel) -> None:
        self.tuned = tuned
        self.stops = answer_ends(tuned.model, tuned.processor)
        reader = TransformersReader(tuned.model)
        self.traces = []
        for prompt in render_prompts(tuned, tuned.processor):
            answer = reader.answer(prompt, self.stops)
            self.traces.append(Trace(tuple(prompt), tuple(answer), reader.logits([*prompt, *answer])))
        self.effect = tuning_effect(tuned.adapted.model, self.compare)

    def compare(self, model: PreTrainedModel) -> Distance:
        """Compare the logits of `model` over the same prompts and answers."""
        return self._distance(TransformersReader(model).logits)

    def _distance(self, logits_of: Callable[[Sequence[int]], torch.Tensor]) -> Distance:
        return compare_outputs([t.logits for t in self.traces], [logits_of(t.ids) for t in self.traces])

    def parity(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase, folder: Path) -> Parity:
        """Compare a product: its logits, its answers, and the prompts its saved `processor` and `folder` make."""
        made = [render_prompts(self.tuned, processor), served_prompts(self.tuned, folder)]
        reader = TransformersReader(model)
        return self.parity_of(reader.logits, reader.answer, made)

    def parity_of(
        self,
        logits_of: Callable[[Sequence[int]], torch.Tensor],
        answer: Callable[[Sequence[int], Sequence[int]], list[int]],
        made: Sequence[Sequence[list[int]]],
    ) -> Parity:
        """Compare another program's logits and answers, and the ids of all prompts as they are `made` in some ways."""
        prompts = [list(trace.prompt) for trace in self.traces]
        same = [answer(trace.prompt, self.stops) == list(trace.answer) for trace in self.traces]
        return Parity(
            **asdict(self._distance(logits_of)),
            prompts=len(prompts),
            positions=sum(len(trace.logits) for trace in self.traces),
            answer_agreement=sum(same) / len(same),
            same_ids=all(list(one) == prompts for one in made),
            effect_kl=self.effect,
        )


def list_questions(task: AnyTask, rows: Sequence[Row]) -> list[Row]:
    """Return `PROMPTS` as rows of the task, and `rows` without their answers."""
    fixed = [task.make_row({"prompt": text, "context": CONTEXT}) for text in PROMPTS]
    return [*fixed, *(task.split_answer(row)[0] for row in rows)]


def render_prompts(tuned: TunedModel, processor: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the ids of `PROMPTS`, and of the rows without their answers, as the task makes them."""
    return [tuned.task.prompt_ids(row, processor, tuned.recipe) for row in list_questions(tuned.task, tuned.rows)]


def render_chats(tuned: TunedModel, tokenizer: PreTrainedTokenizerBase) -> list[str] | None:
    """Return the prompts as a server renders them that knows the saved tokenizer alone.

    None where a client writes the prompt himself.
    """
    if not tuned.task.is_conversational or not tokenizer.chat_template:
        return None
    return [
        cast(
            str,
            tokenizer.apply_chat_template(
                clean(row["messages"]),
                tools=row.get("tools"),
                add_generation_prompt=True,
                tokenize=False,
                **tuned.recipe.model.chat_template_kwargs,
            ),
        )
        for row in list_questions(tuned.task, tuned.rows)
    ]


def served_prompts(tuned: TunedModel, folder: Path) -> list[list[int]]:
    """Return the ids of the prompts as a server makes them that knows the saved folder alone."""
    trust = tuned.recipe.model.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust)
    texts = render_chats(tuned, tokenizer)
    if texts is None:
        return render_prompts(tuned, tokenizer)
    return [cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


# Certificates


def check_output(out: Path) -> Iterator[Problem]:
    """Yield what keeps a product from being written into the folder `out`."""
    if out.is_dir() and any(out.iterdir()) and read_json(out / CERTIFICATE) is None:
        yield Problem("the folder holds something else", str(out), "Choose another folder with --out.")
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        yield Problem("a file stands where a folder is needed", str(existing), "Choose another --out.")


def write_certificate(certificate: Certificate, folder: Path, out: Path, product: str, fix: str = "") -> None:
    """Write the certificate into `folder`, which is to become `out`.

    Raises GateFailed for one that did not pass; its numbers then stand beside `out` as `<out>.failed.json`.
    """
    failed = out.with_name(f"{out.name}.failed.json")
    if not certificate["passed"]:
        write_json(failed, certificate)
        fix = f"{fix}Nothing was kept; the numbers are in {failed}."
        raise GateFailed(*(Problem(f"{product} differs: {breach}", None, fix) for breach in certificate["breaches"]))
    write_json(folder / CERTIFICATE, certificate)
    failed.unlink(missing_ok=True)
