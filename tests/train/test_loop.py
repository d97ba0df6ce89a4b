import dataclasses
import io
import math

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from support.training import adapt, make_recipe, read_metrics, run_training, trained_bytes, with_methods, write_examples

from llmtune.errors import EnvironmentProblem, TrainingError
from llmtune.tasks.registry import get_task
from llmtune.train import loop
from llmtune.train.accumulation import step_gradients
from llmtune.train.checkpoint import TrainState
from llmtune.train.divergence import Divergence
from llmtune.train.metrics_log import show_training
from llmtune.train.setup import set_up
from llmtune.train.signals import StopRequest


def test_a_run_writes_adapter_checkpoints_and_a_line_for_each_log_step(finished):
    folder, _, trained = finished
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 17))
    assert {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_bytes"} <= lines[0].keys()
    assert [line["step"] for line in lines if "validation_loss" in line] == [5, 10, 15, 16]
    assert lines[-1]["epoch"] == 2
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert trained.adapter == folder / "adapter"
    assert (folder / "adapter" / "adapter_config.json").exists()
    assert trained.first_loss == lines[0]["loss"]
    assert trained.steps == 16
    assert (trained.tokens, trained.supervised_tokens) == (2884, 1464)
    assert trained.peak_bytes > 1e7
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        *("step-15", "step-16", f"step-{trained.best_step}")
    }, "old checkpoints are rotated, and the best is kept"
    assert not torch.are_deterministic_algorithms_enabled(), "torch is left as it was"


def test_the_same_seed_gives_the_same_bytes_and_another_seed_different_ones(finished, examples, tmp_path, tiny_llama):
    folder, recipe, _ = finished
    run_training(tmp_path / "twin", recipe, examples)
    assert trained_bytes(tmp_path / "twin") == trained_bytes(folder)
    other = recipe.model_copy(update={"seed": 8})
    run_training(tmp_path / "other", other, examples)
    assert trained_bytes(tmp_path / "other") != trained_bytes(folder)


def test_the_first_step_is_logged_and_later_lines_are_means(finished, examples, tmp_path):
    folder, recipe, _ = finished
    sparse = recipe.model_copy(update={"train": recipe.train.model_copy(update={"logging_steps": 4, "eval_steps": 16})})
    run_training(tmp_path / "sparse", sparse, examples)
    lines = read_metrics(tmp_path / "sparse")
    assert [line["step"] for line in lines] == [1, 4, 8, 12, 16]
    single = [line["loss"] for line in read_metrics(folder)[1:4]]
    assert min(single) < lines[1]["loss"] < max(single)


def test_early_stopping_stops_and_the_best_weights_are_the_result(examples, tmp_path, tiny_llama):
    train = {"learning_rate": 0.1, "num_train_epochs": 30, "early_stopping_patience": 2, "eval_steps": 2}
    recipe = make_recipe(tmp_path, tiny_llama, train=train)
    trained = run_training(tmp_path / "run", recipe, examples)
    validations = {
        line["step"]: line["validation_loss"] for line in read_metrics(tmp_path / "run") if "validation_loss" in line
    }
    best = min(validations, key=validations.__getitem__)
    assert trained.steps == best + 4 < 240
    assert trained.best_step == best
    assert trained.validation_loss == validations[best]
    assert trained.stopped_early.startswith("loss did not improve in 2 validations")
    kept = load_file(tmp_path / "run" / "checkpoints" / f"step-{best}" / "trainable.safetensors")
    saved = load_file(trained.adapter / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name in kept} == saved.keys()
    for name, tensor in kept.items():
        assert torch.equal(tensor, saved[name.replace(".default", "")])


def test_gains_below_the_threshold_do_not_count(examples, tmp_path, tiny_llama):
    train = {"num_train_epochs": 5, "early_stopping_patience": 1, "early_stopping_threshold": 1.0, "eval_steps": 3}
    trained = run_training(tmp_path / "run", make_recipe(tmp_path, tiny_llama, train=train), examples)
    assert trained.steps == 6


def test_without_validation_rows_training_runs_and_saves_at_each_epoch(tmp_path, tiny_llama):
    alone = write_examples(tmp_path / "examples", train=20)
    recipe = make_recipe(tmp_path, tiny_llama, train={"num_train_epochs": 2})
    trained = run_training(tmp_path / "run", recipe, alone)
    assert trained.validation_loss is None
    assert trained.best_step is None
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-3", "step-6"}


