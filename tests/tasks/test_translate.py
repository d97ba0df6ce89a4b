"""Translation with encoder-decoders of every family and prompted decoders: losses, answers, complete runs."""

import json

import httpx
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from support import families
from support.models import build_gpt2, train_tokenizer
from support.pairs import LANGUAGES, PAIRS, quiet, recipe_of, run_recipe
from support.rows import write_jsonl
from support.runs import FAST, invoke
from support.serving import load_served, serving
from support.variants import TRANSLATE, predict
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
)

from llmtune import load_run
from llmtune.data.chat_template import stop_ids
from llmtune.data.text_pairs import first_token
from llmtune.errors import EnvironmentProblem
from llmtune.evaluate.decoder_generation import decoder_settings, run_generation
from llmtune.evaluate.generation import answer_ends, only_these_settings
from llmtune.model.causal_lm_loss import decoder_inputs
from llmtune.plan import open_finished
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.schema import Recipe
from llmtune.run_models import Models
from llmtune.tasks import translate
from llmtune.tasks.text_to_text import check_decoder_start

FAMILIES = ("t5", "mt5", "bart", "mbart", "nllb", "marian")
STILL = {"t5": {"dropout_rate": 0.0}, "mt5": {"dropout_rate": 0.0}}
ROWS = [{**pair, "source_language": None, "target_language": None} for pair in PAIRS]
ROWS[0]["source"] += " Nobody has seen it before today, and nobody will again."
ROWS[1]["target"] += " et personne ne le voit"
ASKED = [translate.VARIANTS[0].split_answer(row)[0] for row in ROWS[:5]]


def build_mbart25(folder, **config):
    """mBART of 2020: the language comes after the end, and the model moves it to the front."""
    tokenizer = MBartTokenizer(vocab=families._make_unigram(families.FAIRSEQ_WORDS), src_lang="en_XX", tgt_lang="fr_XX")
    shape = families._describe(MBartConfig, tokenizer, families.SEQ2SEQ, config)
    return families._save(folder, 0, MBartForConditionalGeneration, shape, tokenizer)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, built):
    folder = tmp_path_factory.mktemp("seq2seq")
    still = {name: STILL.get(name, {"dropout": 0.0}) for name in FAMILIES}
    return {**{name: built(name, **still[name]) for name in FAMILIES}, "mbart25": build_mbart25(folder / "mbart25")}


@pytest.fixture(scope="module")
def translator(tmp_path_factory, built):
    """A run of NLLB on rows that name the languages, which its recipe does not."""
    folder = tmp_path_factory.mktemp("translator")
    run_recipe(folder, built("nllb"), [{**pair, **LANGUAGES["nllb"]} for pair in PAIRS], "translate", train=FAST)
    return folder / "run"


def opened(folder, name, **generation):
    """A plain model, its tokenizer and a recipe for them."""
    section = LANGUAGES.get(name.removesuffix("25"))
    content = {"recipe_version": 1, "task": "translate", "model": {"name": str(folder)}}
    content |= {"data": {"train": "rows.jsonl"}, "generation": {"max_new_tokens": 6, **generation}}
    recipe = Recipe.model_validate({**content, **({"translate": section} if section else {})})
    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder), recipe


def talkative(folder, name, **generation):
    """The same with an untied output layer; otherwise the model would repeat its input."""
    model, processor, recipe = opened(folder, name, **generation)
    torch.manual_seed(3)
    model.lm_head = torch.nn.Linear(64, model.config.vocab_size, bias=False)
    return model, processor, recipe


def examples_of(processor, recipe, count=5):
    return [encoded[0] for encoded in translate.VARIANTS[0].encode(ROWS[:count], processor, recipe)]


def batch_of(examples, processor, recipe):
    return translate.VARIANTS[0].collator(processor, recipe)(examples, 0)


# The loss


