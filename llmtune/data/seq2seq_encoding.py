"""Rows of a text and what is made of it into token ids: for encoder-decoders, and by prompt for decoders."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtune.data.chat_encoding import encode_chat
from llmtune.data.chat_template import render_prompt
from llmtune.data.completion_encoding import encode_completion, prompt_ids
from llmtune.data.overlong import Encoded, too_long
from llmtune.data.tokenization import cut_start
from llmtune.errors import Problem, RecipeError, nearest
from llmtune.records import Example, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe


@dataclass(frozen=True)
class Pair:
    """What is read and what is written, with their languages where the tokenizer wants to know them."""

    source: str
    target: str
    source_language: str | None = None
    target_language: str | None = None


ToPair = Callable[[Any, "Recipe"], Pair]
LANGUAGE_CODE = re.compile(r"[a-z]{2,3}_[A-Z][A-Za-z]{1,3}")
"""How mBART (`en_XX`) and NLLB (`eng_Latn`) write languages."""


# Encoder-decoders


def encode_seq2seq(
    rows: Sequence[Any], processor: PreTrainedTokenizerBase, recipe: Recipe, to_pair: ToPair
) -> list[Encoded]:
    """Return one example a row: the source for the encoder, the target with its end for the decoder."""
    encoded: list[Encoded] = []
    for row in rows:
        pair = to_pair(row, recipe)
        if not pair.target.strip():
            encoded.append("the target is empty")
            continue
        ids = source_ids(pair, processor, recipe)
        target, start, end = target_ids(pair, processor)
        longest = max(len(ids), len(target))
        if longest > recipe.data.max_length:
            encoded.append(too_long(longest, recipe.data.max_length))
            continue
        said = len(pair.target.encode())
        encoded.append([_written(ids, target, [start, end], said)])
    return encoded


def _written(ids: list[int], target: list[int], spans: list[int], said: int) -> Example:
    cost, learned = len(ids) + len(target), spans[1] - spans[0]
    return Example(ids, [], said, target_ids=target, target_spans=spans, counted=learned, cost=cost)


def source_ids(pair: Pair, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
    """Return what the encoder reads, in training and afterwards; its end is cut where `data.on_overlong` says so."""
    set_languages(pair, processor)
    cut = recipe.data.on_overlong == "truncate"
    options: dict[str, Any] = {"truncation": True, "max_length": recipe.data.max_length} if cut else {}
    return list(processor(pair.source, verbose=False, **options)["input_ids"])


def target_ids(pair: Pair, processor: PreTrainedTokenizerBase) -> tuple[list[int], int, int]:
    """Return what the decoder writes, and the range of it that is learned.

    A language code at its start is given at generation, so it is not learned; what stands behind the end is no text.
    """
    set_languages(pair, processor)
    ids = list(processor(text_target=pair.target, verbose=False)["input_ids"])
    end = processor.eos_token_id
    if end not in ids:
        ids.append(end)
    start = int(knows_languages(processor) and ids[0] == first_token(pair, processor))
    return ids, start, len(ids) - ids[::-1].index(end)


def knows_languages(processor: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer writes language codes, as those of mBART, M2M100 and NLLB do."""
    return hasattr(processor, "src_lang") and hasattr(processor, "tgt_lang")


def first_token(pair: Pair, processor: PreTrainedTokenizerBase) -> int | None:
    """Return the token that an answer in the target language has to begin with; None where there is none."""
    if not knows_languages(processor):
        return None
    return language_token(str(pair.target_language), processor)


def starts_with_language(processor: PreTrainedTokenizerBase) -> bool:
    """Whether the decoder's very first token is the language, in place of the model's own start, as in mBART of 2020.

    The tokenizer puts the language behind the end of the text, and the model moves it to the front.
    """
    return knows_languages(processor) and list(processor.suffix_tokens[-1:]) != [processor.eos_token_id]


def language_token(code: str, processor: PreTrainedTokenizerBase) -> int | None:
    """Return the token of a language; None for a code that the tokenizer does not know."""
    return language_codes(processor).get(code)


