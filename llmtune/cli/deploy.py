"""`llmtune deploy`: turn a run into something to ship."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.options import AsJson, DryRun, Offline, RunArgument, Threads
from llmtune.cli.output_streams import Terminated, handled, print_json, stderr_console
from llmtune.errors import Problem, RecipeError, nearest
from llmtune.store.process_environment import gc_paused, prepare_environment

if TYPE_CHECKING:
    from llmtune.serve.server import ServeOptions

ENGINES = ("own", "vllm")
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Most test rows to score it on (default: the run's deploy.limit).")
]

app = typer.Typer(help="Merge, export, serve, certify or publish a run.", no_args_is_help=True)


@app.command()
@handled
def serve(
    addresses: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN", help="A run, or release:NAME. With --engine vllm, several with the same base."),
    ] = None,
    release: Annotated[
        str | None, typer.Option("--release", metavar="NAME", help="Serve the current release, and each later one.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="NAME=RUN", help="Serve a run under a name of your choice.")
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on. Other than localhost needs an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 picks a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="File with the API key (or set LLMTUNE_API_KEY).")
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Merge the adapter into the base in memory.")] = False,
    engine: Annotated[str, typer.Option("--engine", help="own, or vllm if installed.")] = "own",
    max_queue: Annotated[
        int, typer.Option("--max-queue", min=1, help="Maximum waiting requests; more get status 429.")
    ] = 64,
    max_batch: Annotated[int | None, typer.Option("--max-batch", hidden=True)] = None,
    max_body: Annotated[
        int | None,
        typer.Option("--max-body", min=1024, help="Maximum bytes (default: 2 MiB; recordings and pictures 32 MiB)."),
    ] = None,
    grace: Annotated[
        float, typer.Option("--grace", min=0, max=3600, help="Seconds for answers to finish after SIGTERM.")
    ] = 30.0,
    threads: Threads = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Serve a tuned model with OpenAI's endpoints, or its task's own endpoint. Ctrl-C or SIGTERM stops."""
    stated = [*([f"release:{release}"] if release else []), *map(str, addresses or [])]
    _check_engine(engine, max_queue=max_queue != 64, max_body=max_body, grace=grace != 30.0)
    _refuse_retired(max_batch, several=engine == "own" and len(stated) + sum("=" in one for one in adapter or []) > 1)
    prepare_environment(network=False, threads=threads)
    with gc_paused():
        from llmtune.serve.server import ServeOptions

    options = ServeOptions(
        host=host,
        port=port,
        key_file=api_key_file,
        merged=merged,
        max_queue=max_queue,
        max_body=max_body,
        grace_seconds=grace,
        offline=offline,
    )
    if engine == "vllm":
        from llmtune.serve.vllm_engine import serve_by_vllm

        serve_by_vllm(_find_served(stated, adapter or [], engine), options, stderr_console())
    else:
        ((name, run),) = _find_served(stated, adapter or [], engine).items()
        _serve_until_stopped(name, run, options, as_json, _reloaded_release(stated))


def _refuse_retired(max_batch: int | None, *, several: bool) -> None:
    from llmtune.recipe.retired import refuse_retired  # not for --help

    if max_batch is not None:
        raise refuse_retired("deploy serve --max-batch")
    if several:
        raise refuse_retired("deploy serve RUN RUN")


def _find_served(stated: list[str], adapters: list[str], engine: str) -> dict[str, Path]:
    """Return the run folders to serve by name.

    Raises RecipeError if there is none, a name is used twice, or a release is to be reloaded, which vLLM cannot do.
    """
    from llmtune.serve.server import parse_run_names
    from llmtune.store.run_listing import find_run

    if engine != "own" and (release := _reloaded_release(stated)):
        fix = f"Serve it alone with --engine own, or name a fixed one: release:{release}@HASH."
        raise RecipeError.of(f"it is reloaded on each promotion, which --engine {engine} cannot do", stated[0], fix)
    return parse_run_names([find_run(Path(one)) for one in stated], adapters)


def _reloaded_release(stated: list[str]) -> str | None:
    """Return the name of the release that is reloaded when another one becomes current; None for fixed runs."""
    current = [one for one in stated if one.startswith("release:") and "@" not in one]
    return current[0].removeprefix("release:") if current else None


