"""Facts about a chat template, inferred from a dozen probe conversations.

The probes are rendered once for a tokenizer and the switches of a recipe. All code that needs to know how a template
writes headers, ends, thoughts, calls or system messages reads the facts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from llmtune.data.answer_format import (
    ANSWER,
    CALL_ID,
    CALLS,
    INLINE_THOUGHTS,
    KEYS,
    LONG_ID,
    NAME,
    NO_CALLS,
    QUESTION,
    RESULT,
    RESULTS,
    THOUGHT,
    TOOL,
    TOOLS,
    VALUES,
    CallFormat,
    ThoughtFormat,
    call_message,
    read_calls,
    shared_start,
)
from llmtune.data.message_fields import THINK_CLOSE, THINK_OPEN
from llmtune.data.template_text import ENDLESS
from llmtune.data.tokenization import tokenize_each
from llmtune.errors import EnvironmentProblem
from llmtune.records import Json
from llmtune.store.atomic_files import hash_value

FIX = "Set model.chat_template to a Jinja file that"
SYSTEM = "Heed the probe's system message."
MARK_PAIRS = (("<NAME>", "</NAME>"), ("[NAME]", "[/NAME]"), ("<|START_NAME|>", "<|END_NAME|>"))
"""Marks around thoughts in known families."""
_THINKING = re.compile(r"think|reason|thought|analysis|channel", re.IGNORECASE)
_SAID: Json = {"role": "assistant", "content": ANSWER}
_INLINE: Json = {**_SAID, "content": f"{THINK_OPEN}{THOUGHT}{THINK_CLOSE}{ANSWER}"}
_RESULT: Json = {"role": "tool", "content": RESULT, "tool_call_id": CALL_ID, "name": NAME}


def _with_tools(texts: bool) -> dict[str, list[Json]]:
    """Return probes with calls whose arguments are objects, or JSON text."""
    call = call_message(texts=texts)
    return {
        f"call {texts}": [QUESTION, call],
        f"two calls {texts}": [QUESTION, call_message(2, texts)],
        f"result {texts}": [QUESTION, call, _RESULT],
        f"long id {texts}": [QUESTION, call_message(texts=texts, call_id=LONG_ID)],
    }


ROLES = ("system", "user", "assistant", "user")
_MARKS = [f"Message {k} of the probe." for k in range(len(ROLES))]
_TURNS: list[Json] = [{"role": role, "content": mark} for role, mark in zip(ROLES, _MARKS, strict=True)]
PROBES: Mapping[str, list[Json]] = {
    "question": [QUESTION],
    "prompt": [QUESTION],
    "answer": [QUESTION, _SAID],
    "next": [QUESTION, _SAID, {"role": "user", "content": "And now?"}],
    "system": [{"role": "system", "content": SYSTEM}, QUESTION],
    "thought": [QUESTION, {**_SAID, "reasoning_content": THOUGHT}],
    "inline": [QUESTION, _INLINE],
    "turns": _TURNS[1:],
    "system turns": _TURNS,
}
TOOL_PROBES: Mapping[str, list[Json]] = {
    "tools": [QUESTION],
    "answer with tools": [QUESTION, _SAID],
    **_with_tools(False),
    **_with_tools(True),
}
"""Probes rendered with a tool declaration."""
PROMPTS = ("prompt", "turns", "system turns", "tools")
"""Probes rendered with a generation prompt."""


NEEDED = ("question", "prompt", "answer")
"""Probes that every template must accept."""
MAX_PROBE_TEXT = 2**17
Written = Mapping[str, str | None]
"""The rendering of each probe; None if the template rejected it."""


class TemplateRefusal(Exception):
    """The template rejects these messages; the text gives the reason."""


Render = Callable[[Sequence[Json], Sequence[Json] | None, bool], str]
"""Renders messages with tools, with or without a generation prompt. Raises TemplateRefusal."""


@dataclass(frozen=True)
class TemplateFacts:
    """How a chat template writes conversations."""

    opening: str = ""
    """What follows a question in its prompt: the header of an answer, and possibly `<think>`."""
    heading: str = ""
    """The text between a rendered answer's prompt and its content."""
    tail: str = ""
    """The text after an answer, e.g. `<|im_end|>` and a line break."""
    end: str = ""
    """The end-of-turn token: the first token in `tail` that is not ordinary text."""
    end_with_tools: str = ""
    """The end-of-turn token of a text answer that could have called tools; empty if its end is not such a token."""
    ends_with_next: bool = False
    """Whether the header of the next message ends an answer, because nothing else does (GLM)."""
    special: tuple[str, ...] = ()
    """Tokens that are not ordinary text, longest first."""
    thoughts: ThoughtFormat = INLINE_THOUGHTS
    calls: CallFormat = NO_CALLS
    """How it writes tools, tool calls and results."""
    preamble: str = ""
    """The text before a question if the conversation has no system message."""
    writes_system: bool = True
    """Whether it writes a system message, if it accepts one."""
    added_system: str | None = None
    """The system message that it adds to a conversation without one."""
    between: Mapping[tuple[str, str], str] | None = None
    """The text between messages of two roles; None if it does not write every message once and unchanged.

    The role before the first message is empty, and so is the role of the next answer. Contains no system messages if
    the template rejects them."""

    @property
    def closes_thoughts(self) -> bool:
        """Whether the generation prompt closes the thoughts, so the answer has none."""
        return bool(self.thoughts.after.strip()) and self.opening.rstrip().endswith(self.thoughts.after.strip())

    @property
    def supplied(self) -> str:
        """The part of an answer that the generation prompt supplies: `<think>`, or empty thoughts."""
        mark = self.thoughts.before.strip()
        at = self.opening.find(mark) if mark else -1
        return self.opening[at:] if at >= 0 else ""


