"""Options that several commands share."""

import pytest
from support.runs import invoke


@pytest.mark.parametrize("command", [["run"], ["recipes", "check"], ["compare"], ["launch", "local"]])
def test_a_key_that_is_set_twice_is_refused_by_name(command: list[str]) -> None:
    result = invoke(*command, "tiny.yaml", "--set", "train.epochs=1", "--set", "train.epochs = 2")
    said = " ".join(result.stderr.replace("│", " ").split())
    assert (result.exit_code, "'train.epochs' is given twice. Give it once." in said) == (2, True), said
