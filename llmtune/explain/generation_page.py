"""An answer as a page and on the terminal: its four stages, step by step, and where base and tuned model part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from llmtune.explain.explanation import asset
from llmtune.explain.generation_trace import Sampling, TokenScore, Trace
from llmtune.explain.inputs import ModelInputs, PromptRequest
from llmtune.explain.target import BASE, TUNED, Target
from llmtune.explain.token_text import Token, name_tokens, word_label
from llmtune.report.blocks import Block, Cell, Column, Details, Html, Meter, Page, Section, Table, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAD = (
    "A model writes a word at a time. Here is each of its steps: the prompt cut into tokens, what every layer would "
    "predict if it were the last one, how likely each next word is, and the text so far."
)
LEAD_MASKED = (
    "An encoder fills in what is masked, all at once. Here is each mask: what every layer would predict in its place, "
    "and how likely each word is."
)
HEAD, TAIL = 70, 30
"""Tokens of a long prompt that are shown at once."""
MOST_LAYERS = 40
DIGITS = 6


@dataclass(frozen=True)
class Generation:
    """The answers to one prompt."""

    target: Target
    request: PromptRequest
    prompt: ModelInputs
    sampling: Sampling
    traces: dict[str, Trace]
    """By model."""
    scores: dict[str, list[TokenScore]]
    """Of a run, what base and tuned model make of each token of the tuned model's answer."""

    @property
    def parting(self) -> int | None:
        """The first step at which base and tuned model differ; None where they do not, or there is one model."""
        if BASE not in self.traces or TUNED not in self.traces:
            return None
        return find_parting(self.traces[BASE].ids, self.traces[TUNED].ids)


def find_parting(base: Sequence[int], tuned: Sequence[int]) -> int | None:
    """Return the first step, counted from 0, at which two answers differ; None where they are the same."""
    for at, pair in enumerate(zip(base, tuned, strict=False)):
        if pair[0] != pair[1]:
            return at
    return None if len(base) == len(tuned) else min(len(base), len(tuned))


class TokenNames:
    """Tokens with their text."""

    def __init__(self, processor: PreTrainedTokenizerBase) -> None:
        self.processor = processor
        self.one = cache(lambda token: self.sequence([token])[0])

    def sequence(self, ids: Sequence[int]) -> list[Token]:
        """Return the tokens of a text."""
        return name_tokens(self.processor, ids)

    def word(self, token: int) -> str:
        """Return one token as a word by itself."""
        return word_label(self.one(token))


def make_page(generation: Generation, names: TokenNames, values: Mapping[str, object], top: int) -> Page:
    """Return the stages, and of a run where base and tuned model part; `top` tokens of a step are listed."""
    traces, prompt, masked = generation.traces, generation.prompt, bool(generation.prompt.masks)
    tokens = names.sequence(prompt.ids or prompt.decoder_ids)
    picker, lens, prediction, output = (
        Html(Markup(part))  # noqa: S704 - the program's own
        for part in asset("generation.html").split("<!-- section -->\n")
    )
    sides = [Html(_choose_model(list(traces)))] if len(traces) > 1 else []
    at = _shown_step(generation)
    where = f"At step {at + 1}" + (", where they part:" if generation.parting is not None else ":")
    stage4 = "4 The masks, filled in" if masked else "4 Output so far"
    sections = [
        Section("1 Prompt to tokens", _describe_prompt(tokens, prompt.note)),
        Section("", [*sides, picker], brief=False, anchor="answer"),
        Section("2 Model processing", [Text(where), _lens_table(traces, names, at), lens], anchor="lens"),
        Section("3 Word prediction", [*_step_tables(generation, names, top), prediction], anchor="prediction"),
        Section(stage4, [*_outputs(traces, names), output], anchor="output"),
    ]
    if len(traces) > 1:
        sections.insert(0, Section("Where base and tuned part", _describe_parting(generation, names, top)))
    target, system = generation.target, generation.request.system
    chips = [("model", target.short_name), ("family", target.family), *([("system", system)] if system else [])]
    return Page(
        _title(generation),
        sections,
        chips=chips,
        lead=LEAD_MASKED if masked else LEAD,
        navigation=False,
        style=asset("generation.css"),
        script=asset("generation.js"),
        data={
            **{name: values[name] for name in ("temperatures", "choice", "parting", "masked")},
            "traces": _shortened(values["traces"]),
            "labels": _labels(values["traces"]),
        },
    )


