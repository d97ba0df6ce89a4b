"""Any system error becomes an error with a fix, wherever it occurs; any other error is reported as a bug."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pyarrow as pa
import pytest
import typer
from safetensors import SafetensorError
from transformers import PreTrainedModel

from llmtune.cli.output_streams import handled
from llmtune.deploy.parity import load_product
from llmtune.errors import EnvironmentProblem
from llmtune.store.atomic_files import explained

REFUSALS = {
    "disk": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk is full"),
    "size": (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), "ulimit -f"),
    "handles": (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "ulimit -n"),
    "handles in an import": (ImportError("libx.so: cannot open: Too many open files"), "ulimit -n"),
    "memory": (MemoryError(), "the memory is used up"),
    "memory in an import": (
        ImportError("libx.so: failed to map segment from shared object"),
        "the memory is used up",
    ),
    "Arrow's memory": (pa.ArrowMemoryError("malloc of size 1 failed"), "the memory is used up"),
    "Arrow's threads": (
        pa.ArrowException("Failed to launch worker thread: Resource temporarily unavailable"),
        "ulimit -u",
    ),
    "numpy's writer": (OSError("4096 requested and 0 written"), "the disk is full"),
    "threads": (RuntimeError("can't start new thread"), "ulimit -u"),
    "torch's writer": (
        RuntimeError("PytorchStreamWriter failed writing file"),
        "disk is full",
    ),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_system_error_ends_with_exit_code_4(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    error, words = REFUSALS[kind]

    @handled
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as caught:
        command()
    assert caught.value.exit_code == 4
    assert words in " ".join(capsys.readouterr().err.split())


def test_an_error_number_inside_a_library_message_is_found(tmp_path: Path) -> None:
    hidden = SafetensorError('Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "" }')
    with pytest.raises(EnvironmentProblem, match=r"the disk is full: .* MB free"), explained(tmp_path / "x"):
        raise hidden


def test_a_product_that_fails_to_load_for_lack_of_threads_is_not_called_broken() -> None:
    def load() -> tuple[PreTrainedModel, dict[str, set[str]]]:
        raise RuntimeError("can't start new thread")

    with pytest.raises(EnvironmentProblem, match="ulimit -u"), explained(Path("merged")):
        load_product(load, "the merged model")


def test_any_other_error_is_reported_as_a_bug() -> None:
    @handled
    def command() -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        command()
