"""The parity of a product with the tuned model: distances between outputs, limits, and the certificate.

Shapes: T positions of a prompt and its answer, V vocabulary; N distributions over K outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired

import torch
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel
from typing_extensions import TypedDict

from llmtune.errors import EnvironmentProblem, GateFailed, Problem, first_line, system_errno
from llmtune.model.config import UNREADABLE
from llmtune.model.device import is_out_of_memory
from llmtune.store.json_shapes import read_record
from llmtune.store.run_folder import CERTIFICATE

SAME_NUMBER = 0.1
"""Two numbers count as the same first choice within this share of the spread over all rows."""
EFFECT_SHARE = 0.05
"""A merge may undo this share of what tuning did."""

SLACK = 0.1
"""A share of tuning's effect this far from 1 is a breach in float32, and the cause of other breaches elsewhere."""
NOT_FINITE = "its outputs are not finite numbers"
OTHER = "its processor makes other"
"""The start of a breach: its model cannot answer what its processor makes of a picture."""
LARGEST = 10
"""The largest difference of a vector or score may be this many times the limit of the mean."""
NEGLIGIBLE = 100
"""If tuning's effect is smaller than the rounding by this factor, a lost adapter is not checked for."""

Onto = Literal["original", "dequantized"]
Certificate = dict[str, Any]
"""The JSON document `certificate.json`; docs/deploy.md lists its keys."""


@dataclass(frozen=True)
class Distance:
    """The distance between the outputs of two models; KL in nats per position."""

    largest_logit_difference: float
    kl_mean: float
    kl_max: float
    top1_agreement: float
    """Share of positions with the same first choice."""


@dataclass(frozen=True)
class Parity(Distance):
    """The distance of a product from the tuned model."""

    prompts: int
    positions: int
    answer_agreement: float
    """Share of prompts with the same greedy answer."""
    same_ids: bool
    """Whether the saved tokenizer and template produce the same token ids."""
    effect_kl: float | None
    """Mean KL between the tuned model and its base on the same positions; None if it cannot be measured."""
    kl_from_base: float | None
    """Mean KL from the base model to the product, likewise."""
    effect_share: float | None = None
    """How far the product's logits went from the base's in the direction of the tuned model's: 1 is all the way."""
    share_noise: float = 0.0
    """How far rounding may move `effect_share`."""
    same_labels: bool = True
    """Whether a head's outputs have the same names in the same order."""
    ids_error: str | None = None
    """Why the saved tokenizer and template produce no token ids; None if they do."""
    missing_ends: tuple[str, ...] = ()
    """Tokens that end the tuned model's turns and not the product's."""
    pictures: int = 0
    """Number of pictures in the prompts."""
    other_inputs: tuple[str, ...] = ()
    """Inputs of the model that the product's processor makes differently of a picture."""


@dataclass(frozen=True)
class Limits:
    """Limits. The mean KL may be a share of tuning's effect, but at least `kl_floor` and at most `kl_cap`.

    With `noise`, it may be at most half of tuning's effect, or `noise` if that is more. Otherwise a product that lost
    the adapter of a weak tuning would pass.
    """

    kl_floor: float
    kl_cap: float
    top1: float
    logit_difference: float | None = None
    noise: float | None = None
    cosine: float = 2e-3
    """Of vectors: the mean of 1 - cosine; `LARGEST` times as much for a single text."""
    score: float = 1e-2
    """Of a passage's score from 0 to 1: the mean difference; likewise."""

    def kl(self, effect: float | None) -> float:
        """The limit of `kl_mean` for a tuning that moved the model by `effect`."""
        limit = max(self.kl_floor, min(self.kl_cap, EFFECT_SHARE * (effect or 0.0)))
        if effect is None or self.noise is None:
            return limit
        return min(limit, max(self.noise, effect / 2))

    def wider(self, other: Limits) -> Limits:
        """Return limits that allow what either allows."""
        return Limits(
            max(self.kl_floor, other.kl_floor),
            max(self.kl_cap, other.kl_cap),
            min(self.top1, other.top1),
            cosine=max(self.cosine, other.cosine),
            score=max(self.score, other.score),
        )

    def applied(self, effect: float | None) -> Certificate:
        """Return the limits for a tuning that moved the model by `effect`, as a certificate has them."""
        return {
            "kl_mean": self.kl(effect),
            "top1_agreement": self.top1,
            "largest_logit_difference": self.logit_difference,
        }


LIMITS = {
    "exact": Limits(kl_floor=1e-5, kl_cap=1e-4, top1=0.99, logit_difference=0.05, cosine=1e-5, score=1e-4),
    "rounded": Limits(kl_floor=1e-2, kl_cap=2e-2, top1=0.9, noise=5e-3),
    "other base": Limits(kl_floor=2e-2, kl_cap=1e-1, top1=0.85, cosine=2e-2, score=5e-2),
}
"""exact: float32 throughout. rounded: one model in 16 bits, which alone moves SmolLM2 in bfloat16 by 3e-3 to 5e-3.
other base: a 4-bit adapter on the original weights."""