@pytest.mark.parametrize("name", [*FAMILIES, "mbart25"])
@torch.no_grad()
def test_the_loss_is_the_models_own_except_for_the_given_language(name, folders):
    model, processor, recipe = opened(folders[name], name)
    batch = batch_of(examples_of(processor, recipe), processor, recipe)
    ours, labels = TRANSLATE.loss(model, batch), batch["labels"]
    own = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")})
    if recipe.translate:
        language = labels == processor.convert_tokens_to_ids(recipe.translate.target_language)
        assert language.sum(1).tolist() == [1] * len(labels)
        labels = labels.masked_fill(language, -100)
    else:
        assert float(ours.sum / ours.count) == pytest.approx(float(own.loss), rel=1e-5)
    assert ours.count == int((labels != -100).sum())
    expected = torch.nn.functional.cross_entropy(own.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert float(ours.sum) == pytest.approx(float(expected), rel=1e-5)


# Answers


@pytest.mark.parametrize("name", [*FAMILIES, "mbart25"])
def test_an_answer_begins_like_the_training_targets(name, folders):
    model, processor, recipe = talkative(folders[name], name)
    (example,) = examples_of(processor, recipe, 1)
    batch = batch_of([example], processor, recipe)
    given = decoder_inputs(model, batch["labels"])[:, : 1 + example.target_spans[0]]
    first = first_token(translate.VARIANTS[0].pair(ROWS[0], recipe), processor)
    read = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with only_these_settings(model) as own:
        settings = decoder_settings(own, model, processor, recipe, first)
        written = run_generation(model, read, settings)
    assert torch.equal(written[:, : given.shape[1]], given)
    assert written.shape[1] > given.shape[1]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["t5", "bart", "nllb"])
def test_answers_match_a_plain_generate_row_by_row(name, beams, folders):
    model, processor, recipe = talkative(folders[name], name, num_beams=beams)
    texts = predict(TRANSLATE, model, ASKED, processor, recipe)
    start = {"decoder_start_token_id": model.config.decoder_start_token_id}
    if name in LANGUAGES:
        start["forced_bos_token_id"] = processor.convert_tokens_to_ids("fra_Latn")
        processor.src_lang = "eng_Latn"
    expected = []
    for row in ASKED:
        ids = processor(row["source"], return_tensors="pt")
        with only_these_settings(model):
            written = model.generate(
                **ids,
                **start,
                max_new_tokens=6,
                num_beams=beams,
                eos_token_id=processor.eos_token_id,
                pad_token_id=processor.pad_token_id,
            )
        expected.append(processor.decode(written[0], skip_special_tokens=True).strip())
    assert texts == expected
    assert all(texts)


def test_each_row_is_translated_into_its_own_language(folders):
    model, processor, recipe = talkative(folders["nllb"], "nllb")
    asked = [{**ASKED[0], "target_language": code} for code in ("fra_Latn", "deu_Latn", "fra_Latn")]
    french, german, again = predict(TRANSLATE, model, asked, processor, recipe)
    assert french == again != german


def test_marian_never_writes_its_start_token(folders, tmp_path):
    model, processor, recipe = opened(folders["marian"], "marian")
    model.generation_config.bad_words_ids = [[processor.pad_token_id]]
    with torch.no_grad():
        model.final_logits_bias[0, processor.pad_token_id] = 1e4  # its most likely token
    given = processor(ROWS[0]["source"], return_tensors="pt")
    with only_these_settings(model) as own:
        written = run_generation(model, dict(given), decoder_settings(own, model, processor, recipe))
    assert processor.pad_token_id not in written[0, 1:]


def test_a_decoder_without_a_known_start_token_is_refused(folders):
    model, processor, _ = opened(folders["t5"], "t5")
    check_decoder_start(model, processor)
    model.config.decoder_start_token_id = 10_000
    with pytest.raises(EnvironmentProblem, match="decoder_start_token_id is 10000, but the decoder has only"):
        check_decoder_start(model, processor)
    model.config.decoder_start_token_id = None
    with pytest.raises(EnvironmentProblem, match="decoder_start_token_id is missing"):
        check_decoder_start(model, processor)
    named, its, _ = opened(folders["mbart25"], "mbart25")
    named.config.decoder_start_token_id = None
    check_decoder_start(named, its)  # it starts with a language


# Complete runs


