"""The sections of `evaluate` that measure more than the task's metrics: forgetting, fairness, benchmarks, a judge."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path, PurePath
from typing import ClassVar
from urllib.parse import urlsplit

from pydantic import Field

from llmtune.errors import nearest
from llmtune.recipe.gate_grammar import Gate, find_control_problem
from llmtune.recipe.retired import RETIRED, retired_problem
from llmtune.recipe.section import REMOTE, Many, NonEmpty, Positive, RecipeSection, absolute
from llmtune.recipe.source_map import Diagnostics
from llmtune.recipe.task_variant import TaskVariant

MAX_URL = 2000
OWN = "own"
"""Names llmtune's packaged data instead of a file."""
TASK_FILES = (".yaml", ".yml")
"""Extensions of a benchmark's task file."""
SUITE_KEYS = {
    "forgetting": {
        "perplexity": "texts",
        "bits_per_byte": "texts",
        "accuracy": "questions",
        "accuracy_norm": "questions",
    },
    "fairness": {
        "gap": "groups",
        "swap_changes": "swaps",
    },
    "judge": {
        "win_rate": "endpoint",
        "win_rate_uncorrected": "labelled",
        "ties": "endpoint",
        "inconsistent": "endpoint",
        "first_position": "endpoint",
        "longer_wins": "endpoint",
        "agreement": "labelled",
        "kappa": "labelled",
        "error_rate": "labelled",
        "length_bias": "labelled",
    },
}
"""By suite: its metrics, as gates name them after the suite, and the key that each one measures."""

SERVICE_HOSTS = {
    "OPENAI": ("api.openai.com",),
    "ANTHROPIC": ("api.anthropic.com",),
    "AZURE": ("openai.azure.com",),
    "GEMINI": ("generativelanguage.googleapis.com",),
    "GOOGLE": ("generativelanguage.googleapis.com",),
    "MISTRAL": ("api.mistral.ai",),
    "GROQ": ("api.groq.com",),
    "DEEPSEEK": ("api.deepseek.com",),
    "OPENROUTER": ("openrouter.ai",),
    "TOGETHER": ("api.together.xyz", "api.together.ai"),
    "FIREWORKS": ("api.fireworks.ai",),
    "XAI": ("api.x.ai",),
    "NVIDIA": ("integrate.api.nvidia.com",),
    **dict.fromkeys(("HF", "HUGGINGFACE", "HUGGINGFACEHUB", "HUGGING"), ("router.huggingface.co",)),
    **dict.fromkeys(("GITHUB", "GH"), ("models.github.ai", "models.inference.ai.azure.com")),
    **dict.fromkeys(("AWS", "WANDB", "COMET", "NEPTUNE", "MLFLOW", "CLEARML", "SWANLAB", "TRACKIO", "DVC"), ()),
    **dict.fromkeys(("GITLAB", "CI", "ACTIONS", "RUNNER", "BITBUCKET", "CIRCLE", "JENKINS", "CODECOV", "SENTRY"), ()),
    **dict.fromkeys(("NPM", "NODE", "PYPI", "TWINE", "UV", "CARGO", "DOCKER", "CONDA", "ANACONDA", "KAGGLE"), ()),
    **dict.fromkeys(("SLACK", "DISCORD", "TELEGRAM", "STRIPE", "TWILIO", "SENDGRID", "DD", "DATADOG"), ()),
    **dict.fromkeys(("VAULT", "KUBE", "DIGITALOCEAN", "CLOUDFLARE", "HEROKU", "VERCEL", "NETLIFY", "GCP"), ()),
    **dict.fromkeys(("SSH", "GPG", "DJANGO", "SECRET", "LLMTUNE_API", "VLLM", "RUNPOD", "LAMBDA", "MODAL"), ()),
}
"""By first word of an environment variable: the hosts (and their subdomains) of the service that it is for."""


def absolute_file(name: str, folder: Path) -> str:
    """Make a file absolute; return `own` and hub names unchanged."""
    return name if name == OWN or name.startswith(REMOTE) else absolute(name, folder)


def absolute_task(name: str, folder: Path) -> str:
    """Make a benchmark's task file absolute; return the name of an lm-eval task unchanged."""
    return absolute(name, folder) if is_task_file(name) else name


def is_task_file(task: str) -> bool:
    """Return whether a benchmark is a task file rather than the name of a task."""
    return task.endswith(TASK_FILES)


