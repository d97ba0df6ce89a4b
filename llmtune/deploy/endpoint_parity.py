"""A served OpenAI-compatible endpoint compared with what was trained: token ids, greedy answers, log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

import openai
from rich.console import Console

from llmtune.data.chat_template import clean
from llmtune.deploy.parity import (
    ANSWER_TOKENS,
    Certificate,
    TextReference,
    Trace,
    TunedModel,
    list_questions,
    load_tuned,
)
from llmtune.errors import EnvironmentProblem, GateFailed, LlmtuneError, Problem, RecipeError
from llmtune.evaluate.generation import answer_ends, answer_reader, end_output
from llmtune.model.processor import load_processor
from llmtune.records import Row
from llmtune.session import open_finished
from llmtune.store.atomic_files import explained, write_json

if TYPE_CHECKING:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion, ChatCompletionMessageParam
    from transformers import PreTrainedTokenizerBase

ENDPOINT_CERTIFICATE = "endpoint.certificate.json"
MIN_AGREEMENT = 0.9
"""Share of prompts whose greedy answer must be the same."""
MAX_LOGPROB_DIFFERENCE = 0.1
"""How far the log-probabilities of chosen tokens may be off on average, in nats."""
TIE = 0.25
"""Logits this close are a tie, which rounding may decide either way."""
TIMEOUT_SECONDS = 120
RETRIES = 4
"""How often an endpoint that is busy is asked again."""

Parameters = dict[str, object]


@dataclass(frozen=True)
class Reply:
    """What an endpoint answered; what it leaves out is None or empty."""

    text: str
    prompt_ids: list[int] | None
    prompt_tokens: int | None
    answer_ids: Sequence[int]
    logprobs: Sequence[tuple[str, float]]
    """Text and log-probability of the chosen tokens."""


class Endpoint:
    """A client of one endpoint; `url` with or without `/v1`. Redirects are not followed: a key would go along.

    Raises RecipeError for what is not an HTTP URL; EnvironmentProblem where `offline` forbids the host.
    """

    def __init__(self, url: str, key: str | None, offline: bool) -> None:
        parsed = urlsplit(url.strip().rstrip("/"))
        if parsed.scheme not in ("http", "https") or not parsed.hostname or parsed.username or parsed.query:
            fix = "Give it as http://HOST:PORT, and a key with --api-key-file."
            raise RecipeError.of("this is not the address of an endpoint", "--url", fix)
        local = _is_loopback(parsed.hostname)
        if offline and not local:
            fix = "Omit --offline, or certify an endpoint on this machine."
            raise EnvironmentProblem.of(f"--offline forbids asking {parsed.hostname}", "--url", fix)
        self.url = f"{parsed.geturl().removesuffix('/v1')}/v1"
        http_client = openai.DefaultHttpxClient(timeout=TIMEOUT_SECONDS, follow_redirects=False, trust_env=not local)
        self.client = openai.OpenAI(
            base_url=self.url, api_key=key or "none", max_retries=RETRIES, http_client=http_client
        )
        self._accepted: Parameters | None = None
        """The further parameters that the endpoint takes, once that is known."""

    def choose_model(self, requested: str | None, run_name: str) -> str:
        """Return the model to ask: the one requested, the one called like the run, or the only one.

        Raises RecipeError where there is no such model, or several.
        """
        try:
            known = [model.id for model in self.client.with_options(max_retries=0).models.list().data or ()]
        except (openai.APIStatusError, AttributeError) as error:
            if requested is None and isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
                raise self._explain(error) from error
            known = []
        except openai.APIConnectionError as error:
            raise self._explain(error) from error
        if requested is not None and known and requested not in known:
            raise RecipeError.of(f"the endpoint has no model {requested!r}", "--model", f"It has: {', '.join(known)}.")
        if requested is not None or run_name in known:
            return requested or run_name
        if len(known) == 1:
            return known[0]
        several = f"the endpoint has several models: {', '.join(known)}"
        what = several if known else "the endpoint does not list its models"
        raise RecipeError.of(what, "--model", "Name the one to certify with --model.")

    def ask(self, model: str, prompt: Row, chat: bool, extras: Sequence[Parameters]) -> Reply:
        """Ask greedily; `extras` are parameters that not every server knows, those that tell most first.

        Raises EnvironmentProblem where no answer comes.
        """
        last: openai.OpenAIError | None = None
        for extra in extras if self._accepted is None else [self._accepted]:
            try:
                reply = self._complete(model, prompt, chat, extra)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                last = error
                continue
            except openai.OpenAIError as error:
                raise self._explain(error) from error
            except (AttributeError, IndexError, TypeError, ValueError) as error:
                what = "the endpoint's answer does not have the shape of OpenAI's"
                raise EnvironmentProblem.of(what, fix="Check --url.") from error
            self._accepted = extra
            return reply
        assert last is not None, "at least one set of parameters is tried"
        raise self._explain(last) from last

    def _complete(self, model: str, prompt: Row, chat: bool, extra: Parameters) -> Reply:
        if chat:
            conversation = self.client.chat.completions.create(
                model=model,
                messages=cast("list[ChatCompletionMessageParam]", clean(prompt["messages"])),
                temperature=0,
                max_tokens=ANSWER_TOKENS,
                extra_body=extra,
            )
            message, listed = conversation.choices[0].message, conversation.choices[0].logprobs
            logprobs = [(one.token, one.logprob) for one in (listed and listed.content) or ()]
            return _as_reply(conversation, message.content or "", logprobs)
        text = self.client.completions.create(
            model=model, prompt=prompt["prompt"], temperature=0, max_tokens=ANSWER_TOKENS, extra_body=extra
        )
        found = text.choices[0].logprobs
        pairs = zip(found.tokens or (), found.token_logprobs or (), strict=True) if found else ()
        return _as_reply(text, text.choices[0].text, [(token, value) for token, value in pairs if value is not None])

    def _explain(self, error: openai.OpenAIError) -> LlmtuneError:
        if not isinstance(error, openai.APIStatusError):
            fix = "Start it, for example: llmtune deploy serve RUN"
            return EnvironmentProblem.of(f"the endpoint does not answer: {error.__cause__ or error}", self.url, fix)
        if error.status_code in (401, 403):
            what = f"the endpoint wants another key: {error.message[:300]}"
            return EnvironmentProblem.of(what, self.url, "Use --api-key-file.")
        return EnvironmentProblem.of(
            f"the endpoint answered with status {error.status_code}: {error.message[:300]}", self.url
        )


def _as_reply(completion: ChatCompletion | Completion, text: str, logprobs: Sequence[tuple[str, float]]) -> Reply:
    own, of_choice = completion.model_extra or {}, completion.choices[0].model_extra or {}
    return Reply(
        text=text,
        prompt_ids=own.get("prompt_token_ids") or of_choice.get("prompt_token_ids"),
        prompt_tokens=completion.usage.prompt_tokens if completion.usage else None,
        answer_ids=of_choice.get("token_ids") or (),
        logprobs=logprobs,
    )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class EndpointParity:
    """How far an endpoint is from the tuned model."""

    prompts: int
    ids_known_by: str
    """ids: the endpoint returns the prompt's token ids. count: only how many there are. nothing: not even that."""
    same_ids: float
    """Share of prompts with the same ids, or as many."""
    answer_agreement: float
    """Share of prompts with the same greedy text; an answer that parts at a tie counts as the same."""
    ties: int
    logprob_positions: int
    logprob_mean_difference: float | None
    """Nats per chosen token; None where the endpoint returns no log-probabilities."""
    logprob_largest_difference: float | None