NO_FACTS = TemplateFacts()
"""The facts of a template that was not probed."""
_facts_cache: WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, TemplateFacts]] = WeakKeyDictionary()


def read_facts(
    processor: PreTrainedTokenizerBase, kwargs: Mapping[str, object], name: str, render: Render
) -> TemplateFacts:
    """Return a template's facts; cached by its text, its switches and the tokens it may write.

    Args:
        processor: The tokenizer.
        kwargs: The switches that `render` uses.
        name: The template's name in messages to users.
        render: Renders a probe.

    Raises:
        EnvironmentProblem: the template cannot be split into turns.
    """
    special = special_tokens(processor)
    cache = _facts_cache.setdefault(processor, {})
    key = hash_value([processor.chat_template, kwargs, processor.special_tokens_map, special])
    if key not in cache:
        cache[key] = _infer_facts(_write_probes(render, name), special, processor, name)
    return cache[key]


def special_tokens(processor: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the tokens that are not ordinary text, longest first."""
    tokens = {*processor.all_special_tokens, *processor.get_added_vocab()}
    return tuple(sorted((token for token in tokens if token.strip()), key=lambda token: (-len(token), token)))


def _write_probes(render: Render, name: str) -> Written:
    texts: dict[str, str | None] = {}
    for probe, messages in {**PROBES, **TOOL_PROBES}.items():
        try:
            texts[probe] = render(messages, [TOOL] if probe in TOOL_PROBES else None, probe in PROMPTS)
        except TemplateRefusal as refusal:
            if probe in NEEDED:
                raise EnvironmentProblem.of(str(refusal), name, f"{FIX} takes a question and an answer.") from refusal
            texts[probe] = None
    return texts


def _infer_facts(
    texts: Written, special: tuple[str, ...], processor: PreTrainedTokenizerBase, name: str
) -> TemplateFacts:
    prompt, whole, question = texts["prompt"] or "", texts["answer"] or "", str(QUESTION["content"])
    if len(whole) > MAX_PROBE_TEXT:
        what = f"the chat template writes {len(whole):,} characters, but at most {MAX_PROBE_TEXT:,} are allowed"
        raise EnvironmentProblem.of(what, name, ENDLESS)
    if question not in prompt:
        what = f"the template changes or leaves out the text of a question: it writes {prompt!r} for {question!r}"
        raise EnvironmentProblem.of(what, name, f"{FIX} writes a question as given.")
    thoughts = _infer_thoughts(texts, prompt, whole)
    difference = _difference(prompt.removesuffix(thoughts.opener), whole, name)
    heading, _, tail = difference.partition(ANSWER)
    if prompt == texts["question"] and heading.strip():
        what = f"the template ignores add_generation_prompt: a generated answer would have to begin with {heading!r}"
        raise EnvironmentProblem.of(what, name, f"{FIX} ends with that if add_generation_prompt is set.")
    end, ends_with_next = _turn_end(tail, special, processor.eos_token, texts["next"] or "", name)
    start = processor.bos_token_id
    if start is not None and tokenize_each(processor, [whole])[0][:2] == [start, start]:
        what = f"the template writes {processor.bos_token!r} twice at the start"
        raise EnvironmentProblem.of(what, name, f"{FIX} writes it once.")
    return TemplateFacts(
        opening=prompt[prompt.rindex(question) + len(question) :],
        heading=heading,
        tail=tail,
        end=end,
        end_with_tools=_end_with_tools(texts, special, thoughts.opener, processor.eos_token),
        ends_with_next=ends_with_next,
        special=special,
        thoughts=thoughts,
        calls=_infer_calls(texts, special, thoughts, ends_with_next),
        preamble=(texts["question"] or "").partition(question)[0],
        writes_system=texts["system"] is None or SYSTEM in texts["system"],
        added_system=_added_system(texts),
        between=_between_roles(texts),
    )


def _difference(prompt: str, whole: str, name: str) -> str:
    """Return the text that the probe's answer adds to its prompt."""
    if not whole.startswith(prompt):
        start = max(0, len(shared_start(prompt, whole)) - 20)
        what = f"the template cannot be split into turns: its generation prompt is {prompt[start:]!r}"
        what += f" but an answer starts with {whole[start:]!r}"
        raise EnvironmentProblem.of(what, name, f"{FIX} begins an answer with its generation prompt.")
    difference = whole[len(prompt) :]
    if difference.count(ANSWER) != 1:
        what = f"the template cannot be split into turns: an answer is written as {difference!r}, not as given"
        raise EnvironmentProblem.of(what, name, f"{FIX} writes an answer once and unchanged.")
    return difference


def _turn_end(tail: str, special: Sequence[str], eos_token: str, following: str, name: str) -> tuple[str, bool]:
    """Return the token that ends an answer, and whether it is the header of the next message.

    If several tokens follow each other directly, take the tokenizer's own end token if it is one of them, else the
    last: all of them are written.
    """
    end = min((token for token in special if token in tail), key=tail.index, default=None)
    if end is not None:
        last, at = end, tail.index(end) + len(end)
        while last != eos_token and (more := next((token for token in special if tail.startswith(token, at)), None)):
            last, at = more, at + len(more)
        return last, False
    header = following.partition(ANSWER)[2].lstrip()
    end = next((token for token in special if not tail.strip() and header.startswith(token)), None)
    if end is not None:
        return end, True
    what = f"an assistant's turn ends in {tail!r}, not in an end-of-turn token, so answers would never end"
    fix = f"{FIX} writes {eos_token!r} after each answer"
    fix += ", or add the marker to model.add_tokens." if tail.strip() else "."
    raise EnvironmentProblem.of(what, name, fix)


def _end_with_tools(texts: Written, special: Sequence[str], opener: str, eos_token: str) -> str:
    """Return the token that ends a text answer after a declaration of tools; empty if there is none."""
    prompt, whole = (texts["tools"] or "").removesuffix(opener), texts["answer with tools"] or ""
    tail = whole[len(prompt) :].partition(ANSWER)[2] if whole.startswith(prompt) else ""
    return _turn_end(tail, special, eos_token, "", "")[0] if any(token in tail for token in special) else ""


def _added_system(texts: Written) -> str | None:
    """Return the system message that a template adds to a single question; None if it adds none."""
    alone, framed, question = texts["question"], texts["system"], str(QUESTION["content"])
    if alone is None or framed is None or SYSTEM not in framed:
        return None
    before, _, after = (part.partition(question)[0] for part in framed.partition(SYSTEM))
    head = alone.partition(question)[0]
    if not (head.startswith(before) and head.endswith(after) and len(head) >= len(before + after)):
        return None
    return head[len(before) : len(head) - len(after)].strip() or None


def _between_roles(texts: Written) -> Mapping[tuple[str, str], str] | None:
    """Return the text between messages of two roles; None if a message is missing or repeated."""
    parts: dict[tuple[str, str], str] = {}
    for first, text in ((0, texts["system turns"]), (1, texts["turns"])):
        if text is None and first == 0:  # it may reject system messages
            continue
        rest = text or ""
        for step, mark in zip(pairwise(["", *ROLES[first:]]), _MARKS[first:], strict=True):
            parts[step], separator, rest = rest.partition(mark)
            if not separator or mark in rest:
                return None
        parts[ROLES[-1], ""] = rest
    return parts


def _infer_thoughts(texts: Written, prompt: str, plain: str) -> ThoughtFormat:
    """Infer how thoughts are written."""
    opener = _find_opener(prompt, plain)
    whole = texts["thought"]
    if whole is not None and whole.count(THOUGHT) == 1 and THOUGHT in whole[: whole.find(ANSWER)]:
        head, _, rest = whole.partition(THOUGHT)
        after = rest[: rest.index(ANSWER)]
        before = head.removeprefix(prompt) if head.startswith(prompt) else ""
        mark = _counterpart(after, closing=True)
        if not before.strip() and mark and mark in head:
            before = head[head.rindex(mark) :]
        return ThoughtFormat("template", before, after, opener)
    if str(_INLINE["content"]) in (texts["inline"] or ""):
        return ThoughtFormat("content", opener=opener)
    if opener and "<think>" not in opener and (closing := _counterpart(opener, closing=False)):
        return ThoughtFormat("prompt", opener, closing, opener)
    return ThoughtFormat("prompt", opener=opener)


def _find_opener(prompt: str, whole: str) -> str:
    """Return the end of a generation prompt that a rendered answer lacks, if it concerns thoughts.

    Empty if the rendered answer begins with the prompt, or differs in something else.
    """
    if whole.startswith(prompt):
        return ""
    shared = shared_start(prompt, whole).rstrip("<[|/")
    opener = prompt[len(shared) :]
    return opener if _THINKING.search(opener) and ANSWER in whole[len(shared) :] else ""


def _counterpart(text: str, closing: bool) -> str | None:
    """Return the opening mark for a closing mark in a text, or the closing mark for an opening one."""
    for pair in MARK_PAIRS:
        mark, counterpart = pair[::-1] if closing else pair
        if match := re.search(re.escape(mark).replace("NAME", r"(\w+)"), text):
            return counterpart.replace("NAME", match[1])
    return None


def _infer_calls(texts: Written, special: Sequence[str], thoughts: ThoughtFormat, ends_with_next: bool) -> CallFormat:
    """Infer how tools, tool calls and results are written."""
    tool_prompt = texts["tools"] or ""
    features = {TOOLS} if all(text in tool_prompt for text in (NAME, *KEYS)) else set()

    def calls_of(probe: str) -> str | None:
        """Return the text of an answer with calls, after its prompt."""
        whole = texts[probe]
        prompts = (tool_prompt, tool_prompt.removesuffix(thoughts.opener))
        starts = (prompt for prompt in prompts if tool_prompt and whole is not None and whole.startswith(prompt))
        return next((str(whole)[len(prompt) :] for prompt in starts), None)

    as_text = _prefers_texts(calls_of("call False"), calls_of("call True"))
    answered = texts[f"result {as_text}"] or ""
    features |= {RESULTS} if RESULT in answered else set()
    body = calls_of(f"call {as_text}")
    if body is None or not all(text in body for text in (NAME, *KEYS, *VALUES)):
        return CallFormat(frozenset(features))
    written = body.rstrip()
    if ends_with_next:
        written = answered[answered.index(body) + len(body) :].lstrip() if body in answered else ""
    ends = (token for token in special if (written.startswith if ends_with_next else written.endswith)(token))
    end = next(ends, "")
    one, two = (_between(text, thoughts.after.strip(), end) for text in (body, calls_of(f"two calls {as_text}") or ""))
    field, marks = read_calls(one, two if two.count(NAME) == 2 else None)
    refused = texts[f"long id {as_text}"] is None
    return CallFormat(frozenset({*features, CALLS}), as_text, end, field, marks, refused)


def _prefers_texts(objects: str | None, texts: str | None) -> bool:
    """Whether arguments are rendered as JSON only if they are passed as text."""
    if objects is None or texts is None:
        return objects is None and texts is not None
    arguments = dict(zip(KEYS, VALUES, strict=True))
    return str(arguments) in objects and json.dumps(arguments) in texts


def _between(body: str, thought_end: str, end: str) -> str:
    """Return the calls of an answer without the thoughts before and the end after them."""
    body = body.rpartition(thought_end)[2] if thought_end else body
    return body.rstrip().removesuffix(end)
