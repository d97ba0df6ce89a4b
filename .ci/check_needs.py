"""Collect the tests with the packages hidden that only the extra `test-all` names.

A test module that imports one of them while it is collected fails: import it within tests marked `needs`. A test that
reaches such a package without the mark fails in `make test`, which CI runs with the extra `test` alone.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


class HiddenPackages:
    """A plugin of pytest: imports and `find_spec` find no package that only `test-all` names."""

    def pytest_sessionstart(self) -> None:
        """Hide them once pytest has loaded its own plugins."""
        extra = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"][
            "test-all"
        ]
        names = {canonicalize_name(Requirement(line).name) for line in extra} - {"llmtune-cli"}
        for module, owners in importlib.metadata.packages_distributions().items():
            if {*map(canonicalize_name, owners)} <= names:
                sys.modules[module] = None  # type: ignore[assignment]

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Forget the tests, whose list pytest would print."""
        items.clear()


if __name__ == "__main__":
    options = ["--collect-only", "-qq", "--disable-warnings", str(ROOT / "tests")]
    outcome = pytest.main(options, plugins=[HiddenPackages()])
    sys.exit(0 if outcome == pytest.ExitCode.NO_TESTS_COLLECTED else outcome)