def test_qlora_does_not_quantise_the_output_layer_and_its_tied_embedding(tmp_path):
    model = families.build_t5(tmp_path / "model")
    report = run_recipe(tmp_path, model, PAIRS, "translate", adapter={"method": "qlora"})
    run = tmp_path / "run"
    names = load_file(run / "adapter" / "adapter_model.safetensors")
    assert names
    assert not [name for name in names if "lm_head" in name or "shared" in name or "embed_tokens" in name]
    context = open_finished(run, quiet(), True)
    plain = AutoModelForSeq2SeqLM.from_pretrained(context.plan.model_ref.path)
    models = Models(context)
    with models.base() as base:
        weights = sum(parameter.numel() * parameter.element_size() for parameter in base.parameters())
        weights += sum(
            module.weight.quant_state.absmax.nbytes for module in base.modules() if isinstance(module, Linear4bit)
        )
    tuned = models.adapted
    inner = tuned.selected.model
    assert inner.lm_head.weight is inner.shared.weight
    assert torch.equal(inner.shared.weight, plain.shared.weight)
    adapted = {name: module for name, module in inner.named_modules() if hasattr(module, "base_layer")}
    whole = {name for name, module in adapted.items() if not isinstance(module.base_layer, Linear4bit)}
    assert {name.rpartition(".")[2] for name in whole} == {
        "wo"
    }  # transformers keeps it in float32, whatever the dtype of the rest
    assert len(whole) == 4 < len(adapted)
    assert tuned.selected.plan.parts["weights"] == pytest.approx(weights, rel=0.02)
    assert report["adapter"]["matched_modules"] == 2 * 6 + 2 * 10  # q, k, v, o, wi, wo; the decoder attends twice


@pytest.mark.parametrize("given", [{}, {"source_language": "eng_Latn", "target_language": "klingon"}])
def test_a_missing_or_unknown_language_is_refused_with_its_option(given, translator):
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    done = invoke("generate", translator, "a cat", *words)
    assert done.exit_code == 2
    assert ("does not know the language 'klingon'" if given else "takes --target-language") in done.stderr


def test_a_run_whose_rows_name_the_languages_answers_texts_files_and_requests(translator, tmp_path):
    steps = json.loads((translator / "run.json").read_text())["findings"]["next_steps"]
    assert '"TEXT" --source-language SOURCE_LANGUAGE --target-language TARGET_LANGUAGE' in steps
    text, languages = PAIRS[0]["source"], {"source_language": "eng_Latn", "target_language": "fra_Latn"}
    expected = load_run(translator).generate(text, **languages)
    done = invoke("generate", translator, text, "--source-language", "eng_Latn", "--target-language", "fra_Latn")
    assert (done.exit_code, done.stdout.strip()) == (0, expected), done.stderr
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"source": text, **languages}])
    done = invoke("generate", translator, "--input", rows)
    assert (done.exit_code, json.loads(done.stdout)["answer"]) == (0, expected), done.stderr
    with serving(*load_served(mine=translator).values()) as url:
        response = httpx.post(f"{url}/v1/translate", json={"text": text, **languages})
        assert (response.status_code, response.json()["text"]) == (200, expected)


def test_a_decoder_whose_rows_name_the_languages_is_merged_and_certified(tmp_path, tiny_llama):
    run_recipe(tmp_path, tiny_llama, [{**pair, **NAMED} for pair in PAIRS], "translate", train=FAST)
    merged = invoke("deploy", "merge", tmp_path / "run")
    assert merged.exit_code == 0, merged.stderr


# Prompted decoders

NAMED = {"source_language": "English", "target_language": "French"}


def test_a_decoders_answer_ends_at_its_templates_end_of_turn(tmp_path):
    processor = train_tokenizer()
    processor.eos_token = "<|endoftext|>"  # as in base models
    model = AutoModelForCausalLM.from_pretrained(build_gpt2(tmp_path / "gpt2"))
    recipe = load_recipe(str(recipe_of(tmp_path, tmp_path / "gpt2", PAIRS, "translate", translate=NAMED))).recipe
    end = processor.convert_tokens_to_ids("<|im_end|>")
    assert end in stop_ids(processor, recipe)
    assert end in answer_ends(model, processor, recipe)
    processor.chat_template = None
    assert end not in answer_ends(model, processor, recipe)
