"""Run one model on the evaluation's inputs: reference losses, predictions, likelihoods of the choices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress

from llmtune.data.answer_parser import ParsedAnswer
from llmtune.data.chat_rows import write_answer
from llmtune.data.example import Collate
from llmtune.display.console import counting_bars
from llmtune.errors import Problem
from llmtune.evaluate.calibration import Chosen, gather_choices, measure_calibration
from llmtune.evaluate.eval_inputs import EvalContext, EvalInputs
from llmtune.evaluate.evaluated_task import Corpus, EvalPrediction, EvaluatedTask, LoadedModel
from llmtune.evaluate.generation import CompletionOutput, answer_reader, generate_completions
from llmtune.evaluate.intervals import Floats
from llmtune.evaluate.metric import BY_VLLM, Measure, measure_right, measure_shares
from llmtune.evaluate.shared_prefix import find_choice, score_choices
from llmtune.evaluate.suites.own_metrics import measure_own
from llmtune.evaluate.text_metrics import CHOICE_METRIC, TEXT_MEASURES, TOKEN_METRICS, measure_tokens
from llmtune.evaluate.token_batches import TOKEN_BUDGET, budget_for, over_processes, run_in_batches
from llmtune.evaluate.tool_metrics import TOOL_SCORES, calls_tool, measure_tools
from llmtune.model.causal_lm_loss import move_to, unwrap, virtual_tokens
from llmtune.model.device import compute_context, resolve_dtype
from llmtune.model.memory_plan import context_length
from llmtune.recipe.task_facts import CALIBRATION, CUT_METRIC
from llmtune.records import Advance, Prompt
from llmtune.store.processes import world_size


@dataclass(frozen=True)
class TokenSums:
    """Sums over the supervised tokens of each of N rows."""

    nats: Floats
    correct: Floats
    tokens: Floats
    target_bytes: Floats
    first_nats: Floats
    """For a row split into several examples, the sums of the first."""
    first_tokens: Floats


@dataclass(frozen=True)
class Answers:
    """One model's answers; keys are indexes into the evaluated rows."""

    sums: TokenSums | None
    texts: dict[int, str]
    """Answers as text for display."""
    scores: dict[int, list[float]]
    """Log-likelihood of each choice, nats."""
    predictions: dict[int, object] = field(default_factory=dict)
    """Answers in the task's own form; for tasks that answer in text they are in `texts`."""
    parts: dict[int, list[ParsedAnswer]] = field(default_factory=dict)
    """Generated answers with more than text, or with rewards: all answers of a row with tools, its own last."""
    cut: dict[int, float] = field(default_factory=dict)
    """Per row with generated answers, the share that `generation.max_new_tokens` truncated."""
    logits: dict[int, list[list[float]]] = field(default_factory=dict)
    """Per row of a task with `output_labels`, the logits of each of its choices."""
    temperature: float = 1.0
    """The temperature of the model's probabilities; other metrics do not use it."""
    corpus: NDArray[np.float32] | None = None
    """[P, D] vectors of the passages of `data.corpus`."""

    def text(self, row: int) -> str:
        """Return the text of an answer, without reasoning and tool calls."""
        return self.parts[row][-1].text if row in self.parts else self.texts[row]

    def choice(self, row: int, choices: Sequence[str]) -> str:
        """Return the most likely choice of a row, the first of equals, or an empty text if none was scored."""
        return choices[int(np.argmax(self.scores[row]))] if row in self.scores else ""


