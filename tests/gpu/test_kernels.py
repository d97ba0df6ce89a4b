"""Kernels that only a CUDA device has: the same training with them, and none of it done in silence."""

from pathlib import Path

import pytest
from support.models import build_llama
from support.training import adapt, make_recipe, read_metrics, write_examples
from support.training import run_training as train_on

LIGER = {"use_liger_kernel": True}
COMPILED = {"torch_compile": True}


@pytest.mark.parametrize("option", [LIGER, COMPILED], ids=["liger", "compiled"])
def test_training_with_other_kernels_has_the_same_losses(tmp_path: Path, option: dict[str, bool]) -> None:
    pytest.importorskip("liger_kernel" if option is LIGER else "triton")
    model = build_llama(tmp_path / "model")
    examples = write_examples(tmp_path / "examples", train=40, validation=8)
    losses = []
    for name, more in {"plain": {}, "other": option}.items():  # plain first: Liger changes the model's classes
        recipe = make_recipe(tmp_path / name, model, train={"max_steps": 8, "logging_steps": 1, **more})
        train_on(tmp_path / name / "run", recipe, examples, adapted=adapt(recipe, "cuda"))
        losses.append([line["loss"] for line in read_metrics(tmp_path / name / "run")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