def test_non_finite_weights_stop_the_run_with_a_diagnosis(examples, tmp_path, tiny_llama):
    recipe = make_recipe(tmp_path, tiny_llama, train={"max_steps": 4})
    adapted = adapt(recipe)
    head = next(parameter for parameter in adapted.model.parameters() if not parameter.requires_grad)
    with torch.no_grad():
        head[17] = math.nan  # the embedding of one token
    with pytest.raises(TrainingError) as caught:
        run_training(tmp_path / "run", recipe, examples, adapted=adapted)
    text = str(caught.value)
    assert "the loss is nan in step 1" in text
    assert "learning rate" in text
    assert "No checkpoint was saved yet" in text
    assert "check these rows of the step" in text
    assert caught.value.exit_code == 5


def test_only_the_rows_with_a_non_finite_loss_are_named(examples, tmp_path, tiny_llama):
    from llmtune.data.examples import ExampleReader
    from llmtune.train.batch_plan import StepPlan

    reader = ExampleReader(examples, "train")
    first = StepPlan(reader.lengths, 7, 8, None, 1.0, None).rows(1)
    bad = {int(row) for row in first if 17 in reader[int(row)].input_ids}
    assert 0 < len(bad) < 8
    recipe = make_recipe(tmp_path, tiny_llama, train={"max_steps": 4})
    adapted = adapt(recipe)
    embedding = adapted.selected.model.get_input_embeddings().weight
    separate = torch.nn.Parameter(embedding.detach().clone(), requires_grad=False)
    separate[17] = math.nan
    adapted.selected.model.get_input_embeddings().weight = separate  # the output head stays intact
    with pytest.raises(TrainingError) as caught:
        run_training(tmp_path / "run", recipe, examples, adapted=adapted)
    assert caught.value.problems[1].what == f"check these rows of the step: {', '.join(map(str, sorted(bad)))}"


def test_a_learning_rate_far_too_high_stops_the_run(examples, tmp_path, tiny_llama):
    train = {"learning_rate": 10.0, "num_train_epochs": 20, "max_grad_norm": 0, "warmup_steps": 0, "optim": "sgd"}
    train |= {"lr_scheduler_type": "constant"}
    recipe = make_recipe(tmp_path, tiny_llama, adapter={"method": "full"}, train=train)
    with pytest.raises(TrainingError, match=r"diverged|not finite|the loss is|the gradient is") as caught:
        run_training(tmp_path / "run", recipe, examples)
    assert "lower train.learning_rate (now 10)" in str(caught.value)
    assert "set train.max_grad_norm: 1.0" in str(caught.value)


def test_gradients_are_clipped_to_max_grad_norm_and_their_norm_before_is_logged(examples, tmp_path, tiny_llama):
    norms = {}
    for limit in (0, 1e-3):
        train = {"max_steps": 2, "max_grad_norm": limit, "optim": "sgd", "learning_rate": 1.0, "warmup_steps": 0}
        recipe = make_recipe(tmp_path, tiny_llama, train=train)
        run_training(tmp_path / f"{limit}", recipe, examples)
        start = read_metrics(tmp_path / f"{limit}")[0]["grad_norm"]
        saved = load_file(tmp_path / f"{limit}" / "adapter" / "adapter_model.safetensors")
        norms[limit] = start, math.sqrt(sum(float(t.norm()) ** 2 for name, t in saved.items() if "lora_B" in name))
    assert norms[0][0] == norms[1e-3][0]  # the same first gradient
    assert norms[1e-3][1] < 2.1e-3  # two steps of at most 1e-3: lora_B starts at zero
    assert norms[0][1] > 0.05


def test_trackers_receive_the_metrics_through_accelerate(examples, tmp_path, tiny_llama):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = make_recipe(tmp_path, tiny_llama, train={"max_steps": 3, "report_to": "tensorboard"})
    run_training(tmp_path / "run", recipe, examples)
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "tiny"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in logged] == [1, 2, 3]
    assert logged[0][1] == pytest.approx(read_metrics(tmp_path / "run")[0]["loss"])


