"""`llmtune explain generation`: how an answer comes about in four stages, and where base and tuned model diverge.

Prompt to tokens, what each layer would predict, which words could come next, the answer so far.
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
from llmtune.explain.token_text import Token, name_tokens, word_label
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.memory_plan import context_length
from llmtune.report.blocks import Block, Cell, Column, Details, Heatmap, Page, Section, Table, Text
from llmtune.report.charts import draw_meter

MOST_TOKENS = 256
"""Tokens of an answer: the page holds what each layer would predict at each of them."""
FEW_TOKENS = 32
SHOWN_TEMPERATURE, SHOWN_TOP_P = 0.7, 0.9
"""What is shown where nobody says how to sample: common settings."""
SLUG_LETTERS = 40
LEAD_MASKED = (
    "An encoder fills in what is masked, all at once. Here is each mask: what every layer would predict in its place, "
    "and how likely each word is."
)
LENS = (
    "The logit lens: every layer’s state read as if it were the last one. The deeper the colour, the surer the layer; "
    "point at a cell for what else it would predict. Row 0 is what goes into the first layer."
)
CANDIDATES = (
    "Words in brackets would be cut off by temperature, top-k and top-p; the others would be kept to draw from."
)
HEAD, TAIL = 70, 30
"""Tokens of a long prompt that are shown at once."""
MOST_LAYERS = 40
"""Of the table."""


@dataclass
class GenerationExplainer(Explainer):
    """Traces the answer of each model to one prompt."""

    target: Target
    console: Console
    request: PromptRequest
    top: int = 5
    """Tokens that are listed of a step."""

    lead = (
        "A model writes a word at a time. Here is each of its steps: the prompt cut into tokens, what every layer "
        "would predict if it were the last one, how likely each next word is, and the text so far."
    )

    def read(self) -> None:
        """Make the prompt, and find out how to sample."""
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
            what = f"one answer is followed, not the run's {recipe.generation.num_beams} beams"
            self.console.print(f"generation: {what}")

    def run(self) -> None:
        """Open each model and let it answer; of a run, let both score the tuned model's answer as well."""
        target, prompt = self.target, self.prompt
        self.traces: dict[str, Trace] = {}
        self.scores: dict[str, list[TokenScore]] = {}
        for name in target.models:
            with target.open_model(name) as model, self.console.status(f"{name} answers"):
                self.traces[name] = trace_model(model, prompt, target, self.sampling)
                if name == TUNED and not prompt.masks:
                    answer = (prompt, target.processor, self.traces[TUNED].prefix, self.traces[TUNED].ids)
                    self.scores[TUNED] = score_answer(model, *answer)
                    if hasattr(model, "disable_adapter"):
                        with model.disable_adapter():
                            self.scores[BASE] = score_answer(model, *answer)
        if TUNED in self.scores and BASE not in self.scores:  # all weights were trained: the base is a model of its own
            with target.open_model(BASE) as model:
                self.scores[BASE] = score_answer(model, *answer)

    @property
    def prompt_tokens(self) -> list[Token]:
        """The prompt; of a recording, what the decoder begins with."""
        return name_tokens(self.target.processor, self.prompt.ids or self.prompt.decoder_ids)

    @property
    def parting(self) -> int | None:
        """The first step at which base and tuned model differ; None where they do not, or there is one model."""
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
        }

    def page(self, figures: Mapping[str, Path]) -> Page:
        """Return the page, with the model and the system message at its top."""
        system = [("system", self.request.system)] if self.request.system else []
        chips = [("model", self.target.short_name), ("family", self.target.family), *system]
        return replace(super().page(figures), chips=chips)

    def sections(self, figures: Mapping[str, Path]) -> Iterator[Section]:
        """Yield the stages, and of a run first where base and tuned model diverge."""
        parting, last = self.parting, "4 The masks, filled in" if self.prompt.masks else "4 Output so far"
        # layers are looked at where the models diverge, else at the first step
        parts = parting is not None and all(parting < len(trace.steps) for trace in self.traces.values())
        at = parting if parting is not None and parts else 0
        where = f"At step {at + 1}" + (", where they diverge:" if parting is not None else ":")
        if len(self.traces) > 1:
            yield Section("Where base and tuned diverge", list(self._describe_parting()))
        yield Section("1 Prompt to tokens", list(self._describe_prompt()))
        yield Section("2 Model processing", [Text(where), *self._lens_blocks(at)], anchor="lens")
        yield Section("3 Word prediction", list(self._step_blocks()), anchor="prediction")
        yield Section(last, list(self._outputs()), anchor="output")

    def _describe_prompt(self) -> Iterator[Block]:
        tokens, note = self.prompt_tokens, self.prompt.note
        shown = join_tokens(tokens)
        if len(tokens) <= HEAD + TAIL:
            yield Text(f"{len(tokens)} tokens: {shown}")
        else:
            more = f" … {len(tokens) - HEAD - TAIL:,} more … "
            yield Text(f"{len(tokens)} tokens: {join_tokens(tokens[:HEAD])}{more}{join_tokens(tokens[-TAIL:])}")
            yield Details("all tokens", [Text(shown)])
        if note:
            yield Text(note, "note")

    def _lens_blocks(self, at: int) -> Iterator[Block]:
        """Yield what each layer would predict: at one step of all models side by side, and at all steps."""
        known = {name: [step.layers for step in trace.steps if step.layers] for name, trace in self.traces.items()}
        if any(not layers for layers in known.values()):
            yield Text("The layers of this model cannot be read by themselves.", "note")
            return
        columns = [Column("layer", "number")]
        for name in known:
            says = "predicts" if len(known) == 1 else f"{name} predicts"
            columns += [Column(says), Column("p", "number"), Column("p(chosen)", "number")]
        count = len(next(iter(known.values()))[0])
        rows = []
        for layer in range(count):
            cells = [layers[at][layer] for layers in known.values()]
            row = [[*_word_and_probability(cell.likeliest[0]), write_probability(cell.chosen)] for cell in cells]
            rows.append(["0: input" if layer == 0 else str(layer), *chain(*row)])
        every = -(-count // MOST_LAYERS)
        yield Table(columns, [row for i, row in enumerate(rows) if i % every == 0 or i == count - 1], scroll=True)
        yield Text(LENS, "soft")
        for name, layers in known.items():
            trace = self.traces[name]
            grid = [[step[layer] for step in layers] for layer in reversed(range(count))]
            yield Heatmap(
                rows=[str(layer) for layer in reversed(range(count))],
                columns=[word_label(step.token) for step in trace.steps],
                values=[[cell.likeliest[0].probability for cell in row] for row in grid],
                label="What each layer would predict at each step",
                title=name if len(known) > 1 else "",
                down="layer",
                across="the answer",
                texts=[[word_label(cell.likeliest[0].token) for cell in row] for row in grid],
                tips=[[", ".join(map(_spell, cell.likeliest)) for cell in row] for row in grid],
            )

    def _step_blocks(self) -> Iterator[Block]:
        """Yield a row a step: the word, how likely it was, and the others, in brackets those that would be cut off."""
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

    def _outputs(self) -> Iterator[Block]:
        """Yield each model's answer, token by token."""
        for name, trace in self.traces.items():
            end = "" if trace.ended else f" … ({len(trace.steps)} tokens, no end)"
            model = f"{name}: " if len(self.traces) > 1 else ""
            yield Text(f"{model}{join_tokens([step.token for step in trace.steps])}{end}")

    def _describe_parting(self) -> Iterator[Block]:
        """Yield what both models could write where their answers diverge, and how far they agree."""
        at, traces = self.parting, self.traces
        if at is None:
            yield Text("They do not diverge: both write the same, word for word.")
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
        """Return what base and tuned model make of each word of the tuned model's answer."""
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
    """Return a name for a prompt for use in a file name: its letters, and a hash if those are not all of it."""
    text = request.prompt or (request.audio.stem if request.audio else "")
    letters = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if letters and len(letters) <= SLUG_LETTERS and text.isascii():
        return letters
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{letters[:SLUG_LETTERS].rsplit('-', 1)[0]}-{digest}".strip("-")


def find_parting(base: Sequence[int], tuned: Sequence[int]) -> int | None:
    """Return the first step, counted from 0, at which two answers differ; None where they are the same."""
    for at, pair in enumerate(zip(base, tuned, strict=False)):
        if pair[0] != pair[1]:
            return at
    return None if len(base) == len(tuned) else min(len(base), len(tuned))


def resolve_sampling(request: PromptRequest, prompt: ModelInputs, target: Target) -> Sampling:
    """Fill what was left open from the recipe of a run, or with defaults; raises RecipeError for too long an answer."""
    own = target.recipe.generation if target.recipe else None
    sampled = own if own is not None and own.do_sample else None
    longest = request.max_new_tokens or min(own.max_new_tokens if own else FEW_TOKENS, MOST_TOKENS)
    room = context_length(target.config)
    if room is not None and not prompt.masks:
        before = len(prompt.decoder_ids) or 1 if target.config.is_encoder_decoder else len(prompt.ids)
        if room - before < (request.max_new_tokens or 1):
            what = f"{before:,} tokens and {request.max_new_tokens or 1} new ones do not fit into the model's {room:,}"
            raise RecipeError.of(what, "--prompt", "Shorten the prompt, or lower --max-new-tokens.")
        longest = min(longest, room - before)
    sample, seed = request.sample, request.seed
    return Sampling(  # none of its numbers may be 0 but top-k and the seed
        max_new_tokens=longest,
        temperature=request.temperature or (sampled.temperature or 1.0 if sampled else SHOWN_TEMPERATURE),
        top_p=request.top_p or (sampled.top_p or 1.0 if sampled else SHOWN_TOP_P),
        top_k=request.top_k or (sampled and sampled.top_k) or 0,
        min_p=sampled.min_p if sampled else None,
        sample=(sampled is not None if sample is None else sample) and not prompt.masks,
        seed=seed if seed is not None else target.recipe.seed if target.recipe else 0,
    )


def trace_model(model: torch.nn.Module, prompt: ModelInputs, target: Target, sampling: Sampling) -> Trace:
    """Let one model answer; raises RecipeError for one that predicts no words."""
    inner = unwrap(model)
    if inner.get_output_embeddings() is None or not (prompt.masks or inner.can_generate()):
        what = f"this model predicts no words: it is a {type(inner).__name__}"
        raise RecipeError.of(what, target.name, NO_WORDS_FIX)
    trace = trace_masks if prompt.masks else trace_answer
    return trace(model, prompt, target.processor, sampling)


def join_tokens(tokens: Sequence[Token]) -> str:
    """Write tokens one after the other, a line between them; a leading space is a space."""
    words = (word_label(token, 40) for token in tokens)
    pairs = zip(words, tokens, strict=True)
    return "│".join(word.replace("␣", " ", 1) if token.text.startswith(" ") else word for word, token in pairs)


def describe_sampling(sampling: Sampling) -> str:
    """Say how a token is chosen, and what would be kept."""
    kept = f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}"
    if sampling.top_k:
        kept += f", top-k {sampling.top_k}"
    return f"drawn with {kept}, seed {sampling.seed}" if sampling.sample else f"greedy; kept: by {kept}"


def _word_and_probability(token: LikelyToken) -> list[str]:
    return [word_label(token.token), write_probability(token.probability)]


def _spell(token: LikelyToken) -> str:
    return " ".join(_word_and_probability(token))


def write_probability(value: float, *, exact: bool = False) -> str:
    """Write a probability in five letters; a small one as such, or with its power of ten."""
    if value >= 0.995:
        return "1.00" if value >= 0.9995 else f"{value:.3f}"
    if value >= 0.005:
        return f"{value:.2f}"
    if exact:
        return f"{value:.0e}" if value else "0"
    return f"{value:.3f}" if value >= 0.0005 else "<.001"


def write_factor(base: float, tuned: float) -> str:
    """Write by which factor a probability grew or shrank."""
    if not base:
        return "∞" if tuned else "1"
    factor = tuned / base
    return f"× {factor:,.0f}" if factor >= 9.5 else f"× {factor:.1f}" if factor >= 0.1 else f"× {factor:.0e}"
