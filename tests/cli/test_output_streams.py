import json
import os
import subprocess
import sys
from contextlib import suppress

import pytest
import typer

from llmtune.cli.output_streams import end_with, handled, print_json
from llmtune.errors import RecipeError


def test_prints_of_libraries_go_to_stderr_not_into_the_json_document(capsys):
    @handled
    def command(as_json: bool) -> None:
        print("a library greets")
        print_json({"loss": 1.5})

    command(as_json=True)
    out, err = capsys.readouterr()
    assert json.loads(out) == {"loss": 1.5}
    assert "a library greets" in err


def test_an_error_after_a_library_printed_is_still_one_document(capsys):
    @handled
    def command(as_json: bool) -> None:
        print("a library greets")
        raise RecipeError.of("no such task", "task", "Name one.")

    with pytest.raises(typer.Exit):
        command(as_json=True)
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2


@pytest.mark.parametrize(
    ("options", "shows"),
    [
        ({"recipe": "r.yaml", "out": None}, "interrupted; finished steps are kept. To continue, run"),
        ({"recipe": None}, "interrupted\n"),
    ],
    ids=["a run", "a plan"],
)
def test_only_commands_with_a_run_folder_promise_to_resume(capsys, options, shows):
    @handled
    def command(**options: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as caught:
        command(**options)
    assert caught.value.exit_code == 130
    assert shows in capsys.readouterr().err


@pytest.mark.parametrize("command", [["models", "list"], ["--help"], ["recipes", "schema"]], ids=" ".join)
def test_a_reader_that_leaves_ends_a_command_as_it_ends_other_programs(command):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "llmtune", *command], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_closed_standard_output_is_no_bug():
    command = f"{sys.executable} -m llmtune models list >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("prints", [True, False], ids=["by the command", "at its end"])
def test_a_document_that_a_full_disk_refuses_is_one_message(capsys, monkeypatch, prints):
    @handled
    def command(as_json: bool) -> None:
        if prints:
            print_json({"loss": 1.5})
        end_with(lambda exit_code, error: {"exit_code": exit_code})

    with suppress(OSError), open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(typer.Exit) as caught:
            command(as_json=True)
    assert caught.value.exit_code == 4
    assert capsys.readouterr().err.count("the disk is full") == 1