def measure_distance(
    expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor], kind: str = "choice"
) -> Distance:
    """Compare logits [N, K] with others of the same inputs.

    `kind` is a task's `output_kind`. The KL of numbers is that of two normal distributions around them, with the
    spread of the numbers over all rows as width.
    """
    pairs = list(zip(expected, actual, strict=True))
    check_shapes(expected, actual)
    largest = max(float((one - other).abs().max()) for one, other in pairs)
    if kind == "choice":
        parts = [_compare_choices(*pair) for pair in pairs]
    else:
        compare = _compare_labels if kind == "yes-no" else _compare_numbers
        parts = [compare(torch.cat(tuple(expected)), torch.cat(tuple(actual)))]
    kl_N, agreed_N = (torch.cat(part) for part in zip(*parts, strict=True))
    return Distance(largest, float(kl_N.mean()), float(kl_N.max()), float(agreed_N.float().mean()))


def check_shapes(expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor]) -> None:
    """Raise GateFailed if a product returns another number of outputs than the tuned model."""
    for one, other in zip(expected, actual, strict=True):
        if one.shape != other.shape:
            shapes = " x ".join(map(str, other.shape)), " x ".join(map(str, one.shape))
            what = f"its outputs have the shape {shapes[0]}; those of the tuned model have {shapes[1]}"
            raise GateFailed.of(what, None, "Give an export of this run.")


