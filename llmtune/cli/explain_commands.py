"""`llmtune explain`: look inside a model."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.options import AsJson, Offline, RunArgument, Threads
from llmtune.cli.output_streams import handled, print_json, stderr_console
from llmtune.store.process_environment import at_once, is_remote_model, prepare_environment

if TYPE_CHECKING:
    from llmtune.explain.target import Subject

app = typer.Typer(
    help="Look inside a model: the base, the tuned one, and the difference between the two.", no_args_is_help=True
)
Looked = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder, a model folder, a hub name, or builtin:NAME.")
]
OutFolder = Annotated[
    Path | None, typer.Option("--out", help="Folder for the pictures (default: RUN/explain, or explain/NAME).")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that a model brings (never of a run).")]


class View(StrEnum):
    """Which pictures `attention` draws beside its page."""

    heatmap = "heatmap"
    graph = "graph"
    both = "both"


@app.callback()
def _explain() -> None:
    pass


@app.command()
@handled
def attention(
    run: Looked,
    text: Annotated[str | None, typer.Option("--text", help="What the model reads.")] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", help="What an encoder-decoder writes (default: what it answers; of a run, the base)."),
    ] = None,
    pair: Annotated[str | None, typer.Option("--pair", help="A second text behind the first (encoders).")] = None,
    audio: Annotated[Path | None, typer.Option("--audio", help="A recording, instead of a text (speech).")] = None,
    language: Annotated[
        str | None,
        typer.Option("--language", help="Spoken language, or SOURCE,TARGET of a translator (never of a run)."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the text into the chat template; else it is read as it stands.")
    ] = False,
    kind: Annotated[
        str | None, typer.Option("--kind", help="self, masked-self or cross (default: all that the model has).")
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            "--layer", help="A number from 0, or all (default: where words look at words most; of a run, changed most)."
        ),
    ] = None,
    head: Annotated[
        str, typer.Option("--head", help="A number from 0, mean, all, or rollout: through all layers up to this one.")
    ] = "mean",
    view: Annotated[View, typer.Option("--view", help="Pictures beside the page.")] = View.both,
    threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Weight from which the graph has an edge (default: about two edges a word)."),
    ] = None,
    special: Annotated[
        bool, typer.Option("--special", help="Draw a graph's edges to special tokens and to the first one as well.")
    ] = False,
    words: Annotated[bool, typer.Option("--words", help="Put the pieces of a word into one row.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, max=2048, help="Longest text that is drawn, in tokens.")] = 512,
    cut: Annotated[bool, typer.Option("--cut", help="Cut what is too long, instead of refusing it.")] = False,
    out: OutFolder = None,
    trust_remote_code: Trust = False,
    threads: Threads = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Show which words look at which: every layer and head, as heatmap and as graph; base, tuned and difference."""
    prepare_environment(network=is_remote_model(run) and not offline, threads=threads)
    with at_once():
        from rich.console import Console

        from llmtune.explain.attention import explain_attention
        from llmtune.explain.attention_inputs import Given
        from llmtune.explain.attention_selection import Wishes
        from llmtune.explain.attention_table import print_attention
        from llmtune.explain.target import open_subject

    console = stderr_console()
    subject = open_subject(run, console, offline=offline, trust_remote_code=trust_remote_code)
    given = Given(text, target, pair, audio, language, chat, words, max_tokens, cut)
    wishes = Wishes(kind, layer, head, view.value, threshold, special)
    told, written = explain_attention(subject, given, wishes, out or subject.folder, console)
    if as_json:
        print_json({**told, "files": written})
    else:
        print_attention(told, Console(highlight=False))
    _tell(written, subject)


