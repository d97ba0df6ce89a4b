"""Describe the machine of the measurements: processor, accelerator, memory, versions, date; no host names or paths."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "tokenizers", "llamafactory")


def describe_machine() -> dict[str, Any]:
    """Return the description of the machine, ready for JSON."""
    import psutil
    import torch

    from llmtune import __version__

    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # those that torch may use
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.system(),
        "python": platform.python_version(),
        "llmtune": __version__,
    }
    found |= {name: package_version(name) for name in PACKAGES if package_version(name)}
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def processor() -> str:
    """Name the processor, with its bfloat16 instructions where the system lists them."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    special = [name for name in ("avx512_bf16", "amx_bf16") if name in facts.get("flags", "").split()]
    family = f", family {facts['cpu family']} model {facts['model']}" if "cpu family" in facts else ""
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name}{family}" + (f", {', '.join(special)}" if special else "")


def package_version(name: str) -> str | None:
    """Return the installed version, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
