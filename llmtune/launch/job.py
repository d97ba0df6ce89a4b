"""What a scheduler is given to start: `launch local` with the options of this command; and how its end becomes ours."""

from __future__ import annotations

import base64
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import walk_tree

from llmtune.errors import BY_EXIT_CODE, EnvironmentProblem, LlmtuneError, Problem, RecipeError, Stopped
from llmtune.launch.topology import Topology
from llmtune.recipe.builtin import recipes_folder
from llmtune.recipe.loader import LoadedRecipe
from llmtune.records import Json
from llmtune.store.run_folder import REPORTS

BEGIN, END = "-----BEGIN LLMTUNE REPORT-----", "-----END LLMTUNE REPORT-----"
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Job:
    """A recipe on its way to a scheduler."""

    loaded: LoadedRecipe
    folder: Path
    """The run folder."""
    topology: Topology
    options: tuple[str, ...] = ()
    """More options of `launch local`, such as `--set` and its value."""

    @property
    def name(self) -> str:
        """The run's name."""
        return self.loaded.recipe.name

    @property
    def slug(self) -> str:
        """The run folder's name as schedulers take one: lower case, digits and hyphens, a letter first."""
        return re.sub(r"[^a-z0-9]+", "-", self.folder.name.lower()).lstrip("-0123456789")[:40].rstrip("-") or "run"

    @property
    def shipped(self) -> str | None:
        """The name of a recipe that every llmtune has; None for a file of the user's own."""
        return self.loaded.file.stem if self.loaded.file.parent == recipes_folder() else None

    def command(self, program: str, recipe: str, folder: str, rank: str = "", address: str = "") -> str:
        """Return the line for the shell of each machine; `rank` and `address` are what its variables say there."""
        where = self.topology
        words = ["launch", "local", recipe, "--out", folder, "--processes", str(where.processes)]
        words += ["--strategy", where.strategy, "--max-restarts", str(where.max_restarts), *self.options]
        line = f"{program} {shlex.join(words)}"
        if where.machines == 1:
            return line
        return f'{line} --machines {where.machines} --rank "{rank}" --address "{address}"'


def call(words: Sequence[str], install: str, stdin: str | None = None) -> str:
    """Run a scheduler's own command and return what it prints.

    Raises EnvironmentProblem where it is not installed or refuses.
    """
    require_command(words[0], install)
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise EnvironmentProblem.of(said, words[0], "The scheduler refused; --dry-run prints what it is sent.")
    return done.stdout.strip()


def require_command(name: str, install: str) -> None:
    """Raise EnvironmentProblem where a command is not on this machine."""
    if shutil.which(name) is None:
        raise EnvironmentProblem.of(f"there is no command {name} here", name, install)


def require_package(name: str, install: str) -> None:
    """Raise EnvironmentProblem where a package is not installed."""
    if find_spec(name) is None:
        raise EnvironmentProblem.of(f"the package {name} is not installed", "llmtune launch", install)


def to_yaml(value: Json) -> str:
    """Write a document as YAML, texts of several lines as blocks."""
    walk_tree(value)
    stream = io.StringIO()
    YAML().dump(value, stream)
    return stream.getvalue()


def check_secrets(names: Sequence[str], *, here: bool) -> None:
    """Raise RecipeError for secrets that are more than a name; `here`: or are not set in this environment."""
    RecipeError.collect(
        Problem("it is no name of a variable; a value may be seen", "--secret", "Give its name alone: --secret NAME.")
        if not VARIABLE.fullmatch(name)
        else Problem(f"{name} is not set in this environment", "--secret", f"Set it: export {name}=...")
        for name in names
        if not VARIABLE.fullmatch(name) or (here and name not in os.environ)
    )


def fail_as(code: int, what: str, fix: str) -> LlmtuneError:
    """Return the error that makes this command end with the exit code of the job."""
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        return Stopped(Problem(what, fix=fix), signal_number=code - 128)
    return BY_EXIT_CODE.get(code, EnvironmentProblem)(Problem(what, fix=fix))


def with_report(command: str, folder: str, rank: str = "0") -> str:
    """Return a script that runs a command, then prints the report (of rank 0) into its own log, packed as text."""
    return f"""{command} &
trap "kill -TERM $!" TERM
wait $!; code=$?
while kill -0 $! 2>/dev/null; do wait $!; code=$?; done
if [ "{rank}" = 0 ]; then
  echo "llmtune ended with exit code $code"
  echo "{BEGIN}"
  tar -cz -C {shlex.quote(folder)} {" ".join(REPORTS)} 2>/dev/null | base64
  echo "{END}"
fi
exit $code
"""


def read_log(lines: Iterable[str], folder: Path, console: Console) -> int | None:
    """Show a job's log line by line and unpack the report in it into `folder`; return the exit code that it states."""
    code: int | None = None
    packed: list[str] = []
    inside = False
    for line in lines:
        text = re.sub(r"^\([^()]*\) ", "", line.rstrip("\n"))  # SkyPilot's mark of job and process
        if text in (BEGIN, END):
            inside = text == BEGIN
            packed = [] if inside else packed
        elif inside:
            packed.append(text)
        else:
            stated = re.fullmatch(r"llmtune ended with exit code (\d+)", text)
            code = int(stated[1]) if stated else code
            console.print(line.rstrip("\n"), markup=False, highlight=False, soft_wrap=True)
    try:
        unpack_report(base64.b64decode("".join(packed)), folder, console)
    except ValueError:  # binascii.Error among them
        console.print("The report in the log is damaged.", style="yellow")
    return code


def unpack_report(packed: bytes, folder: Path, console: Console) -> None:
    """Unpack the report's files, as `tar -cz` has packed them, into a folder, and say where they are."""
    try:
        with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as archive:
            members = [member for member in archive if member.name in REPORTS and member.isfile()]
            folder.mkdir(parents=True, exist_ok=True)
            archive.extractall(folder, members, filter="data")
    except (tarfile.TarError, EOFError, OSError):
        members = []
    if members:
        console.print(f"The report is here: {folder / REPORTS[0]}", markup=False, highlight=False)
