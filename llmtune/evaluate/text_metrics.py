"""Metrics of language models by name: on supervised tokens, and on generated texts against references.

Text metrics equal their reference library or script. Shapes: N rows.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmtune.evaluate.intervals import Floats, Formula
from llmtune.evaluate.metric import (
    Measure,
    bleu_bounds,
    chrf_bounds,
    columns,
    error_bounds,
    measure_right,
    measure_shares,
    quotient,
    ratio,
)
from llmtune.evaluate.paired_statistics import Bounds, share_bounds
from llmtune.recipe.task_facts import CHOICE_METRICS
from llmtune.store.atomic_files import read_json

if TYPE_CHECKING:
    from jiwer import AlignmentChunk
    from sacrebleu.metrics.base import Metric

    from llmtune.recipe.model_section import ModelSection

TOKEN_METRICS = ("loss", "perplexity", "bits_per_byte", "accuracy")
ROUGE_METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
TEXT_METRICS = ("exact_match", *ROUGE_METRICS, "chrf")
"""The metrics of `TEXT_MEASURES` for chat and completion."""
CHOICE_METRIC = "choice_accuracy"
METRICS = (*TOKEN_METRICS, *TEXT_METRICS, *CHOICE_METRICS)
SQUAD_METRICS = ("exact_match", "f1")
BLEU_ORDER = 4


def exponential_ratio(sums: Floats) -> Floats:
    """[..., (nats, tokens)] -> perplexity [...]."""
    with np.errstate(over="ignore"):
        return np.exp(ratio(sums))


def measure_tokens(metric: str, nats: Floats, correct: Floats, tokens: Floats, target_bytes: Floats) -> Measure:
    """Build a metric of `TOKEN_METRICS` from row sums [N] over the supervised tokens."""
    if metric == "loss":
        unit = "nats per supervised token, end-of-turn included"
        return Measure(metric, columns(nats, tokens), ratio, signature=unit)
    if metric == "perplexity":
        return Measure(metric, columns(nats, tokens), exponential_ratio, signature="exp(loss)")
    if metric == "bits_per_byte":
        signature = "bits of the supervised tokens by UTF-8 bytes of their text, end-of-turn not counted in the bytes"
        return Measure(metric, columns(nats / math.log(2), target_bytes), ratio, signature=signature)
    assert metric == "accuracy"
    signature = "share of supervised tokens predicted first"
    return Measure(metric, columns(correct, tokens), ratio, signature=signature, bounds=share_bounds)


def measure_same(texts: Sequence[str], references: Sequence[str]) -> Measure:
    """Build the share of texts that equal their reference after stripping outer white space."""
    equal = [text.strip() == reference.strip() for text, reference in zip(texts, references, strict=True)]
    return measure_right(equal, "exact_match")


def measure_rouge(texts: Sequence[str], references: Sequence[str], *, metric: str) -> Measure:
    """Build a metric of `ROUGE_METRICS`: the mean F1 of the rows."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([metric], use_stemmer=False)
    scores = [scorer.score(reference, text)[metric].fmeasure for text, reference in zip(texts, references, strict=True)]
    signature = "rouge-score F1, no stemmer" + (", sentences by line" if metric == "rougeLsum" else "")
    read = sum(re.search("[a-z0-9]", reference.lower()) is not None for reference in references)
    if 2 * read < len(references):
        signature += "; it reads only a to z and 0 to 9, which most references do not have: use chrf"
    return measure_shares(metric, scores, signature)


def measure_bleu(texts: Sequence[str], references: Sequence[str], tokenize: str = "13a") -> Measure:
    """Build corpus BLEU, 0 to 100: n-gram counts are summed over the rows before scoring.

    `tokenize` is sacrebleu's: "13a" for languages with spaces between words, "zh" for Chinese, "char" for others.
    """
    from sacrebleu.metrics.bleu import BLEU

    # `force` silences a warning about texts that end in " ."; it has no effect on the score.
    scorer = BLEU(tokenize=tokenize, force=True)
    return measure_corpus("bleu", "BLEU", scorer, 2 + 2 * BLEU_ORDER, bleu_formula, bleu_bounds, texts, references)


def bleu_formula(sums: Floats) -> Floats:
    """[..., 10] sums (length, reference length, matches and n-grams of the orders 1 to 4) -> BLEU [...].

    Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation", 2002; orders without a match are
    smoothed as in mteval-v13a.
    """
    from sacrebleu.metrics.bleu import BLEU

    def score(row: Floats) -> float:
        length, expected, *grams = row.tolist()
        matches, totals = grams[:BLEU_ORDER], grams[BLEU_ORDER:]
        return float(BLEU.compute_bleu(matches, totals, int(length), int(expected), smooth_method="exp").score)

    return np.asarray(np.apply_along_axis(score, -1, sums), dtype=np.float64)


