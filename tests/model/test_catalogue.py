"""The catalogue: correct facts about its models, and queries in a recipe's own words."""

import json
import re
from pathlib import Path

import pytest
from support.runs import invoke, write_colours, write_recipe

from llmtune.model.catalogue import (
    CatalogueModel,
    ModelQuery,
    find_catalogue_model,
    read_catalogue,
    select_models,
)
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TASK_FACTS

PARAMETERS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "google/gemma-2-2b-it": 2_614_341_888,
    "google/gemma-3-1b-it": 999_885_952,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "microsoft/phi-4": 14_659_507_200,
    "allenai/OLMo-2-0425-1B-Instruct": 1_484_916_736,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "openai-community/gpt2": 124_439_808,
    "EleutherAI/pythia-410m": 405_334_016,
}
"""As counted from the weights on the hub."""


def test_the_catalogue_describes_models_for_every_task():
    known = read_catalogue()
    assert len(known) >= 150
    for task in TASK_FACTS:
        found, left_out = select_models(ModelQuery(task))
        assert found
        assert len(found) + len(left_out) == len(known)


def test_shapes_give_the_parameter_counts_of_the_weights():
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    for name, count in PARAMETERS.items():
        model = read_catalogue()[name]
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(AutoConfig.for_model(model.model_type, **model.config))
        assert sum(one.numel() for one in built.parameters()) == count == model.parameters, name


DOCUMENTED = {name: model for name, model in read_catalogue().items() if model.source}
ONE_A_TYPE = {model.model_type: name for name, model in DOCUMENTED.items()}.values()


def _count(model: CatalogueModel, folder: Path, *, towers: bool) -> int:
    """Return the parameters of the class that a chat recipe loads."""
    from llmtune.model.config import build_skeleton, find_class
    from llmtune.tasks.registry import get_task

    recipe = Recipe.model_validate(
        {"recipe_version": 1, "name": "x", "task": "chat", "data": {"train": "x"}, "model": {"name": model.name}}
    )
    skeleton = build_skeleton(*find_class(model.write_config(folder), recipe, get_task("chat")), recipe, towers=towers)
    return sum(one.numel() for one in skeleton.parameters())


@pytest.mark.parametrize(
    "name", [name if name in ONE_A_TYPE else pytest.param(name, marks=pytest.mark.slow) for name in DOCUMENTED]
)
def test_a_documented_shape_gives_the_class_of_the_checkpoint_and_its_parameter_count(name: str, tmp_path: Path):
    model = DOCUMENTED[name]
    assert _count(model, tmp_path, towers=True) == model.parameters


def test_the_towers_of_a_model_that_also_sees_are_not_planned_for_text(tmp_path: Path):
    model = DOCUMENTED["Qwen/Qwen3.5-4B"]
    assert model.parameters - _count(model, tmp_path, towers=False) == 333_514_240


def test_models_of_2025_and_2026_are_documented_with_the_size_in_their_name():
    assert len(DOCUMENTED) >= 40
    for name, model in DOCUMENTED.items():
        assert str(model.source).startswith("https://")
        size = re.search(r"-(\d+(?:\.\d+)?)b(?!\w)", name.lower())  # not E2B: effective ones
        if size and "llama-4" not in name.lower():  # 17B are those in use
            assert model.parameters == pytest.approx(float(size[1]) * 1e9, rel=0.3), name


