"""Translation with encoder-decoders of every family, and by prompt with decoders: losses, answers, whole runs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import AutoPeftModelForSeq2SeqLM
from safetensors.torch import load_file, save_file
from support import families
from support.models import build_gpt2, train_tokenizer
from support.pairs import LANGUAGES, PAIRS, gradient, quiet, recipe_of, run_recipe, start_training, tuned_logits
from support.runs import llmtune
from support.training import read_metrics
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
)

from llmtune.data.chat_template import stop_ids
from llmtune.data.seq2seq_encoding import first_token
from llmtune.errors import EnvironmentProblem
from llmtune.evaluate.generation import answer_ends, only_these_settings
from llmtune.evaluate.task_predictions import decoder_settings, generate
from llmtune.model import load_processor
from llmtune.model.decoder_start import check_decoder_start
from llmtune.model.task_losses import decoder_inputs, seq2seq_loss
from llmtune.pipeline import evaluate_run, run_pipeline
from llmtune.recipe import Recipe, load_recipe
from llmtune.session import Models, Options, open_finished
from llmtune.tasks import translate

FAMILIES = ("t5", "mt5", "bart", "mbart", "nllb", "marian")
STILL = {"t5": {"dropout_rate": 0.0}, "mt5": {"dropout_rate": 0.0}}
ROWS = [{**pair, "source_language": None, "target_language": None} for pair in PAIRS]
ROWS[0]["source"] += " Nobody has seen it before today, and nobody will again."
ROWS[1]["target"] += " et personne ne le voit"
ASKED = [translate.VARIANTS[0].split_answer(row)[0] for row in ROWS[:5]]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks
]


def build_mbart25(folder, **config):
    """mBART of 2020: the language stands behind the end, and the model moves it to the front."""
    tokenizer = MBartTokenizer(vocab=families._make_unigram(families.FAIRSEQ_WORDS), src_lang="en_XX", tgt_lang="fr_XX")
    shape = families._describe(MBartConfig, tokenizer, families.SEQ2SEQ, config)
    return families._save(folder, 0, MBartForConditionalGeneration, shape, tokenizer)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seq2seq")
    still = {name: STILL.get(name, {"dropout": 0.0}) for name in FAMILIES}
    built = {name: getattr(families, f"build_{name}")(folder / name, **still[name]) for name in FAMILIES}
    return {**built, "mbart25": build_mbart25(folder / "mbart25")}


def opened(folder, name, **generation):
    """A plain model, its tokenizer and a recipe for them."""
    section = LANGUAGES.get(name.removesuffix("25"))
    content = {"recipe_version": 1, "task": "translate", "model": {"name": str(folder)}}
    content |= {"data": {"train": "rows.jsonl"}, "generation": {"max_new_tokens": 6, **generation}}
    recipe = Recipe.model_validate({**content, **({"translate": section} if section else {})})
    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder), recipe


def talkative(folder, name, **generation):
    """The same with an output layer of its own, so that the model does not write what it reads over and over."""
    model, processor, recipe = opened(folder, name, **generation)
    torch.manual_seed(3)
    model.lm_head = torch.nn.Linear(64, model.config.vocab_size, bias=False)
    return model, processor, recipe


def examples_of(processor, recipe, count=5):
    return [encoded[0] for encoded in translate.VARIANTS[0].encode(ROWS[:count], processor, recipe)]


def batch_of(examples, processor, recipe):
    return translate.VARIANTS[0].collator(processor, recipe)(examples, 0)


# The loss


@pytest.mark.parametrize("name", ["t5", "mt5", "bart", "marian"])
@torch.no_grad()
def test_the_loss_is_the_models_own(name, folders):
    model, processor, recipe = opened(folders[name], name)
    batch = batch_of(examples_of(processor, recipe), processor, recipe)
    ours = seq2seq_loss(model, batch)
    own = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss
    assert ours.count == int((batch["labels"] != -100).sum())
    assert float(ours.sum / ours.count) == pytest.approx(float(own), rel=1e-5)


@pytest.mark.parametrize("name", ["mbart", "nllb", "mbart25"])
@torch.no_grad()
def test_the_loss_is_the_models_own_but_for_the_language_which_is_given_and_not_learned(name, folders):
    model, processor, recipe = opened(folders[name], name)
    batch = batch_of(examples_of(processor, recipe), processor, recipe)
    ours = seq2seq_loss(model, batch)
    own = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")})
    labels = batch["labels"]
    assert int((labels != -100).sum()) - ours.count == len(labels)
    language = labels == processor.convert_tokens_to_ids(recipe.translate.target_language)
    assert language.sum(1).tolist() == [1] * len(labels)
    without = labels.masked_fill(language, -100)
    expected = torch.nn.functional.cross_entropy(own.logits.flatten(0, 1), without.flatten(), reduction="sum")
    assert float(ours.sum) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", [*FAMILIES, "mbart25"])
@torch.no_grad()
def test_padding_does_not_change_the_loss_of_a_row(name, folders):
    model, processor, recipe = opened(folders[name], name)
    examples = examples_of(processor, recipe)
    assert len({len(example.input_ids) for example in examples}) > 1
    together = seq2seq_loss(model, batch_of(examples, processor, recipe), by_row=True)
    alone = [seq2seq_loss(model, batch_of([example], processor, recipe), by_row=True) for example in examples]
    assert together.row_sums.tolist() == pytest.approx([float(loss.sum) for loss in alone], rel=1e-5)
    assert together.row_correct.tolist() == [float(loss.correct) for loss in alone]
    assert together.count == sum(loss.count for loss in alone) == sum(example.supervised for example in examples)


@pytest.mark.parametrize("name", ["t5", "bart", "nllb"])
def test_micro_batches_of_one_row_give_the_gradient_of_one_large_batch(name, folders, tmp_path):
    section = {"translate": LANGUAGES[name]} if name in LANGUAGES else {}
    recipe = recipe_of(tmp_path, folders[name], ROWS, "translate", adapter={"lora_dropout": 0.0}, **section)
    training = start_training(recipe, tmp_path / "run")
    with torch.no_grad():
        for i, parameter in enumerate(training.parameters):  # away from the start, where half of the gradient is zero
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    one, single = gradient(training, 1)
    large, whole = gradient(training, 100_000)
    assert one == pytest.approx(large, rel=1e-6)
    assert float((single - whole).norm() / whole.norm()) < 1e-5
    assert float(whole.norm()) > 0.01


# Answers


@pytest.mark.parametrize("name", [*FAMILIES, "mbart25"])
def test_an_answer_begins_as_the_targets_of_training_do(name, folders):
    model, processor, recipe = talkative(folders[name], name)
    (example,) = examples_of(processor, recipe, 1)
    batch = batch_of([example], processor, recipe)
    given = decoder_inputs(model, batch["labels"])[:, : 1 + example.target_spans[0]]
    first = first_token(translate.VARIANTS[0].pair(ROWS[0], recipe), processor)
    read = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with only_these_settings(model) as own:
        settings = decoder_settings(own, model, processor, recipe, first)
        written = generate(model, read, settings)
    assert torch.equal(written[:, : given.shape[1]], given)
    assert written.shape[1] > given.shape[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_written_from_the_ids_of_training(name, folders):
    model, processor, recipe = talkative(folders[name], name)
    seen = []
    encoder = model.get_encoder()
    encoder.register_forward_pre_hook(lambda module, args, kwargs: seen.append({**kwargs}), with_kwargs=True)
    texts = translate.VARIANTS[0].predict(model, ASKED, processor, recipe, device="cpu")
    assert len(texts) == len(ASKED)
    (given,) = seen
    masks = given["attention_mask"].bool()
    ids = [row[mask].tolist() for row, mask in zip(given["input_ids"], masks, strict=True)]
    expected = [list(example.input_ids) for example in examples_of(processor, recipe)]
    assert sorted(ids) == sorted(expected)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["t5", "bart", "nllb"])
def test_answers_are_those_of_a_plain_generate_a_row_at_a_time(name, beams, folders):
    model, processor, recipe = talkative(folders[name], name, num_beams=beams)
    texts = translate.VARIANTS[0].predict(model, ASKED, processor, recipe, device="cpu")
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


def test_each_row_is_answered_in_its_own_language(folders):
    model, processor, recipe = talkative(folders["nllb"], "nllb")
    asked = [{**ASKED[0], "target_language": code} for code in ("fra_Latn", "deu_Latn", "fra_Latn")]
    french, german, again = translate.VARIANTS[0].predict(model, asked, processor, recipe, device="cpu")
    assert french == again != german


def test_marian_never_writes_the_token_that_it_starts_with(folders, tmp_path):
    model, processor, recipe = opened(folders["marian"], "marian")
    model.generation_config.bad_words_ids = [[processor.pad_token_id]]
    with torch.no_grad():
        model.final_logits_bias[0, processor.pad_token_id] = 1e4  # what it would like best
    given = processor(ROWS[0]["source"], return_tensors="pt")
    with only_these_settings(model) as own:
        written = generate(model, dict(given), decoder_settings(own, model, processor, recipe))
    assert processor.pad_token_id not in written[0, 1:]


def test_a_decoder_whose_start_is_not_known_is_refused(folders):
    model, processor, recipe = opened(folders["t5"], "t5")
    check_decoder_start(model, processor, recipe)
    model.config.decoder_start_token_id = 10_000
    with pytest.raises(EnvironmentProblem, match="decoder_start_token_id is 10000, and the decoder knows"):
        check_decoder_start(model, processor, recipe)
    model.config.decoder_start_token_id = None
    with pytest.raises(EnvironmentProblem, match="decoder_start_token_id is missing"):
        check_decoder_start(model, processor, recipe)
    named, its, about = opened(folders["mbart25"], "mbart25")
    named.config.decoder_start_token_id = None
    check_decoder_start(named, its, about)  # it starts with a language


# Whole runs

UNTIED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
QUICK = {"lora": {}, "qlora": {}, "full": UNTIED}
LONG = [
    ("t5", "full", {}),
    ("mt5", "qlora", {}),
    ("bart", "lora", {}),
    ("bart", "full", {}),
    ("mbart", "full", {}),
    ("nllb", "lora", {}),
    ("nllb", "qlora", {}),
    ("marian", "lora", {}),
    ("marian", "full", {}),
]
BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    "decoder_input_ids": torch.tensor([[0, 7], [0, 9]]),
}
RELOAD = """
import sys
from safetensors.torch import load_file, save_file
from peft import AutoPeftModelForSeq2SeqLM
from transformers import AutoModelForSeq2SeqLM
batch = load_file(sys.argv[1])
for folder in sys.argv[2:]:
    kind = AutoModelForSeq2SeqLM if folder.endswith("weights") else AutoPeftModelForSeq2SeqLM
    model = kind.from_pretrained(folder).eval()
    save_file({"logits": model(**batch, use_cache=False).logits.detach()}, f"{folder}/logits.safetensors")
