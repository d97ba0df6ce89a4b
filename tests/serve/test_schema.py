"""The server behaves as its OpenAPI document says: schemathesis sends documented and undocumented requests."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.pairs import finish
from support.serving import load_served, served_of, serving


def examine(url: str, examples: int, folder: Path) -> str:
    """Run schemathesis in `folder`; all of its checks hold, but for one.

    A schema cannot say whether settings go together or a prompt fits the context, so a valid request may be refused.
    """
    command = [str(Path(sys.executable).with_name("st")), "run", f"{url}/openapi.json", "--seed", "7"]
    command += ["--max-examples", str(examples), "--phases", "examples,coverage,fuzzing", "--no-color"]
    command += ["--exclude-checks", "positive_data_acceptance"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout


@pytest.mark.parametrize("examples", [3, pytest.param(150, marks=pytest.mark.slow)])
def test_no_request_valid_or_invalid_is_a_server_error(tune, tmp_path, examples, capsys):
    with serving(served_of(tune())) as url:
        assert "6 selected / 6 total" in examine(url, examples, tmp_path)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_the_same_holds_for_the_endpoint_of_another_task(tmp_path, capsys):
    with serving(*load_served(mine=finish("classify", tmp_path)).values()) as url:
        examine(url, 3, tmp_path)
    assert "Traceback" not in capsys.readouterr().err