def certify_run(
    run: Path, *, url: str, model: str | None, key_file: Path | None, offline: bool, console: Console
) -> Certificate:
    """Ask a served endpoint and the model of a finished run the same, greedily; the certificate is written either way.

    Raises:
        RecipeError: no URL, no such model there, a task whose models are not asked by messages or texts to continue.
        GateFailed: the endpoint differs from what was trained by more than the limits.
        EnvironmentProblem: it does not answer.
    """
    try:
        key = key_file.read_text("utf-8").strip() if key_file else None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError.of(f"the API key cannot be read: {error}", "--api-key-file") from error
    endpoint = Endpoint(url, key, offline)
    context, model_ref = open_finished(run, console, offline)
    if not context.task.free_prompt:
        fix = "Its answers are those of `llmtune generate`; merge and GGUF files have certificates of their own."
        raise RecipeError.of(f"an endpoint of task {context.task.name} has no prompts to compare", "--url", fix)
    with endpoint.client:
        name = endpoint.choose_model(model, context.recipe.name)
        tuned = load_tuned(context, model_ref, load_processor(model_ref, context.recipe.model))
        tuned = replace(tuned, rows=[row for row in tuned.rows if _is_plain_text(row)])
        with console.status("asking the tuned model"):
            traces = TextReference(tuned).traces
        with console.status(f"asking {endpoint.url}"):
            parity = _compare(traces, _ask_all(endpoint, name, tuned), tuned)
    breaches = find_endpoint_breaches(parity)
    limits = {"answer_agreement": MIN_AGREEMENT, "logprob_mean_difference": MAX_LOGPROB_DIFFERENCE, "same_ids": 1.0}
    about = {"url": endpoint.url, "model": name, "limits": limits, "measured": asdict(parity)}
    certificate = {**tuned.certificate(breaches), **about}
    with explained(out := run / ENDPOINT_CERTIFICATE):
        write_json(out, certificate)
    fix = f"The numbers are in {out}. Serve the run itself, its merged folder, or its template as it was saved."
    GateFailed.collect(Problem(f"the endpoint differs: {breach}", endpoint.url, fix) for breach in breaches)
    console.print(f"endpoint {endpoint.url}, model {name}", highlight=False, markup=False)
    console.print(_describe(parity), highlight=False)
    return certificate