def test_a_tracker_that_is_not_installed_is_an_error_with_its_pip_command(examples, tmp_path, tiny_llama):
    recipe = make_recipe(tmp_path, tiny_llama, train={"report_to": ["wandb", "comet_ml"]})
    with pytest.raises(EnvironmentProblem) as caught:
        run_training(tmp_path / "run", recipe, examples)
    assert [problem.fix for problem in caught.value.problems] == ["pip install wandb", "pip install comet-ml"]


def test_a_terminal_shows_a_bar_and_other_outputs_get_plain_lines(examples, tmp_path, tiny_llama):
    recipe = make_recipe(tmp_path, tiny_llama, train={"max_steps": 3})
    plain, terminal = io.StringIO(), io.StringIO()
    run_training(tmp_path / "plain", recipe, examples, console=Console(file=plain, width=120))
    run_training(tmp_path / "bar", recipe, examples, console=Console(file=terminal, width=120, force_terminal=True))
    assert "step 3/3  loss" in plain.getvalue()
    assert "\x1b[" not in plain.getvalue()
    assert "tokens/s" in terminal.getvalue()
    assert "step 3/3" not in terminal.getvalue()
    assert "3/3" in terminal.getvalue()


def test_a_non_finite_validation_loss_stops_the_run(examples, tmp_path, tiny_llama, console):
    task = get_task("chat")

    def loss(model, batch, by_row=False):
        found = task.loss(model, batch, by_row)
        return found if model.training else dataclasses.replace(found, sum=found.sum * math.nan)

    recipe = make_recipe(tmp_path, tiny_llama, train={"eval_steps": 3, "save_steps": 2})
    with pytest.raises(TrainingError, match="the validation loss is nan after step 3") as caught:
        run_training(tmp_path / "run", recipe, examples, task=with_methods(task, loss=loss), console=console)
    assert str(tmp_path / "run" / "checkpoints" / "step-2") in caught.value.problems[0].fix


@pytest.fixture
def started(examples, tmp_path, tiny_llama, console):
    """A run that is set up, before its first step."""
    recipe = make_recipe(tmp_path, tiny_llama)
    training = set_up(adapt(recipe), examples, get_task("chat"), recipe, tmp_path / "run", console, "inputs")
    state = TrainState(budget=128)
    with show_training(console, 0, training.plan.total_steps) as display:
        yield loop.Run(training, state, Divergence(math.inf), StopRequest(), display, console, lambda tokens: None)


def gradients(run):
    return [parameter.grad.clone() for parameter in run.training.parameters]


@pytest.mark.parametrize("scale", [2.0**16, 2.0**140])  # the latter overflows float32 with a gradient of 0.1
def test_a_loss_scale_does_not_change_gradients_and_is_halved_on_overflow(started, scale):
    plain = step_gradients(started.training, 1, 128, 1.0)
    expected = gradients(started)
    started.training.optimizer.zero_grad(set_to_none=True)
    started.state.loss_scale = scale
    scaled = loop._gradients(started, 1)
    assert (started.state.loss_scale < scale) == (scale > 2.0**100)
    assert scaled.mean == plain.mean
    assert scaled.grad_norm == pytest.approx(plain.grad_norm, rel=1e-6)
    for got, wanted in zip(gradients(started), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-9)


def test_out_of_memory_in_an_update_is_not_retried(started):
    def too_large(optimizer, args, kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    started.training.optimizer.optimizer.register_step_pre_hook(too_large)
    with pytest.raises(TrainingError, match="out of memory in the update of step 1"):
        loop._take_step(started)
    assert started.state.step == 0


def test_an_update_that_ruins_the_weights_in_the_last_step_is_not_saved(started):
    """No later step's loss would show it, and there are no validation rows."""
    started.training = dataclasses.replace(started.training, validation=None)
    started.training.folder.mkdir()
    total = started.training.plan.total_steps

    def ruin(optimizer, args, kwargs):
        if started.state.step == total - 1:
            with torch.no_grad():
                started.training.parameters[-1][0, 0] = math.inf

    started.training.optimizer.optimizer.register_step_post_hook(ruin)
    with pytest.raises(TrainingError, match=f"not finite after the update of step {total}") as caught:
        loop._run_steps(started)
    assert caught.value.exit_code == 5
    assert "The last good checkpoint is" in caught.value.problems[0].fix
    assert not (started.training.checkpoints / f"step-{total}").exists()
