"""Compare an OpenAI-compatible endpoint with the tuned model: token ids, greedy answers, log-probabilities."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import openai
import torch
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam
from pydantic.dataclasses import dataclass
from rich.console import Console

from llmtune.adapter.vllm_lora import find_vllm_obstacle
from llmtune.data.chat_messages import clean_messages, list_pictures, with_image_parts
from llmtune.data.pictures import open_picture, row_pictures
from llmtune.deploy.export import open_to_export
from llmtune.deploy.export_score import describe_differences, score_answers
from llmtune.deploy.parity import Certificate
from llmtune.deploy.parity_reference import TextReference
from llmtune.deploy.tuned_model import ANSWER_TOKENS, load_tuned
from llmtune.display.console import spinner
from llmtune.errors import GateFailed, Problem, RecipeError
from llmtune.evaluate.eval_inputs import EvalContext
from llmtune.evaluate.generation import answer_ends, answer_reader, end_output
from llmtune.evaluate.inference import Answers
from llmtune.evaluate.suites.endpoint_client import check_key, connect, explained_errors
from llmtune.recipe.user_files import read_text_file
from llmtune.records import Row
from llmtune.store.atomic_files import explained, write_json

ENDPOINT_CERTIFICATE = "endpoint.certificate.json"
MIN_AGREEMENT = 0.9
"""Minimum share of prompts with the same greedy answer."""
MAX_LOGPROB_DIFFERENCE = 0.1
"""Maximum mean difference of the chosen tokens' log-probabilities, in nats."""
TIE = 0.25
"""Logits closer than this are a tie, which rounding may decide either way."""

Parameters = dict[str, object]


@dataclass(frozen=True)
class Reply:
    """An endpoint's answer; missing fields are None or empty."""

    text: str
    prompt_ids: list[int] | None
    prompt_tokens: int | None
    answer_ids: list[int]
    logprobs: list[tuple[str, float]]
    """Text and log-probability of the chosen tokens."""


def certify_run(
    run: Path,
    *,
    url: str,
    model: str | None,
    key_file: Path | None,
    offline: bool,
    console: Console,
    limit: int | None = None,
) -> Certificate:
    """Ask an endpoint and the model of a finished run the same prompts greedily; write the certificate in any case.

    Scores at most `limit` test rows, by default `deploy.limit` of the run.

    Raises:
        RecipeError: no URL, an unknown model, or a task without messages or texts to continue.
        GateFailed: the endpoint differs from the tuned model by more than the limits.
        EnvironmentProblem: the endpoint does not answer.
    """
    client = connect(url, _read_key(key_file) if key_file else None, offline)
    url = str(client.base_url).rstrip("/")
    context = open_to_export(run, console, offline=offline, limit=limit)
    if not context.plan.task.free_prompt:
        fix = "Its answers are those of `llmtune generate`; merge and GGUF files have certificates of their own."
        raise RecipeError.of(f"an endpoint of task {context.plan.task.name} has no prompts to compare", "--url", fix)
    with client:
        name = choose_served_model(client, model, context.plan.recipe.name)
        tuned = load_tuned(context)
        tuned = replace(tuned, rows=[row for row in tuned.rows if _is_sendable(row)])
        with spinner(console, "asking the tuned model"):
            reference = TextReference(tuned)
        with spinner(console, f"asking {url}"):
            chat = tuned.task.is_conversational and bool(tuned.processor.chat_template)
            ids: Parameters = {"return_token_ids": True, "repetition_penalty": 1.0}
            logprobs: Parameters = {"logprobs": True, "top_logprobs": 1} if chat else {"logprobs": 1}
            replies = ask_all(client, name, tuned.questions, chat, [ids | logprobs, ids, logprobs, {}])
        measured = _compare_replies(reference, replies)
        obstacles = find_ignored_adapter(client, name, context.plan.model_ref.path)
        with explained(folder := run / "certified" / "endpoint"):
            folder.mkdir(parents=True, exist_ok=True)
            scored = score_answers(context, tuned.processor, partial(_ask_test_rows, client, name, chat), folder)
    breaches = [*obstacles, *find_endpoint_breaches(measured)]
    limits = {"answer_agreement": MIN_AGREEMENT, "logprob_mean_difference": MAX_LOGPROB_DIFFERENCE, "same_ids": 1.0}
    certificate = {
        **tuned.certificate(breaches),
        "url": url,
        "model": name,
        "limits": limits,
        "measured": measured,
        "score": scored,
    }
    with explained(out := run / ENDPOINT_CERTIFICATE):
        write_json(out, certificate)
    fix = f"The numbers are in {out}. Serve the run itself, its merged folder, or its template as it was saved."
    GateFailed.collect(Problem(f"the endpoint differs: {breach}", url, fix) for breach in breaches)
    console.print(f"endpoint {url}, model {name}", highlight=False, markup=False)
    console.print(_describe_endpoint(measured), highlight=False)
    for line in describe_differences(scored, "the endpoint"):
        console.print(line, highlight=False)
    return certificate