def predict(model: torch.nn.Module, name: str, context: EvalContext, packs: bool | None = None) -> Answers:
    """Run one model on the inputs; sets it to evaluation mode.

    `packs` is whether rows are packed for the loss, as in `SelectedModel`.
    """
    inputs, task, recipe, device = context.inputs, context.task, context.recipe, context.device
    assert inputs is not None
    limit = context_limit(model)
    new_tokens = recipe.generation.max_new_tokens
    answerable = inputs.generation_prompts.items()
    prompts = {i: turns for i, turns in answerable if max(map(len, turns)) + new_tokens <= limit}
    trees = {i: tree for i, tree in inputs.trees.items() if tree.longest <= limit}
    with inference_on(model, context) as bars:
        sums = None
        if task.has_row_loss and any(metric in TOKEN_METRICS for metric in inputs.metrics):
            collate = task.collator(context.processor, recipe, packs)
            advance = add_bar(bars, f"{name}: loss", len(measured_examples(inputs)))
            sums = score_tokens(model, inputs, task, collate, device, advance, bool(packs))
        scores: list[list[float]] = []
        if trees:
            advance = add_bar(bars, f"{name}: choices", len(trees))
            grown, processor = list(trees.values()), context.processor
            scores = score_choices(model, grown, task, processor, recipe, device=device, advance=advance)
        if task.predicts:
            advance = add_bar(bars, f"{name}: answers", len(inputs.answered))
            rows = [inputs.questions[i] for i in inputs.answered]
            loaded = LoadedModel(model, context.processor, recipe, device, advance)
            values, cut, logits = predict_rows(task, rows, loaded)
            predictions = dict(zip(inputs.answered, values, strict=True))
            texts = {i: task.format_prediction(value) for i, value in predictions.items()}
            cut = {inputs.answered[row]: end for row, end in cut.items()}
            logits = {inputs.answered[row]: noted for row, noted in logits.items()}
            corpus = embed_corpus(inputs.corpus, task, loaded, bars, name)
            return Answers(sums, texts, {}, predictions, cut=cut, logits=logits, corpus=corpus)
        outputs: list[CompletionOutput] = []
        if prompts:
            flat = [prompt for turns in prompts.values() for prompt in turns]
            advance = add_bar(bars, f"{name}: answers", len(flat))
            outputs = generate_completions(model, flat, context.processor, recipe, device=device, advance=advance)
    choice_scores = dict(zip(trees, scores, strict=True))
    answers = parse_outputs(Answers(sums, {}, choice_scores), prompts, outputs, context)
    return rate_answers(model, name, answers, context) if task.has_rewards and inputs.metrics else answers


def rate_answers(model: torch.nn.Module, name: str, answers: Answers, context: EvalContext) -> Answers:
    """Add sampled answers with their rewards, and the rewards of the given answers; the processes share the rows."""
    inputs, task = context.inputs, context.task
    assert inputs is not None
    with inference_on(model, context) as bars:
        advance = add_bar(bars, f"{name}: samples", len(answers.texts))
        loaded = LoadedModel(model, context.processor, context.recipe, context.device, advance)

        def work(part: Sequence[int]) -> list[object]:
            return task.rate_samples([inputs.full_rows[i] for i in part], [answers.parts[i][-1] for i in part], loaded)

        rated = over_processes(model, [*answers.texts], work)
    return replace(answers, predictions=dict(zip(answers.texts, rated, strict=True)))


def predict_rows(
    task: EvaluatedTask, rows: Sequence[Mapping[str, Any]], loaded: LoadedModel
) -> tuple[list[object], dict[int, float], dict[int, list[list[float]]]]:
    """Return each row's prediction; for rows whose answers end, 1 if the answer was truncated, else 0; and its logits.

    Processes share the rows unless answers are sampled: a sample depends on the other rows of its batch.
    """

    def work(part: Sequence[Mapping[str, Any]]) -> list[tuple[object, bool | None, list[list[float]] | None]]:
        ends: dict[int, bool] = {}
        logits: dict[int, list[list[float]]] = {}
        noting = replace(loaded, note_end=ends.__setitem__, note_logits=logits.__setitem__)
        values = task.predict(part, noting) if part else []
        return [(value, ends.get(i), logits.get(i)) for i, value in enumerate(values)]

    results = over_processes(loaded.model, rows, work, divide=not loaded.recipe.generation.do_sample)
    ends = {i: float(end) for i, (_, end, _) in enumerate(results) if end is not None}
    logits = {i: noted for i, (*_, noted) in enumerate(results) if noted is not None}
    return [value for value, *_ in results], ends, logits


def embed_corpus(
    passages: Sequence[str], task: EvaluatedTask, loaded: LoadedModel, bars: Progress, name: str
) -> NDArray[np.float32] | None:
    """Return the vectors of a corpus, which the processes share; None without passages."""
    if not passages:
        return None
    advance = add_bar(bars, f"{name}: corpus", len(passages))
    loaded = replace(loaded, advance=advance)
    return np.stack(over_processes(loaded.model, passages, lambda part: [*task.embed_passages(part, loaded)]))


def read_choices(context: EvalContext, answers: Answers) -> Chosen | None:
    """Return the choices in a model's answers to the context's inputs, with the right labels; None without any.

    Rows of chat and completion whose reference is not a choice have no right label.
    """
    inputs, task, recipe = context.inputs, context.task, context.recipe
    assert inputs is not None
    if task.predicts:
        right = {i: task.right_labels(inputs.targets[i]) for i in answers.logits}
        many = task.output_kind(recipe) == "yes-no"
        return gather_choices(task.output_labels(recipe), answers.logits, right, many=many)
    scores = {i: [one] for i, one in answers.scores.items()}
    right = {i: [[find_choice(inputs.references[i], inputs.choices)]] for i in scores}
    return gather_choices(inputs.choices, scores, right, many=False)


