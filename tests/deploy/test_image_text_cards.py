"""Model cards of checkpoints that also read images, and of models whose files look like theirs."""

import contextlib
import io
import re

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from support.architectures import build
from support.classifying import colour_rows
from support.exports import SILENT
from support.image_text import build_image_text
from support.models import build_llama
from support.pairs import PAIRS, run_recipe
from support.runs import finish_run
from transformers import AutoModelForImageTextToText

from llmtune.deploy.model_card import PublishOptions
from llmtune.deploy.publish import publish_run
from llmtune.model.processor import PROCESSOR_FILES

BRIEF = {"max_steps": 2, "num_train_epochs": None, "learning_rate": 5e-2}


def finish(folder, family, *missing, **sections):
    base = build_image_text(folder / "base", family)
    for name in missing:
        (base / name).unlink(missing_ok=True)
    return base, finish_run(folder, base, train=BRIEF, data={"packing": False}, **sections)


def run_card(run, hub, base, console, **options):
    """Publish a run and execute its card's code; return the card, and the model and output of the code."""
    publish_run(run, PublishOptions(to=hub, **options), console)
    card = ModelCard.load(hub / "README.md")
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    names = {"base": base}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code.replace('"base"', repr(str(base))).replace('"tiny"', repr(str(hub))), names)
    return card, names["model"], printed.getvalue()


@torch.inference_mode()
def score(model):
    return model(input_ids=torch.arange(4, 24)[None]).logits


@pytest.mark.parametrize(("family", "missing"), [("qwen3_5", ()), ("llava", ()), ("llava", PROCESSOR_FILES)])
def test_the_code_on_an_adapters_card_gives_the_tuned_answers(tmp_path, console, family, missing):
    base, run = finish(tmp_path, family, *missing)
    card, model, printed = run_card(run, tmp_path / "hub", base, console)
    assert "AutoModelForImageTextToText.from_pretrained(" in card.text
    plain = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    unchanged = score(plain)
    expected = score(PeftModel.from_pretrained(plain, run / "adapter").eval())
    assert (expected - unchanged).abs().max() > 0.1
    assert torch.equal(score(model), expected)
    assert "It was tuned on text." in card.text
    assert printed


@pytest.mark.parametrize("family", ["qwen3_5", "llava"])
def test_the_code_on_a_merged_checkpoints_card_gives_the_tuned_answers_to_a_chat(tmp_path, console, family):
    base, run = finish(tmp_path, family, deploy=["merged"])
    card, model, printed = run_card(run, tmp_path / "hub", base, console, merged=True)
    assert "AutoModelForImageTextToText.from_pretrained(" in card.text
    assert "apply_chat_template" in card.text
    plain = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    expected = score(PeftModel.from_pretrained(plain, run / "adapter").eval())
    torch.testing.assert_close(score(model), expected, atol=1e-4, rtol=1e-4)
    assert card.data.pipeline_tag == "image-text-to-text"
    assert printed


def test_a_text_model_with_a_processors_file_has_the_card_of_a_decoder(tmp_path, console):
    base = build_llama(tmp_path / "base")
    (base / "preprocessor_config.json").write_text("{}")
    run = finish_run(tmp_path, base, train=BRIEF)
    card, _, printed = run_card(run, tmp_path / "hub", base, console)
    assert "AutoModelForCausalLM.from_pretrained(" in card.text
    assert card.data.pipeline_tag == "text-generation"
    assert printed


def test_an_encoder_decoder_that_also_reads_images_has_the_card_of_a_translator(tmp_path, console):
    build("encoder-decoder", "t5gemma2", tmp_path / "base")
    run_recipe(tmp_path, tmp_path / "base", PAIRS, "translate", train=BRIEF, adapter={"method": "full"})
    card, _, printed = run_card(tmp_path / "run", tmp_path / "hub", tmp_path / "base", console)
    assert "AutoModelForSeq2SeqLM.from_pretrained(" in card.text
    assert printed


def test_the_code_on_a_classifiers_cards_gives_the_tuned_answers(tmp_path, console):
    base = build_image_text(tmp_path / "base", "gemma3")
    run_recipe(tmp_path, base, colour_rows(40), "classify", train=BRIEF, deploy=["merged"], **SILENT)
    card, adapted, printed = run_card(tmp_path / "run", tmp_path / "hub", base, console)
    merged_card, merged, merged_printed = run_card(tmp_path / "run", tmp_path / "merged", base, console, merged=True)
    assert "AutoModelForSequenceClassification.from_pretrained(" in card.text
    assert "AutoModelForSequenceClassification.from_pretrained(" in merged_card.text
    assert "green" in printed
    assert "green" in merged_printed
    torch.testing.assert_close(score(merged), score(adapted), atol=1e-4, rtol=1e-4)
    with adapted.disable_adapter():
        assert (score(merged) - score(adapted)).abs().max() > 0.1
