"""What the tests on fake CUDA tensors share; `make test-fake-cuda` preloads what stands in for the driver."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_cuda.device import PRELOADED
from tasks.conftest import clips  # noqa: F401  (a fixture)

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.skipif(not PRELOADED, reason="make test-fake-cuda"))
