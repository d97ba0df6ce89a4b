"""Check out another commit of llmtune in a separate work tree, to measure both in one run."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def work_tree(commit: str) -> Iterator[Path]:
    """Check a commit out into a folder that is removed at the end; `.` is the tree as it is."""
    if commit == ".":
        yield ROOT
        return
    with TemporaryDirectory(prefix="llmtune-") as scratch:
        tree = Path(scratch) / "tree"
        git("worktree", "add", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def git(*arguments: str) -> str:
    """Run git in this repository; return its output."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