def _serve_until_stopped(
    name: str, run: Path, options: ServeOptions, as_json: bool, release: str | None = None
) -> None:
    """Serve until Ctrl-C or SIGTERM, then exit with its code."""
    from llmtune.serve.server import serve_run

    console = stderr_console()
    try:
        serve_run(name, run, options, console, print_json if as_json else lambda ready: None, release)
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, Terminated)
        console.print("terminated: accepting no more requests" if terminated else "stopped")
        raise typer.Exit(143 if terminated else 130) from None


def _check_engine(engine: str, **stated: object) -> None:
    """Raise RecipeError for an unknown engine, or stated options that it does not support."""
    from llmtune.recipe.extras import require_extra

    require_extra("serve", "llmtune deploy serve")
    if engine not in ENGINES:
        what = f"unknown engine {engine!r}.{nearest(engine, ENGINES)}"
        raise RecipeError.of(what, "--engine", f"Choose one of: {', '.join(ENGINES)}.")
    if engine == "vllm":
        fix = "Omit it: vLLM has its own settings."
        options = [f"--{name.replace('_', '-')}" for name, value in stated.items() if value]
        RecipeError.collect(Problem("has no effect with --engine vllm", option, fix) for option in options)


@app.command("merge")
@handled
def merge_command(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option("--out", help="Output folder (default: RUN/merged).")] = None,
    onto: Annotated[
        str | None,
        typer.Option("--onto", help="original or dequantized weights (default: those used in training)."),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16 (auto: as trained).")] = "auto",
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Of a model that also reads images, only the language model.")
    ] = False,
    limit: Limit = None,
    threads: Threads = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Merge the adapter into the base weights, and certify the result against the adapter; exit 6 if they differ."""
    prepare_environment(network=False, threads=threads)
    with gc_paused():
        from llmtune.deploy.export import export, open_to_export
        from llmtune.deploy.merged_model import merged_format

    context = open_to_export(run, stderr_console(), offline=offline, limit=limit)
    certificate = export(context, merged_format(onto, dtype, text_only), out)
    if as_json:
        print_json(certificate)


@app.command()
@handled
def gguf(
    run: RunArgument,
    number_format: Annotated[
        str, typer.Option("--type", help="f32, f16, bf16, q8_0 or q4_k_m (needs llama.cpp); f32 or f16 for an adapter.")
    ] = "f16",
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Write only the LoRA, for use with its base's GGUF file.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Output folder (default: RUN/gguf/TYPE).")] = None,
    onto: Annotated[
        str | None, typer.Option("--onto", help="For qlora: original or dequantized weights (default: dequantized).")
    ] = None,
    limit: Limit = None,
    threads: Threads = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Write a GGUF file for llama.cpp with an Ollama Modelfile, and certify it; exit 6 if it differs."""
    if adapter_only and limit is not None:
        raise RecipeError.of("an adapter without its base is not scored", "--limit", "Omit --limit.")
    prepare_environment(network=False, threads=threads)
    with gc_paused():
        from llmtune.deploy.export import export, open_to_export
        from llmtune.deploy.gguf_export import gguf_format

    context = open_to_export(run, stderr_console(), offline=offline, limit=limit)
    certificate = export(context, gguf_format(number_format.lower(), onto=onto, adapter_only=adapter_only), out)
    if as_json:
        print_json(certificate)


