"""Progress without a terminal: a line at least once a minute, with counts and an estimate."""

import io
import time

import pytest
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn

from llmtune.display import console as console_module
from llmtune.display.console import LiveProgress, VisibleConsole, counting_bars, phase, spinner, track_items


@pytest.fixture
def log(monkeypatch):
    """A console without a terminal, and the function that returns what it printed."""
    monkeypatch.setattr(console_module, "BEAT_SECONDS", 0.1)
    text = io.StringIO()
    console = VisibleConsole(file=text, width=160)
    return console, text.getvalue


def test_a_silent_phase_speaks_and_names_its_time(log):
    console, printed = log
    with phase(console, "deduplicate"):
        time.sleep(0.25)
    assert printed().startswith("deduplicate: still running after 0.1 s")
    assert len(printed().splitlines()) == 2


def test_a_phase_that_prints_gets_no_further_lines(log):
    console, printed = log
    with phase(console, "train"):
        for step in range(6):
            time.sleep(0.05)
            console.print(f"step {step}")
    assert "still running" not in printed()


def test_the_innermost_phase_speaks_and_only_one_of_them(log):
    console, printed = log
    with phase(console, "evaluate"), spinner(console, "loading the model"):
        time.sleep(0.15)
    assert printed().splitlines() == ["loading the model: 0.1 s so far"]


def test_progress_without_a_terminal_has_counts_and_the_time_left(log):
    console, printed = log
    with counting_bars(console) as bars:
        bar = bars.add_task("gguf: answers", total=62)
        time.sleep(0.05)
        bars.advance(bar, 31)
        time.sleep(0.1)
    line = printed().splitlines()[0]
    assert line.startswith("gguf: answers: 31 of 62, 0.1 s so far, about 0.1 s left")


def test_the_estimate_of_a_resumed_training_counts_only_new_steps(log):
    console, _ = log
    with LiveProgress(BarColumn(), MofNCompleteColumn(), console=console) as bars:
        bar = bars.add_task("train", total=100, completed=90)
        bars.tasks[0].start_time -= 50
        bars.advance(bar, 5)
        assert bars.describe() == "train: 95 of 100, 50 s so far, about 50 s left"


def test_progress_in_bytes_is_a_share(log):
    console, _ = log
    with LiveProgress(BarColumn(), DownloadColumn(), console=console) as bars:
        bars.add_task("read rows", total=2_000_000, completed=500_000)
        assert bars.describe() == "read rows: 25 %, 0.0 s so far"


def test_tracked_items_speak_while_one_takes_long(log):
    console, printed = log
    for _ in track_items(console, [1, 2], "likelihoods"):
        time.sleep(0.15)
    assert printed().splitlines()[0].startswith("likelihoods: 0 of 2, ")


def test_a_terminal_and_a_quiet_console_get_no_lines(monkeypatch):
    monkeypatch.setattr(console_module, "BEAT_SECONDS", 0.05)
    for options in ({"quiet": True}, {"force_terminal": True}):
        text = io.StringIO()
        with phase(VisibleConsole(file=text, **options), "read"):
            time.sleep(0.15)
        assert "still running" not in text.getvalue()


def test_the_thread_ends_with_the_outermost_phase_even_after_an_error(log):
    console, printed = log
    with pytest.raises(ValueError, match="broken"), phase(console, "read"):
        raise ValueError("broken")
    time.sleep(0.2)
    assert printed() == ""
    assert console.heartbeat.phases == []
