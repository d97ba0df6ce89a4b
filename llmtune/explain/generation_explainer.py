"""`llmtune explain generation`: how a model generates an answer in four stages, and where base and tuned diverge.

The stages: prompt to tokens, predictions of each layer, candidates for the next word, the answer so far.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from rich.console import Console

from llmtune.display.blocks import Block, Cell, Column, Details, Heatmap, Page, Section, Table, Text
from llmtune.display.charts import draw_meter
from llmtune.errors import RecipeError
from llmtune.explain.explainer import BASE, TUNED, Explainer, Target
from llmtune.explain.generation_trace import (
    LikelyToken,
    Sampling,
    TokenScore,
    Trace,
    score_answer,
    trace_answer,
    trace_masks,
)
from llmtune.explain.inputs import NO_WORDS_FIX, ModelInputs, PromptRequest, read_prompt
from llmtune.explain.picture_prompts import grey_tensors, picture_line
from llmtune.explain.token_text import Token, word_label
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.memory_plan import context_length

MOST_TOKENS = 256
"""Maximum tokens of an answer; the page has each layer's prediction at each token."""
FEW_TOKENS = 32
SHOWN_TEMPERATURE, SHOWN_TOP_P = 0.7, 0.9
"""Common sampling settings, shown by default."""
SLUG_LETTERS = 40
LEAD_MASKED = (
    "An encoder fills in all masks at once. For each mask, this page shows the prediction of every layer "
    "and the probability of each word."
)
LENS = (
    "The logit lens reads every layer’s state as if it were the last one. Deeper colours mean more certainty; "
    "point at a cell for its other predictions. Row 0 is the input of the first layer."
)
CANDIDATES = "Temperature, top-k and top-p would cut off the words in brackets; sampling would draw from the others."
GREY_PICTURE = (
    "Each word of the answer, given the words before it, with a grey picture of the same size in place of each "
    "picture. A word that keeps its probability does not come from the picture."
)
HEAD, TAIL = 70, 30
"""Tokens shown of a long prompt: from its start and its end."""
MOST_LAYERS = 40
"""Rows of the table."""


