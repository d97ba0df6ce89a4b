"""Both models of a finished run: loaded once, scored packed, with the same results as separately."""

import pytest
from support.classifying import run
from support.runs import write_recipe

from llmtune import run_models
from llmtune.data.examples import load_examples
from llmtune.data.row_store import load_rows
from llmtune.evaluate.eval_inputs import EvalContext, make_inputs
from llmtune.evaluate.inference import predict
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.loading import load_model
from llmtune.plan import open_finished
from llmtune.run_models import Models


def opened(folder, console):
    context = open_finished(folder, console, True)
    processor = context.plan.processor
    rows, examples = (load(folder / "data" / name) for load, name in ((load_rows, "rows"), (load_examples, "examples")))
    return Models(context), make_inputs(rows, examples, context.plan.task, processor, context.plan.recipe)


def ask(models, model, plan, console):
    context = models.context
    asked = EvalContext(context.plan.recipe, context.plan.task, context.plan.processor, plan, "cpu", console)
    return predict(model, "a model", asked, models.packs)


@pytest.fixture
def loads(monkeypatch):
    """The loaded models."""
    loaded = []

    def load(*given, **options):
        selected = load_model(*given, **options)
        loaded.append(selected.model)
        return selected

    monkeypatch.setattr(run_models, "load_model", load)
    return loaded


def test_base_and_tuned_model_share_one_set_of_weights_and_score_as_separately_loaded_ones(
    tmp_path, tiny_llama, chat_rows, console, loads
):
    train = {"num_train_epochs": 1}
    _, folder = run(write_recipe(tmp_path / "r.yaml", tiny_llama, chat_rows, train=train))
    loads.clear()
    models, plan = opened(folder, console)
    with models.base() as base:
        together = [ask(models, base, plan, console)]
    with models.tuned() as tuned:
        together.append(ask(models, tuned, plan, console))
        assert unwrap(tuned) is base
    assert len(loads) == 1
    for side, found in zip(("base", "tuned"), together, strict=True):
        fresh, _ = opened(folder, console)
        with getattr(fresh, side)() as model:
            alone = ask(fresh, model, plan, console)
        assert found.texts == alone.texts
        assert (found.sums.nats == alone.sums.nats).all()
        assert (found.sums.correct == alone.sums.correct).all()
    assert (together[0].sums.nats != together[1].sums.nats).all()


def test_fully_trained_weights_are_loaded_one_model_at_a_time(tmp_path, tiny_llama, chat_rows, console, loads):
    method = {"method": "full", "r": None, "lora_alpha": None}
    train = {"max_steps": 1, "num_train_epochs": None}
    _, folder = run(write_recipe(tmp_path / "r.yaml", tiny_llama, chat_rows, adapter=method, train=train))
    loads.clear()
    models, _ = opened(folder, console)
    with models.base() as base:
        pass
    with models.tuned() as tuned:
        assert tuned is not base
    assert "_selected" not in vars(models)
    assert len(loads) == 2