def test_models_are_chosen_by_task_licence_and_language_with_a_reason_against_each_other_one():
    found, left_out = select_models(ModelQuery("translate", ["apache-2.0"], "de"))
    assert {"google-t5/t5-base", "Qwen/Qwen3-4B"} <= {one.name for one in found}
    assert left_out["google/gemma-2-2b-it"] == "its licence is gemma"
    assert left_out["google-bert/bert-base-uncased"] == "a model of the kind encoder cannot do task translate"
    assert left_out["facebook/bart-base"] == "its languages are en"
    assert find_catalogue_model("smollm2-135m").name == "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("list", "--task", "chatt"), "Did you mean 'chat'?"),
        (("list", "--licence", "apache"), "Did you mean 'apache-2.0'?"),
        (("list", "--language", "xx"), "no model in the catalogue has the language 'xx'"),
        (("list", "--family", "Qwen25"), "Did you mean 'Qwen2.5'?"),
        (("show", "smollm9"), "the catalogue has no model 'smollm9'"),
        (("fits",), "one of --memory, --device, --devices and --recipe is needed"),
        (("fits", "--devices", "2x24GB", "--memory", "24GB"), "one of --memory, --device, --devices"),
        (("fits", "--devices", "0x24GB"), "'0x24GB' names no cards"),
        (("fits", "--devices", "2xcpu"), "'2xcpu' names no cards"),
        (("fits", "--devices", "2x"), "'2x' is not an amount of memory"),
        (("fits", "--devices", "2xh1000"), "Did you mean 'h100'?"),
        (("fits", "--devices", "2xfoo"), "3090, t4.\n"),  # cpu is no card that shares a model
        (("fits", "--memory", "much"), "'much' is not an amount of memory"),
        (("fits", "--device", "h1000"), "Did you mean 'h100'?"),
        (("fits", "--device", "cpu", "--price", "h100=2"), "have no effect without --recipe"),
        (("fits", "--recipe", "quickstart", "--price", "h100=much"), "'h100=much' is not a price"),
        (("fits", "--recipe", "quickstart", "--price", "t4=1", "--price", "t4=2"), "'t4' is given twice"),
    ],
)
def test_unknown_values_are_refused_with_the_known_ones(words: tuple[str, ...], said: str):
    done = invoke("models", *words)
    assert (done.exit_code, said in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize("task", [*TASK_FACTS])
def test_the_list_has_a_complete_line_per_model_in_a_pipe(task: str):
    lines = invoke("models", "list", "--task", task).stdout.splitlines()
    models = json.loads(invoke("models", "list", "--task", task, "--json").stdout)["models"]
    assert [line.split()[0] for line in lines[1:]] == [one["name"] for one in models]
    assert all(line.endswith(" ".join(one["languages"])) for line, one in zip(lines[1:], models, strict=True))


def test_fits_are_listed_by_method_with_the_longest_row():
    words = ("--memory", "24GB", "--licence", "llama3.1", "--length", 2048, "--json")
    done = invoke("models", "fits", *words)
    found = {(one["model"], one["method"]): one for one in json.loads(done.stdout)["fits"]}
    assert done.stderr == "Planning 2 models.\n"
    eight = "meta-llama/Llama-3.1-8B-Instruct"
    assert found[eight, "full"]["longest"] == 0
    assert found[eight, "qlora"]["longest"] > found[eight, "lora"]["longest"] > 0
    assert found[eight, "lora"]["lower_bound"] > 16e9
    assert found["meta-llama/Llama-3.1-70B-Instruct", "qlora"]["rows"] == 0
    shown = invoke("models", "fits", "--device", "h100", "--licence", "llama3.1").stdout
    assert "Llama-3.1-8B" in shown
    assert "million" in shown


def test_fits_of_a_prepared_recipe_state_the_hours_of_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_llama, write_colours(tmp_path / "rows.jsonl"))
    before = json.loads(invoke("models", "fits", "--recipe", recipe, "--json").stdout)
    assert invoke("run", recipe, "--until", "select", "--offline").exit_code == 0

    found = json.loads(invoke("models", "fits", "--recipe", recipe, "--json").stdout)

    assert before["trained_tokens"] is None
    assert found["trained_tokens"] > 0
    assert all(one["hours"] is None for one in before["fits"])
    assert any(one["hours"] for one in found["fits"] if one["card"] == "h100")