@dataclass
class GenerationExplainer(Explainer):
    """Traces the answer of each model to one prompt."""

    target: Target
    console: Console
    request: PromptRequest
    top: int = 5
    """Tokens listed per step."""

    lead = (
        "A model writes one word at a time. This page shows each step: the prompt cut into tokens, what every layer "
        "would predict if it were the last one, how likely each next word is, and the text so far."
    )

    def read(self) -> None:
        """Make the prompt and the sampling settings."""
        text = self.request.prompt or (self.request.audio.name if self.request.audio else "")
        text = " ".join(text.split())
        self.title = f"Generation: {text if len(text) <= 70 else text[:69] + '…'}"
        self.stem = f"generation-{slug(self.request)}"
        self.prompt = read_prompt(self.target, self.request)
        if self.prompt.masks:
            self.lead = LEAD_MASKED
        self.sampling = resolve_sampling(self.request, self.prompt, self.target)
        recipe = self.target.recipe
        if recipe is not None and recipe.generation.num_beams > 1:
            what = f"this follows a single answer, not the run's {recipe.generation.num_beams} beams"
            self.console.print(f"generation: {what}")

    def run(self) -> None:
        """Let each model answer; for a run, let both score the tuned model's answer as well."""
        target, prompt = self.target, self.prompt
        self.traces: dict[str, Trace] = {}
        self.scores: dict[str, list[TokenScore]] = {}
        self.blind: dict[str, tuple[list[TokenScore], list[TokenScore]]] = {}
        """Each answer scored with its pictures, and with grey ones."""
        for name in target.models:
            with target.open_model(name) as model, self.console.status(f"{name} answers"):
                self.traces[name] = trace = trace_model(model, prompt, target, self.sampling)
                if prompt.pictures:
                    blind = replace(prompt, tensors=grey_tensors(target, prompt.ids, prompt.pictures, prompt.recipe))
                    pair = [
                        score_answer(model, one, target.processor, trace.prefix, trace.ids) for one in (prompt, blind)
                    ]
                    self.blind[name] = (pair[0], pair[1])
                if name == TUNED and not prompt.masks:
                    answer = (prompt, target.processor, self.traces[TUNED].prefix, self.traces[TUNED].ids)
                    self.scores[TUNED] = score_answer(model, *answer)
                    if hasattr(model, "disable_adapter"):
                        with model.disable_adapter():
                            self.scores[BASE] = score_answer(model, *answer)
        if TUNED in self.scores and BASE not in self.scores:  # after full training the base is a separate model
            with target.open_model(BASE) as model:
                self.scores[BASE] = score_answer(model, *answer)

    @property
    def prompt_tokens(self) -> list[Token]:
        """The tokens of the prompt, one for each picture, or for a recording the decoder's first tokens."""
        ids = self.prompt.ids or self.prompt.decoder_ids
        return list(picture_line(self.target.processor, ids, self.prompt.pictures).tokens)

    @property
    def parting(self) -> int | None:
        """The first step at which base and tuned model differ; None if they agree, or for a single model."""
        if BASE not in self.traces or TUNED not in self.traces:
            return None
        return find_parting(self.traces[BASE].ids, self.traces[TUNED].ids)

    def to_json(self) -> dict[str, object]:
        """Return everything as JSON values, tokens with their text."""
        return {
            "model": self.target.name,
            "family": self.target.family,
            "given": {name: value for name, value in self.request.named().items() if value is not None},
            "note": self.prompt.note,
            "tokens": [asdict(token) for token in self.prompt_tokens],
            "masked": bool(self.prompt.masks),
            "sampling": asdict(self.sampling),
            "traces": {name: asdict(trace) for name, trace in self.traces.items()},
            "parting": self.parting,
            "scores": {name: [asdict(score) for score in scores] for name, scores in self.scores.items()},
            "blind": {name: [asdict(score) for score in grey] for name, (_, grey) in self.blind.items()},
        }

    def page(self, figures: Mapping[str, Path]) -> Page:
        """Return the page, headed by the model and the system message."""
        system = [("system", self.request.system)] if self.request.system else []
        chips = [("model", self.target.short_name), ("family", self.target.family), *system]
        return replace(super().page(figures), chips=chips)

    def sections(self, figures: Mapping[str, Path]) -> Iterator[Section]:
        """Yield the stages; for a run, first the step where base and tuned model diverge."""
        parting, last = self.parting, "4 The masks, filled in" if self.prompt.masks else "4 Output so far"
        # show layers where the models diverge, else at the first step
        parts = parting is not None and all(parting < len(trace.steps) for trace in self.traces.values())
        at = parting if parting is not None and parts else 0
        where = f"At step {at + 1}" + (", where they diverge:" if parting is not None else ":")
        if len(self.traces) > 1:
            yield Section("Where base and tuned diverge", list(self._describe_parting()))
        yield Section("1 Prompt to tokens", list(self._describe_prompt()))
        yield Section("2 Model processing", [Text(where), *self._lens_blocks(at)], anchor="lens")
        yield Section("3 Word prediction", list(self._step_blocks()), anchor="prediction")
        if self.blind:
            yield Section("Without the picture", [*self._compare_blind(), Text(GREY_PICTURE, "soft")], anchor="blind")
        yield Section(last, list(self._outputs()), anchor="output")

    def _describe_prompt(self) -> Iterator[Block]:
        tokens, note = self.prompt_tokens, self.prompt.note
        shown = join_tokens(tokens)
        count = f"{len(self.prompt.ids or tokens):,} tokens"
        if seen := sum(len(picture.places) for picture in self.prompt.pictures):
            count += f", {seen:,} of them pictures"
        if len(tokens) <= HEAD + TAIL:
            yield Text(f"{count}: {shown}")
        else:
            more = f" … {len(tokens) - HEAD - TAIL:,} more … "
            yield Text(f"{count}: {join_tokens(tokens[:HEAD])}{more}{join_tokens(tokens[-TAIL:])}")
            yield Details("all tokens", [Text(shown)])
        if note:
            yield Text(note, "note")

    def _lens_blocks(self, at: int) -> Iterator[Block]:
        """Yield each layer's predictions: at one step with the models side by side, and at all steps."""
        layers_by_model = {
            name: [step.layers for step in trace.steps if step.layers] for name, trace in self.traces.items()
        }
        if any(not layers for layers in layers_by_model.values()):
            yield Text("The lens cannot read the layers of this model.", "note")
            return
        columns = [Column("layer", "number")]
        for name in layers_by_model:
            says = "predicts" if len(layers_by_model) == 1 else f"{name} predicts"
            columns += [Column(says), Column("p", "number"), Column("p(chosen)", "number")]
        count = len(next(iter(layers_by_model.values()))[0])
        rows = []
        for layer in range(count):
            cells = [layers[at][layer] for layers in layers_by_model.values()]
            row = [[*_word_and_probability(cell.likeliest[0]), write_probability(cell.chosen)] for cell in cells]
            rows.append(["0: input" if layer == 0 else str(layer), *chain(*row)])
        every = -(-count // MOST_LAYERS)
        yield Table(columns, [row for i, row in enumerate(rows) if i % every == 0 or i == count - 1], scroll=True)
        yield Text(LENS, "soft")
        for name, layers in layers_by_model.items():
            trace = self.traces[name]
            grid = [[step[layer] for step in layers] for layer in reversed(range(count))]
            yield Heatmap(
                rows=[str(layer) for layer in reversed(range(count))],
                columns=[word_label(step.token) for step in trace.steps],
                values=[[cell.likeliest[0].probability for cell in row] for row in grid],
                label="What each layer would predict at each step",
                title=name if len(layers_by_model) > 1 else "",
                down="layer",
                across="the answer",
                texts=[[word_label(cell.likeliest[0].token) for cell in row] for row in grid],
                tips=[[", ".join(map(_spell, cell.likeliest)) for cell in row] for row in grid],
            )

    def _step_blocks(self) -> Iterator[Block]:
        """Yield a row per step: the word, its probability, and the alternatives, in brackets if cut off."""
        yield Text(describe_sampling(self.sampling))
        word = "mask" if self.prompt.masks else "word"
        numeric = [Column(name, "number") for name in ("p", "bits", "kept")]
        columns = [Column("", "number"), Column(word), *numeric, Column("could also be")]
        several = len(self.traces) > 1
        for name, trace in self.traces.items():
            rows = []
            for number, step in enumerate(trace.steps, 1):
                others = [one for one in step.candidates if one.token.id != step.token.id][: max(0, self.top - 1)]
                numbers = [write_probability(step.probability), f"{step.entropy_bits:.2f}", f"{step.kept_tokens:,}"]
                listed = ", ".join(_spell(one) if one.kept else f"({_spell(one)})" for one in others)
                rows.append([str(number), word_label(step.token), *numbers, listed])
            yield Table(columns, rows, name if several else "", scroll=True)
        yield Text(CANDIDATES, "soft")

    def _compare_blind(self) -> Iterator[Table]:
        """Yield the probability of each word of an answer with its pictures and with grey ones."""
        for name, (seen, blind) in self.blind.items():
            rows = []
            for step, with_picture, grey in zip(self.traces[name].steps, seen, blind, strict=True):
                numbers = [write_probability(one.probability, exact=True) for one in (with_picture, grey)]
                factor = write_factor(with_picture.probability, grey.probability)
                rows.append(
                    [word_label(step.token), *numbers, factor, "the same" if grey.rank == 1 else _spell(grey.likeliest)]
                )
            columns = [Column("word"), *(Column(head, "number") for head in ("picture", "grey", "times"))]
            yield Table([*columns, Column("grey predicts")], rows, name if len(self.blind) > 1 else "", scroll=True)

    def _outputs(self) -> Iterator[Block]:
        """Yield each model's answer, token by token."""
        for name, trace in self.traces.items():
            end = "" if trace.ended else f" … ({len(trace.steps)} tokens, no end)"
            model = f"{name}: " if len(self.traces) > 1 else ""
            yield Text(f"{model}{join_tokens([step.token for step in trace.steps])}{end}")

    def _describe_parting(self) -> Iterator[Block]:
        """Yield both models' candidates where their answers diverge, and the part they share."""
        at, traces = self.parting, self.traces
        if at is None:
            yield Text("They do not diverge: both answers are identical.")
        else:
            common = join_tokens([step.token for step in traces[TUNED].steps[:at]])
            where = (
                f"Both begin with the same words and diverge at word {at + 1}, after: {common}"
                if at
                else "At the first word."
            )
            chance = " Words were drawn at random, so they may diverge by chance." if self.sampling.sample else ""
            columns, cells = [], []
            for name in (BASE, TUNED):
                columns += [Column(name), Column("p", "number")]
                listed = [one for step in traces[name].steps[at : at + 1] for one in step.candidates]
                written = [_word_and_probability(one) for one in listed[: self.top]] or [["its answer has ended", ""]]
                cells.append(written + [["", ""]] * (self.top - len(written)))
            yield Text(where + chance)
            yield Table(columns, [[*base, *tuned] for base, tuned in zip(*cells, strict=True)])
        if self.scores:
            yield self._compare_words()

    def _compare_words(self) -> Table:
        """Return the probability of each word of the tuned answer in base and tuned model."""
        rows: list[list[Cell | str]] = []
        for step, base, tuned in zip(self.traces[TUNED].steps, self.scores[BASE], self.scores[TUNED], strict=True):
            numbers = [write_probability(one.probability, exact=True) for one in (base, tuned)]
            meter = Cell(picture=draw_meter(tuned.probability))
            factor = write_factor(base.probability, tuned.probability)
            predicted = "the same" if base.rank == 1 else _spell(base.likeliest)
            rows.append([word_label(step.token), *numbers, meter, factor, f"{base.rank:,}", predicted])
        heads = [Column("word"), Column("base", "number"), Column("tuned", "number"), Column("", "picture")]
        heads += [Column("times", "number"), Column("its rank in the base", "number"), Column("the base predicts")]
        note = "Each word, given the words before it in the tuned model’s answer."
        return Table(heads, rows, "How the tuning moved each word of the tuned model’s answer", note, scroll=True)


def slug(request: PromptRequest) -> str:
    """Return a file name for a prompt: its letters, plus a hash if it has other characters."""
    text = request.prompt or (request.audio.stem if request.audio else "")
    letters = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if letters and len(letters) <= SLUG_LETTERS and text.isascii():
        return letters
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{letters[:SLUG_LETTERS].rsplit('-', 1)[0]}-{digest}".strip("-")


def find_parting(base: Sequence[int], tuned: Sequence[int]) -> int | None:
    """Return the first step, from 0, at which two answers differ; None if they are equal."""
    for at, pair in enumerate(zip(base, tuned, strict=False)):
        if pair[0] != pair[1]:
            return at
    return None if len(base) == len(tuned) else min(len(base), len(tuned))


def resolve_sampling(request: PromptRequest, prompt: ModelInputs, target: Target) -> Sampling:
    """Fill unset options from the run's recipe or defaults; raises RecipeError if the answer would be too long."""
    section = target.recipe.generation if target.recipe else None
    sampled = section if section is not None and section.do_sample else None
    longest = request.max_new_tokens or min(section.max_new_tokens if section else FEW_TOKENS, MOST_TOKENS)
    room = context_length(target.config)
    if room is not None and target.recipe is not None:
        room -= target.recipe.adapter.virtual_tokens
    if room is not None and not prompt.masks:
        before = len(prompt.decoder_ids) or 1 if target.config.is_encoder_decoder else len(prompt.ids)
        if room - before < (request.max_new_tokens or 1):
            what = f"{before:,} tokens and {request.max_new_tokens or 1} new ones do not fit into the model's {room:,}"
            raise RecipeError.of(what, "--prompt", "Shorten the prompt, or lower --max-new-tokens.")
        longest = min(longest, room - before)
    sample, seed = request.sample, request.seed
    return Sampling(  # only top-k and the seed may be 0
        max_new_tokens=longest,
        temperature=request.temperature or (sampled.temperature or 1.0 if sampled else SHOWN_TEMPERATURE),
        top_p=request.top_p or (sampled.top_p or 1.0 if sampled else SHOWN_TOP_P),
        top_k=request.top_k or (sampled and sampled.top_k) or 0,
        min_p=sampled.min_p if sampled else None,
        sample=(sampled is not None if sample is None else sample) and not prompt.masks,
        seed=seed if seed is not None else target.recipe.seed if target.recipe else 0,
    )


def trace_model(model: torch.nn.Module, prompt: ModelInputs, target: Target, sampling: Sampling) -> Trace:
    """Let one model answer; raises RecipeError if it predicts no words."""
    inner = unwrap(model)
    if inner.get_output_embeddings() is None or not (prompt.masks or inner.can_generate()):
        what = f"this model predicts no words: it is a {type(inner).__name__}"
        raise RecipeError.of(what, target.name, NO_WORDS_FIX)
    trace = trace_masks if prompt.masks else trace_answer
    return trace(model, prompt, target.processor, sampling)


def join_tokens(tokens: Sequence[Token]) -> str:
    """Join tokens with a line between them, keeping leading spaces."""
    words = (word_label(token, 40) for token in tokens)
    pairs = zip(words, tokens, strict=True)
    return "│".join(word.replace("␣", " ", 1) if token.text.startswith(" ") else word for word, token in pairs)


def describe_sampling(sampling: Sampling) -> str:
    """Describe how tokens are chosen, and which would be kept."""
    kept = f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}"
    if sampling.top_k:
        kept += f", top-k {sampling.top_k}"
    return f"drawn with {kept}, seed {sampling.seed}" if sampling.sample else f"greedy; kept: by {kept}"


def _word_and_probability(token: LikelyToken) -> list[str]:
    return [word_label(token.token), write_probability(token.probability)]


def _spell(token: LikelyToken) -> str:
    return " ".join(_word_and_probability(token))


def write_probability(value: float, *, exact: bool = False) -> str:
    """Format a probability in five characters; a small one as "<.001", or with its exponent if `exact`."""
    if value >= 0.995:
        return "1.00" if value >= 0.9995 else f"{value:.3f}"
    if value >= 0.005:
        return f"{value:.2f}"
    if exact:
        return f"{value:.0e}" if value else "0"
    return f"{value:.3f}" if value >= 0.0005 else "<.001"


def write_factor(base: float, tuned: float) -> str:
    """Format the factor by which a probability grew or shrank."""
    if not base:
        return "∞" if tuned else "1"
    factor = tuned / base
    return f"× {factor:,.0f}" if factor >= 9.5 else f"× {factor:.1f}" if factor >= 0.1 else f"× {factor:.0e}"
