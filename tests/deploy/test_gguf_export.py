import json

import pytest
from conversion.llama import LlamaModel
from support.exports import export_tuned
from support.ggufs import build_family
from support.models import CHATML
from support.runs import write_recipe
from support.templates import EMPTY_THOUGHTS

import llmtune.deploy.gguf_export as exporting
import llmtune.deploy.gguf_readers as gguf_reading
from llmtune.adapter.injection import inject
from llmtune.deploy.gguf_export import gguf_format
from llmtune.deploy.gguf_readers import check_reader
from llmtune.deploy.gguf_tokenizer import NAMES
from llmtune.deploy.tuned_model import TunedModel
from llmtune.errors import EnvironmentProblem, GateFailed, RecipeError
from llmtune.model.config import read_model_config
from llmtune.model.loading import load_model
from llmtune.model.processor import load_processor
from llmtune.model.resolve import resolve_model
from llmtune.recipe.loader import load_recipe
from llmtune.tasks.registry import choose_variant


@pytest.fixture(autouse=True)
def read_by_transformers(monkeypatch):
    """Read files with transformers; test_gguf_llama.py uses llama.cpp."""
    monkeypatch.setattr(gguf_reading, "has_llama", lambda: False)
    monkeypatch.setattr(exporting, "has_llama", lambda: False)


@pytest.mark.parametrize("number_format", ["f16", "q8_0"])
def test_a_certified_file_answers_like_the_tuned_model(tune, tmp_path, console, number_format):
    out = tmp_path / "gguf"
    certificate = export_tuned(tune(), gguf_format(number_format=number_format), out)
    assert {file.name for file in out.iterdir()} == {certificate["file"], "Modelfile", "certificate.json"}
    assert certificate["file"] == f"tiny-{number_format.upper()}.gguf"
    assert certificate["reader"].startswith("transformers")
    measured = certificate["measured"]
    assert measured["kl_mean"] < measured["effect_kl"] / 100
    assert measured["same_ids"]
    assert json.loads((out / "certificate.json").read_text()) == json.loads(json.dumps(certificate))
    assert "read by transformers" in console.file.getvalue()


def test_a_model_that_needs_llama_cpp_is_refused_early_without_it(monkeypatch):
    with pytest.raises(EnvironmentProblem, match=r"'smollm3'(?s:.*)pip install llama-cpp-python"):
        check_reader("smollm3", "smollm")
    with pytest.raises(EnvironmentProblem, match="pre-tokenizer 'falcon'"):
        check_reader("llama", "falcon")
    monkeypatch.setattr(gguf_reading, "has_llama", lambda: True)
    check_reader("smollm3", "falcon")


def test_the_modelfile_has_file_template_stops_and_sampling(tune, tmp_path, console):
    export_tuned(tune(), gguf_format(), tmp_path / "gguf")
    lines = (tmp_path / "gguf/Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./tiny-F16.gguf"
    assert lines[1].startswith('TEMPLATE """{{ range $i, $_ := .Messages }}')
    assert lines[2:] == ["PARAMETER temperature 0.0", "PARAMETER repeat_penalty 1.0", 'PARAMETER stop "<|im_end|>"']


def test_template_values_go_into_the_file_and_the_modelfile(tune, tmp_path, console):
    (tmp_path / "mine.jinja").write_text(EMPTY_THOUGHTS)
    model = {"chat_template": str(tmp_path / "mine.jinja"), "chat_template_kwargs": {"enable_thinking": False}}
    certificate = export_tuned(tune(model=model), gguf_format(), tmp_path / "gguf")
    assert certificate["measured"]["same_ids"]
    assert b"enable_thinking is not defined" in (tmp_path / "gguf" / certificate["file"]).read_bytes()
    assert "<think>\\n\\n</think>" in (tmp_path / "gguf/Modelfile").read_text()


def test_a_template_without_a_go_equivalent_gets_no_modelfile(tune, tmp_path, console):
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0]['content'] }}" + CHATML)
    certificate = export_tuned(tune(model={"chat_template": str(template)}), gguf_format(), tmp_path / "gguf")
    assert certificate["modelfile"] is False
    assert not (tmp_path / "gguf/Modelfile").exists()
    assert "No Modelfile: Ollama's templates cannot express" in console.file.getvalue()


@pytest.mark.slow
def test_completion_of_another_family_is_certified_with_a_plain_modelfile(tune, tmp_path, console):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "The quick brown fox."}\n')
    model = build_family("gemma3", tmp_path / "model")
    certificate = export_tuned(
        tune(model, 0.02, task="completion", data={"train": str(rows)}), gguf_format(), tmp_path / "gguf"
    )
    assert certificate["measured"]["kl_mean"] < 1e-4
    assert certificate["measured"]["effect_kl"] > 1e-3
    assert 'TEMPLATE """{{ .Prompt }}"""\n' in (tmp_path / "gguf/Modelfile").read_text()


def test_an_adapter_without_effect_does_not_count_as_lost(tune, tmp_path, console):
    certificate = export_tuned(tune(strength=0.0), gguf_format(number_format="q8_0"), tmp_path / "gguf")
    assert certificate["measured"]["effect_kl"] == 0