def test_cards_together_fit_what_one_does_not():
    words = ("models", "fits", "--licence", "llama3.1", "--json", "--devices")
    fits = {}
    for devices in ("24GB", "2x24GB", "8x80GB", "8xh100"):
        found = json.loads(invoke(*words, devices).stdout)
        assert found["devices"] == int(devices.partition("x")[0]) if "x" in devices else 1
        for one in found["fits"]:
            fits[devices, one["model"].rpartition("Llama-3.1-")[2], one["method"]] = one["longest"]
    assert fits["24GB", "8B-Instruct", "lora"] < fits["2x24GB", "8B-Instruct", "lora"]
    assert fits["24GB", "8B-Instruct", "full"] == fits["2x24GB", "8B-Instruct", "full"] == 0
    assert fits["8x80GB", "8B-Instruct", "full"] > 0
    assert fits["8x80GB", "70B-Instruct", "lora"] == fits["8xh100", "70B-Instruct", "lora"] > 0
    assert "on each of 2 cards (24 GB, fsdp)" in invoke(*words[:4], "--devices", "2 × 24GB").stdout


def test_the_catalogue_is_written_as_it_is_read():
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    spec = spec_from_file_location("catalogue_script", Path(__file__).parents[2] / "docs" / "catalogue.py")
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    written = [f"{name}: {script.flow(script.as_entry(model))}" for name, model in read_catalogue().items()]
    lines = [line for line in script.FILE.read_text("utf-8").splitlines() if not line.startswith("#")]
    assert written == lines


def test_a_recipe_is_planned_by_method_and_card_with_time_and_cost(here):
    words = ("fits", "--recipe", "chat", "--set", "model.name=Qwen/Qwen2.5-7B-Instruct")
    done = invoke("models", *words, "--price", "h100=3", "--price", "l4=0.5", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    fits = {(one["card"], one["method"]): one for one in found["fits"]}
    assert fits["l4", "full"]["rows"] == fits["t4", "lora"]["rows"] == 0
    assert fits["l4", "qlora"]["rows"] > 0
    assert fits["h100", "qlora"]["needed"] < fits["h100", "lora"]["needed"] < fits["h100", "full"]["needed"]
    assert fits["h100", "lora"]["seconds"] == pytest.approx(4 * 7_615_616_512 * 1e6 / (989e12 * 0.35))
    assert found["trained_tokens"] is found["cheapest"]["hours"] is None
    best = fits["h100", "qlora"]
    assert found["cheapest"] == best
    assert best["cost"] == pytest.approx(best["seconds"] / 3600 * 3)
    for prices, basis in (((), "memory"), (("h100=3",), "these prices")):
        shown = invoke("models", *words, *(f"--price={one}" for one in prices))
        assert f"Cheapest by {basis}: " in " ".join(shown.stderr.split())
    assert "an estimate" in " ".join(shown.stderr.split())
    assert "a100-40" in shown.stdout


def test_a_run_is_planned_for_a_card_that_this_machine_lacks(here, tiny_llama):
    recipe = write_recipe(Path("r.yaml"), tiny_llama, write_colours(Path("rows.jsonl")), model={"dtype": "auto"})
    plans = {}
    for words in (("run", recipe, "--dry-run"), ("select", recipe)):
        for card in ("t4", "h100"):
            done = invoke(*words, "--device", card, "--json")
            assert done.exit_code == 0, done.stderr
            (plans[card],) = json.loads(done.stdout)["plan"]["plans"].values()
            assert f"Memory plan ({card})" in done.stderr
    assert plans["h100"]["limit"] > 4 * plans["t4"]["limit"]
    assert plans["h100"]["parts"]["weights"] * 2 == plans["t4"]["parts"]["weights"]  # a T4 has no bfloat16
    assert not Path("runs").exists()
    for words, said in (
        (("run", recipe, "--device", "h100"), "Add --dry-run"),
        (("select", recipe, "--device", "h1000"), "Did you mean 'h100'?"),
    ):
        done = invoke(*words)
        assert (done.exit_code, said in " ".join(done.stderr.split())) == (2, True), done.stderr