def _title(generation: Generation) -> str:
    request = generation.request
    text = " ".join((request.prompt or Path(str(request.audio or "")).name).split())
    return f"Generation: {text if len(text) <= 70 else text[:69] + '…'}"


def _shortened(value: object) -> object:
    """Return JSON values with the digits that a page needs."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    return [_shortened(item) for item in value] if isinstance(value, list) else value


def _labels(value: object) -> dict[str, str]:
    """Return the labels of all tokens in JSON values, by their text."""
    if isinstance(value, list):
        return {text: label for item in value for text, label in _labels(item).items()}
    if not isinstance(value, dict):
        return {}
    found = _labels(list(value.values()))
    if "special" in value:
        token = Token(int(value["id"]), str(value["text"]), bool(value["special"]), continues=False)
        found[token.text] = word_label(token, 30)
    return found


def _choose_model(models: Sequence[str]) -> Markup:
    choice = Markup('<label><input type="radio" name="side" value="{0}"{1}><span>{0}</span></label>')
    choices = [choice.format(name, Markup(" checked") if name == models[-1] else "") for name in models]
    return Markup('<fieldset class="sides picker"><legend>Answer of</legend>{}</fieldset>').format(
        Markup("").join(choices)
    )


def _describe_prompt(tokens: Sequence[Token], note: str) -> list[Block]:
    shown = join_tokens(tokens)
    cut = len(tokens) > HEAD + TAIL
    if cut:
        shown = f"{join_tokens(tokens[:HEAD])} … {len(tokens) - HEAD - TAIL:,} more … {join_tokens(tokens[-TAIL:])}"
    blocks: list[Block] = [Text(f"{len(tokens)} tokens: {shown}")]
    if cut:
        blocks.append(Details("all tokens", [Text(join_tokens(tokens))]))
    return [*blocks, Text(note, "note")] if note else blocks


def join_tokens(tokens: Sequence[Token]) -> str:
    """Write tokens one after the other, a line between them; a leading space is a space."""
    words = (word_label(token, 40) for token in tokens)
    pairs = zip(words, tokens, strict=True)
    return "│".join(word.replace("␣", " ", 1) if token.text.startswith(" ") else word for word, token in pairs)


def _shown_step(generation: Generation) -> int:
    """Return the step at which layers are looked at: where the models part, else the first."""
    at = generation.parting
    return at if at is not None and all(at < len(trace.steps) for trace in generation.traces.values()) else 0


def _lens_table(traces: Mapping[str, Trace], names: TokenNames, at: int) -> Block:
    """Return what each layer would predict at one step, of all models beside one another."""
    layers = {name: trace.steps[at].layers for name, trace in traces.items() if trace.steps}
    known = {name: found for name, found in layers.items() if found}
    if not known or len(known) != len(layers):
        return Text("The layers of this model cannot be read by themselves.", "note")
    columns = [Column("layer", "number")]
    for name in known:
        says = "predicts" if len(known) == 1 else f"{name} predicts"
        columns += [Column(says), Column("p", "number"), Column("p(chosen)", "number")]
    count = len(next(iter(known.values())))
    every = -(-count // MOST_LAYERS)
    rows = []
    for layer in [i for i in range(count) if i % every == 0 or i == count - 1]:
        row = ["0: input" if layer == 0 else str(layer)]
        for found in known.values():
            one = found[layer]
            row += [names.word(one.ids[0]), share(one.probabilities[0]), share(one.chosen)]
        rows.append(row)
    return Table(columns, rows, scroll=True)


def describe_sampling(sampling: Sampling) -> str:
    """Say how a token is chosen, and what would be kept."""
    kept = f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}"
    if sampling.top_k:
        kept += f", top-k {sampling.top_k}"
    return f"drawn with {kept}, seed {sampling.seed}" if sampling.sample else f"greedy; kept: by {kept}"


def _step_tables(generation: Generation, names: TokenNames, top: int) -> list[Block]:
    """Return a row a step: the word, how likely it was, and the others."""
    blocks: list[Block] = [Text(describe_sampling(generation.sampling))]
    word = "mask" if generation.prompt.masks else "word"
    numeric = [Column(name, "number") for name in ("p", "bits", "kept")]
    columns = [Column("", "number"), Column(word), *numeric, Column("could also be")]
    for name, trace in generation.traces.items():
        rows = []
        tokens = names.sequence(trace.ids)
        for number, (step, token) in enumerate(zip(trace.steps, tokens, strict=True), 1):
            listed = step.next_tokens
            pairs = zip(listed.ids, listed.probabilities, strict=True)
            others = [f"{names.word(i)} {share(p)}" for i, p in pairs if i != step.id][: max(0, top - 1)]
            numbers = [share(step.probability), f"{listed.entropy_bits:.2f}", f"{listed.kept_tokens:,}"]
            rows.append([str(number), word_label(token), *numbers, ", ".join(others)])
        blocks.append(Table(columns, rows, name if len(generation.traces) > 1 else "", scroll=True))
    return blocks


def _outputs(traces: Mapping[str, Trace], names: TokenNames) -> list[Block]:
    """Return each model's answer, token by token."""
    blocks: list[Block] = []
    for name, trace in traces.items():
        end = "" if trace.ended else f" … ({len(trace.steps)} tokens, no end)"
        model = f"{name}: " if len(traces) > 1 else ""
        blocks.append(Text(f"{model}{join_tokens(names.sequence(trace.ids))}{end}"))
    return blocks