class ForgettingSection(RecipeSection):
    """General abilities that the tuned model lost, on general text and general questions."""

    texts: Many[NonEmpty] = (OWN,)
    """General text whose perplexity is measured before and after tuning: `own` (public domain, ships with llmtune), or
    text files. Default `own`: any text unrelated to the training rows shows forgetting."""
    questions: Many[NonEmpty] = (OWN,)
    """Multiple-choice questions, answered by likelihood: `own`, or JSON lines files with `question`, `choices` and
    `answer`. Default `own`: common knowledge in plain words."""

    paths: ClassVar = {"texts": absolute_file, "questions": absolute_file}

    def check(self, diagnostics: Diagnostics, variant: TaskVariant) -> None:
        """Report a suite that this task's models cannot run, that measures nothing, or that names something twice."""
        key = "evaluate.forgetting"
        if variant.without_decoder:
            why, because = variant.without_decoder
            what = f"'{key}' measures the likelihood of text, and {why}"
            diagnostics.add(key, what, "Remove it; it is for decoder language models.", because)
            return
        if not self.texts and not self.questions:
            diagnostics.add(key, f"'{key}' measures nothing", "Give it texts or questions, or remove it.")
        for name, files in (("texts", self.texts), ("questions", self.questions)):
            diagnostics.repeated(f"{key}.{name}", files, "something")
            for file in files:
                if file.startswith(REMOTE):
                    diagnostics.add(f"{key}.{name}", f"'{file}' is not a file", "Use `own`, or files.")


class FairnessSection(RecipeSection):
    """Whether the models treat groups of people differently, base compared with tuned."""

    swaps: Many[NonEmpty] = (OWN,)
    """Pairs of group words, such as woman and man, to swap in the prompts of the test rows: `own`, or CSV files with
    two columns and no header. Default `own`: English words for women and men."""
    groups: Many[NonEmpty] = ()
    """Columns that name the group of a test row; each metric's gap between their values is measured. Default none: few
    data sets have such a column."""

    paths: ClassVar = {"swaps": absolute_file}

    def check(self, diagnostics: Diagnostics, variant: TaskVariant, has_test: bool) -> None:
        """Report keys without effect, and values named twice."""
        key = "evaluate.fairness"
        if not (self.swaps or self.groups):
            diagnostics.add(key, f"'{key}' measures nothing", "Give it swaps or groups, or remove it.")
        for name in ("swaps", "groups"):
            diagnostics.repeated(f"{key}.{name}", getattr(self, name), "something")
        for name, (why, fix) in fairness_without_effect(variant, has_test).items():
            if getattr(self, name):
                diagnostics.no_effect(f"{key}.{name}", why, fix, "task" if name != "groups" else "data.test")
        for file in self.swaps:
            if file.startswith(REMOTE):
                diagnostics.add(f"{key}.swaps", f"'{file}' is not a file", "Use `own`, or a CSV file of two columns.")


def fairness_without_effect(variant: TaskVariant, has_test: bool) -> dict[str, tuple[str, str]]:
    """Return the keys of `fairness` without effect for this task and these rows, each with reason and fix."""
    if not has_test:
        fix = "Give data.test a share of the rows or sources, or remove it."
        return dict.fromkeys(("swaps", "groups"), ("without test rows", fix))
    unswapped = variant.facts.unswapped
    return {"swaps": (f"with task: {variant.task}: {unswapped}", "Remove it.")} if unswapped else {}


class JudgeSection(RecipeSection):
    """A model behind an endpoint that compares the answers of base and tuned model to the test rows."""

    endpoint: NonEmpty
    """URL of an OpenAI-compatible endpoint, such as https://api.openai.com/v1 or http://localhost:8000. It receives the
    prompts and answers of your test rows. Required."""
    model: NonEmpty
    """Name of the judge, as the endpoint knows it. Required."""
    question: NonEmpty = "Which answer is better: more correct, more helpful and clearer?"
    """The question about two answers. Default: general quality; your own criterion is more telling."""
    labelled: NonEmpty | None = None
    """File of answer pairs that people judged: `prompt` (or `question`), `answer_a`, `answer_b` and `label` (A, B or
    tie). The judge answers them too, and the win rate is corrected for its errors. Default none: the judge is taken at
    its word, and the verdict says so."""
    api_key_env: NonEmpty | None = None
    """Environment variable with the endpoint's API key; its name ends in _KEY or _TOKEN. A variable of another service,
    such as HF_TOKEN, is refused. Default none: LLMTUNE_JUDGE_KEY; for api.openai.com also OPENAI_API_KEY."""

    paths: ClassVar = {"labelled": absolute}

    def check(self, diagnostics: Diagnostics, variant: TaskVariant) -> None:
        """Report a task without free text, an address that is none, and a key in the place of a variable's name."""
        key = "evaluate.judge"
        if variant.facts.takes_audio or not (variant.facts.generates and variant.generates):
            objective, style = "completion.objective", "qa.style"
            because = objective if variant.is_masked else style if variant.is_extractive else "task"
            fix = "Remove it; it is for tasks that answer in free text."
            diagnostics.add(
                key, f"'{key}' compares written answers to texts, which this task does not have", fix, because
            )
        if not is_endpoint(self.endpoint):
            fix = "Write https://HOST/v1, without a key or a query."
            diagnostics.add(f"{key}.endpoint", f"'{key}.endpoint' is not the address of an endpoint", fix)
        if self.api_key_env is not None and (problem := describe_key_variable(self.api_key_env, self.endpoint)):
            diagnostics.add(f"{key}.api_key_env", *problem)