def parse_outputs(
    answers: Answers,
    prompts: Mapping[int, Sequence[Prompt]],
    outputs: Sequence[CompletionOutput],
    context: EvalContext,
) -> Answers:
    """Add the answers to rows: each row takes as many consecutive outputs as it has prompts."""
    inputs = context.inputs
    assert inputs is not None
    read = answer_reader(context.processor, context.recipe) if outputs else None
    left = iter(outputs)
    for row, turns in prompts.items():
        assert read is not None
        answered, tools = [*islice(left, len(turns))], inputs.questions[row].get("tools")
        parsed = [
            read(output.token_ids, tools, prompt.ids, output.finish_reason == "length")
            for output, prompt in zip(answered, turns, strict=True)
        ]
        answers.texts[row] = write_answer(parsed[-1].text, parsed[-1].tool_calls)
        answers.cut[row] = sum(not one.complete for one in parsed) / len(answered)
        if context.task.has_rewards or row in inputs.turns or parsed[-1].reasoning or parsed[-1].tool_calls:
            answers.parts[row] = parsed
    return answers


def score_tokens(
    model: torch.nn.Module,
    inputs: EvalInputs,
    task: EvaluatedTask,
    collate: Collate,
    device: str,
    advance: Advance = lambda rows: None,
    packed: bool = False,
) -> TokenSums:
    """Add up loss and first choices over the supervised tokens of each row; examples of a split row are summed.

    With `packed`, `collate` concatenates examples, and a batch costs the sum of their lengths. If only some rows are
    measured, the sums are theirs, in the order of `inputs.measured`.
    """
    reader, examples = inputs.reader, measured_examples(inputs)

    def score(indexes: Sequence[int]) -> list[list[float]]:
        def work(batch: list[int]) -> list[list[float]]:
            loss = task.loss(model, move_to(device, collate([reader[indexes[i]] for i in batch], 0)), True)
            assert loss.row_sums is not None
            assert loss.row_correct is not None
            sums: list[list[float]] = torch.stack([loss.row_sums, loss.row_correct], 1).double().cpu().tolist()
            return sums

        lengths = [int(reader.lengths[i]) for i in indexes]
        return run_in_batches(lengths, budget_for(device, TOKEN_BUDGET), work, advance, packed=packed)

    nats, correct = np.asarray(over_processes(model, examples, score)).reshape(-1, 2).T
    rows = np.asarray(inputs.rows)[list(inputs.measured)] if inputs.measured else np.asarray(inputs.rows)
    row_of = np.searchsorted(rows, np.asarray(reader.rows)[examples])

    def by_row(values: Floats) -> Floats:
        sums = np.bincount(row_of, weights=values, minlength=len(rows))
        return sums.astype(np.float64)

    supervised = np.asarray(reader.supervised, dtype=np.float64)[examples]
    target_bytes = np.asarray([reader[i].target_bytes for i in examples], dtype=np.float64)
    first = np.unique(row_of, return_index=True)[1]
    sums = by_row(nats), by_row(correct), by_row(supervised), by_row(target_bytes)
    return TokenSums(*sums, nats[first], supervised[first])


def measured_examples(inputs: EvalInputs) -> list[int]:
    """Return the numbers of the examples of the rows that are measured."""
    if not inputs.measured:
        return list(range(len(inputs.reader)))
    rows = [inputs.rows[i] for i in inputs.measured]
    return [int(i) for i in np.flatnonzero(np.isin(np.asarray(inputs.reader.rows), rows))]


def compute_metrics(
    context: EvalContext, answers: Answers, base: Answers, problems: dict[str, Problem] | None = None
) -> dict[str, Measure]:
    """Compute the metrics of the inputs from answers; metrics without rows or without meaning here are omitted.

    Generated answers always add the share of truncated ones. The user's own metrics that fail are omitted too, and
    added to `problems`.
    """
    inputs, section = context.inputs, context.recipe.evaluate
    assert inputs is not None
    given = answers.predictions if context.task.predicts else answers.texts
    failed: dict[str, Problem] = {} if problems is None else problems
    user_measures = measure_own(context.recipe, inputs.full_rows, inputs.origins, given, failed, context.console)
    metrics = [name for name in dict.fromkeys((*inputs.metrics, CUT_METRIC)) if name not in section.own_metrics]
    measures = user_measures | {metric: measure_one(metric, context, inputs, answers, base) for metric in metrics}
    by_engine = BY_VLLM if context.engine else ""
    return {
        metric: replace(one, signature=one.signature + by_engine).in_clusters(inputs.clusters)
        for metric, one in measures.items()
        if one is not None and len(one.sums_NK)
    }