def _is_plain_text(row: Row) -> bool:
    """Whether a row's messages hold nothing but texts."""
    messages: Sequence[Mapping[str, object]] = row.get("messages", ())
    return not row.get("tools") and all(
        set(message) <= {"role", "content", "train"} and isinstance(message.get("content"), str) for message in messages
    )


def _ask_all(endpoint: Endpoint, model: str, tuned: TunedModel) -> list[Reply]:
    chat = tuned.task.is_conversational and bool(tuned.processor.chat_template)
    ids: Parameters = {"return_token_ids": True, "repetition_penalty": 1.0}
    logprobs: Parameters = {"logprobs": True, "top_logprobs": 1} if chat else {"logprobs": 1}
    extras: list[Parameters] = [ids | logprobs, ids, logprobs, {}]
    if kwargs := dict(tuned.recipe.model.chat_template_kwargs):  # our own server has them already, and refuses them
        given: Parameters = {"chat_template_kwargs": kwargs}
        extras = [{**extra, **more} for extra in extras for more in (given, {})]
    return [endpoint.ask(model, row, chat, extras) for row in list_questions(tuned.task, tuned.rows)]


def _compare(traces: Sequence[Trace], replies: Sequence[Reply], tuned: TunedModel) -> EndpointParity:
    stops, processor = set(answer_ends(tuned.model, tuned.processor, tuned.recipe)), tuned.processor
    pairs = list(zip(traces, replies, strict=True))
    by_ids = all(reply.prompt_ids is not None for reply in replies)
    by_count = all(reply.prompt_tokens is not None for reply in replies)
    if by_ids:
        same = [reply.prompt_ids == list(trace.prompt) for trace, reply in pairs]
    else:
        same = [by_count and reply.prompt_tokens == len(trace.prompt) for trace, reply in pairs]
    read = answer_reader(processor, tuned.recipe)
    answers = [end_output(trace.answer, stops).token_ids for trace in traces]
    # A server that reads no thoughts and no calls returns them within the text.
    texts = [{read(ids, None).text, processor.decode(ids, skip_special_tokens=True)} for ids in answers]
    equal = [
        reply.text.rstrip("\ufffd") in {text.rstrip("\ufffd") for text in known}
        for known, reply in zip(texts, replies, strict=True)
    ]
    ties = [not one and _is_tie(trace, reply, stops) for one, (trace, reply) in zip(equal, pairs, strict=True)]
    differences = [one for trace, reply in pairs for one in _logprob_differences(trace, reply, processor)]
    return EndpointParity(
        prompts=len(pairs),
        ids_known_by="ids" if by_ids else "count" if by_count else "nothing",
        same_ids=sum(same) / len(same),
        answer_agreement=(sum(equal) + sum(ties)) / len(equal),
        ties=sum(ties),
        logprob_positions=len(differences),
        logprob_mean_difference=sum(differences) / len(differences) if differences else None,
        logprob_largest_difference=max(differences) if differences else None,
    )


