"""The tools, each in its own environment."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "mlx"
"""Distributions whose versions are shown next to a tool's own."""
HERE = Path(__file__).resolve().parent
VARIABLES = {
    "PYTHONPATH": str(HERE.parent),
    "PYTHONSAFEPATH": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
"""Environment variables of every adapter."""


@dataclass(frozen=True)
class Tool:
    """A tool as `tools.toml` describes it."""

    name: str
    title: str
    package: str
    """The distribution whose version is shown."""
    requires: Sequence[str]
    """What pip installs; empty for the project's own environment."""
    cache: Path
    """Where environments are made."""
    python: str = sys.executable
    """The Python that makes the environment."""
    absent: str = ""
    """Why the page does not show the tool."""
    given: str = ""
    """What the adapter gives the tool besides settings; the page shows it."""
    source: str = ""
    """The folder with the tool's code, if it is in this repository: its version stays while the code changes."""
    find_links: str = ""
    """A further place for pip to look for files, such as torch's builds without CUDA."""

    @property
    def adapter(self) -> Path:
        return HERE / "tools" / f"{self.name}.py"

    def interpreter(self) -> Path:
        """Return the Python of the tool's environment, which is made at the first use; a link is used as it is.

        Raises:
            CalledProcessError: it does not install here.
        """
        if not self.requires:
            return Path(sys.executable)
        folder = self.cache / "environments" / self.name
        done, wanted = folder / ".done", "\n".join(self.requires)
        if not folder.is_symlink() and (not done.exists() or done.read_text() != wanted):
            subprocess.run([self.python, "-m", "venv", "--clear", folder], check=True)
            links = ["--find-links", self.find_links] if self.find_links else []
            subprocess.run(
                [folder / "bin/python", "-m", "pip", "install", "--quiet", *links, *self.requires], check=True
            )
            done.write_text(wanted)
        return folder / "bin" / "python"

    def read_versions(self) -> dict[str, str]:
        """Return the versions of the tool, first, and of the libraries in its environment.

        Raises:
            CalledProcessError: it does not install here.
        """
        code = "import importlib.metadata as m; print(*(f'{d.name} {d.version}' for d in m.distributions()), sep='\\n')"
        lines = (line.split() for line in self.run("-c", code).stdout.splitlines())
        installed = {name.lower().replace("_", "-"): version for name, version in lines}
        if self.package not in installed:
            raise subprocess.CalledProcessError(1, self.package, stderr=f"{self.package} is not installed")
        names = [self.package, *(name for name in LIBRARIES if name != self.package)]
        return {name: installed[name] for name in names if name in installed}

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(argument) for argument in (self.interpreter(), *arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **VARIABLES})


def list_tools(cache: Path) -> dict[str, Tool]:
    """Return the tools of `tools.toml` by name."""
    table = tomllib.loads((HERE / "tools.toml").read_text(encoding="utf-8"))
    return {name: Tool(name=name, cache=cache, **entry) for name, entry in table.items()}
