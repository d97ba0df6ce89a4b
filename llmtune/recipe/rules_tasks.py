"""Rules of the tasks: sections of other tasks, and keys that this task, or what its section says, does not read."""

from __future__ import annotations

from collections.abc import Iterator

from llmtune.recipe.finding import Finding, idle
from llmtune.recipe.schema import Recipe
from llmtune.recipe.source_map import Places
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.recipe.task_sections import PreferenceSection

GENERATION_KEYS = (
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "num_beams",
)
WRITING = ("chat", "completion", "translate", "summarize", "qa", "preference")
"""Tasks of which some models go on from a text, as those in GGUF files do."""
PROMPT_FIELDS = {
    "translate": ("source", "source_language", "target_language"),
    "summarize": ("document",),
    "qa": ("question", "context"),
}
MASKED_METRICS = ("loss", "perplexity", "accuracy")
"""Metrics of masked tokens; bits per byte are of a whole text, and nothing is generated."""
LOSS_KEYS = {
    "beta": ("dpo", "ipo", "kto", "orpo"),
    "label_smoothing": ("dpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "center_rewards_coefficient": ("reward",),
}
"""Keys of `preference`, and the losses that read them."""
LOSS_METRICS = {
    "dpo": ("loss", "accuracy", "margin", "likelihood_accuracy", "kl"),
    "ipo": ("loss", "accuracy", "margin", "likelihood_accuracy", "kl"),
    "kto": ("accuracy", "margin", "kl"),
    "orpo": ("accuracy", "margin", "likelihood_accuracy", "kl"),
    "reward": ("loss", "accuracy", "margin"),
}
"""Metrics of task preference that each loss has: those of KTO and ORPO depend on the rows that stand in one step."""


def task_findings(recipe: Recipe, places: Places) -> Iterator[Finding]:
    """Yield what has no effect with this task."""
    yield from section_findings(recipe, places)
    yield from data_of_task(recipe, places)
    yield from model_of_task(recipe, places)
    yield from generation_of_task(recipe, places)
    yield from prompt_findings(recipe)
    yield from within_section(recipe, places)
    if "gguf" in recipe.deploy and (recipe.task not in WRITING or is_masked(recipe)):
        what = f"'deploy: gguf' has no effect with task: {recipe.task}: its model does not go on from a text"
        yield Finding("deploy", what, "Remove it.", ("task",))


def section_findings(recipe: Recipe, places: Places) -> Iterator[Finding]:
    """Yield sections of other tasks."""
    for name, facts in TASK_FACTS.items():
        section = facts.section
        if section and name != recipe.task and places.stated(section) and getattr(recipe, section) is not None:
            yield idle(section, f"with task: {recipe.task}", f"Remove it; it belongs to task: {name}.", "task")


def data_of_task(recipe: Recipe, places: Places) -> Iterator[Finding]:
    """Yield keys of `data` that the task does not read."""
    data, facts = recipe.data, TASK_FACTS[recipe.task]
    if recipe.task != "chat" and places.stated("data.train_on"):
        fix = "Remove it: what the row names as its answer is what is learned."
        yield idle("data.train_on", f"with task: {recipe.task}", fix, "task")
    if not facts.packs and places.stated("data.packing"):
        yield idle("data.packing", f"with task: {recipe.task}", "Remove it: these rows are padded.", "task")
    allowed = ("error", "drop") if points(recipe) else facts.overlong
    if data.on_overlong not in allowed:
        what = f"'data.on_overlong' is '{data.on_overlong}', which task: {recipe.task} cannot do"
        yield Finding("data.on_overlong", what, f"Allowed: {', '.join(allowed)}.", ("task",))


def model_of_task(recipe: Recipe, places: Places) -> Iterator[Finding]:
    """Yield keys of `model` that the task does not read."""
    model, facts = recipe.model, TASK_FACTS[recipe.task]
    if not facts.templated or points(recipe):
        for name in ("chat_template", "chat_template_kwargs"):
            if getattr(model, name) is not None and places.stated(f"model.{name}"):
                yield idle(f"model.{name}", f"with task: {recipe.task}", "Remove it, or use task: chat.", "task")
    if model.candidates is not None and (not facts.ranks or is_masked(recipe)):
        what = f"'model.candidates' cannot be ranked for task: {recipe.task}: its rows hold no text that a model writes"
        yield Finding("model.candidates", what, "Name one model as model.name.", ("task",))


def generation_of_task(recipe: Recipe, places: Places) -> Iterator[Finding]:
    """Yield generation settings where nothing is generated."""
    writes = recipe.task == "preference" and not scores_answers(recipe)  # with `llmtune generate`
    if writes or (TASK_FACTS[recipe.task].generates and not is_masked(recipe) and not points(recipe)):
        return
    for name in GENERATION_KEYS:
        if places.stated(f"generation.{name}"):
            yield idle(f"generation.{name}", f"with task: {recipe.task}", "Remove it: nothing is generated.", "task")


def prompt_findings(recipe: Recipe) -> Iterator[Finding]:
    """Yield prompts that do not hold the text, or hold what no row has."""
    fields = PROMPT_FIELDS.get(recipe.task)
    section = getattr(recipe, recipe.task, None) if fields else None
    prompt = getattr(section, "prompt", None)
    if fields is None or prompt is None:
        return
    key = f"{recipe.task}.prompt"
    needed = fields if recipe.task == "qa" else fields[:1]
    missing = [name for name in needed if f"{{{name}}}" not in prompt]
    if missing:
        yield Finding(key, f"'{key}' does not say where the {missing[0]} stands", f"Put {{{missing[0]}}} into it.")


def within_section(recipe: Recipe, places: Places) -> Iterator[Finding]:
    """Yield keys of the task's own section that others in it leave without effect."""
    if recipe.completion and not is_masked(recipe) and places.stated("completion.mask_probability"):
        fix = "Remove it, or set completion.objective: masked."
        yield idle("completion.mask_probability", "without completion.objective: masked", fix, "completion.objective")
    if is_masked(recipe):
        yield from masked_findings(recipe)
    if recipe.qa:
        yield from qa_findings(recipe, places)
    if recipe.classify:
        yield from classify_findings(recipe, places)
    if recipe.task == "preference":
        yield from preference_findings(recipe, places)


def preference_findings(recipe: Recipe, places: Places) -> Iterator[Finding]:
    """Yield settings that this loss does not read, and metrics and gates on what it does not have."""
    loss = loss_of(recipe)
    for name, readers in LOSS_KEYS.items() if recipe.preference else ():
        key = f"preference.{name}"
        if loss not in readers and places.stated(key) and getattr(recipe.preference, name) is not None:
            fix = f"Remove it; it belongs to: {', '.join(readers)}."
            yield idle(key, f"with preference.loss: {loss}", fix, "preference.loss")
    missing = unmeasured(recipe)
    left = ", ".join(metric for metric in TASK_FACTS["preference"].metrics if metric not in missing)
    for i, metric in enumerate(recipe.evaluate.metrics):
        if metric in missing:
            what = f"'{metric}' cannot be measured: {missing[metric]}"
            yield Finding(f"evaluate.metrics.{i}", what, f"Remove it. What can be: {left}.", ("preference.loss",))


def loss_of(recipe: Recipe) -> str:
    """Return the loss of task preference, by its default where the recipe has no such section."""
    return (recipe.preference or PreferenceSection()).loss


def unmeasured(recipe: Recipe) -> dict[str, str]:
    """Return the metrics of task preference that its loss or its adapter does not have, each with the reason."""
    if recipe.task != "preference":
        return {}
    loss, adapter = loss_of(recipe), recipe.adapter
    known = TASK_FACTS["preference"].metrics
    missing = {name: f"preference.loss: {loss} has no such thing" for name in known if name not in LOSS_METRICS[loss]}
    if "kl" not in missing and adapter.method == "full":
        missing["kl"] = "with adapter.method: full there is no adapter that could be switched off"
    elif "kl" not in missing and adapter.bias != "none":
        missing["kl"] = f"with adapter.bias: {adapter.bias} a model differs from its base with its adapter off, too"
    return missing


def masked_findings(recipe: Recipe) -> Iterator[Finding]:
    """Yield metrics that masked tokens do not have."""
    for i, metric in enumerate(recipe.evaluate.metrics):
        if metric in TASK_FACTS[recipe.task].metrics and metric not in MASKED_METRICS:
            what = f"'{metric}' cannot be measured with completion.objective: masked"
            fix = f"Remove it. What can be: {', '.join(MASKED_METRICS)}."
            yield Finding(f"evaluate.metrics.{i}", what, fix, ("completion.objective",))


def qa_findings(recipe: Recipe, places: Places) -> Iterator[Finding]:
    """Yield keys of the other style of answering; `auto` is settled by the model, so both are read there."""
    assert recipe.qa is not None
    readers = {
        "extractive": ("stride", "max_answer_length", "null_score_diff_threshold"),
        "generative": ("prompt", "no_answer"),
    }
    for style, names in readers.items():
        for name in names:
            if recipe.qa.style not in ("auto", style) and places.stated(f"qa.{name}"):
                fix = f"Remove it, or set qa.style: {style}."
                yield idle(f"qa.{name}", f"with qa.style: {recipe.qa.style}", fix, "qa.style")
    if recipe.qa.style != "generative" and recipe.qa.stride >= recipe.data.max_length // 2:
        what = f"'qa.stride' is {recipe.qa.stride}, and a window has {recipe.data.max_length} tokens (data.max_length)"
        yield Finding(
            "qa.stride", what, "Windows must move on: less than half of data.max_length.", ("data.max_length",)
        )


def classify_findings(recipe: Recipe, places: Places) -> Iterator[Finding]:
    """Yield names and weights of classes that do not go together."""
    section = recipe.classify
    assert section is not None
    labels = section.labels or ()
    if len(set(labels)) < len(labels):
        yield Finding("classify.labels", "'classify.labels' names a label twice", "Name each once.")
    if section.kind == "regression":
        for name in ("labels", "class_weights"):
            if getattr(section, name) is not None and places.stated(f"classify.{name}"):
                yield idle(f"classify.{name}", "with classify.kind: regression", "Remove it.", "classify.kind")
    weights = section.class_weights
    if isinstance(weights, dict) and labels:
        for name in set(weights) - set(labels):
            what = f"'classify.class_weights' weighs '{name}', which is none of the labels"
            yield Finding("classify.class_weights", what, f"Labels: {', '.join(labels)}.", ("classify.labels",))


def scores_answers(recipe: Recipe) -> bool:
    """Whether a model is trained that scores answers and writes none."""
    return recipe.task == "preference" and recipe.preference is not None and recipe.preference.loss == "reward"


def points(recipe: Recipe) -> bool:
    """Whether answers are pointed at for certain; with `auto` the model decides."""
    return recipe.task == "qa" and recipe.qa is not None and recipe.qa.style == "extractive"


def default_metrics(recipe: Recipe) -> tuple[str, ...]:
    """Return the task's own choice of metrics, as far as the recipe's objective has them."""
    metrics = TASK_FACTS[recipe.task].default_metrics
    if is_masked(recipe):
        return tuple(metric for metric in metrics if metric in MASKED_METRICS)
    missing = unmeasured(recipe)
    return tuple(metric for metric in metrics if metric not in missing)


def is_masked(recipe: Recipe) -> bool:
    """Whether masked tokens are predicted."""
    return recipe.task == "completion" and recipe.completion is not None and recipe.completion.objective == "masked"
