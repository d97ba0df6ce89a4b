"""docs/guarantees.md names a test for each guarantee, and each of them exists."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "guarantees.md"


def test_each_guarantee_names_tests_that_exist() -> None:
    rows = re.findall(r"^\| (\d+) \| .+ \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 24))
    for number, cell in rows:
        named = re.findall(r"`([\w/]+\.py)(?:::(test_\w+))?`", cell)
        assert named, f"guarantee {number} names no test"
        for file, test in named:
            assert f"def {test}(" in (TESTS / file).read_text() if test else (TESTS / file).is_file(), (file, test)
