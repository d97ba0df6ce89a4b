import os
import signal

import pytest
from rich.console import Console
from support.process import Watched
from support.training import make_recipe, read_metrics, run_training, trained_bytes, with_methods

from llmtune.errors import Stopped
from llmtune.tasks.registry import get_task
from llmtune.train.signals import catch_signals


def send_at(text, *numbers):
    """Return a console that sends signals to this process when `text` is printed."""

    def react():
        for number in numbers:
            os.kill(os.getpid(), number)

    return Console(file=Watched(text, react), width=200)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_after_the_step_and_resuming_gives_the_same_bytes(number, code, finished, examples, tmp_path):
    folder, recipe, _ = finished
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as caught:
        run_training(tmp_path / "run", recipe, examples, console=send_at("step 7/", number))
    assert caught.value.exit_code == code
    assert "a checkpoint is saved" in caught.value.problems[0].what
    assert "Run the same command again to resume" in caught.value.problems[0].fix
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert (tmp_path / "run" / "checkpoints" / "step-7").exists()
    assert not (tmp_path / "run" / "adapter").exists()
    assert run_training(tmp_path / "run", recipe, examples).resumed_from == 7
    assert trained_bytes(tmp_path / "run") == trained_bytes(folder)
    losses = [[(line["step"], line["loss"]) for line in read_metrics(path)] for path in (folder, tmp_path / "run")]
    assert losses[0] == losses[1]


def test_a_stop_during_validation_saves_at_once_and_validates_on_resuming(finished, examples, tmp_path):
    folder, recipe, _ = finished
    task = get_task("chat")

    def loss(model, batch, by_row=False):
        if not model.training and (tmp_path / "run" / "checkpoints" / "step-3").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return task.loss(model, batch, by_row)

    with pytest.raises(Stopped, match="after step 5 of 16"):
        run_training(tmp_path / "run", recipe, examples, task=with_methods(task, loss=loss))
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
    run_training(tmp_path / "run", recipe, examples)
    assert trained_bytes(tmp_path / "run") == trained_bytes(folder)
    validated = [
        [(line["step"], line["loss"], line.get("validation_loss")) for line in read_metrics(path)]
        for path in (folder, tmp_path / "run")
    ]
    assert validated[0] == validated[1]


def test_a_stop_in_the_rehearsal_says_that_nothing_was_trained(tmp_path, tiny_llama, examples):
    recipe = make_recipe(tmp_path, tiny_llama)
    with pytest.raises(Stopped, match="stopped by SIGTERM before step 1"):
        run_training(tmp_path / "run", recipe, examples, console=send_at("Rehearsed", signal.SIGTERM))


def test_a_stop_after_the_last_step_is_not_ignored(finished, examples, tmp_path):
    with pytest.raises(Stopped, match="after step 16 of 16"):
        run_training(tmp_path / "run", finished[1], examples, console=send_at("step 16/", signal.SIGTERM))
    run_training(tmp_path / "run", finished[1], examples)
    assert trained_bytes(tmp_path / "run") == trained_bytes(finished[0])


def test_a_second_interrupt_quits_at_once(finished, examples, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    console = send_at("step 7/", signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "run", finished[1], examples, console=console)
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "run" / "checkpoints" / "step-7").exists()


def test_only_the_first_signal_prints_what_happens(console):
    with catch_signals(console) as request:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert request.signal_number == signal.SIGTERM
    assert console.file.getvalue().count("this step is finished and saved") == 1