def _read_key(file: Path) -> str | None:
    try:
        return check_key(read_text_file(file), "--api-key-file")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError.of(f"the API key cannot be read: {error}", "--api-key-file") from error


def _ask_test_rows(client: openai.OpenAI, model: str, chat: bool, evaluated: EvalContext) -> Answers:
    """Let an endpoint answer the test rows; losses and choices stay unknown."""
    inputs, tokens = evaluated.inputs, evaluated.recipe.generation.max_new_tokens
    assert inputs is not None
    indices = (
        [i for i in inputs.generation_prompts if _is_sendable(inputs.questions[i])]
        if evaluated.recipe.evaluate.predicted & {*inputs.metrics}
        else []
    )
    replies = ask_all(client, model, [inputs.questions[i] for i in indices], chat, [{}], tokens)
    return Answers(None, {i: reply.text.strip() for i, reply in zip(indices, replies, strict=True)}, {})


def _is_sendable(conversation: Row) -> bool:
    """Whether the messages contain only text and pictures."""
    messages: Sequence[Mapping[str, object]] = conversation.get("messages", ())
    return not conversation.get("tools") and all(
        set(message) <= {"role", "content", "train", "images"} and isinstance(message.get("content"), str)
        for message in messages
    )


# The client


def choose_served_model(client: openai.OpenAI, requested: str | None, run_name: str) -> str:
    """Return the model to ask: the requested one, the one named like the run, or the only one.

    Raises RecipeError if no model or several models match.
    """
    names: list[str] = []
    with explained_errors(client):
        try:
            names = [str(model.id) for model in client.with_options(max_retries=0).models.list().data or ()]
        except (openai.APIStatusError, AttributeError) as error:  # some endpoints do not list their models
            if requested is None and isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
                raise
    if requested is not None and names and requested not in names:
        raise RecipeError.of(f"the endpoint has no model {requested!r}", "--model", f"It has: {', '.join(names)}.")
    if requested is not None or run_name in names:
        return requested or run_name
    if len(names) == 1:
        return names[0]
    several = f"the endpoint has several models: {', '.join(names)}"
    what = several if names else "the endpoint lists no models"
    raise RecipeError.of(what, "--model", "Name the one to certify with --model.")


def find_ignored_adapter(client: openai.OpenAI, model: str, base: Path) -> list[str]:
    """Describe the adapter that a vLLM server lists as `model`, if vLLM reads none on the model in `base`."""
    obstacle = find_vllm_obstacle(base)
    if obstacle is None:
        return []
    with explained_errors(client), suppress(openai.APIStatusError, AttributeError):
        for listed in client.models.list().data or ():
            if listed.id == model and listed.owned_by == "vllm" and (listed.model_extra or {}).get("parent"):
                return [f"{obstacle}. Serve the merged folder"]
    return []


def ask_all(
    client: openai.OpenAI,
    model: str,
    questions: Sequence[Row],
    chat: bool,
    extras: Sequence[Parameters],
    tokens: int = ANSWER_TOKENS,
) -> list[Reply]:
    """Ask greedily, with the first of `extras` that the server accepts: parameters that some servers do not know.

    Raises EnvironmentProblem if no answer comes.
    """
    replies: list[Reply] = []
    with explained_errors(client):
        for question in questions:
            for extra in extras:
                try:
                    replies.append(_complete(client, model, question, chat, extra, tokens))
                except (openai.BadRequestError, openai.UnprocessableEntityError):
                    if extra is extras[-1]:
                        raise
                    continue
                extras = [extra]
                break
    return replies


def _complete(client: openai.OpenAI, model: str, prompt: Row, chat: bool, extra: Parameters, tokens: int) -> Reply:
    completion: ChatCompletion | Completion
    if chat:
        completion = client.chat.completions.create(
            model=model,
            messages=cast(list[ChatCompletionMessageParam], [*map(_with_pictures, clean_messages(prompt["messages"]))]),
            temperature=0,
            max_tokens=tokens,
            extra_body=extra,
        )
        text, choice_logprobs = completion.choices[0].message.content or "", completion.choices[0].logprobs
        logprobs = [(one.token, one.logprob) for one in (choice_logprobs and choice_logprobs.content) or ()]
    else:
        completion = client.completions.create(
            model=model, prompt=prompt["prompt"], temperature=0, max_tokens=tokens, extra_body=extra
        )
        text, listed = completion.choices[0].text, completion.choices[0].logprobs
        pairs = zip(listed.tokens or (), listed.token_logprobs or (), strict=True) if listed else ()
        logprobs = [(token, value) for token, value in pairs if value is not None]
    completion_fields, choice_fields = completion.model_extra or {}, completion.choices[0].model_extra or {}
    return Reply(  # checks types, unlike the client
        text=text,
        prompt_ids=completion_fields.get("prompt_token_ids") or choice_fields.get("prompt_token_ids"),
        prompt_tokens=completion.usage.prompt_tokens if completion.usage else None,
        answer_ids=choice_fields.get("token_ids") or [],
        logprobs=list(logprobs),
    )


