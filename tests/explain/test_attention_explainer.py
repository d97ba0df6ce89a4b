from __future__ import annotations

import base64
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from support.audio import write_tone
from support.browser import Page, browser, open_browser
from support.explaining import expect, explain, open_quietly, page_data, quiet, train, values_of
from support.families import build_t5
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from llmtune.errors import RecipeError
from llmtune.explain import attention_maps
from llmtune.explain.attention_explainer import AttentionExplainer
from llmtune.explain.inputs import AttentionRequest
from llmtune.model.library_logging import hushed
from llmtune.recipe.loader import load_recipe

invoke = partial(explain, "attention")

TEXT = "Which colour has the cat? The cat is blue."
PAIRS = [{"source": f"number {i} is red", "target": "blue"} for i in range(24)]
QUICK = {"train": {"num_train_epochs": 2}, "evaluate": {"metrics": ["loss"]}}
FIGURES = {"attention-heatmap.png", "attention-heatmap.svg", "attention-graph.svg", "attention-graph.graphml"}


@pytest.fixture(scope="module")
def explained(chat_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The printed result for the run and the text, and the folder of its files."""
    out = tmp_path_factory.mktemp("explained")
    return values_of(invoke(chat_run, "--text", TEXT, "--out", out, "--json")), out


def names(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}


def unpack(kind: dict[str, Any], side: str, layer: int, head: Any) -> np.ndarray:
    """Return a map from the page, [rows, columns]."""
    numbers = np.frombuffer(base64.b64decode(kind["values"][f"{side}/{layer}/{head}"]), "<u2") / 65535
    shape = (len(kind["rows"]), len(kind["columns"]))
    if not kind["masked"]:
        return numbers.reshape(shape)
    whole = np.zeros(shape)
    whole[np.tril_indices(shape[0])] = numbers
    return whole


def test_a_run_shows_base_tuned_and_difference_in_all_files(explained):
    found, out = explained
    assert names(out) == {*FIGURES, "attention.html"} == {Path(file).name for file in found["files"]}
    assert found["sides"] == ["base", "tuned"]
    kind = found["attention"]["masked-self"]
    assert (kind["layers"], kind["heads"]) == (2, 4)
    assert [layer["layer"] for layer in kind["by_layer"]] == [0, 1]
    assert all(layer["mean_change"] > 0 for layer in kind["by_layer"])
    page = page_data(out / "attention.html")["kinds"][0]
    base, tuned = (unpack(page, side, 1, "mean") for side in ("base", "tuned"))
    change = np.abs(tuned - base).sum() / 2 / len(base)
    assert change == pytest.approx(kind["by_layer"][1]["mean_change"], abs=1e-3)
    assert "".join(token["text"] for token in found["tokens"]["source"]) == TEXT


def test_a_run_shows_its_own_base_and_tuned_model(chat_run, explained):
    page = page_data(explained[1] / "attention.html")["kinds"][0]
    name = str(load_recipe(str(chat_run / "recipe.yaml")).recipe.model.name)
    ids = AutoTokenizer.from_pretrained(name)(TEXT, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="eager").eval()
    for side in ("base", "tuned"):
        if side == "tuned":
            with hushed():
                model = PeftModel.from_pretrained(model, chat_run / "adapter").eval()
        with torch.inference_mode():
            seen = model(**ids, output_attentions=True).attentions
        for layer in (0, 1):
            for head in range(4):
                wanted = seen[layer][0, head].numpy()
                assert np.abs(unpack(page, side, layer, head) - wanted).max() < 2e-5


def test_the_three_kinds_of_an_encoder_decoder_are_distinguished(built, tmp_path):
    asked = ("--text", "The sky is blue", "--target", "Der Himmel", "--out", tmp_path, "--json")
    found = values_of(invoke(built("t5"), *asked))
    assert list(found["attention"]) == ["self", "masked-self", "cross"]
    kinds = {kind["name"]: kind for kind in page_data(tmp_path / "attention.html")["kinds"]}
    source, target = (len(found["tokens"][side]) for side in ("source", "target"))
    shapes = {name: (len(kind["rows"]), len(kind["columns"])) for name, kind in kinds.items()}
    assert shapes == {"self": (source, source), "masked-self": (target, target), "cross": (target, source)}
    assert found["tokens"]["target"][0]["text"] == "<pad>"
    assert "".join(token["text"] for token in found["tokens"]["target"] if not token["special"]).strip() == "Der Himmel"
    assert "cross/0/rollout" not in str(kinds["cross"]["values"].keys())
    drawn = {
        f"{stem}-{kind}.{ending}" for kind in kinds for stem, _, ending in (name.partition(".") for name in FIGURES)
    }
    assert names(tmp_path) == drawn | {"attention.html"}


def test_without_a_target_an_encoder_decoder_writes_its_own_answer(built, tmp_path):
    result = invoke(built("t5"), "--text", "The sky is blue", "--out", tmp_path, "--json")
    found = values_of(result)
    tokenizer = AutoTokenizer.from_pretrained(str(built("t5")))
    model = AutoModelForSeq2SeqLM.from_pretrained(str(built("t5"))).eval()
    ids = tokenizer("The sky is blue", return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=64, do_sample=False, num_beams=1)
    assert found["target"] == tokenizer.decode(written[0], skip_special_tokens=True).strip()
    assert "own answer; --target gives another" in " ".join(result.stderr.split())


@pytest.mark.slow
def test_a_translators_run_reads_the_text_as_its_task_encodes_it(tmp_path):
    run = train(
        tmp_path,
        build_t5(tmp_path / "model"),
        PAIRS,
        **QUICK,
        task="translate",
        translate={"prompt": "to blue: {source}"},
        generation={"max_new_tokens": 4},
    )
    found = values_of(invoke(run, "--text", "number 3 is red", "--target", "blue", "--json"))
    read = "".join(token["text"] for token in found["tokens"]["source"] if not token["special"])
    assert read.strip() == "to blue: number 3 is red"
    assert all(layer["mean_change"] > 0 for layer in found["attention"]["cross"]["by_layer"])
    assert (run / "explain" / "attention.html").is_file()


def test_whisper_shows_a_recording_in_stretches_and_the_silence_after_it_as_one(built, tmp_path):
    tone = write_tone(tmp_path / "tone.wav", 1.3)
    asked = ("--audio", tone, "--target", "blue", "--language", "de", "--out", tmp_path, "--json")
    found = values_of(invoke(built("whisper"), *asked))
    source = [token["text"] for token in found["tokens"]["source"]]
    assert source == [*(f"{tenth / 10:.1f}s" for tenth in range(13)), "silence"]
    assert [token["text"] for token in found["tokens"]["target"]][:2] == ["<|startoftranscript|>", "<|de|>"]


def test_a_message_is_rendered_as_in_the_runs_training(chat_run, tmp_path):
    found = values_of(invoke(chat_run, "--text", "Is 3 red?", "--chat", "--out", tmp_path, "--json"))
    read = [token["text"] for token in found["tokens"]["source"]]
    assert "".join(read) == "<|im_start|>user\nIs 3 red?<|im_end|>\n<|im_start|>assistant\n"
    assert [token["special"] for token in found["tokens"]["source"]].count(True) == 3


def test_layer_and_head_select_the_drawn_map(built, tmp_path):
    asked = ("--text", TEXT, "--layer", 1, "--head", 3, "--out", tmp_path, "--json")
    found = values_of(invoke(built("bert"), *asked))
    assert found["attention"]["self"]["shown"]["layer"] == 1
    for name in ("attention-heatmap.svg", "attention-graph.svg"):
        assert "layer 1, head 3" in (tmp_path / name).read_text("utf-8")


def test_letters_without_a_font_are_reported_once(tmp_path):
    from llmtune.explain.figures import fonts_for

    families, missing = fonts_for(["cat שלום", "\U0001fbc5", "\U0001fbc5 a"])
    assert missing == "\U0001fbc5"
    assert families[0] == "DejaVu Sans"


# Limits and mistakes


def test_a_long_text_is_refused_with_both_lengths_or_truncated(built, tmp_path):
    long = "cat dog " * 200
    expect(invoke(built("bert"), "--text", long), 3, "--text", "402 tokens", "positions for 256", "--cut")
    expect(invoke(built("llama"), "--text", long, "--max-tokens", 30), 3, "a figure shows at most 30", "--max-tokens")
    expect(invoke(built("t5"), "--text", "cat", "--target", long, "--max-tokens", 30), 3, "--target", "--cut")
    cut = ("--cut", "--max-tokens", 30, "--out", tmp_path, "--json")
    found = values_of(invoke(built("bert"), "--text", long, *cut))
    read = [token["text"] for token in found["tokens"]["source"]]
    assert (len(read), read[0], read[-1]) == (30, "[CLS]", "[SEP]")


def test_missing_empty_and_inapplicable_options_are_named_with_the_fix(built, tmp_path):
    expect(invoke(built("llama"), "--text", "  "), 3, "--text: the text is empty", "at least one word")
    expect(invoke(built("llama")), 2, "--text: it is needed")
    expect(invoke(built("llama"), "--text", "a", "--target", "b"), 2, "--target: it does not apply to this model")
    expect(invoke(built("bert"), "--text", "a", "--chat"), 2, "--chat: the model has no chat template")
    expect(invoke(built("whisper"), "--text", "a"), 2, "--audio: it is needed: this model reads recordings")
    expect(invoke(built("whisper"), "--audio", tmp_path / "none.wav"), 3, "none.wav", "file not found:")


def test_an_unknown_layer_head_or_kind_is_refused_with_the_known_ones(built):
    asked = (built("llama"), "--text", "a b")
    expect(invoke(*asked, "--layer", "2"), 2, "--layer: layer 2 not found: the model has 2", "from 0 to 1")
    expect(invoke(*asked, "--head", "4"), 2, "--head: head '4' not found: a layer has 4", "0 to 3, mean or rollout")
    expect(invoke(*asked, "--head", "meen"), 2, "Did you mean 'mean'?")
    expect(invoke(*asked, "--kind", "cross"), 2, "--kind", "This model has masked-self.")
    expect(invoke(built("t5"), "--text", "a", "--kind", "cross", "--head", "rollout"), 2, "has no rollout")


def test_without_room_for_all_heads_the_page_has_those_of_the_given_layer(built, tmp_path, monkeypatch):
    monkeypatch.setattr(attention_maps, "MOST_NUMBERS", 1000)
    target = open_quietly(built("bert"))
    with pytest.raises(RecipeError, match="too many to keep"):
        AttentionExplainer(target, quiet(), AttentionRequest(text=TEXT, head="1")).explain(tmp_path)
    AttentionExplainer(target, quiet(), AttentionRequest(text=TEXT, layer=1, head="2")).explain(tmp_path)
    kind = page_data(tmp_path / "attention.html")["kinds"][0]
    assert {"model/1/mean", "model/1/rollout", "model/1/2"} <= set(kind["values"])
    assert "model/0/2" not in kind["values"]
    assert "this page has heads of at most one layer" in (tmp_path / "attention.html").read_text("utf-8")


# The page in a browser

CHOOSE = """
const choose = (id, value, event) => {
  const field = document.getElementById(id);
  field.value = value;
  field.dispatchEvent(new Event(event || "change"));
};
"""


@pytest.fixture
def page(tmp_path):
    with open_browser(tmp_path / "profile") as opened:
        yield opened


def shown_after(page: Page, script: str = "") -> str:
    """The page's content after a script ran in it."""
    return page.run(f"(() => {{ {CHOOSE} {script}; return document.documentElement.outerHTML; }})()")


@browser
def test_choosing_a_head_changes_the_picture(built, tmp_path, page):
    values_of(invoke(built("bert"), "--text", "The cat sat", "--out", tmp_path, "--json"))
    page.open((tmp_path / "attention.html").as_uri())
    before, after = shown_after(page), shown_after(page, 'choose("layer", "1"); choose("head", "2")')
    pictures = [re.findall(r'<image[^>]* href="(data:image/png[^"]*)"', shown)[0] for shown in (before, after)]
    assert pictures[0] != pictures[1]
    assert "Layer 1, head 2." in after
    assert "head 2." not in before
    assert ">[CLS]<title>" in before.replace("\n", "")


@browser
def test_a_runs_maps_are_side_by_side_and_its_graph_follows_the_threshold(chat_run, tmp_path, page):
    values_of(invoke(chat_run, "--text", "one two three four", "--out", tmp_path, "--json"))
    page.open((tmp_path / "attention.html").as_uri())
    edges = {}
    for value in ("0.01", "0.99"):
        shown = shown_after(page, f'choose("side", "all"); choose("threshold", "{value}", "input"); point(2, 1)')
        edges[value] = shown.count('class="edge ')
        assert shown.count("<image ") == 3
        assert re.search(r"looks at <bdi>.*?</bdi>: base 0\.\d{3}, tuned 0\.\d{3}, difference [+−]?0\.\d{3}", shown)
    assert edges["0.01"] > edges["0.99"]
    assert page.errors == []