def _describe_parting(generation: Generation, names: TokenNames, top: int) -> list[Block]:
    """Return what base and tuned model could write at the step where their answers part, and how far they agree."""
    at, traces = generation.parting, generation.traces
    blocks: list[Block] = []
    if at is None:
        blocks.append(Text("They do not part: both write the same, word for word."))
    else:
        common = join_tokens(names.sequence(traces[TUNED].ids[:at]))
        where = "At the first word." if not at else f"Both begin alike; they part at word {at + 1}, after: {common}"
        chance = " Words were drawn at random, so they may part by chance." if generation.sampling.sample else ""
        columns, cells = [], []
        for name in (BASE, TUNED):
            columns += [Column(name), Column("p", "number")]
            steps = traces[name].steps[at : at + 1]
            ids = steps[0].next_tokens.ids[:top] if steps else []
            shares = steps[0].next_tokens.probabilities[:top] if steps else []
            empty = ["" if ids else "its answer has ended"] + [""] * top
            cells.append([[names.word(i) for i in ids] + empty, [share(p) for p in shares] + [""] * (top + 1)])
        rows = [[part[rank] for model in cells for part in model] for rank in range(top)]
        blocks += [Text(where + chance), Table(columns, rows)]
    if generation.scores:
        blocks.append(_moved_table(generation, names))
    return blocks


def _moved_table(generation: Generation, names: TokenNames) -> Table:
    """Return how likely each token of the tuned model's answer is to both."""
    rows: list[list[Cell | str]] = []
    columns = zip(generation.traces[TUNED].ids, generation.scores[BASE], generation.scores[TUNED], strict=True)
    for token, base, tuned in columns:
        first = f"{names.word(base.likeliest)} {share(base.likeliest_probability)}"
        numbers = [share(base.probability, exact=True), share(tuned.probability, exact=True)]
        factor = times(base.probability, tuned.probability)
        meter = Cell(picture=Meter(tuned.probability))
        rank = f"{base.rank:,}"
        rows.append([names.word(token), *numbers, meter, factor, rank, "the same" if base.rank == 1 else first])
    heads = [Column("word"), Column("base", "number"), Column("tuned", "number"), Column("", "picture")]
    heads += [Column("times", "number"), Column("its rank in the base", "number"), Column("there the base predicts")]
    note = "Each word is read behind the words of the tuned model’s answer that stand before it."
    return Table(heads, rows, "How the tuning moved each word of the tuned model’s answer", note, scroll=True)


def share(value: float, *, exact: bool = False) -> str:
    """Write a probability in five letters; a small one as such, or with its power of ten."""
    if value >= 0.995:
        return "1.00" if value >= 0.9995 else f"{value:.3f}"
    if value >= 0.005:
        return f"{value:.2f}"
    if exact:
        return f"{value:.0e}" if value else "0"
    return f"{value:.3f}" if value >= 0.0005 else "<.001"


def times(base: float, tuned: float) -> str:
    """Write by which factor a probability grew or shrank."""
    if not base:
        return "∞" if tuned else "1"
    factor = tuned / base
    return f"× {factor:,.0f}" if factor >= 9.5 else f"× {factor:.1f}" if factor >= 0.1 else f"× {factor:.0e}"