def is_endpoint(url: str) -> bool:
    """Return whether a URL can be an endpoint: HTTP, printable ASCII, a host, no credentials, query or fragment."""
    url = url.strip()
    try:
        parsed = urlsplit(url)
        host, port = parsed.hostname or "", parsed.port  # an invalid port raises
        named = all(0 < len(part) < 64 for part in host.rstrip(".").split("."))
        is_host = bool(ip_address(host.partition("%")[0])) if "[" in parsed.netloc else named
    except ValueError:
        return False
    is_plain = url.isascii() and url.isprintable() and " " not in url and len(url) <= MAX_URL
    extra = parsed.username or parsed.query or parsed.fragment or port == 0
    return parsed.scheme in ("http", "https") and is_plain and is_host and not extra


def describe_key_variable(name: str, endpoint: str) -> tuple[str, str] | None:
    """Return why this environment variable is not for this endpoint's key, with the fix; None if it may be."""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        fix = "Write the name, such as MY_JUDGE_KEY, and keep the key itself in the environment."
        return "this is not the name of an environment variable", fix
    fix = "Set MY_JUDGE_KEY to the endpoint's key, and name that."
    if not name.endswith(("_KEY", "_TOKEN")):
        return f"{name} does not end in _KEY or _TOKEN", fix
    host = endpoint_host(endpoint)
    service = next((word for word in SERVICE_HOSTS if name.startswith(f"{word}_")), None)
    if service is None or any(f".{host}".endswith(f".{domain}") for domain in SERVICE_HOSTS[service]):
        return None
    return f"{name} is the key of another service, and would be sent to {host}", fix


def endpoint_host(url: str) -> str:
    """Return the host of an endpoint's URL, without the port."""
    try:
        return urlsplit(url.strip()).hostname or ""
    except ValueError:
        return ""


def is_local(url: str) -> bool:
    """Return whether an endpoint is on this machine."""
    host = endpoint_host(url)
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class BenchmarkSection(RecipeSection):
    """One benchmark of lm-evaluation-harness. A plain string is its `task`."""

    task: NonEmpty
    """Name of an lm-eval task, group or tag, or a task file (YAML) with your own rows. Required."""
    num_fewshot: int | None = Field(default=None, ge=0, le=100)
    """Few-shot examples before each question. Default none: the task's own number."""
    limit: Positive | None = None
    """Maximum number of questions. Default none: all; a limit saves time."""
    apply_chat_template: bool = False
    """Ask each question as a chat message. Default false, as in lm-eval: scores equal those of its command line."""

    network: bool | None = None
    """Whether its rows, or the tasks of a group, may be downloaded if they are not cached. Default true for the name of
    a task, false for a task file."""

    paths: ClassVar = {"task": absolute_task}

    @property
    def needs_network(self) -> bool:
        """Return whether its rows, or its tasks, may be downloaded."""
        return not is_task_file(self.task) if self.network is None else self.network


def check_benchmark_keys(
    diagnostics: Diagnostics, benchmarks: tuple[BenchmarkSection, ...], variant: TaskVariant
) -> None:
    """Report benchmarks that this task's models cannot answer, and two with the same name in the report."""
    key = "evaluate.benchmarks"
    if benchmarks and variant.without_decoder:
        why, because = variant.without_decoder
        diagnostics.add(key, f"'{key}' runs on decoder language models, and {why}", "Remove it.", because)
        return
    names = [suite_name(benchmark.task) for benchmark in benchmarks]
    for i, name in enumerate(names):
        if name in names[:i]:
            fix = "Name each once. For another number of examples, include the task in a task file of another name."
            diagnostics.add(f"{key}.{i}", f"the scores of two benchmarks would both be called {name}", fix)