def language_codes(processor: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the token of each language by its code; words of the vocabulary that look like a code are none."""
    if hasattr(processor, "lang_code_to_token"):  # M2M100: `fr` is written `__fr__`
        return {code: int(processor.get_lang_id(code)) for code in processor.lang_code_to_token}
    if hasattr(processor, "lang_code_to_id"):  # mBART
        known = {code: int(token) for code, token in processor.lang_code_to_id.items()}
    else:
        known = {str(token): i for i, token in processor.added_tokens_decoder.items() if token.special}
    return {code: i for code, i in known.items() if LANGUAGE_CODE.fullmatch(code) and i != processor.unk_token_id}


def set_languages(pair: Pair, processor: PreTrainedTokenizerBase) -> None:
    """Tell the tokenizer the languages of a pair.

    Raises RecipeError for one that is missing or that it does not know.
    """
    if not knows_languages(processor):
        return
    wanted = pair.source_language, pair.target_language
    if None not in wanted and (processor.src_lang, processor.tgt_lang) == wanted:
        return
    codes = language_codes(processor)
    problems = []
    for side, code in (("source", pair.source_language), ("target", pair.target_language)):
        where = f"translate.{side}_language"
        if code is None:
            fix = "Set it to the model's own code, such as eng_Latn; or give the rows a column of that name."
            problems.append(
                Problem("this model wants to know the language, and neither recipe nor row says it", where, fix)
            )
        elif code not in codes:
            fix = f"Use the model's own code, such as {next(iter(codes), 'eng_Latn')}.{nearest_code(code, list(codes))}"
            problems.append(Problem(f"the tokenizer does not know the language {code!r}", where, fix))
    RecipeError.collect(problems)
    processor.src_lang, processor.tgt_lang = wanted


def nearest_code(code: str, codes: Sequence[str]) -> str:
    """Return ` Did you mean 'x'?` for the language that someone meant: `en` or `English` for `eng_Latn` or `en_XX`."""
    said = re.split("[-_]", code.lower())[0]
    names = {known: known.partition("_")[0] for known in codes}
    alike = [known for known, name in names.items() if said and (said.startswith(name) or name.startswith(said))]
    return f" Did you mean '{alike[0]}'?" if alike else nearest(code, codes)


# Decoders, by prompt


def by_prompt(row: Any, recipe: Recipe, processor: PreTrainedTokenizerBase, to_pair: ToPair) -> Row:
    """Return a row of chat where the model has a chat template, else one of completion; the target may be empty."""
    pair = to_pair(row, recipe)
    if processor.chat_template:
        messages = [{"role": "user", "content": pair.source}]
        return {"messages": [*messages, *([{"role": "assistant", "content": pair.target}] if pair.target else [])]}
    return {"prompt": f"{pair.source}\n", "completion": pair.target}


def encode_by_prompt(
    rows: Sequence[Any], processor: PreTrainedTokenizerBase, recipe: Recipe, to_pair: ToPair
) -> list[Encoded]:
    """Return one example a row: the prompt, and the target as the model's answer."""
    written: list[Any] = [by_prompt(row, recipe, processor, to_pair) for row in rows]
    return (encode_chat if processor.chat_template else encode_completion)(written, processor, recipe)


def render_by_prompt(row: Any, processor: PreTrainedTokenizerBase, recipe: Recipe, to_pair: ToPair) -> list[int]:
    """Return the token ids to generate the target from.

    With `data.on_overlong: truncate` the start of the prompt is cut as in training, to leave room for a whole answer.
    """
    written = by_prompt(row, recipe, processor, to_pair)
    ids = _render(written, processor, recipe)
    room = max(recipe.data.max_length - recipe.generation.max_new_tokens, recipe.data.max_length // 2)
    tries = _TRIES if recipe.data.on_overlong == "truncate" else 0
    while len(ids) > room and tries:  # a cut text may take a token more than was counted
        written = _shortened(written, len(ids) - room, processor)
        ids, tries = _render(written, processor, recipe), tries - 1
    return ids


_TRIES = 6


def _render(written: Row, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
    if "messages" in written:
        return render_prompt(written["messages"], processor, recipe)
    return prompt_ids(written["prompt"], processor)


def _shortened(written: Row, tokens: int, processor: PreTrainedTokenizerBase) -> Row:
    """Cut so many tokens from the start of a prompt."""
    if "messages" in written:
        (asked,) = written["messages"]
        return {
            "messages": [{**asked, "content": cut_start(processor, asked["content"], tokens) or asked["content"][-1:]}]
        }
    return {**written, "prompt": cut_start(processor, written["prompt"], tokens)}