assert not any(module.startswith("llmtune") for module in sys.modules)
"""


def tune(folder, name, method, config):
    """Run all steps; returns the run's folder and its report."""
    section = {"translate": LANGUAGES[name]} if name in LANGUAGES else {}
    model = getattr(families, f"build_{name}")(folder / "model", **config)
    report = run_recipe(folder, model, PAIRS, "translate", adapter={"method": method}, **section)
    return folder / "run", report


def check_report(report):
    scores = report["evaluation"]
    assert report["train"]["train_loss"] < report["train"]["first_loss"]
    assert scores["tuned"]["loss"] < scores["base"]["loss"]
    for part in ("base", "tuned", "difference"):
        assert set(scores[part]) == {"loss", "bleu", "chrf"}
    assert scores["difference"]["loss"]["interval"][1] < 0
    assert scores["signatures"]["bleu"].startswith("corpus BLEU, sacrebleu nrefs:1|case:mixed|eff:no|tok:13a|")
    assert scores["signatures"]["chrf"].startswith("corpus chrF2, sacrebleu nrefs:1|")


def read_back_plainly(folder, *results):
    """Load results with the plain classes in a process without llmtune, and see that they say what the runs' do."""
    save_file(BATCH, folder / "batch.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, str(folder / "batch.safetensors"), *map(str, results)],
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for result in results:
        plain = load_file(result / "logits.safetensors")["logits"]
        (result / "logits.safetensors").unlink()  # the run is as it was
        torch.testing.assert_close(plain, tuned_logits(result.parent, BATCH), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {method: tune(folder / method, "t5", method, config) for method, config in QUICK.items()}


@pytest.mark.parametrize("method", QUICK)
def test_a_t5_is_tuned_and_measured_beside_its_base(method, runs):
    check_report(runs[method][1])


def test_what_was_tuned_is_read_back_by_plain_classes(runs):
    kinds = {"lora": (AutoPeftModelForSeq2SeqLM, "adapter"), "full": (AutoModelForSeq2SeqLM, "weights")}
    for method, (kind, name) in kinds.items():
        run, _ = runs[method]
        plain = kind.from_pretrained(run / name).eval()
        torch.testing.assert_close(
            plain(**BATCH, use_cache=False).logits, tuned_logits(run, BATCH), rtol=1e-4, atol=1e-5
        )
        assert AutoTokenizer.from_pretrained(run / name)("The sky")["input_ids"]


@pytest.mark.slow
def test_what_was_tuned_is_read_back_where_there_is_no_llmtune(runs, tmp_path):
    read_back_plainly(tmp_path, runs["lora"][0] / "adapter", runs["full"][0] / "weights")


def test_qlora_leaves_the_output_layer_and_its_tied_embedding_alone(runs):
    run, report = runs["qlora"]
    names = load_file(run / "adapter" / "adapter_model.safetensors")
    assert names
    assert not [name for name in names if "lm_head" in name or "shared" in name or "embed_tokens" in name]
    context, place = open_finished(run, quiet(), True)
    plain = AutoModelForSeq2SeqLM.from_pretrained(place.path)
    models = Models(context, place, load_processor(place, context.recipe.model))
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
    }  # transformers keeps it in float32, whatever the rest is
    assert len(whole) == 4 < len(adapted)
    assert tuned.selected.plan.parts["weights"] == pytest.approx(weights, rel=0.02)
    assert report["adapter"]["matched_modules"] == 2 * 6 + 2 * 10  # q, k, v, o, wi, wo; the decoder attends twice


def test_a_second_run_skips_every_step_and_an_evaluation_keeps_the_rest(runs):
    run, report = runs["lora"]
    loaded = load_recipe(str(run.parent / "recipe.yaml"))
    again = run_pipeline(loaded, Options(out=run), quiet())
    assert all(step["skipped"] for step in again["steps"])
    assert again["evaluation"]["tuned"] == report["evaluation"]["tuned"]
    changed = load_recipe(str(run / "recipe.yaml"), ["generation.num_beams=2", "evaluate.metrics=[ter, bleu]"])
    beams = evaluate_run(changed, run, quiet(), offline=True)
    assert set(beams["evaluation"]["tuned"]) == {"ter", "bleu"}
    assert beams["evaluation"]["signatures"]["generation"].endswith("num_beams 2")


@pytest.mark.slow
def test_a_t5_that_has_learned_its_rows_writes_them(tmp_path):
    model = families.build_t5(tmp_path / "model", **UNTIED)
    train = {"num_train_epochs": 40, "learning_rate": 3.0e-3}
    report = run_recipe(tmp_path, model, PAIRS, "translate", adapter={"method": "full"}, train=train)
    scores = report["evaluation"]
    assert scores["base"]["chrf"] < 20
    assert scores["tuned"]["chrf"] > 50  # the colours and things of unseen pairs are known
    assert scores["difference"]["chrf"]["interval"][0] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method", "config"), LONG, ids=lambda value: value if isinstance(value, str) else "")
def test_every_family_is_tuned_and_its_result_read_back_by_plain_classes(name, method, config, tmp_path):
    run, report = tune(tmp_path, name, method, config)
    check_report(report)
    if method != "qlora":
        read_back_plainly(tmp_path, run / ("weights" if method == "full" else "adapter"))


@pytest.mark.slow
def test_two_processes_train_a_t5_as_one_does(folders, tmp_path):
    recipe_of(tmp_path, folders["t5"], ROWS, "translate", adapter={"lora_dropout": 0.0}, train={"batch_size": 6})
    two = llmtune("launch", "local", "recipe.yaml", "--processes", 2, "--threads", 2, "--out", "two", cwd=tmp_path)
    assert two.returncode == 0, two.stderr
    one = llmtune("train", "recipe.yaml", "--out", "one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    pairs = list(zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True))
    assert len(pairs) >= 6
    for alone, together in pairs:
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)


# By prompt

NAMED = {"source_language": "English", "target_language": "French"}


@pytest.mark.parametrize(("template", "packing"), [(True, True), (True, False), (False, True)])
def test_a_decoder_is_tuned_by_prompt(template, packing, tiny_llama, tiny_gpt2, tmp_path):
    model = tiny_llama if template else tiny_gpt2
    data = {"packing": packing}
    report = run_recipe(
        tmp_path,
        model,
        PAIRS,
        "translate",
        translate=NAMED,
        data=data,
        train={"max_steps": 4, "num_train_epochs": None},
    )
    check_report(report)
    asked = report["evaluation"]["samples"][0]
    assert asked["prompt"] in {pair["source"] for pair in PAIRS}


def test_packed_and_padded_prompts_have_the_same_losses(tiny_llama, tmp_path):
    losses = {}
    for packing in (True, False):
        recipe = recipe_of(
            tmp_path / f"{packing}", tiny_llama, PAIRS, "translate", translate=NAMED, data={"packing": packing}
        )
        training = start_training(recipe, tmp_path / f"{packing}" / "run")
        assert training.packed == packing
        losses[packing] = gradient(training, 4000)[0]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


def test_an_answer_of_a_decoder_ends_where_its_template_ends_a_turn(tmp_path):
    processor = train_tokenizer()
    processor.eos_token = "<|endoftext|>"  # as base models have it
    model = AutoModelForCausalLM.from_pretrained(build_gpt2(tmp_path / "gpt2"))
    recipe = load_recipe(str(recipe_of(tmp_path, tmp_path / "gpt2", PAIRS, "translate", translate=NAMED))).recipe
    end = processor.convert_tokens_to_ids("<|im_end|>")
    assert end in stop_ids(processor, recipe)
    assert end in answer_ends(model, processor, recipe)
    processor.chat_template = None
    assert end not in answer_ends(model, processor, recipe)