def check_controls(
    diagnostics: Diagnostics, controls: Sequence[str], gates: Iterable[tuple[str, Gate]], variant: TaskVariant
) -> None:
    """Report controls named twice or without pictures, and gates (with their keys) on controls that are not run."""
    diagnostics.repeated("evaluate.controls", controls, "a control")
    if not variant.may_have_images:
        diagnostics.no_effect("evaluate.controls", "without pictures", "Remove it.", "task")
    for key, gate in gates:
        if problem := find_control_problem(gate, variant.may_have_images, controls):
            diagnostics.add(key, *problem, "evaluate.controls")


def check_export_gate(
    diagnostics: Diagnostics, key: str, gate: Gate, metrics: Sequence[str], exports: Sequence[str]
) -> None:
    """Report a gate on an export that is not made, or on a metric that is not among the computed `metrics`."""
    _, name, metric = (*gate.metric.split(".", 2), "")[:3]
    if name not in exports:
        fix = f"Add {name} to deploy, or remove the gate."
        diagnostics.add(key, f"the gate {gate.text!r} uses an export that is not made", fix, "deploy")
    elif metric not in metrics:
        fix = f"{nearest(metric, metrics)} Write deploy.{name}.METRIC; metrics: {', '.join(metrics)}.".strip()
        diagnostics.add(key, f"the gate {gate.text!r} uses a metric that is not computed", fix, "evaluate.metrics")


def check_suite_gate(
    diagnostics: Diagnostics,
    key: str,
    gate: Gate,
    suites: Mapping[str, RecipeSection | tuple[BenchmarkSection, ...] | None],
    unused: dict[str, tuple[str, str]],
) -> None:
    """Report a gate on a suite that is not run, or on a metric that the suite does not measure here.

    `suites` has every suite by name, `unused` the keys of `fairness` without effect.
    """
    name, _, metric = gate.metric.partition(".")
    prefix = f"the gate {gate.text!r} uses"
    suite, metric_keys = suites.get(name), SUITE_KEYS.get(name, {})
    if gate.metric in RETIRED:
        problem = retired_problem(gate.metric, None)
        diagnostics.add(key, problem.what, problem.fix or "")
    elif name not in suites:
        fix = f"{nearest(name, [*suites])} Studies: {', '.join(suites)}.".strip()
        diagnostics.add(key, f"{prefix} an unknown study", fix)
    elif not suite:
        fix = f"Set evaluate.{name}, or remove the gate."
        diagnostics.add(key, f"{prefix} a study that is not run", fix, f"evaluate.{name}")
    elif name == "benchmarks":
        if "." not in metric:  # lm-eval knows the tasks and metrics only after it has read the task files
            fix = "Write benchmarks.TASK.METRIC, such as benchmarks.arc_easy.acc."
            diagnostics.add(key, f"the gate {gate.text!r} names a task without a metric", fix)
    elif metric not in metric_keys:
        fix = f"{nearest(metric, [*metric_keys])} Metrics of evaluate.{name}: {', '.join(metric_keys)}.".strip()
        diagnostics.add(key, f"{prefix} an unknown metric", fix)
    else:
        source = f"evaluate.{name}.{metric_keys[metric]}"
        files = getattr(suite, metric_keys[metric])
        if name == "fairness" and metric_keys[metric] in unused:
            diagnostics.add(key, f"{prefix} a metric that is not measured here", "Remove it.", source)
        elif not files:
            fix = f"Give {source} something to measure, or remove the gate."
            diagnostics.add(key, f"{prefix} a metric that is not measured", fix, source)


def suite_name(task: str) -> str:
    """Return the name of a benchmark's scores: the task's name, or the stem of a task file, as gates can write it."""
    return plain_name(PurePath(task).stem if is_task_file(task) else task)


def plain_name(name: str) -> str:
    """Return an lm-eval name as gates can write it: letters, digits, single dashes, underscores; a letter first."""
    plain = re.sub(r"-{2,}", "-", re.sub(r"[^A-Za-z0-9_-]+", "_", name)).strip("-")
    return plain if plain[:1].isalpha() and plain not in ("low", "high") else f"n{plain}"
