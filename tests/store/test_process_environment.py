"""Test the effect of the settings made before importing torch."""

import os
import subprocess
import sys

import pytest

from llmtune.store.process_environment import KERNEL_CACHES

SCRIPT = """
from llmtune.store.process_environment import prepare_environment
prepare_environment(network=False, threads=1)
import psutil, torch
weights_OI = [torch.randn(o, i, dtype=torch.bfloat16) for o in (192, 576, 1536) for i in (192, 576, 1536)]

def multiply(tokens):
    for weight_OI in weights_OI:
        torch.nn.functional.linear(torch.ones(tokens, weight_OI.shape[1], dtype=torch.bfloat16), weight_OI) @ weight_OI

multiply(300)
before = psutil.Process().memory_info().rss
for tokens in range(200, 300, 2):
    multiply(tokens)
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is counted otherwise")
def test_memory_does_not_grow_with_every_new_length_of_a_batch() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHES}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < 200_000_000
