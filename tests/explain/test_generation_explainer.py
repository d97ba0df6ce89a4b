from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.audio import write_tone
from support.explaining import ANSWERED, expect, explain, train, values_of
from support.families import build_whisper
from support.models import build_llama
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from llmtune.data.chat_template import render_prompt
from llmtune.explain.generation_explainer import find_parting
from llmtune.explain.generation_trace import Sampling, score_answer
from llmtune.explain.inputs import ModelInputs
from llmtune.recipe.loader import load_recipe

invoke = partial(explain, "generation")

QUESTION = "Which colour has number 7?"


@pytest.fixture(scope="module")
def told(chat_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The printed result for the run and the question."""
    return values_of(invoke(chat_run, "--prompt", QUESTION, "--json", "--out", tmp_path_factory.mktemp("told")))


@pytest.fixture
def run(chat_run: Path, tmp_path: Path) -> Path:
    """A writable copy of the run."""
    return shutil.copytree(chat_run, tmp_path / "run")


def test_base_and_tuned_answers_diverge_and_the_changes_are_listed(told):
    base, tuned = (told["traces"][side]["steps"] for side in ("base", "tuned"))
    assert "blue" in told["traces"]["tuned"]["text"]
    assert "blue" not in told["traces"]["base"]["text"]
    at = told["parting"]
    assert [s["token"]["id"] for s in base[:at]] == [s["token"]["id"] for s in tuned[:at]]
    assert base[at]["token"]["id"] != tuned[at]["token"]["id"]
    assert told["scores"]["tuned"][0]["probability"] > 2 * told["scores"]["base"][0]["probability"]
    for score, step in zip(told["scores"]["tuned"], tuned, strict=True):
        assert score["probability"] == pytest.approx(step["probability"], rel=1e-3)


def test_the_base_is_the_model_without_adapter_and_the_prompt_is_as_in_training(told, chat_run):
    loaded = load_recipe(str(chat_run / "recipe.yaml")).recipe
    model = AutoModelForCausalLM.from_pretrained(str(loaded.model.name)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(loaded.model.name))
    ids = render_prompt([{"role": "user", "content": QUESTION}], tokenizer, loaded)
    assert [token["id"] for token in told["tokens"]] == ids
    answer = [step["token"]["id"] for step in told["traces"]["tuned"]["steps"]]
    wanted = score_answer(model, ModelInputs(ids, loaded), tokenizer, ids, answer)
    assert [row["probability"] for row in told["scores"]["base"]] == pytest.approx(
        [w.probability for w in wanted], rel=1e-3
    )
    assert [row["rank"] for row in told["scores"]["base"]] == [w.rank for w in wanted]


def test_a_fully_trained_run_has_a_separate_base(tmp_path):
    run = train(
        tmp_path,
        build_llama(tmp_path / "model"),
        ANSWERED,
        adapter={"method": "full", "r": None, "lora_alpha": None},
        train={"num_train_epochs": 1},
        evaluate={"metrics": ["loss"]},
    )
    told = values_of(invoke(run, "--prompt", QUESTION, "--json", "--max-new-tokens", 3))
    base, tuned = (told["scores"][name][0] for name in ("base", "tuned"))
    assert tuned["probability"] > base["probability"]
    assert base["likeliest"]["token"] == told["traces"]["base"]["steps"][0]["token"]


def test_the_runs_report_links_to_the_page_and_is_otherwise_unchanged(run):
    before = json.loads((run / "report.json").read_text())
    assert before["explanations"] == []
    assert "llmtune explain generation RUN" in (run / "report.html").read_text()
    expect(invoke(run, "--prompt", QUESTION), 0, "linked from:", "report.html")
    name = "generation-which-colour-has-number-7"
    assert {path.name for path in (run / "explain").iterdir()} == {f"{name}.html"}
    assert f'href="explain/{name}.html"' in (run / "report.html").read_text()
    assert 'href="../report.html"' in (run / "explain" / f"{name}.html").read_text()
    assert json.loads((run / "report.json").read_text()) == {**before, "explanations": [name]}


def test_the_terminal_shows_the_four_stages_and_the_divergence(chat_run, tmp_path):
    shown = invoke(chat_run, "--prompt", QUESTION, "--out", tmp_path / "out", columns=80).stdout
    stages = ["Where base and tuned diverge", "1 Prompt to tokens", "2 Model processing", "3 Word prediction"]
    stages.append("4 Output so far")
    at = [shown.index(stage) for stage in stages]
    assert at == sorted(at)
    assert "<|im_start|>│user│⏎│" in shown
    assert all(len(line.rstrip()) <= 80 for line in shown.splitlines())


def test_words_cut_off_by_sampling_are_in_brackets(tiny_llama, tmp_path):
    kept = ("--top", 3, "--top-k", 2, "--top-p", 1, "--max-new-tokens", 1)
    shown = invoke(tiny_llama, "--prompt", "red", *kept, "--out", tmp_path).stdout
    assert re.search(r" 2 +\S+ [\d.]+, \(\S+ [\d.]+\)", shown)


def test_a_plain_model_uses_its_template_unless_plain_is_given(tiny_llama, tmp_path):
    short = ("--max-new-tokens", 1, "--json", "--out", tmp_path)
    with_template = values_of(invoke(tiny_llama, "--prompt", "red", "--system", "Be short.", *short))
    assert "".join(token["text"] for token in with_template["tokens"]).startswith("<|im_start|>system\nBe short.")
    plain = values_of(invoke(tiny_llama, "--prompt", "red", "--plain", *short))
    assert "".join(token["text"] for token in plain["tokens"]) == "red"
    assert list(plain["traces"]) == ["model"]
    assert plain["parting"] is None


def test_an_encoder_fills_its_masks(built, tmp_path):
    told = values_of(invoke(built("bert"), "--prompt", "The [MASK] is blue.", "--json", "--out", tmp_path))
    assert told["masked"]
    (step,) = told["traces"]["model"]["steps"]
    assert len(step["layers"]) == 3
    assert "blue" in told["traces"]["model"]["text"]


def test_whispers_transcript_is_traced(tmp_path):
    model, sound = build_whisper(tmp_path / "whisper", multilingual=False), write_tone(tmp_path / "tone.wav", 3.0)
    told = values_of(invoke(model, "--audio", sound, "--max-new-tokens", 3, "--json", "--out", tmp_path))
    assert [token["special"] for token in told["tokens"]] == [True] * len(told["tokens"])
    assert told["note"] == "Only the first 2 s of the recording are used."
    assert all(step["layers"] for step in told["traces"]["model"]["steps"])
    expect(invoke(model, "--prompt", "x", "--out", tmp_path), 2, "--prompt", "--audio")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("--prompt", "needed")),
        (("--prompt", " \n"), ("--prompt", "empty")),
        (("--prompt", "word " * 3000), ("--prompt", "2,048 positions", "Shorten")),
        (("--prompt", "fox " * 1900, "--max-new-tokens", "256"), ("--max-new-tokens", "2,048")),
        (("--prompt", "x", "--context", "y"), ("--context", "does not apply")),
        (("--prompt", "x", "--plain", "--system", "y"), ("--system", "does not apply")),
        (("--audio", "tone.wav"), ("--audio", "--prompt")),
    ],
)
def test_prompts_that_a_model_cannot_continue_are_refused_with_place_and_fix(tiny_llama, tmp_path, arguments, words):
    expect(invoke(tiny_llama, *arguments, "--out", tmp_path), 2, *words)
    assert list(tmp_path.iterdir()) == []


def test_models_that_predict_no_words_are_refused(built, tmp_path, tiny_gpt2):
    bert = built("bert")
    expect(invoke(bert, "--prompt", "The sky is blue.", "--out", tmp_path), 2, "[MASK]", "--prompt")
    AutoModel.from_pretrained(bert).save_pretrained(tmp_path / "headless")
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "headless")
    expect(
        invoke(tmp_path / "headless", "--prompt", "The [MASK].", "--out", tmp_path), 2, "BertModel", "predicts no words"
    )
    AutoModel.from_pretrained(tiny_gpt2).save_pretrained(tmp_path / "body")
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(tmp_path / "body")
    expect(invoke(tmp_path / "body", "--prompt", "x", "--out", tmp_path), 2, "GPT2Model", "predicts no words")
    expect(invoke(tiny_gpt2, "--prompt", "x", "--plain", "--out", tmp_path), 2, "--plain", "no chat template")


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), max_size=6))
def test_answers_diverge_after_their_common_prefix(base, tuned):
    at = find_parting(base, tuned)
    if at is None:
        assert base == tuned
    else:
        assert base[:at] == tuned[:at]
        assert base[at : at + 1] != tuned[at : at + 1]


def test_sampling_options_keep_the_recipes_penalty_and_replace_its_sampling(chat_run):
    recipe = load_recipe(str(chat_run / "recipe.yaml")).recipe
    own = recipe.generation.model_copy(
        update={"repetition_penalty": 1.3, "num_beams": 4, "do_sample": True, "top_k": 5}
    )
    changed = Sampling(9, 0.7, 0.9).recipe(recipe.model_copy(update={"generation": own})).generation
    assert (changed.max_new_tokens, changed.num_beams, changed.do_sample, changed.top_k) == (9, 1, False, None)
    assert changed.repetition_penalty == 1.3


def test_pages_of_an_earlier_training_are_removed(tmp_path):
    model = build_llama(tmp_path / "model")
    short = {"train": {"max_steps": 1, "num_train_epochs": None}, "evaluate": {"metrics": ["loss"]}}
    run = train(tmp_path, model, ANSWERED, **short)
    expect(invoke(run, "--prompt", QUESTION), 0)
    assert train(tmp_path, model, ANSWERED, **short) == run  # the same again: nothing is trained
    assert len(json.loads((run / "report.json").read_text())["explanations"]) == 1
    train(tmp_path, model, ANSWERED[:-1], **short)
    assert json.loads((run / "report.json").read_text())["explanations"] == []
    assert not (run / "explain").exists()
