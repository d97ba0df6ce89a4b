"""llmtune in a process of its own that is killed, without warning, before so many files were put in their place."""

import subprocess
import sys
from pathlib import Path

KILLED = """
import os, signal, sys
left = int(sys.argv.pop(1))
def watch(event, arguments):
    global left
    if event == "os.rename":
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
from llmtune.cli import main
try:
    main()
finally:
    print("renames left:", left)
"""


def run_until(renames: int, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run llmtune and kill it just before so many files or folders were put in their place."""
    command = [sys.executable, "-c", KILLED, str(renames), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
