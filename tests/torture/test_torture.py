"""After any disturbance the same command resumes, nothing is lost, and the bytes are the same as without it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from torture.rounds import DEFAULT_ROUNDS, Torture, plan

ROUNDS = int(os.environ.get("TORTURE_ROUNDS", DEFAULT_ROUNDS))
SEED = int(os.environ.get("TORTURE_SEED", 0))


@pytest.fixture(scope="module")
def torture() -> Iterator[Torture]:
    with tempfile.TemporaryDirectory() as folder:
        made = Torture(Path(folder), SEED)
        yield made
        made.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "fault", "fresh"),
    [pytest.param(number, *one, id=f"{number} {one[0]}") for number, one in enumerate(plan(ROUNDS, SEED))],
)
def test_a_disturbed_command_resumes_and_nothing_is_lost(
    torture: Torture, number: int, fault: str, fresh: bool
) -> None:
    outcome = torture.play(number, fault, fresh=fresh)
    assert outcome.good, "\n".join([str(outcome), *outcome.wrong])
