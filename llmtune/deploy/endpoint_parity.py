"""A served endpoint held against what was trained: token ids of prompts, greedy answers, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console

from llmtune.data.chat_template import clean
from llmtune.deploy.endpoint import Endpoint, Reply
from llmtune.deploy.parity import ANSWER_TOKENS, Trace, list_questions, render_prompts, trace_answers
from llmtune.errors import GateFailed, Problem, RecipeError
from llmtune.evaluate.generation import answer_ends, decode_answer
from llmtune.records import AdaptedModel, Row
from llmtune.store.atomic_files import explained, write_json
from llmtune.tasks import AnyTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

FEWEST_ANSWERS = 0.9
"""Share of prompts whose greedy answer must be the same."""
MOST_NATS = 0.1
"""How far the log-probabilities of chosen tokens may be off on average."""
TIE = 0.25
"""Logits so close are a tie, which rounding may decide either way."""


@dataclass(frozen=True)
class Measured:
    """What an endpoint said to the prompts, by how much it tells."""

    prompts: int
    ids_known_by: str
    """ids: the endpoint gives the prompt's token ids. count: only how many there are. nothing: not even that."""
    same_ids: float
    """Share of prompts with the same ids, or as many."""
    answer_agreement: float
    """Share of prompts with the same greedy text; an answer that parts at a tie counts as the same."""
    ties: int
    logprob_positions: int
    logprob_mean_difference: float | None
    """Nats a chosen token; None where the endpoint gives no log-probabilities."""
    logprob_largest_difference: float | None


@dataclass(frozen=True)
class EndpointCertificate:
    """What a served endpoint was held to, and what was measured."""

    passed: bool
    breaches: tuple[str, ...]
    url: str
    model: str
    base: str
    revision: str | None
    base_sha256: str
    trained_sha256: str | None
    limits: dict[str, float]
    measured: Measured


def certify_endpoint(
    adapted: AdaptedModel,
    recipe: Recipe,
    task: AnyTask,
    endpoint: Endpoint,
    model: str,
    out: Path,
    console: Console,
    *,
    rows: Sequence[Row] = (),
    trained_sha256: str | None = None,
) -> dict[str, Any]:
    """Ask an endpoint and the tuned model the same, greedily; the certificate is written to `out` either way.

    `rows`, if any, are asked beside the fixed prompts; those that hold more than texts are left out.

    Raises:
        RecipeError: a task whose models are not asked by messages or by a text to go on from.
        GateFailed: the endpoint differs from what was trained by more than the limits.
        EnvironmentProblem: it does not answer.
    """
    if not task.free_prompt:
        fix = "Its answers are those of `llmtune generate`; merge and GGUF files have certificates of their own."
        raise RecipeError.of(f"an endpoint of task {task.name} has no prompts to compare", "--url", fix)
    processor = cast("PreTrainedTokenizerBase", adapted.selected.processor)
    tuned = cast("PreTrainedModel", adapted.model)
    asked = [row for row in rows if _holds_texts(row)]
    with console.status("asking the tuned model"):
        traces = trace_answers(tuned, processor, render_prompts(task, processor, recipe, asked))
    by_messages = task.is_conversational and bool(processor.chat_template)
    questions = list_questions(task, asked)
    with console.status(f"asking {endpoint.url}"):
        replies = [_ask(endpoint, model, row, by_messages, recipe) for row in questions]
    measured = _measure(traces, replies, set(answer_ends(tuned, processor, recipe)), processor)
    breaches = tuple(find_breaches(measured))
    place = adapted.selected.model_ref
    certificate = EndpointCertificate(
        passed=not breaches,
        breaches=breaches,
        url=endpoint.url,
        model=model,
        base=place.name,
        revision=place.revision,
        base_sha256=place.content_hash,
        trained_sha256=trained_sha256,
        limits={"answer_agreement": FEWEST_ANSWERS, "logprob_mean_difference": MOST_NATS, "same_ids": 1.0},
        measured=measured,
    )
    written = asdict(certificate)
    with explained(out):
        write_json(out, written)
    fix = f"The numbers are in {out}. Serve the run itself, its merged folder, or its template as it was saved."
    GateFailed.collect(Problem(f"the endpoint differs: {breach}", endpoint.url, fix) for breach in breaches)
    _show(certificate, console)
    return written


def _holds_texts(row: Row) -> bool:
    messages = row.get("messages", ())
    return not row.get("tools") and all(
        set(message) <= {"role", "content", "train"} and isinstance(message.get("content"), str) for message in messages
    )