def _compare_choices(expected_NK: torch.Tensor, actual_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL(expected || actual) of each position in nats, and whether both have the same first choice."""
    expected, actual = expected_NK.log_softmax(-1), actual_NK.log_softmax(-1)
    kl_N = (expected.exp() * (expected - actual)).sum(-1).clamp_min(0)
    return kl_N, expected_NK.argmax(-1) == actual_NK.argmax(-1)


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


def measure_step(
    base: Sequence[torch.Tensor], tuned: Sequence[torch.Tensor], product: Sequence[torch.Tensor], kind: str
) -> tuple[float | None, float]:
    """Return the share of the step from `base` to `tuned` that `product` took, and how far rounding may move it.

    It is the least-squares share; None without a step. The part of the product's step that is not in the tuned
    model's direction is taken for rounding. It has as many independent numbers as the outputs, and one direction gets
    its share: three standard deviations.
    """

    def step(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        moved = (other - one).double()  # for a choice, a shift of all logits changes nothing
        return (moved - moved.mean(-1, keepdim=True) if kind == "choice" else moved).flatten()

    aim = torch.cat([step(one, other) for one, other in zip(base, tuned, strict=True)])
    taken = torch.cat([step(one, other) for one, other in zip(base, product, strict=True)])
    total = float(aim.square().sum())
    if not total:
        return None, 0.0
    share = float(aim @ taken) / total
    rest = float((taken - share * aim).norm())
    return share, 3 * rest / (total * len(aim)) ** 0.5


def find_breaches(parity: Parity, limits: Limits) -> list[str]:
    """Describe the violated limits."""
    breaches = []
    if parity.ids_error:
        breaches.append(f"the saved tokenizer and chat template produce no token ids: {parity.ids_error}")
    elif not parity.same_ids:
        breaches.append("the saved tokenizer and chat template produce other token ids")
    if not parity.same_labels:
        breaches.append("its labels, or their order, are not those of the tuned model")
    breaches += [f"its answers do not end at {token!r}" for token in parity.missing_ends]
    breaches += [f"{OTHER} {name} of a picture" for name in parity.other_inputs]
    kl = limits.kl(parity.effect_kl)
    if not math.isfinite(parity.kl_mean):
        breaches.append(NOT_FINITE)
    elif not parity.kl_mean <= kl:
        breaches.append(f"mean KL is {parity.kl_mean:.2g} nats per position; the limit is {kl:.2g}")
    if not parity.top1_agreement >= limits.top1:
        share = f"the first choice agrees at {parity.top1_agreement:.1%} of positions"
        breaches.append(f"{share}; at least {limits.top1:.0%} is required")
    highest = limits.logit_difference
    if highest is not None and not parity.largest_logit_difference <= highest:
        difference = f"the largest logit difference is {parity.largest_logit_difference:.2g}"
        breaches.append(f"{difference}; the limit is {highest:.2g}")
    taken, exact = parity.effect_share, highest is not None
    moved = taken is not None and not abs(taken - 1) <= SLACK + parity.share_noise
    if moved and parity.same_ids and (breaches or exact):
        breaches.append(describe_share(taken or 0.0))
    return [*breaches, *find_lost_adapter(parity)]


def describe_share(taken: float) -> str:
    """Describe a product that took only a share of tuning's step."""
    return f"its outputs moved by {round(taken, 2) + 0.0:.0%} of what tuning did to the base model's"


def find_lost_adapter(parity: Parity) -> list[str]:
    """Return a breach if a product is nearer to the base than to the tuned model, by mean KL.

    With its adapter a product is nearer to the tuned model by the effect of tuning; without it, farther by as much.
    An effect far below the rounding cannot be distinguished from it.
    """
    base, tuned, effect = parity.kl_from_base, parity.kl_mean, parity.effect_kl
    if base is None or effect is None or effect < tuned / NEGLIGIBLE or tuned - base <= effect / 2:
        return []
    numbers = f"mean KL {base:.2g} nats per position, and {tuned:.2g} to the tuned model"
    return [f"it is nearer to the base model ({numbers}): the adapter is lost"]


class ParityNumbers(TypedDict):
    """The numbers of a parity check, as a certificate has them."""

    positions: int
    kl_mean: float | None
    largest_logit_difference: float | None
    top1_agreement: float
    answer_agreement: float
    same_ids: bool
    pictures: NotRequired[int]
    effect_kl: NotRequired[float | None]
    kl_from_base: NotRequired[float | None]


class SearchNumbers(TypedDict):
    """The numbers of a parity check of vectors or scores."""

    unit: str
    outputs: int
    difference_mean: float | None
    difference_max: float | None
    same_order: float
    same_ids: bool
    ndcg: float | None
    ndcg_tuned: float | None
    effect: NotRequired[float | None]
    effect_share: NotRequired[float | None]


class CertificateDocument(TypedDict, total=False):
    """The certificate fields that other commands read."""

    passed: bool
    breaches: list[str]
    trained_sha256: str
    base_sha256: str
    file_sha256: str
    files_sha256: dict[str, str]
    number_format: str
    reader: str
    measured: ParityNumbers | SearchNumbers | None


def read_certificate(folder: Path, name: str = CERTIFICATE) -> Certificate | None:
    """Read the certificate of a product; None if there is none. Raises EnvironmentProblem for a damaged one."""
    certificate: Certificate | None = read_record(folder / name, CertificateDocument, fix="Make the product again.")
    return certificate


def describe_parity(measured: Certificate) -> str:
    """Format a certificate's numbers as one readable line."""
    ids = f"token ids {'equal' if measured['same_ids'] else 'not equal'}"
    if "difference_mean" in measured:
        effect = "" if measured["effect"] is None else f" (tuning had moved it by {measured['effect']:.2g})"
        ndcg = (
            "" if measured["ndcg"] is None else f", nDCG@10 {measured['ndcg']:.3f}, tuned {measured['ndcg_tuned']:.3f}"
        )
        return (
            f"over {measured['outputs']} outputs {describe_distance(measured)}{effect}, "
            f"largest {_write(measured['difference_max'])}{ndcg}, {ids}"
        )
    effect = "" if measured.get("effect_kl") is None else f" (tuning had moved it by {measured['effect_kl']:.2g})"
    pictures = f" with {measured['pictures']} pictures" if measured.get("pictures") else ""
    return (
        f"over {measured['positions']} positions{pictures} mean KL {_write(measured['kl_mean'])} nats{effect}, "
        f"largest logit difference {_write(measured['largest_logit_difference'])}, same first choice "
        f"{measured['top1_agreement']:.1%}, same answers {measured['answer_agreement']:.0%}, {ids}"
    )


def describe_distance(measured: Certificate) -> str:
    """Format the distance of a model from the tuned one: mean and agreement."""
    if "difference_mean" in measured:
        unit, mean = measured["unit"], measured["difference_mean"]
        return f"mean difference ({unit}) {_write(mean)}, same order {measured['same_order']:.1%}"
    return f"mean KL {_write(measured['kl_mean'])}, same first choice {measured['top1_agreement']:.1%}"


def _write(value: float | None) -> str:
    """Format a number; certificates have None for NaN and infinity."""
    return "not a number" if value is None else f"{value:.2g}"


def check_onto(onto: str, quantized: bool, original: bool = True) -> Iterator[Problem]:
    """Yield problems with the weights to merge onto; some models have no `original` ones."""
    if onto not in ("original", "dequantized"):
        yield Problem(f"{onto!r} is unknown", "--onto", "Use original or dequantized.")
    elif onto == "dequantized" and not quantized:
        yield Problem("the base was not quantised in training", "--onto", "Omit --onto.")
    elif onto == "original" and not original:
        yield Problem("the base's files are quantised, so it has no other weights", "--onto", "Omit --onto.")


def load_product(load: Callable[[], tuple[PreTrainedModel, dict[str, set[str]]]], product: str) -> PreTrainedModel:
    """Load a product as a user would, without llmtune; `load` returns the model and its loading info.

    Raises:
        EnvironmentProblem: the product cannot be loaded. Errors of the system pass unchanged.
        GateFailed: the product has missing or unexpected weights.
    """
    try:
        model, info = load()
    except UNREADABLE as error:
        if is_out_of_memory(error) or system_errno(error) is not None:
            raise
        raise EnvironmentProblem.of(f"{product} cannot be loaded: {first_line(error)}") from error
    if lost := sorted({*info["missing_keys"], *info["unexpected_keys"]}):
        raise GateFailed.of(f"{len(lost)} weights of {product} are missing or unexpected, such as {lost[0]}")
    return model.eval()
