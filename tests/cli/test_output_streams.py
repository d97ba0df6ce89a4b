import json

import pytest
import typer

from llmtune.cli.output_streams import handled, print_json
from llmtune.errors import RecipeError


def test_what_libraries_print_stands_beside_the_json_document_not_in_it(capsys):
    @handled
    def command(as_json: bool) -> None:
        print("a library greets")
        print_json({"loss": 1.5})

    command(as_json=True)
    out, err = capsys.readouterr()
    assert json.loads(out) == {"loss": 1.5}
    assert "a library greets" in err


def test_an_error_after_a_library_has_printed_is_one_document_too(capsys):
    @handled
    def command(as_json: bool) -> None:
        print("a library greets")
        raise RecipeError.of("no such task", "task", "Name one.")

    with pytest.raises(typer.Exit):
        command(as_json=True)
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2
