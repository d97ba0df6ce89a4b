"""`llmtune explain`: look inside a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.options import AsJson, Offline, RunArgument, Threads
from llmtune.cli.output_streams import handled, print_json, stderr_console
from llmtune.store.process_environment import gc_paused, is_remote_model, prepare_environment

if TYPE_CHECKING:
    from llmtune.explain.explainer import Explainer, Target

app = typer.Typer(help="Look inside a model: base, tuned, and the difference.", no_args_is_help=True)
Looked = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder, a model folder, a hub name, or builtin:NAME.")
]
OutFolder = Annotated[
    Path | None, typer.Option("--out", help="Folder for the pictures (default: RUN/explain, or explain/NAME).")
]
Images = Annotated[
    list[Path] | None,
    typer.Option("--image", help="A picture before the text, or at each <image> in it (chat); may be repeated."),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with a model (never for a run).")]


@app.command()
@handled
def attention(
    run: Looked,
    text: Annotated[str | None, typer.Option("--text", help="Text for the model to read.")] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            help="Text for the decoder of an encoder-decoder (default: its own answer; for a run, the base's).",
        ),
    ] = None,
    pair: Annotated[str | None, typer.Option("--pair", help="A second text after the first (encoders).")] = None,
    audio: Annotated[Path | None, typer.Option("--audio", help="A recording, instead of a text (speech).")] = None,
    language: Annotated[
        str | None,
        typer.Option("--language", help="Spoken language, or SOURCE,TARGET of a translator (never for a run)."),
    ] = None,
    image: Images = None,
    word: Annotated[
        str | None, typer.Option("--word", help="Word of the answer that is drawn on pictures (default: its first).")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the text into the chat template (default: use it unchanged).")
    ] = False,
    kind: Annotated[
        str | None, typer.Option("--kind", help="self, masked-self or cross (default: all kinds of the model).")
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            "--layer",
            min=0,
            help="Layer, from 0 (default: where words look most at words, or at pictures; for a run, changed most).",
        ),
    ] = None,
    head: Annotated[
        str, typer.Option("--head", help="A number from 0, mean, or rollout (through all layers up to this one).")
    ] = "mean",
    threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Minimum weight of an edge in the graph (default: about two edges per word)."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=2048, help="Maximum tokens of a drawn text.")] = 512,
    cut: Annotated[bool, typer.Option("--cut", help="Truncate long inputs instead of refusing them.")] = False,
    out: OutFolder = None,
    trust_remote_code: Trust = False,
    threads: Threads = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Show which words look at which, as heatmap, graph and page of all heads; base, tuned and difference."""
    opened = _open(run, threads, offline, trust_remote_code, images=bool(image))
    from llmtune.explain.attention_explainer import AttentionExplainer
    from llmtune.explain.inputs import AttentionRequest

    request = AttentionRequest(
        *(text, target, pair, audio, language, chat, max_tokens, cut, kind, layer, head, threshold),
        image=tuple(image or ()),
        word=word,
    )
    _print_explanation(AttentionExplainer(opened, stderr_console(), request), opened, out, as_json)


