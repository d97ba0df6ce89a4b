"""Test the limits of untrusted code."""

import time

import pytest

from llmtune.store.resource_limits import LimitExceeded, limited


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


class Slow:
    def __del__(self) -> None:
        spin(0.3)


def work() -> None:
    Slow()
    spin(5)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_limit_holds_even_if_python_ignores_an_error_in_a_destructor() -> None:
    with pytest.raises(LimitExceeded, match=r"more than 0\.1 s"), limited(0.1):
        work()
