"""Rows of a text and what is made of it into token ids: for encoder-decoders, and by prompt for decoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtune.data.audio import Samples, read_recording
from llmtune.data.collate_targets import feature_extractor
from llmtune.data.encode import encode_chat, encode_completion, prompt_ids
from llmtune.data.messages import RowError
from llmtune.data.overlong import TOO_LONG, Encoded, too_long
from llmtune.data.template import render_prompt
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


ToPair = Callable[[Row, "Recipe"], Pair]


# Encoder-decoders


def encode_seq2seq(
    rows: Sequence[Row], processor: PreTrainedTokenizerBase, recipe: Recipe, to_pair: ToPair
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
            cut = recipe.data.on_overlong == "truncate" and len(target) <= recipe.data.max_length
            if not cut:
                encoded.append(too_long(longest, recipe.data.max_length))
                continue
            ids = source_ids(pair, processor, recipe, cut=True)
        said = len(pair.target.encode())
        encoded.append([_written(ids, target, [start, end], said)])
    return encoded


def _written(ids: list[int], target: list[int], spans: list[int], said: int, **more: Any) -> Example:
    cost = more.pop("cost", len(ids)) + len(target)
    learned = spans[1] - spans[0]
    return Example(ids, [], said, target_ids=target, target_spans=spans, counted=learned, cost=cost, **more)


def source_ids(pair: Pair, processor: PreTrainedTokenizerBase, recipe: Recipe, cut: bool = False) -> list[int]:
    """Return what the encoder reads; with `cut`, no more than `data.max_length` tokens of it."""
    set_languages(pair, processor)
    options: dict[str, Any] = {"truncation": True, "max_length": recipe.data.max_length} if cut else {}
    return list(processor(pair.source, **options)["input_ids"])


def target_ids(pair: Pair, processor: PreTrainedTokenizerBase) -> tuple[list[int], int, int]:
    """Return what the decoder writes, and the range of it that is learned.

    A language code at its start is given at generation, so it is not learned; what stands behind the end is no text.
    """
    set_languages(pair, processor)
    ids = list(processor(text_target=pair.target)["input_ids"])
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


def language_token(code: str, processor: PreTrainedTokenizerBase) -> int | None:
    """Return the token of a language; None for a code that the tokenizer does not know."""
    if hasattr(processor, "get_lang_id"):  # M2M100
        return int(processor.get_lang_id(code)) if code in processor.lang_code_to_token else None
    found = processor.convert_tokens_to_ids(code)
    return None if found is None or found == processor.unk_token_id else int(found)


def set_languages(pair: Pair, processor: PreTrainedTokenizerBase) -> None:
    """Tell the tokenizer the languages of a pair.

    Raises RecipeError for one that is missing or that it does not know.
    """
    if not knows_languages(processor):
        return
    problems = []
    for side, code in (("source", pair.source_language), ("target", pair.target_language)):
        where = f"translate.{side}_language"
        if code is None:
            fix = "Set it to the model's own code, such as eng_Latn; or give the rows a column of that name."
            problems.append(
                Problem("this model wants to know the language, and neither recipe nor row says it", where, fix)
            )
        elif language_token(code, processor) is None:
            codes = [token for token in processor.get_vocab() if 2 <= len(token) <= 10 and "_" in token]
            fix = f"Use the model's own code.{nearest(code, sorted(codes))}"
            problems.append(Problem(f"the tokenizer does not know the language {code!r}", where, fix))
    RecipeError.collect(problems)
    processor.src_lang, processor.tgt_lang = pair.source_language, pair.target_language


# Decoders, by prompt


def by_prompt(row: Row, recipe: Recipe, processor: PreTrainedTokenizerBase, to_pair: ToPair) -> Row:
    """Return a row of chat where the model has a chat template, else one of completion; the target may be empty."""
    pair = to_pair(row, recipe)
    if processor.chat_template:
        messages = [{"role": "user", "content": pair.source}]
        return {"messages": [*messages, *([{"role": "assistant", "content": pair.target}] if pair.target else [])]}
    return {"prompt": f"{pair.source}\n", "completion": pair.target}


def encode_by_prompt(
    rows: Sequence[Row], processor: PreTrainedTokenizerBase, recipe: Recipe, to_pair: ToPair
) -> list[Encoded]:
    """Return one example a row: the prompt, and the target as the model's answer."""
    written = [by_prompt(row, recipe, processor, to_pair) for row in rows]
    return (encode_chat if processor.chat_template else encode_completion)(written, processor, recipe)


