"""Runs with a teacher: what it predicted is recorded, learned, and part of the run's inputs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import families
from support.adapting import quiet
from support.models import build_llama
from support.pairs import DOCUMENTS, PAIRS, recipe_of
from support.task_cases import CHATS, MULTI, NO_TEXT, SINGLE, TAGS
from support.training import trained_bytes

from llmtune import run_models
from llmtune.data.examples import ExampleReader
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.model.causal_lm_loss import move_to
from llmtune.model.teacher_loss import Distribution, Recorder
from llmtune.pipeline import run_pipeline
from llmtune.plan import open_finished
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_request import RunRequest
from llmtune.train import teacher_cache
from llmtune.train.teacher_cache import Distilled, TeacherReader

SPLIT = {"validation": 0.2, "test": 0.1}
CASES: dict[str, tuple[Any, list[dict[str, Any]], str, dict[str, Any]]] = {
    "chat": (build_llama, CHATS, "chat", {}),
    "completion": (build_llama, CHATS, "completion", {"data": {"packing": False}}),
    "translate": (families.build_t5, PAIRS, "translate", {}),
    "summarize": (build_llama, DOCUMENTS, "summarize", {}),
    "classify": (families.build_bert, SINGLE, "classify", NO_TEXT),
    "classify-multi": (families.build_bert, MULTI, "classify", NO_TEXT),
    "token-classify": (families.build_bert, TAGS, "token-classify", NO_TEXT),
}


def write(folder: Path, case: str, teacher: Path | None, **sections: Any) -> Path:
    build, rows, task, own = CASES[case]
    model = folder / "model"
    if not model.exists():
        build(model)
    if teacher is not None:
        sections["distil"] = {"teacher": str(teacher), "control": False, **sections.get("distil", {})}
    data = {**SPLIT, **own.get("data", {}), **sections.pop("data", {})}
    return recipe_of(folder, model, rows, task, **{**own, **sections, "data": data})


def train(recipe: Path, run: str = "run", console: Any = None, **request: Any) -> Path:
    out = recipe.parent / run
    run_pipeline(load_recipe(str(recipe)), RunRequest(out=out, until="train", **request), console or quiet())
    return out


def make_teacher(folder: Path, case: str) -> Path:
    """Train a teacher whose predictions differ from the student's."""
    train_settings = {"max_steps": 4, "learning_rate": 1e-2, "num_train_epochs": None}
    return train(write(folder / "teacher", case, None, train=train_settings))


@pytest.mark.parametrize("case", CASES)
def test_recorded_predictions_give_the_loss_and_gradient_of_the_live_teacher(tmp_path, case):
    teacher = make_teacher(tmp_path, case)
    weight = 1.0 if case == "completion" else 0.4
    top_k = {} if case.startswith(("classify", "token")) else {"top_k": 7}
    section = {"weight": weight, "temperature": 2.0, **top_k}
    run = train(write(tmp_path, case, teacher, distil=section, train={"max_steps": 2, "num_train_epochs": None}))

    context = replace(open_finished(run, quiet(), True))
    plan, examples, task = context.plan, context.examples, context.plan.task
    loaded = run_models.Models(context)
    with run_models.open_teacher(context) as (model, _), loaded.tuned() as student:
        for split in ("train", "validation"):
            reader = ExampleReader(examples, split, task.example_type)
            rows = np.array([1, 0])
            collate = task.collator(plan.processor, plan.recipe, loaded.packs)
            batch = move_to("cpu", collate([reader[int(row)] for row in rows], 0))
            recorder = Recorder(7 if top_k else 1000, 2.0, 10**6)
            with torch.no_grad():
                task.loss(model, {**batch, "teacher": recorder})
            live = Distribution(torch.cat(recorder.ids), torch.cat(recorder.logs), weight, 2.0)
            assert plan.recipe.distil is not None
            stored = TeacherReader(run / "data" / "teacher", split, reader)
            objective = Distilled(task.loss, plan.recipe.distil, {split: stored})
            objective.split = split
            parameters = [one for one in student.parameters() if one.is_floating_point()]
            for parameter in parameters:
                parameter.requires_grad_()
            results = []
            for loss in (objective.loss(student, batch, rows), task.loss(student, {**batch, "teacher": live})):
                assert loss.count == reader.supervised[rows].sum()
                gradients = torch.autograd.grad(loss.sum, parameters, allow_unused=True)
                results.append([loss.sum.detach(), *(one for one in gradients if one is not None)])
            for cached, fresh in zip(*results, strict=True):
                torch.testing.assert_close(cached, fresh, rtol=5e-3, atol=5e-3)
            plain = task.loss(student, batch).sum
            assert abs(results[0][0] - plain) > 1e-2  # the teacher has an effect
