"""`evaluate` and `generate` with --engine vllm: what vLLM gets, and refusals. `tests/gpu/test_vllm.py` runs vLLM."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.classifying import scored
from support.runs import FAST, finish_run, invoke, llmtune
from support.training import make_recipe

from llmtune.errors import RecipeError
from llmtune.evaluate.metric import BY_VLLM
from llmtune.evaluate.opened_runs import find_other_measure, pair_measures
from llmtune.evaluate.vllm_completions import engine_arguments, progress_bar, sampling_arguments
from llmtune.plan import open_finished
from llmtune.serve import answer_file
from llmtune.store.atomic_files import hash_folder
from llmtune.tasks.registry import get_task
from llmtune.vllm_models import check_engine, find_unanswerable, find_unmeasurable, locate_vllm_weights

without_vllm = pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
ANSWERS = "evaluate.metrics=[exact_match]"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    return finish_run(tmp_path_factory.mktemp("vllm"), tiny_llama, train=FAST)


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def problems(found: Iterator[Any]) -> str:
    return "\n".join(f"{one.where}: {one.what} {one.fix}" for one in found)


def test_greedy_answers_get_the_ends_and_the_length_of_our_own_loop(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_llama, generation={"max_new_tokens": 9, "repetition_penalty": 1.2})
    assert sampling_arguments(recipe, {7, 2}, at=3) == {
        "temperature": 0.0,
        "repetition_penalty": 1.2,
        "max_tokens": 9,
        "stop_token_ids": [2, 7],
        "detokenize": False,
    }


def test_sampled_answers_have_the_settings_of_the_recipe_and_a_seed_each(tmp_path: Path, tiny_llama: Path) -> None:
    drawn = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1}
    recipe = make_recipe(tmp_path, tiny_llama, seed=40, generation=drawn)
    first, second = (sampling_arguments(recipe, {2}, at) for at in (0, 1))
    assert first.items() >= {name: value for name, value in drawn.items() if name != "do_sample"}.items()
    assert (first.pop("seed"), second.pop("seed")) == (40, 41)
    assert first == second


def test_vllm_computes_in_the_dtype_of_our_own_loop_and_ignores_the_settings_of_the_checkpoint(
    tmp_path: Path, tiny_llama: Path
) -> None:
    recipe = make_recipe(tmp_path, tiny_llama)
    alone = engine_arguments(tiny_llama, recipe, dtype=torch.bfloat16, longest=200, rank=None)
    assert alone["dtype"] == "bfloat16"
    assert alone["max_model_len"] == 200
    assert alone["generation_config"] == "vllm"
    assert "enable_lora" not in alone
    adapted = engine_arguments(tiny_llama, recipe, dtype=torch.bfloat16, longest=200, rank=16)
    assert adapted == {**alone, "enable_lora": True, "max_loras": 1, "max_lora_rank": 16}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"evaluate": {"metrics": ["loss", "chrf"]}}, ["likelihoods", ": loss", "'evaluate.metrics=[chrf]'"]),
        ({"evaluate": {"metrics": ["perplexity"]}}, ["'evaluate.metrics=[exact_match]'"]),
        ({"evaluate": {"metrics": ["choice_accuracy"]}}, ["these metrics need: choice_accuracy"]),
        ({"evaluate": {"metrics": None}}, ["'evaluate.metrics=[exact_match, rougeL, chrf]'"]),
        ({"evaluate": {"metrics": ["chrf"], "forgetting": {}}}, ["evaluate.forgetting"]),
        ({"evaluate": {"metrics": ["chrf"], "fairness": {}}}, ["evaluate.fairness"]),
        ({"evaluate": {"metrics": ["chrf"], "champion": "release:best"}}, ["--set evaluate.champion=null"]),
    ],
)
def test_parts_of_an_evaluation_that_need_more_than_answers_are_refused(
    tmp_path: Path, tiny_llama: Path, sections: dict[str, Any], words: list[str]
) -> None:
    recipe = make_recipe(tmp_path, tiny_llama, **sections)
    found = problems(find_unmeasurable(recipe, get_task("chat")))
    assert all(word in found for word in words), found


def test_metrics_of_answers_are_measured(tmp_path: Path, tiny_llama: Path) -> None:
    metrics = ["exact_match", "rougeL", "chrf", "tool_name", "answers_cut"]
    assert not problems(
        find_unmeasurable(make_recipe(tmp_path, tiny_llama, evaluate={"metrics": metrics}), get_task("chat"))
    )


def test_models_and_settings_that_vllm_does_not_have_are_refused(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = make_recipe(
        tmp_path, tiny_llama, generation={"num_beams": 4}, model={"add_tokens": ["<x>"]}, adapter={"method": "qlora"}
    )
    found = problems(find_unanswerable(recipe, get_task("chat"), base=True))
    assert all(key in found for key in ("generation.num_beams", "model.add_tokens", "adapter.method")), found
    alone = problems(find_unanswerable(recipe, get_task("chat"), base=False))
    assert "num_beams" in alone
    assert "add_tokens" not in alone
    sampling = {"do_sample": True, "min_p": 0.1}
    for top_p in (None, 1.0, 0.9):
        recipe = make_recipe(tmp_path, tiny_llama, generation={**sampling, "top_p": top_p})
        assert ("min_p" in problems(find_unanswerable(recipe, get_task("chat"), base=True))) == (top_p == 0.9)
    for task in ("classify", "token-classify", "embed", "rerank", "speech", "preference"):
        assert f"task {task}" in problems(find_unanswerable(recipe, get_task(task), base=True))


def test_scores_of_answers_by_vllm_and_by_our_own_loop_are_not_paired() -> None:
    own = scored(["a", "b"], ["a", "b", "b"], ["a", "b", "a"])
    signed = {name: replace(one, signature=one.signature + BY_VLLM) for name, one in own.measures.tuned.items()}
    by_vllm = replace(own, name="theirs", measures=replace(own.measures, tuned=signed))
    assert pair_measures(by_vllm, by_vllm)[0].keys() == own.measures.tuned.keys()
    for pair in ((own, by_vllm), (by_vllm, own)):
        pairs, left_out = pair_measures(*pair)
        assert not pairs
        assert left_out == dict.fromkeys(own.measures.tuned, "vLLM generated the answers of only one of them")
    assert find_other_measure(own, by_vllm, "accuracy")[1] == " (--engine vllm)"


def test_the_bar_advances_by_answers_and_not_by_the_prompts_that_vllm_reads(capfd: pytest.CaptureFixture[str]) -> None:
    advanced: list[int] = []
    assert [*progress_bar(advanced.append, [1, 2, 3], desc="Rendering prompts")] == [1, 2, 3]
    assert not advanced
    bar = progress_bar(advanced.append, total=3, desc="Processed prompts", dynamic_ncols=True, postfix="speed")
    for _ in range(3):
        assert bar.format_dict["elapsed"] > 0
        bar.update(1)
    bar.close()
    assert advanced == [1, 1, 1]
    assert capfd.readouterr() == ("", "")


def test_sampled_answers_to_the_parts_of_a_file_are_drawn_anew(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_file, "AT_ONCE", 2)
    recipe = copied / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("do_sample: false", "do_sample: true"))
    (tmp_path / "rows.jsonl").write_text(4 * (json.dumps({"prompt": "What comes after 3?"}) + "\n"))
    ended = invoke("generate", copied, "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "answers.jsonl")
    assert ended.exit_code == 0, ended.output
    answers = [json.loads(line)["answer"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert answers[:2] != answers[2:]


@without_vllm
def test_without_vllm_a_command_ends_with_exit_4_and_changes_nothing(copied: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "What comes after 3?"}) + "\n")
    before = hash_folder(copied)
    for words in (["evaluate", copied, "--set", ANSWERS], ["generate", copied, "--input", rows]):
        ended = invoke(*words, "--engine", "vllm")
        assert ended.exit_code == 4, ended.output
        assert "--engine: vLLM is not installed" in ended.output
        assert "pip install vllm" in ended.output
    assert hash_folder(copied) == before


def test_a_vllm_that_cannot_be_imported_ends_with_exit_4_and_changes_nothing(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    before = hash_folder(copied)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = ["evaluate", copied, "--set", ANSWERS, "--engine", "vllm"]
    ended = llmtune(*words, cwd=copied.parent, PYTHONPATH=path)
    assert ended.returncode == 4, ended.stderr
    assert "error --engine: vLLM cannot be imported: libcudart.so.12: cannot open" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert hash_folder(copied) == before


def test_refusals_end_with_exit_2_before_vllm_is_looked_for(copied: Path, tmp_path: Path) -> None:
    before = hash_folder(copied)
    likelihoods = invoke("evaluate", copied, "--engine", "vllm")
    assert "need: loss, accuracy" in likelihoods.output
    text = invoke("generate", copied, "Hello", "--engine", "vllm")
    assert "--input" in text.output
    recipe = invoke("evaluate", copied.parents[0] / "tiny.yaml", "--engine", "vllm")
    assert "llmtune evaluate RUN --engine vllm" in recipe.output
    unknown = invoke("evaluate", copied, "--engine", "sglang")
    assert [one.exit_code for one in (likelihoods, text, recipe, unknown)] == [2, 2, 2, 2]
    assert hash_folder(copied) == before


def test_an_adapter_that_vllm_would_not_apply_needs_merged_weights_of_the_same_training(copied: Path) -> None:
    context = open_finished(copied, Console(quiet=True), offline=True)
    assert locate_vllm_weights(context).adapter == copied / "adapter"
    config = copied / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    with pytest.raises(RecipeError, match=r"(?s)DoRA.*no merged weights.*llmtune deploy merge"):
        locate_vllm_weights(context)
    (copied / "merged").mkdir()
    certificate = copied / "merged" / "certificate.json"
    certificate.write_text(json.dumps({"trained_sha256": "of another training"}))
    with pytest.raises(RecipeError, match="no merged weights"):
        locate_vllm_weights(context)
    certificate.write_text(json.dumps({"trained_sha256": hash_folder(copied / "adapter")}))
    assert locate_vllm_weights(context).tuned == copied / "merged"


def test_answers_with_probabilities_of_choices_are_refused(copied: Path) -> None:
    context = open_finished(copied, Console(quiet=True), offline=True)
    by_vllm = replace(context, request=replace(context.request, engine="vllm"))
    with pytest.raises(RecipeError, match="probabilities of its choices"):
        check_engine(by_vllm, chooses=True)
    check_engine(context, chooses=True)