def measure_one(
    metric: str, context: EvalContext, inputs: EvalInputs, answers: Answers, base: Answers
) -> Measure | None:
    """Compute one metric from answers; None if it has no meaning here."""
    if metric == CUT_METRIC:
        cut = measure_shares(metric, [*answers.cut.values()], "share of answers truncated at max_new_tokens")
        return replace(cut, at=tuple(answers.cut))
    if metric in CALIBRATION:
        chosen = read_choices(context, answers)
        return measure_calibration(metric, chosen, answers.temperature) if chosen is not None else None
    if metric in TOOL_SCORES:
        return measure_tools(metric, answers.parts, inputs.turns)
    values, others = (one.predictions or {i: one.text(i) for i in one.texts} for one in (answers, base))
    if values:
        before = [others[i] for i in values] if values.keys() <= others.keys() else None
        corpus = Corpus(inputs.corpus, answers.corpus) if answers.corpus is not None else None
        output = EvalPrediction([*values.values()], [inputs.targets[i] for i in values], before, corpus)
        measured = context.task.compute_metric(metric, output, context.recipe)
        if measured is not None:
            rows = tuple(values)
            return replace(measured, at=tuple(rows[i] for i in measured.at) if measured.at else rows)
    if metric in TOKEN_METRICS:
        return measure_sums(metric, context, answers.sums)
    return None if context.task.predicts else measure_answers(metric, inputs, answers)


def measure_sums(metric: str, context: EvalContext, sums: TokenSums | None) -> Measure | None:
    """Return a metric of the supervised tokens; None without sums for it."""
    if sums is None or (metric == "bits_per_byte" and not sums.target_bytes.any()):
        return None
    measured = measure_tokens(metric, sums.nats, sums.correct, sums.tokens, sums.target_bytes)
    if not context.task.predicts_tokens:
        measured = replace(measured, signature=task_signature(metric, context))
    assert context.inputs is not None
    return replace(measured, at=context.inputs.measured or tuple(range(len(sums.nats))))


def measure_answers(metric: str, inputs: EvalInputs, answers: Answers) -> Measure:
    """Return a metric of the most likely choices, or of generated texts."""
    if metric == CHOICE_METRIC:
        references = {i: find_choice(inputs.references[i], inputs.choices) for i in answers.scores}
        right = [answers.choice(i, inputs.choices) == reference for i, reference in references.items()]
        measured = measure_right(right, metric, "share of rows whose reference answer is the most likely choice")
        return replace(measured, at=tuple(answers.scores))
    rows = [i for i in answers.texts if not calls_tool(inputs.turns.get(i, ()))]
    texts, expected = [answers.text(i) for i in rows], [inputs.references[i] for i in rows]
    return replace(TEXT_MEASURES[metric](texts, expected), at=tuple(rows))


def task_signature(metric: str, context: EvalContext) -> str:
    """Describe what the loss is a mean over, for a task that does not predict tokens."""
    if metric != "loss":
        return f"{metric} of the predictions"
    weights = (context.recipe.task_section() or {}).get("class_weights")
    weighted = ", weighted by class_weights" if weights is not None else ""
    return f"mean of the {context.task.name} loss over {context.task.loss_unit}{weighted}"


def context_limit(model: torch.nn.Module) -> int:
    """Return the maximum number of tokens of a text; a very large number if the model states none."""
    return (context_length(unwrap(model).config) or 1 << 60) - virtual_tokens(model)


@contextmanager
def inference_on(model: torch.nn.Module, context: EvalContext) -> Iterator[Progress]:
    """Set a model to evaluation mode, compute in the recipe's dtype, and show progress bars."""
    trains = model.training  # training continues after this, so its caches must work with gradients
    model.eval()
    dtype = resolve_dtype(context.recipe.model.dtype, context.device)
    with (
        torch.no_grad() if trains else torch.inference_mode(),
        compute_context(dtype, context.device),
        counting_bars(context.console) as bars,
    ):
        yield bars


def add_bar(bars: Progress, name: str, total: int) -> Callable[[int], None]:
    """Add a bar and return the function that advances it; without a terminal, print one line."""
    if not bars.console.is_terminal:
        bars.console.print(f"{name}: {total:,} rows", highlight=False)
    bar = bars.add_task(name, total=-(-total // world_size()))
    return lambda rows: bars.advance(bar, rows)