@app.command("onnx")
@handled
def onnx_command(
    run: RunArgument,
    int8: Annotated[bool, typer.Option("--int8", help="Round weights to 8 bits.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Output folder (default: RUN/onnx/float32 or int8).")
    ] = None,
    limit: Limit = None,
    threads: Threads = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Write ONNX files for onnxruntime with a script that runs them, and certify them; exit 6 if they differ."""
    prepare_environment(network=False, threads=threads)
    with gc_paused():
        from llmtune.deploy.export import export, open_to_export
        from llmtune.deploy.onnx_export import onnx_format

    context = open_to_export(run, stderr_console(), offline=offline, limit=limit)
    certificate = export(context, onnx_format(int8=int8), out)
    if as_json:
        print_json(certificate)


@app.command("quantize")
@handled
def quantize_command(
    run: RunArgument,
    scheme: Annotated[
        str,
        typer.Option("--scheme", help="w4a16 (4-bit weights), w8a8 or fp8 (8-bit weights and activations)."),
    ] = "w4a16",
    out: Annotated[Path | None, typer.Option("--out", help="Output folder (default: RUN/quantized/SCHEME).")] = None,
    limit: Limit = None,
    threads: Threads = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Merge and quantise a model for vLLM (compressed-tensors), certify and score it; exit 6 if it differs."""
    prepare_environment(network=False, threads=threads)
    with gc_paused():
        from llmtune.deploy.export import export, open_to_export
        from llmtune.deploy.quantized_model import quantized_format

    context = open_to_export(run, stderr_console(), offline=offline, limit=limit)
    certificate = export(context, quantized_format(scheme.lower()), out)
    if as_json:
        print_json(certificate)


@app.command()
@handled
def publish(
    run: RunArgument,
    to: Annotated[Path | None, typer.Option("--to", help="Write a folder in the hub's layout.")] = None,
    repo: Annotated[
        str | None, typer.Option("--repo", metavar="OWNER/NAME", help="Upload to this model on the hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the hub's repository private.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="Publish the merged model instead of the adapter.")] = False,
    gguf: Annotated[Path | None, typer.Option("--gguf", metavar="FILE", help="Also publish this GGUF file.")] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", metavar="OWNER/NAME", help="The hub name of a local base model.")
    ] = None,
    license_name: Annotated[
        str | None, typer.Option("--license", help="Licence by the hub's short name (default: the base model's).")
    ] = None,
    data_license: Annotated[str | None, typer.Option("--data-license", help="Licence of the training data.")] = None,
    language: Annotated[
        list[str] | None, typer.Option("--language", metavar="CODE", help="Language code, such as en; may be repeated.")
    ] = None,
    despite_gates: Annotated[
        bool, typer.Option("--despite-gates", help="Publish although a gate of the run failed.")
    ] = False,
    dry_run: DryRun = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Publish model, model card, certificate, lock and recipe to a folder or the hub, without paths or secrets."""
    prepare_environment(network=repo is not None and not offline)
    with gc_paused():
        from llmtune.deploy.model_card import PublishOptions
        from llmtune.deploy.publish import publish_run

    options = PublishOptions(
        to=to,
        repo=repo,
        private=private,
        merged=merged,
        gguf=gguf,
        dry_run=dry_run,
        despite_gates=despite_gates,
        offline=offline,
        base_model=base_model,
        license=license_name,
        data_license=data_license,
        languages=tuple(language or ()),
    )
    published = publish_run(run, options, stderr_console())
    if as_json:
        print_json(published)


@app.command()
@handled
def certify(
    export: Annotated[
        str,
        typer.Argument(metavar="EXPORT", help="A GGUF or ONNX file, a model folder or a URL; or RUN with --url."),
    ],
    run: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="The run that the export was made from.")
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", help="URL of the server, such as http://127.0.0.1:8000, if EXPORT is a run.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="The server's model to ask (default: the run's name).")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", metavar="FILE", help="File with the endpoint's API key.")
    ] = None,
    limit: Limit = None,
    threads: Threads = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Compare an export with the tuned model and score it on the run's test rows; exit 6 if they differ."""
    if (run is None) == (url is None):
        fix = "Write `llmtune deploy certify EXPORT --run RUN`, or RUN --url URL for an endpoint."
        raise RecipeError.of("an export and its run are needed", "--run", fix)
    prepare_environment(network=False, threads=threads)
    with gc_paused():
        from llmtune.deploy.products import certify_export
        from llmtune.store.run_listing import find_run

    console = stderr_console()
    url = url or (export if "://" in export else None)
    folder = find_run(Path(run or export))
    if url is not None:
        from llmtune.recipe.extras import require_extra

        require_extra("serve", "--url")
        from llmtune.deploy.endpoint_parity import certify_run

        certificate = certify_run(
            folder, url=url, model=model, key_file=api_key_file, offline=offline, console=console, limit=limit
        )
    else:
        ours = {"--model": model, "--api-key-file": api_key_file}
        RecipeError.collect(Problem("applies to endpoints only", name, "Omit it.") for name, one in ours.items() if one)
        certificate = certify_export(folder, Path(export), offline=offline, console=console, limit=limit)
    if as_json:
        print_json(certificate)