def test_a_translating_decoder_is_certified_with_its_own_prompt(chat_rows, tmp_path, console):
    rows = tmp_path / "pairs.jsonl"
    pair = {"source": "The fox is red.", "target": "Le renard est rouge."}
    rows.write_text(json.dumps(pair) + "\n")
    languages = {"source_language": "English", "target_language": "French"}
    sections = {"task": "translate", "translate": languages, "evaluate": {"metrics": ["bleu"]}}
    model = build_family("qwen2", tmp_path / "model")
    recipe = load_recipe(write_recipe(tmp_path / "pairs.yaml", model, rows, **sections)).recipe
    place = resolve_model(str(model), recipe.model, console, offline=True)
    processor = load_processor(place, recipe.model)
    form = choose_variant(recipe, read_model_config(place, recipe.model), "tiny")
    selected = load_model(place, recipe, form, processor, device="cpu", training=False)
    adapted = inject(selected, recipe, console)
    certificate = export_tuned(TunedModel(adapted, recipe, form, [pair]), gguf_format(), tmp_path / "gguf")
    assert certificate["measured"]["same_ids"]
    assert certificate["measured"]["prompts"] == 9


def test_qlora_merges_onto_its_training_weights_by_default(tune, tmp_path, console):
    certificate = export_tuned(tune(adapter={"method": "qlora"}), gguf_format(onto="dequantized"), tmp_path / "gguf")
    assert certificate["onto"] == "dequantized"
    assert certificate["measured"]["kl_mean"] < 1e-5


def fails(tuned, out, said, **options):
    with pytest.raises(GateFailed, match=said) as raised:
        export_tuned(tuned, gguf_format(**options), out)
    assert raised.value.exit_code == 6
    assert not out.exists()
    return out.with_name(f"{out.name}.failed.json")


@pytest.mark.parametrize("wrong", [{NAMES.CHAT_TEMPLATE: CHATML.replace("assistant", "helper")}, {NAMES.ADD_BOS: True}])
def test_a_file_with_another_template_or_start_token_fails_and_is_deleted(tune, tmp_path, console, monkeypatch, wrong):
    describe = exporting.describe_tokenizer
    monkeypatch.setattr(exporting, "describe_tokenizer", lambda *given: describe(*given) | wrong)
    certificate = json.loads(fails(tune(), tmp_path / "gguf", "other token ids").read_text())
    assert not certificate["passed"]
    assert not certificate["measured"]["same_ids"]


def test_a_file_without_the_adapter_fails_in_any_format(tune, tmp_path, console, monkeypatch):
    number_format = "q8_0"
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "merge_weights", lambda adapted, onto: adapted.model.unload())
        failed = fails(tune(), tmp_path / "gguf", "the adapter is lost", number_format=number_format)
    assert json.loads(failed.read_text())["measured"]["kl_from_base"] < 1e-4
    assert export_tuned(tune(), gguf_format(number_format=number_format), tmp_path / "gguf")["passed"]
    assert not failed.exists()


def test_a_file_with_rows_in_transformers_order_fails(tune, tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaModel, "permute", staticmethod(lambda weight, *heads: weight))
    model = build_family("llama", tmp_path / "model")
    fails(tune(model, 0.02), tmp_path / "gguf", "first choice agrees")


@pytest.mark.parametrize(
    "adapter", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"v_proj": 2}}]
)
def test_an_adapter_alone_adds_what_peft_adds(tune, tmp_path, console, adapter):
    certificate = export_tuned(
        tune(adapter=adapter), gguf_format(adapter_only=True, number_format="f32"), tmp_path / "lora"
    )
    assert certificate["adapter"]["modules"] == 14
    assert certificate["adapter"]["largest_difference"] < 1e-6
    assert certificate["reader"] == "its own arithmetic"
    text = (tmp_path / "lora/Modelfile").read_text()
    assert "FROM ./base.gguf\nADAPTER ./tiny-lora-F32.gguf\n" in text


def test_an_adapter_file_with_wrong_products_fails(tune, tmp_path, monkeypatch):
    lora_tensors = exporting.lora_tensors

    def halved(model, layout):
        for name, weight in lora_tensors(model, layout):
            yield name, weight / 2 if name == "blk.1.attn_q.weight.lora_b" else weight

    monkeypatch.setattr(exporting, "lora_tensors", halved)
    with pytest.raises(GateFailed, match=r"blk\.1\.attn_q\.weight differs from the trained one by 0\.5"):
        export_tuned(tune(), gguf_format(adapter_only=True), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "trained biases"),
        ({"method": "full", "r": None, "lora_alpha": None}, "trained all weights"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "an adapter on the embedding"),
    ],
)
def test_an_adapter_that_llama_cpp_cannot_store_is_refused_with_the_reason(tune, tmp_path, console, adapter, said):
    model = build_family("qwen2", tmp_path / "model")
    with pytest.raises(RecipeError, match=said):
        export_tuned(tune(model, adapter=adapter), gguf_format(adapter_only=True), tmp_path / "lora")