def measure_chrf(texts: Sequence[str], references: Sequence[str]) -> Measure:
    """Build corpus chrF, 0 to 100: n-gram counts are summed over the rows before scoring."""
    from sacrebleu.metrics.chrf import CHRF

    scorer = CHRF()
    return measure_corpus("chrf", "chrF2", scorer, 3 * scorer.order, chrf_formula, chrf_bounds, texts, references)


def chrf_formula(sums: Floats) -> Floats:
    """[..., 18] n-gram counts (hypothesis, reference, match; orders 1 to 6) -> chrF2 [...], computed as in sacrebleu.

    Popović, "chrF: character n-gram F-score for automatic MT evaluation", 2015; averages over the orders that both
    sides have.
    """
    counts = sums.reshape(*sums.shape[:-1], -1, 3)
    hypothesis, reference, match = counts[..., 0], counts[..., 1], counts[..., 2]
    effective = (hypothesis > 0) & (reference > 0)
    orders = np.maximum(effective.sum(-1), 1)
    precision = (effective * quotient(match, hypothesis)).sum(-1) / orders
    recall = (effective * quotient(match, reference)).sum(-1) / orders
    return np.asarray(100 * 5 * precision * recall / np.maximum(4 * precision + recall, 1e-300), dtype=np.float64)


def measure_ter(texts: Sequence[str], references: Sequence[str]) -> Measure:
    """Build corpus TER, edits per 100 reference words: lower is better, and it may exceed 100."""
    from sacrebleu.metrics.ter import TER

    return measure_corpus("ter", "TER", TER(), 2, ter_formula, error_bounds, texts, references)


def ter_formula(sums: Floats) -> Floats:
    """[..., (edits, reference words)] -> TER [...]; without reference words 100 if there are edits, 0 if not.

    Snover et al., "A Study of Translation Edit Rate with Targeted Human Annotation", 2006.
    """
    edits, words = sums[..., 0], sums[..., 1]
    return np.asarray(100 * np.where(words > 0, quotient(edits, words), edits > 0), dtype=np.float64)


def measure_corpus(
    metric: str,
    title: str,
    scorer: Metric,
    sums: int,
    formula: Formula,
    bounds: Bounds,
    texts: Sequence[str],
    references: Sequence[str],
) -> Measure:
    """Build a corpus score from the statistics [N, sums] that a sacrebleu scorer sums over the rows."""
    if not texts:
        return Measure(metric, np.empty((0, sums)), formula)
    # They have no public name; tests compare their formulas with `corpus_score`.
    sums_NK = np.asarray(scorer._extract_corpus_statistics(list(texts), [list(references)]), dtype=np.float64)
    signature = f"corpus {title}, sacrebleu {scorer.get_signature()}"
    return Measure(metric, sums_NK, formula, signature=signature, bounds=bounds)


def measure_length_ratio(texts: Sequence[str], references: Sequence[str]) -> Measure:
    """Build the ratio of words in all texts to words in all references."""
    words = [np.array([len(text.split()) for text in side], dtype=np.float64) for side in (texts, references)]
    signature = "words of the texts per word of the references, split at white space"
    return Measure("length_ratio", columns(*words), ratio, signature=signature)


TEXT_MEASURES: dict[str, Callable[[Sequence[str], Sequence[str]], Measure]] = {
    "exact_match": measure_same,
    **{metric: partial(measure_rouge, metric=metric) for metric in ROUGE_METRICS},
    "chrf": measure_chrf,
    "bleu": measure_bleu,
    "ter": measure_ter,
    "length_ratio": measure_length_ratio,
}
"""Metrics of N texts with one reference each, by name."""


def measure_squad(metric: str, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> Measure:
    """Build a metric of `SQUAD_METRICS` from one text per row and any number of right answers per row.

    No right answer means that the question is unanswerable; an empty text is then right. Values are the script's / 100.
    Rajpurkar et al., "Know What You Don't Know: Unanswerable Questions for SQuAD", 2018, official evaluation script.
    """
    right_answers = ([answer for answer in right if bare(answer)] or [""] for right in answers)
    rows = zip(texts, right_answers, strict=True)
    signature = (
        "SQuAD 2.0, share of 1: lower case, without punctuation and articles; the best of several answers; "
        "an empty text is right if the question has no answer"
    )
    if metric == "exact_match":
        return measure_right([bare(text) in map(bare, right) for text, right in rows], metric, signature)
    assert metric == "f1"
    values = [max(shared_words(text, answer) for answer in right) for text, right in rows]
    return measure_shares(metric, values, signature)


def bare(text: str) -> str:
    """Lowercase; remove punctuation, English articles and superfluous white space."""
    letters = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())


def shared_words(text: str, answer: str) -> float:
    """F1 of the words shared by text and answer; if either has none, 1 if both have none, else 0."""
    given, expected = bare(text).split(), bare(answer).split()
    if not given or not expected:
        return float(given == expected)
    shared = (Counter(given) & Counter(expected)).total()
    return 2 * shared / (len(given) + len(expected))