def _ask(endpoint: Endpoint, model: str, row: Row, by_messages: bool, recipe: Recipe) -> Reply:
    ids: dict[str, Any] = {"return_token_ids": True, "repetition_penalty": 1.0}
    told: dict[str, Any] = {"logprobs": True, "top_logprobs": 1} if by_messages else {"logprobs": 1}
    extras = [ids | told, ids, told, {}]
    if kwargs := dict(recipe.model.chat_template_kwargs):  # our own server has them already, and refuses them
        extras = [more | given for more in extras for given in ({"chat_template_kwargs": kwargs}, dict[str, Any]())]
    body: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": ANSWER_TOKENS}
    if by_messages:
        return endpoint.ask("/chat/completions", {**body, "messages": clean(row["messages"])}, extras)
    return endpoint.ask("/completions", {**body, "prompt": row["prompt"]}, extras)


def _measure(
    traces: Sequence[Trace], replies: Sequence[Reply], stops: set[int], processor: PreTrainedTokenizerBase
) -> Measured:
    pairs = list(zip(traces, replies, strict=True))
    by_ids = all(reply.prompt_ids is not None for reply in replies)
    by_count = all(reply.prompt_tokens is not None for reply in replies)
    if by_ids:
        same = [reply.prompt_ids == trace.prompt for trace, reply in pairs]
    else:
        same = [by_count and reply.prompt_tokens == len(trace.prompt) for trace, reply in pairs]
    equal = [_said(trace, stops, processor) == reply.text.rstrip("\ufffd") for trace, reply in pairs]
    ties = [not one and _is_tie(trace, reply, stops) for one, (trace, reply) in zip(equal, pairs, strict=True)]
    apart = [difference for trace, reply in pairs for difference in _logprob_differences(trace, reply, processor)]
    return Measured(
        prompts=len(pairs),
        ids_known_by="ids" if by_ids else "count" if by_count else "nothing",
        same_ids=sum(same) / len(same),
        answer_agreement=(sum(equal) + sum(ties)) / len(equal),
        ties=sum(ties),
        logprob_positions=len(apart),
        logprob_mean_difference=sum(apart) / len(apart) if apart else None,
        logprob_largest_difference=max(apart) if apart else None,
    )


def _said(trace: Trace, stops: set[int], processor: PreTrainedTokenizerBase) -> str:
    return decode_answer(trace.answer, stops, processor).rstrip("\ufffd")


def _is_tie(trace: Trace, reply: Reply, stops: set[int]) -> bool:
    """Whether the endpoint's answer parts from ours where two tokens were as good as equal."""
    for at, (ours, theirs) in enumerate(zip(trace.answer, reply.answer_ids or (), strict=False)):
        if ours != theirs:
            logits_V = trace.logits[len(trace.prompt) + at - 1]
            return float(logits_V[ours] - logits_V[theirs]) <= TIE
        if ours in stops:
            return False
    return False


def _logprob_differences(trace: Trace, reply: Reply, processor: PreTrainedTokenizerBase) -> list[float]:
    """Compare log-probabilities of chosen tokens for as long as both models choose the same."""
    found = []
    for at, (ours, (text, logprob)) in enumerate(zip(trace.answer, reply.logprobs or (), strict=False)):
        if text not in (processor.decode([ours]), processor.convert_ids_to_tokens(ours)):
            break
        wanted_V = trace.logits[len(trace.prompt) + at - 1].log_softmax(-1)
        found.append(abs(float(wanted_V[ours]) - logprob))
    return found


def find_breaches(measured: Measured) -> list[str]:
    """Say, in words, which limits are broken."""
    breaches = []
    if measured.ids_known_by == "nothing":
        breaches.append("it tells neither the token ids of a prompt nor how many there are: its template is unproven")
    elif measured.same_ids < 1:
        what = "other token ids" if measured.ids_known_by == "ids" else "another number of tokens"
        share = f"{1 - measured.same_ids:.0%} of prompts"
        breaches.append(f"it makes {what} of {share}: another chat template, or a start token too many")
    if not measured.answer_agreement >= FEWEST_ANSWERS:
        said = f"{measured.answer_agreement:.0%} of its greedy answers are the same"
        breaches.append(f"{said}, and at least {FEWEST_ANSWERS:.0%} is wanted")
    apart = measured.logprob_mean_difference
    if apart is not None and not apart <= MOST_NATS:
        said = f"log-probabilities of chosen tokens are off by {apart:.2g} nats on average"
        breaches.append(f"{said}, and at most {MOST_NATS:.2g} is admitted")
    return breaches


def _show(certificate: EndpointCertificate, console: Console) -> None:
    measured = certificate.measured
    ids = {"ids": "token ids of all prompts equal", "count": "as many tokens in all prompts (ids are not told)"}
    parts = [ids[measured.ids_known_by], f"same greedy answers {measured.answer_agreement:.0%}"]
    if measured.ties:
        parts.append(f"{measured.ties} of them part at a tie")
    if measured.logprob_mean_difference is not None:
        parts.append(f"log-probabilities off by {measured.logprob_mean_difference:.2g} nats on average")
    console.print(f"endpoint {certificate.url}, model {certificate.model}", highlight=False, markup=False)
    console.print(f"parity with the adapter over {measured.prompts} prompts: {', '.join(parts)}", highlight=False)