def render_by_prompt(row: Row, processor: PreTrainedTokenizerBase, recipe: Recipe, to_pair: ToPair) -> list[int]:
    """Return the token ids to generate the target from."""
    written = by_prompt(row, recipe, processor, to_pair)
    if "messages" in written:
        return render_prompt(written["messages"], processor, recipe)
    return prompt_ids(written["prompt"], processor)


# Preferences


def encode_preference(rows: Sequence[Row], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
    """Return one example a row: the prompt with the chosen answer and with the rejected one, the answers supervised.

    For KTO: the prompt with its answer, and with the answer to the next row's prompt, which the estimate of the KL
    divergence is made of.
    """
    loss = recipe.preference.loss if recipe.preference else "dpo"
    wanted = ("answer",) if loss == "kto" else ("chosen", "rejected")
    if any(name not in row for row in rows for name in wanted):
        return [_other_rows(row, loss, wanted) for row in rows]
    if loss == "kto":
        answers = [row["answer"] for row in rows]
        others = [
            next((a for a in (*answers[i + 1 :], *answers) if a != answers[i]), answers[i]) for i in range(len(rows))
        ]
        first, second = answers, others
    else:
        first, second = [row["chosen"] for row in rows], [row["rejected"] for row in rows]
    left, right = (_encode_answers(rows, said, processor, recipe) for said in (first, second))
    return [_join(row, a, b, recipe) for row, a, b in zip(rows, left, right, strict=True)]


def _other_rows(row: Row, loss: str, wanted: Sequence[str]) -> Encoded:
    needs = "single answers with a thumb" if loss == "kto" else "pairs of a chosen and a rejected answer"
    return f"preference.loss: {loss} learns from {needs}"


def _encode_answers(
    rows: Sequence[Row], answers: Sequence[str], processor: PreTrainedTokenizerBase, recipe: Recipe
) -> list[Encoded]:
    data = recipe.data.model_copy(update={"train_on": "last", "on_overlong": "drop"})
    alone = recipe.model_copy(update={"data": data})
    written = [with_answer(row, answer, processor) for row, answer in zip(rows, answers, strict=True)]
    return (encode_chat if processor.chat_template else encode_completion)(written, processor, alone)


def render_preference(row: Row, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
    """Return the token ids to write an answer from."""
    if processor.chat_template:
        return render_prompt(row["messages"], processor, recipe, tools=row.get("tools"))
    return prompt_ids(with_answer(row, "", processor)["prompt"], processor)


def with_answer(row: Row, answer: str, processor: PreTrainedTokenizerBase) -> Row:
    """Return a row of chat (of completion, for a model without a template) out of a prompt and an answer."""
    if processor.chat_template:
        tools = {"tools": row["tools"]} if row.get("tools") else {}
        return {"messages": [*row["messages"], {"role": "assistant", "content": answer}], **tools}
    said = "\n\n".join(str(message["content"]) for message in row["messages"])
    return {"prompt": f"{said}\n", "completion": answer}


def _join(row: Row, left: Encoded, right: Encoded, recipe: Recipe) -> Encoded:
    for part in (left, right):
        if isinstance(part, str):
            return part
    (one,), (other,) = left, right
    if list(one.input_ids) == list(other.input_ids) and "chosen" in row:
        return "chosen equals rejected: both answers are the same tokens"
    values = [1.0 if row["good"] else -1.0] if "good" in row else []
    cost = len(one.input_ids) + len(other.input_ids)
    return [
        Example(
            one.input_ids,
            one.spans,
            one.target_bytes,
            target_ids=other.input_ids,
            target_spans=other.spans,
            values=values,
            counted=1,
            cost=cost,
        )
    ]


# Speech


def encode_whisper(rows: Sequence[Row], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
    """Return one example a row: the samples, and the transcript behind the tokens of language and task."""
    extract = feature_extractor(processor)
    set_speech(processor, recipe)
    prefix = list(processor.prefix_tokens)
    encoded: list[Encoded] = []
    for row in rows:
        heard = hear(row, extract.sampling_rate, recipe)
        if isinstance(heard, str):
            encoded.append(heard)
            continue
        said = row["text"].strip()
        target = [*prefix[1:], *processor(f" {said}", add_special_tokens=False)["input_ids"], processor.eos_token_id]
        if len(target) > recipe.data.max_length:
            encoded.append(too_long(len(target), recipe.data.max_length))
            continue
        frames = extract.n_samples // extract.hop_length // 2
        spans = [len(prefix) - 1, len(target)]
        encoded.append([_written([], target, spans, len(said.encode()), audio=heard, cost=frames)])
    return encoded


def set_speech(processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Tell a Whisper tokenizer the language and the task.

    Raises RecipeError for a language that it does not know, one that is missing, or one where there is no choice.
    """
    section = recipe.speech
    language, task = (section.language, section.task) if section else (None, "transcribe")
    known = [token[2:-2] for token in processor.get_vocab() if token.startswith("<|") and token[2:-2].isalpha()]
    many = "<|en|>" in processor.get_vocab() and "<|fr|>" in processor.get_vocab()
    if not many:
        if language not in (None, "en", "english", "English") or task != "transcribe":
            what = "this model knows English alone, and writes down what is said"
            raise RecipeError.of(what, "speech.language", "Remove language and task, or name a multilingual model.")
        processor.set_prefix_tokens(language=None, task=None, predict_timestamps=False)
        return
    if language is None:
        fix = "Set it to what is spoken, such as en; the model would guess, and could guess wrongly in training."
        raise RecipeError.of("this model knows many languages, and the recipe names none", "speech.language", fix)
    try:
        processor.set_prefix_tokens(language=language, task=task, predict_timestamps=False)
        prefix = processor.prefix_tokens
    except ValueError:
        fix = f"Use a code such as en, de, fr.{nearest(language, [name for name in known if len(name) == 2])}"
        raise RecipeError.of(f"the model does not know the language {language!r}", "speech.language", fix) from None
    if None in prefix or processor.unk_token_id in prefix[1:]:
        raise RecipeError.of(f"the tokenizer has no token for {language!r}", "speech.language", "Use another model.")


def encode_ctc(rows: Sequence[Row], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
    """Return one example a row: the samples, and the letters of the transcript."""
    extract = feature_extractor(processor)
    frames_of = _frame_counter(processor)
    encoded: list[Encoded] = []
    for row in rows:
        heard = hear(row, extract.sampling_rate, recipe)
        letters = spell(row["text"], processor)
        if isinstance(heard, str) or isinstance(letters, str):
            encoded.append(heard if isinstance(heard, str) else str(letters))
            continue
        frames = frames_of(len(heard))
        repeats = sum(a == b for a, b in zip(letters, letters[1:], strict=False))
        if frames < len(letters) + repeats:
            encoded.append(f"{len(letters)} letters, and the recording has {frames} frames to say them in")
            continue
        said = len(row["text"].encode())
        encoded.append([Example([], [], said, target_ids=letters, audio=heard, counted=len(letters), cost=frames)])
    return encoded


def spell(text: str, processor: PreTrainedTokenizerBase) -> list[int] | str:
    """Return the letters of a transcript, in the case that the vocabulary has; or why there are none.

    Punctuation that the vocabulary lacks is left out: it is not heard.
    """
    vocabulary = processor.get_vocab()
    for cased in (text, text.upper(), text.lower()):
        kept = "".join(c for c in cased if c.isalnum() or c.isspace() or c in vocabulary).strip()
        ids = list(processor(kept, add_special_tokens=False)["input_ids"]) if kept else []
        if ids and processor.unk_token_id not in ids:
            return ids
    unknown = next((c for c in text.upper() if c.isalnum() and c not in vocabulary and c.lower() not in vocabulary), "")
    return f"a letter that the model does not know: {unknown!r}" if unknown else "the transcript has no letters"


def _frame_counter(processor: PreTrainedTokenizerBase) -> Callable[[int], int]:
    """Return how many frames a model makes of so many samples, by its convolutions."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(processor.name_or_path), local_files_only=True)

    def count(samples: int) -> int:
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1
        return max(0, samples)

    return count


def hear(row: Row, rate: int, recipe: Recipe) -> Samples | str:
    """Return the samples of a row's recording, or why it cannot be trained on."""
    try:
        samples = read_recording_of(row, rate)
    except RowError as error:
        return str(error)
    limit = recipe.speech.window_seconds if recipe.speech else 30.0
    seconds = len(samples) / rate
    if seconds > limit:
        return f"{TOO_LONG}: {seconds:.1f} s, speech.window_seconds is {limit:g}; its words have no times to cut it by"
    return samples


def read_recording_of(row: Row, rate: int) -> Samples:
    """Read the recording that a row names; raises RowError."""
    from pathlib import Path

    return read_recording(Path(row["audio"]), rate)
