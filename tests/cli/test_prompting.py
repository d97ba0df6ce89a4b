"""`llmtune chat` in a pseudo-terminal."""

import os
import pty
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.models import build_llama
from support.runs import finish_run

ESCAPES_OF_UP = "\x1b[A"


class Terminal:
    """A command in a pseudo-terminal; `screen` has all its output."""

    def __init__(self, *command: str, cwd: Path) -> None:
        self.process, self.file = pty.fork()
        if self.process == 0:
            os.chdir(cwd)
            os.environ |= {"TERM": "xterm", "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
            os.execv(sys.executable, [sys.executable, "-m", "llmtune", *command])
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Read until the text comes; return what came before it, and forget both."""
        deadline = time.monotonic() + seconds
        while text not in self.screen:
            assert time.monotonic() < deadline, (text, self.screen[-2000:])
            if select.select([self.file], [], [], 0.2)[0]:
                self.screen += os.read(self.file, 4096).decode(errors="replace")
        before, _, self.screen = self.screen.partition(text)
        return before

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """A chat with an untrained model that never stops."""
    model = build_llama(tmp_path / "model")
    train = {"num_train_epochs": None, "max_steps": 1, "learning_rate": 1e-12}
    finish_run(tmp_path, model, train=train, evaluate={"metrics": ["loss"]}, generation={"max_new_tokens": 1500})
    yield (chat := Terminal("chat", "runs/tiny", cwd=tmp_path))
    os.close(chat.file)


def test_arrow_up_recalls_a_line_and_interrupts_stop_answer_then_program(terminal: Terminal) -> None:
    terminal.wait_for("you")
    terminal.type("hello there\n")
    terminal.wait_for("hello there")
    time.sleep(0.5)
    terminal.type("\x03")
    terminal.wait_for("Stopped")
    terminal.wait_for("you")
    terminal.type(ESCAPES_OF_UP)
    shown = terminal.wait_for("hello there")
    assert "^[[A" not in shown
    terminal.type("\x15/reset\n")
    terminal.wait_for("forgotten")
    terminal.wait_for("you")
    time.sleep(0.5)  # an interrupt in the instant in which the prompt is drawn is lost
    terminal.type("\x03")
    terminal.wait_for("again to quit")
    terminal.wait_for("you")
    time.sleep(0.5)
    terminal.type("\x03")
    terminal.wait_for("interrupted")
    assert terminal.exit_code() == 130