def _with_pictures(message: Mapping[str, object]) -> Mapping[str, object]:
    """Return a message in OpenAI's form, with its pictures as training read them: RGB and upright."""
    if "images" not in message:
        return message
    pictures = iter(list_pictures([message]))
    parts = []
    for part in cast(list[dict[str, object]], with_image_parts(message)["content"]):
        if part["type"] == "image":
            file = io.BytesIO()
            open_picture(next(pictures)).save(file, "PNG")
            url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
            part = {"type": "image_url", "image_url": {"url": url}}
        parts.append(part)
    return {**{key: value for key, value in message.items() if key != "images"}, "content": parts}


# The comparison


def _compare_replies(reference: TextReference, replies: Sequence[Reply]) -> Certificate:
    """Measure how far an endpoint is from the tuned model; an answer that diverges at a tie counts as the same."""
    tuned = reference.tuned
    stops = set(answer_ends(tuned.model, tuned.processor, tuned.recipe))
    read = answer_reader(tuned.processor, tuned.recipe)
    by_ids = all(reply.prompt_ids is not None for reply in replies)
    by_count = all(reply.prompt_tokens is not None for reply in replies)
    same, equal, ties, differences = 0, 0, 0, []
    for number, reply in enumerate(replies):
        prompt, answer = reference.prompts[number], reference.answers[number]
        logits_TV = reference.logits[number][len(prompt) - 1 :]  # for the answer's tokens
        same += reply.prompt_ids == prompt if by_ids else by_count and reply.prompt_tokens == len(prompt)
        ids = end_output(answer, stops).token_ids
        # A server that does not parse thoughts and calls returns them within the text.
        texts = (read(ids, None).text, tuned.processor.decode(ids, skip_special_tokens=True))
        equal += (same_text := reply.text.rstrip("\ufffd") in [text.rstrip("\ufffd") for text in texts])
        ties += not same_text and _parts_at_tie(answer, reply.answer_ids, logits_TV, stops)
        for ours, (token, logprob), logits_V in zip(answer, reply.logprobs, logits_TV, strict=False):
            if token not in (tuned.processor.decode([ours]), tuned.processor.convert_ids_to_tokens(ours)):
                break
            differences.append(abs(float(logits_V.log_softmax(-1)[ours]) - logprob))
    return {
        "prompts": len(replies),
        "pictures": sum(len(row_pictures(row)) for row in tuned.questions),
        "ids_known_by": "ids" if by_ids else "count" if by_count else "nothing",
        "same_ids": same / len(replies),
        "answer_agreement": (equal + ties) / len(replies),
        "ties": ties,
        "logprob_positions": len(differences),
        "logprob_mean_difference": sum(differences) / len(differences) if differences else None,
        "logprob_largest_difference": max(differences) if differences else None,
    }


def _parts_at_tie(answer: Sequence[int], other: Sequence[int], logits_TV: torch.Tensor, stops: set[int]) -> bool:
    """Whether another answer diverges from ours at a tie between two tokens."""
    for ours, theirs, logits_V in zip(answer, other, logits_TV, strict=False):
        if ours != theirs:
            if not 0 <= theirs < len(logits_V):
                return False
            return float(logits_V[ours] - logits_V[theirs]) <= TIE
        if ours in stops:
            return False
    return False


def find_endpoint_breaches(measured: Certificate) -> list[str]:
    """Describe the violated limits."""
    breaches = []
    if measured["ids_known_by"] == "nothing":
        breaches.append("it returns neither a prompt's token ids nor their number, so its template cannot be checked")
    elif measured["same_ids"] < 1:
        what = "other token ids" if measured["ids_known_by"] == "ids" else "a different number of tokens"
        share = f"{1 - measured['same_ids']:.0%} of prompts"
        breaches.append(f"it makes {what} of {share}: another chat template, or an extra start token")
    if not measured["answer_agreement"] >= MIN_AGREEMENT:
        share = f"{measured['answer_agreement']:.0%} of its greedy answers are the same"
        breaches.append(f"{share}; at least {MIN_AGREEMENT:.0%} is required")
    difference = measured["logprob_mean_difference"]
    if difference is not None and not difference <= MAX_LOGPROB_DIFFERENCE:
        what = f"log-probabilities of chosen tokens are off by {difference:.2g} nats on average"
        breaches.append(f"{what}; the limit is {MAX_LOGPROB_DIFFERENCE:.2g}")
    return breaches


def _describe_endpoint(measured: Certificate) -> str:
    ids = {"ids": "token ids of all prompts equal", "count": "equal token counts of all prompts (ids are not returned)"}
    parts = [ids[measured["ids_known_by"]], f"same greedy answers {measured['answer_agreement']:.0%}"]
    if measured["ties"]:
        parts.append(f"{measured['ties']} of them diverge at a tie")
    if measured["logprob_mean_difference"] is not None:
        parts.append(f"log-probabilities off by {measured['logprob_mean_difference']:.2g} nats on average")
    pictures = f" with {measured['pictures']} pictures" if measured["pictures"] else ""
    return f"parity with the adapter over {measured['prompts']} prompts{pictures}: {', '.join(parts)}"