@app.command()
@handled
def generation(
    run: Looked,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="A message, or the text to go on from, to work on or to fill in.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message before it (chat).")] = None,
    context: Annotated[str | None, typer.Option("--context", help="The text that holds the answer (qa).")] = None,
    audio: Annotated[Path | None, typer.Option("--audio", help="A recording (Whisper).")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Leave a model's chat template out (never of a run).")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, max=256, help="Longest answer (default: the run's, or 32).")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.01, max=100, help="What it would keep is shown (default: the run's, or 0.7).")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="What it would keep is shown (default: the run's, or 0.9).")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="What it would keep is shown (default: all).")] = None,
    sample: Annotated[
        bool | None, typer.Option("--sample/--greedy", help="Draw words, or take the likeliest (default: as the run).")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the draws (default: the run's, or 0).")] = None,
    top: Annotated[int, typer.Option(min=1, max=40, help="Words listed for each step in the terminal.")] = 5,
    out: OutFolder = None,
    trust_remote_code: Trust = False,
    threads: Threads = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Show how an answer comes about, word by word: tokens, layers, likely words; and where base and tuned part."""
    prepare_environment(network=is_remote_model(run) and not offline, threads=threads)
    with at_once():
        from rich.console import Console

        from llmtune.explain.generation import Wishes, explain_generation
        from llmtune.explain.generation_inputs import Given
        from llmtune.explain.generation_table import print_generation
        from llmtune.explain.target import open_subject

    console = stderr_console()
    subject = open_subject(run, console, offline=offline, trust_remote_code=trust_remote_code)
    given = Given(prompt, system, context, audio, plain)
    wishes = Wishes(max_new_tokens, temperature, top_p, top_k, sample, seed)
    told, written = explain_generation(subject, given, wishes, out or subject.folder, console)
    if as_json:
        print_json({**told, "files": written})
    else:
        print_generation(told, Console(highlight=False), top)
    _tell(written, subject)


@app.command()
@handled
def positions(
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="A run or a model; without one the sinusoidal encoding is computed."),
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="A text, whose words stand at the positions.")] = None,
    length: Annotated[
        int | None, typer.Option("--length", min=1, help="So many positions, where there is no text.")
    ] = None,
    dimension: Annotated[
        int | None, typer.Option("--dimension", help="Numbers a position of the encoding, even (default: 64).")
    ] = None,
    base: Annotated[
        float | None, typer.Option("--base", help="n of the encoding, which sets the longest wave (default: 10000).")
    ] = None,
    out: OutFolder = None,
    trust_remote_code: Trust = False,
    threads: Threads = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Show how a model knows the order of words: sines, a learned table, rotations (RoPE), biases by distance (T5)."""
    prepare_environment(network=run is not None and is_remote_model(run) and not offline, threads=threads)
    with at_once():
        from rich.console import Console

        from llmtune.explain.positions import Asked, explain_positions
        from llmtune.explain.positions_table import print_positions
        from llmtune.explain.target import open_subject

    console = stderr_console()
    options = {"offline": offline, "trust_remote_code": trust_remote_code}
    subject = None if run is None else open_subject(run, console, **options)
    folder = out or (subject.folder if subject else Path("explain") / "sinusoidal")
    shown, told, written = explain_positions(Asked(text, length, dimension, base), subject, folder, console)
    if as_json:
        print_json({**told, "files": written})
    else:
        print_positions(shown, Console(highlight=False))
    _tell(written, subject)


@app.command()
@handled
def model(
    run: Looked,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Run one block over longer and longer texts, about 10 s.")
    ] = True,
    out: OutFolder = None,
    trust_remote_code: Trust = False,
    threads: Threads = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Draw the architecture: parts, shapes, parameters, residual paths, what was trained, and what a text costs."""
    prepare_environment(network=is_remote_model(run) and not offline, threads=threads)
    with at_once():
        from rich.console import Console

        from llmtune.explain.model import explain_model
        from llmtune.explain.model_table import print_model
        from llmtune.explain.target import open_subject

    console = stderr_console()
    subject = open_subject(run, console, offline=offline, trust_remote_code=trust_remote_code)
    portrait, told, written = explain_model(subject, out or subject.folder, console, measure=measure)
    if as_json:
        print_json({**told, "files": written})
    else:
        print_model(portrait, Console(highlight=False))
    _tell(written, subject)


@app.command()
@handled
def adapter(
    run: RunArgument,
    out: OutFolder = None,
    threads: Threads = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Show where the tuning went: how far each layer and module of a run's model moved, and in how many directions."""
    prepare_environment(network=False, threads=threads)
    with at_once():
        from rich.console import Console

        from llmtune.explain.adapter import explain_adapter, require_run
        from llmtune.explain.adapter_table import print_moves
        from llmtune.explain.target import open_subject

    console = stderr_console()
    require_run(run)
    subject = open_subject(str(run), console, offline=offline)
    found, told, written = explain_adapter(subject, out or subject.folder, console)
    if as_json:
        print_json({**told, "files": written})
    else:
        print_moves(found, Console(highlight=False))
    _tell(written, subject)


def _tell(written: Sequence[Path], subject: Subject | None = None) -> None:
    """Say which files were written; a run's report is written anew, with links to the pages in the run's own folder."""
    from rich.markup import escape

    from llmtune.report import link_explanations

    console = stderr_console()
    for path in written:
        console.print(f"written: {escape(str(path))}")
    own = subject is not None and subject.recipe is not None and any(path.parent == subject.folder for path in written)
    if subject is not None and own and link_explanations(subject.folder.parent):
        console.print(f"linked from: {escape(str(subject.folder.parent / 'report.html'))}")