@app.command()
@handled
def generation(
    run: Looked,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="A message, or a text to continue, to process or to fill in.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message before the prompt (chat).")] = None,
    context: Annotated[str | None, typer.Option("--context", help="The text with the answer (qa).")] = None,
    audio: Annotated[Path | None, typer.Option("--audio", help="A recording (Whisper).")] = None,
    image: Images = None,
    plain: Annotated[bool, typer.Option("--plain", help="Ignore a model's chat template (never for a run).")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, max=256, help="Maximum tokens of the answer (default: the run's, or 32).")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.01, max=100, help="Show the words it would keep (default: the run's, or 0.7).")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="Show the words it would keep (default: the run's, or 0.9).")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Show the words it would keep (default: all).")] = None,
    sample: Annotated[
        bool | None,
        typer.Option("--sample/--greedy", help="Sample words, or take the likeliest (default: as the run)."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed for sampling (default: the run's, or 0).")] = None,
    top: Annotated[int, typer.Option(min=1, max=40, help="Words listed for each step in the terminal.")] = 5,
    out: OutFolder = None,
    trust_remote_code: Trust = False,
    threads: Threads = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Show word by word how an answer is generated: tokens, layers, likely words; and where base and tuned diverge."""
    target = _open(run, threads, offline, trust_remote_code, images=bool(image))
    from llmtune.explain.generation_explainer import GenerationExplainer
    from llmtune.explain.inputs import PromptRequest

    request = PromptRequest(
        *(prompt, system, context, audio, plain, max_new_tokens, temperature, top_p, top_k, sample, seed),
        image=tuple(image or ()),
    )
    _print_explanation(GenerationExplainer(target, stderr_console(), request, top), target, out, as_json)


@app.command()
@handled
def positions(
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="A run or a model (default: compute the sinusoidal encoding)."),
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="A text that gives the words at the positions.")] = None,
    length: Annotated[
        int | None, typer.Option("--length", min=1, help="Number of positions, if no text is given.")
    ] = None,
    dimension: Annotated[
        int | None, typer.Option("--dimension", help="Even number of dimensions of the encoding (default: 64).")
    ] = None,
    base: Annotated[
        float | None, typer.Option("--base", help="Base of the encoding, which sets the longest wave (default: 10000).")
    ] = None,
    out: OutFolder = None,
    trust_remote_code: Trust = False,
    threads: Threads = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Show a model's position encoding: sines, a learned table, rotations (RoPE), or biases by distance (T5)."""
    if run is None:
        prepare_environment(network=False, threads=threads)
    target = None if run is None else _open(run, threads, offline, trust_remote_code)
    with gc_paused():
        from llmtune.explain.positions_explainer import PositionsExplainer

    explainer = PositionsExplainer(target, stderr_console(), text, length, dimension, base)
    _print_explanation(explainer, target, out or (None if target else Path("explain/sinusoidal")), as_json)


@app.command()
@handled
def model(
    run: Looked,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Time one block on texts of growing length, for about 10 s.")
    ] = True,
    out: OutFolder = None,
    trust_remote_code: Trust = False,
    threads: Threads = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Draw the architecture: parts, shapes, parameters, residual paths, trained modules, and the cost of a text."""
    target = _open(run, threads, offline, trust_remote_code)
    from llmtune.explain.model_explainer import ModelExplainer

    _print_explanation(ModelExplainer(target, stderr_console(), measure), target, out, as_json)


@app.command()
@handled
def adapter(
    run: RunArgument,
    out: OutFolder = None,
    threads: Threads = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Show how far the tuning moved each layer and module of a run's model, and in how many directions."""
    target = _open(str(run), threads, offline)
    from llmtune.explain.adapter_explainer import AdapterExplainer

    _print_explanation(AdapterExplainer(target, stderr_console()), target, out, as_json)


def _open(
    run: str, threads: int | None, offline: bool, trust_remote_code: bool = False, *, images: bool = False
) -> Target:
    """Open a run or a model by its name."""
    prepare_environment(network=is_remote_model(run) and not offline, threads=threads)
    with gc_paused():
        from llmtune.explain.explainer import open_target

    return open_target(run, stderr_console(), offline=offline, trust_remote_code=trust_remote_code, images=images)


def _print_explanation(explainer: Explainer, target: Target | None, out: Path | None, as_json: bool) -> None:
    """Write and print the result with its files, and link the pages of a run in its report."""
    from rich.markup import escape

    from llmtune.display.console import VisibleConsole, print_page
    from llmtune.report.report_page import link_explanations

    folder = out or (target.folder if target else Path("explain"))
    explanation = explainer.explain(folder)
    if as_json:
        print_json({**explanation.values, "files": explanation.files})
    else:
        print_page(explanation.page, VisibleConsole(highlight=False))
    console = stderr_console()
    for path in explanation.files:
        console.print(f"written: {escape(str(path))}")
    if target and target.recipe and folder == target.folder and link_explanations(folder.parent):
        console.print(f"linked from: {escape(str(folder.parent / 'report.html'))}")