# Word and character error rate of transcripts, after normalisation


SPELLINGS = "normalizer.json"
NORMALISERS = ("none", "basic", "whisper")
ENGLISH = ("en", "english")
Normaliser = Callable[[str], str]


def measure_error_rate(
    metric: str,
    texts: Sequence[str],
    references: Sequence[str],
    normaliser: str = "basic",
    language: str = "",
    spellings: Mapping[str, str] | None = None,
) -> Measure:
    """Build the word error rate (`wer`) or character error rate (`cer`, spaces between words included).

    It is the number of substitutions, deletions and insertions in all rows divided by the length of all references: 0
    means no errors, it may exceed 1, and it is NaN if no reference has a word. See `make_normaliser` for the rest.
    """
    import jiwer

    assert len(texts) == len(references)
    process = jiwer.process_words if metric == "wer" else jiwer.process_characters
    unit = "words" if metric == "wer" else "characters"
    clean = make_normaliser(normaliser, language, spellings)
    sums_N2 = np.empty((0, 2))
    if texts:
        aligned = process([clean(text) for text in references], [clean(text) for text in texts])
        sums_N2 = errors_and_lengths(aligned.alignments, aligned.references)
    cleaned = name_normaliser(normaliser, language, spellings)
    signature = (
        f"errors per reference {unit}, normaliser {cleaned}, jiwer {version('jiwer')};"
        " any text for an empty reference counts as errors"
    )
    return Measure(metric, sums_N2, error_rate, signature=signature, bounds=error_bounds)


measure_wer = partial(measure_error_rate, "wer")
measure_cer = partial(measure_error_rate, "cer")


def error_rate(sums: Floats) -> Floats:
    """[..., (errors, reference length)] -> [...]; NaN without a reference."""
    errors, length = sums[..., 0], sums[..., 1]
    return np.asarray(np.where(length > 0, quotient(errors, length), np.nan), dtype=np.float64)


def errors_and_lengths(alignments: Sequence[Sequence[AlignmentChunk]], references: Sequence[Sequence[str]]) -> Floats:
    """Return [N, (errors, reference length)] from jiwer's alignments."""
    rows = []
    for chunks, words in zip(alignments, references, strict=True):
        wrong = [chunk for chunk in chunks if chunk.type != "equal"]
        sizes = [max(one.ref_end_idx - one.ref_start_idx, one.hyp_end_idx - one.hyp_start_idx) for one in wrong]
        rows.append((sum(sizes), len(words)))
    return np.asarray(rows, dtype=np.float64).reshape(-1, 2)


def make_normaliser(name: str, language: str = "", spellings: Mapping[str, str] | None = None) -> Normaliser:
    """Return the normaliser with a name of `NORMALISERS`.

    "none" leaves texts unchanged; jiwer splits at spaces. "basic" is Unicode lowercase without punctuation; dashes and
    white space of any kind become one space. "whisper" is the normaliser of OpenAI's Whisper: for English it also
    expands contractions, turns number words into digits and, with `spellings` (British to American, in Whisper's
    tokenizer as `english_spelling_normalizer`), unifies spellings.
    """
    if name == "none":
        return str
    if name == "basic":
        return lower_without_punctuation
    assert name == "whisper"
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    english = language.lower() in ENGLISH
    whisper = EnglishTextNormalizer(dict(spellings or {})) if english else BasicTextNormalizer()
    return lambda text: str(whisper(text)).strip()


def find_spellings(model: ModelSection) -> dict[str, str] | None:
    """Return the spellings in a Whisper model's `normalizer.json`; None if not found.

    Looks in a folder and in the hub's cache, which has the model by the time its answers are measured.
    """
    from huggingface_hub import try_to_load_from_cache

    name = str(model.name)
    source: object = Path(name) / SPELLINGS
    if not Path(name).is_dir():
        named = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
        source = try_to_load_from_cache(name, SPELLINGS, revision=model.revision) if named else None
    if not isinstance(source, str | Path) or not Path(source).is_file():
        return None
    content = read_json(Path(source))
    return {str(british): str(american) for british, american in content.items()} if isinstance(content, dict) else None


def lower_without_punctuation(text: str) -> str:
    """Lowercase, turn dashes into spaces, drop other punctuation, collapse white space; NFC-composed letters."""
    lowered = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())
    kinds = ((letter, unicodedata.category(letter)) for letter in lowered)
    kept = (" " if kind == "Pd" else letter for letter, kind in kinds if kind == "Pd" or not kind.startswith("P"))
    return " ".join("".join(kept).split())


def name_normaliser(name: str, language: str, spellings: Mapping[str, str] | None) -> str:
    """Name a normaliser for the report."""
    if name != "whisper":
        return name
    if language.lower() not in ENGLISH:
        return "whisper (basic)"
    return "whisper (English)" if spellings else "whisper (English, spellings not unified)"