def _is_tie(trace: Trace, reply: Reply, stops: set[int]) -> bool:
    """Whether the endpoint's answer parts from ours where two tokens were as good as equal."""
    for at, (ours, theirs) in enumerate(zip(trace.answer, reply.answer_ids, strict=False)):
        if ours != theirs:
            logits_V = trace.logits[len(trace.prompt) + at - 1]
            return float(logits_V[ours] - logits_V[theirs]) <= TIE
        if ours in stops:
            return False
    return False


def _logprob_differences(trace: Trace, reply: Reply, processor: PreTrainedTokenizerBase) -> list[float]:
    """Compare log-probabilities of chosen tokens for as long as both models choose the same."""
    differences = []
    for at, (ours, (text, logprob)) in enumerate(zip(trace.answer, reply.logprobs, strict=False)):
        if text not in (processor.decode([ours]), processor.convert_ids_to_tokens(ours)):
            break
        expected_V = trace.logits[len(trace.prompt) + at - 1].log_softmax(-1)
        differences.append(abs(float(expected_V[ours]) - logprob))
    return differences


def find_endpoint_breaches(parity: EndpointParity) -> list[str]:
    """Describe the limits that are broken."""
    breaches = []
    if parity.ids_known_by == "nothing":
        breaches.append("it returns neither the token ids of a prompt nor their number: its template is unproven")
    elif parity.same_ids < 1:
        what = "other token ids" if parity.ids_known_by == "ids" else "another number of tokens"
        share = f"{1 - parity.same_ids:.0%} of prompts"
        breaches.append(f"it makes {what} of {share}: another chat template, or a start token too many")
    if not parity.answer_agreement >= MIN_AGREEMENT:
        share = f"{parity.answer_agreement:.0%} of its greedy answers are the same"
        breaches.append(f"{share}; at least {MIN_AGREEMENT:.0%} is required")
    difference = parity.logprob_mean_difference
    if difference is not None and not difference <= MAX_LOGPROB_DIFFERENCE:
        what = f"log-probabilities of chosen tokens are off by {difference:.2g} nats on average"
        breaches.append(f"{what}; the limit is {MAX_LOGPROB_DIFFERENCE:.2g}")
    return breaches


def _describe(parity: EndpointParity) -> str:
    ids = {"ids": "token ids of all prompts equal", "count": "as many tokens in all prompts (ids are not returned)"}
    parts = [ids[parity.ids_known_by], f"same greedy answers {parity.answer_agreement:.0%}"]
    if parity.ties:
        parts.append(f"{parity.ties} of them part at a tie")
    if parity.logprob_mean_difference is not None:
        parts.append(f"log-probabilities off by {parity.logprob_mean_difference:.2g} nats on average")
    return f"parity with the adapter over {parity.prompts} prompts: {', '.join(parts)}"
