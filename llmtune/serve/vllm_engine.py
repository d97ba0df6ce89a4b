"""The same server by vLLM, where that is installed: its command line, with the adapters of runs as LoRA modules."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtune.errors import EnvironmentProblem

KEY_VARIABLE = "VLLM_API_KEY"


@dataclass(frozen=True)
class VllmRun:
    """A run as it is passed to vLLM."""

    name: str
    path: Path
    """A PEFT folder, or a folder of whole weights."""
    rank: int | None
    """The highest rank of the adapter; None for whole weights."""


def vllm_command(
    base: Path,
    base_name: str,
    runs: Sequence[VllmRun],
    *,
    host: str,
    port: int,
    dtype: str,
    quantized: bool,
    trust_remote_code: bool,
    generation: Mapping[str, object],
) -> list[str]:
    """Return the command that serves `runs` on `base`; the first run's folder has the tokenizer and chat template.

    `generation` are the settings that hold where a request does not state them.
    """
    first = runs[0]
    whole = first.rank is None
    command = ["vllm", "serve", str(first.path if whole else base), "--tokenizer", str(first.path)]
    command += ["--served-model-name", first.name if whole else base_name, "--host", host, "--port", str(port)]
    command += ["--dtype", dtype, "--generation-config", "vllm"]
    command += ["--override-generation-config", json.dumps(generation)]
    if (template := first.path / "chat_template.jinja").is_file():
        command += ["--chat-template", str(template)]
    if quantized:
        command += ["--quantization", "bitsandbytes"]
    if trust_remote_code:
        command.append("--trust-remote-code")
    if not whole:
        ranks = max(run.rank or 1 for run in runs)
        command += ["--enable-lora", "--max-lora-rank", str(next(r for r in _RANKS if r >= ranks))]
        command += ["--max-loras", str(len(runs)), "--lora-modules", *(f"{run.name}={run.path}" for run in runs)]
    return command


_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512, 1 << 30)
"""What vLLM accepts for --max-lora-rank; a higher one is left for it to refuse."""


def hand_over(command: Sequence[str], key: str | None) -> None:
    """Become vLLM: this process goes on as the command, with the key in its environment alone.

    Raises EnvironmentProblem where it is not installed.
    """
    program = require_vllm()
    kept = {name: value for name, value in os.environ.items() if name not in {"LLMTUNE_API_KEY", KEY_VARIABLE}}
    os.execve(program, list(command), {**kept, **({KEY_VARIABLE: key} if key else {})})  # noqa: S606 - no shell is wanted


def require_vllm() -> str:
    """Return where vLLM's command is; raises EnvironmentProblem where it is not installed."""
    program = shutil.which("vllm")
    if program is None:
        fix = "Install it (pip install vllm; it needs a GPU), or omit --engine: llmtune's own server needs none."
        raise EnvironmentProblem.of("vLLM is not installed: there is no command vllm", "--engine", fix)
    return program
