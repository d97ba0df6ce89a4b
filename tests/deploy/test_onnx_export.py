"""ONNX exports of every kind of model, read by onnxruntime; planted faults fail their certificates."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys

import onnx
import pytest
import torch
from support import families, pairs
from support.classifying import colour_rows
from support.exports import MANY, NUMBERS, SILENT, spoken, train_family
from support.runs import invoke
from transformers import BertForMaskedLM

import llmtune.deploy.onnx_export as exporting
from llmtune.adapter.merging import merge_adapter as really_merge
from llmtune.deploy import onnx_graphs
from llmtune.deploy.export import export
from llmtune.deploy.merged_model import save_settings as really_save
from llmtune.deploy.onnx_export import check_onnx, onnx_format
from llmtune.deploy.onnx_model import open_onnx_export
from llmtune.deploy.parity import LIMITS
from llmtune.deploy.products import open_export
from llmtune.deploy.search_parity import make_reference
from llmtune.deploy.tuned_model import load_tuned
from llmtune.errors import EnvironmentProblem, GateFailed, RecipeError
from llmtune.model import device
from llmtune.pipeline import run_pipeline
from llmtune.plan import open_finished
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.retired import RETIRED
from llmtune.serve.finished_run import FinishedRun
from llmtune.store.run_request import RunRequest

COLOURS = colour_rows(40)
PAIRS = [{**row, "pair": "which colour?"} for row in COLOURS]
NAMED = [{**row, "source_language": "English", "target_language": "German"} for row in pairs.PAIRS]
TALK = [
    {"messages": [{"role": "user", "content": f"What comes after {i}?"}, {"role": "assistant", "content": str(i + 1)}]}
    for i in range(24)
]


CASES = {
    "classify": ("bert", "classify", COLOURS, SILENT, ["the green fox number 3"]),
    "classify-pairs": ("roberta", "classify", PAIRS, SILENT, ["the green fox number 3", "which colour?"]),
    "classify-many": ("bert", "classify", MANY, SILENT, ["the green fox number 3"]),
    "classify-number": ("distilbert", "classify", NUMBERS, SILENT, ["a fox of size 3"]),
    "classify-decoder": ("llama", "classify", COLOURS, SILENT, ["the green fox number 3"]),
    "reward": (
        "llama",
        "preference",
        pairs.LIKED,
        {"preference": {"loss": "reward"}, **SILENT},
        ["Which colour has the cat?", "The cat is red."],
    ),
    "token-classify": ("deberta", "token-classify", pairs.TASKS["token-classify"][1], SILENT, ["the red cat 3"]),
    "qa": (
        "bert",
        "qa",
        pairs.TASKS["qa"][1],
        {"qa": {"stride": 16}, **SILENT},
        ["Which colour has cat 3?", "The cat number 3 is red."],
    ),
    "qa-unanswerable": (
        "bert",
        "qa",
        [{**row, "answers": []} for row in pairs.TASKS["qa"][1]],
        {"qa": {"stride": 16}, **SILENT},
        ["Which colour has cat 3?", "The cat number 3 is red."],
    ),
    "chat": ("llama", "chat", TALK, {}, ["What comes after 7?"]),
    "summarize-decoder": ("llama", "summarize", pairs.DOCUMENTS, {}, ["The sky is blue. Nobody else is here."]),
    "translate-decoder": ("llama", "translate", NAMED, {}, ["The sky is blue.", "English", "German"]),
    "translate": ("t5", "translate", pairs.PAIRS, {}, ["The sky is blue."]),
    "translate-bart": ("bart", "translate", pairs.PAIRS, {}, ["The sky is blue."]),
    "translate-nllb": ("nllb", "translate", pairs.PAIRS, {"translate": pairs.LANGUAGES["nllb"]}, ["The sky is blue."]),
    "whisper": ("whisper", "speech", pairs.tones, {"speech": {"language": "fr", "window_seconds": 2}}, None),
    "letters": ("wav2vec2", "speech", spoken, {"speech": {"window_seconds": 2}}, None),
}
QUICK = ("classify", "chat")
HIDING = """
import runpy, sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *about):
        return None if name.partition(".")[0] in ("torch", "llmtune") else self.finder.find_spec(name, *about)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def train(folder, tiny_llama, case, until="train"):
    family, task, rows, sections, _ = CASES[case]
    return train_family(folder, tiny_llama, family, task, rows, until, **sections)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama):
    """The run folder of a case, trained once for all tests."""
    return functools.cache(lambda case: train(tmp_path_factory.mktemp(case), tiny_llama, case))


def run_script(folder, *arguments):
    """Run the script of an export in a Python without torch and llmtune; without arguments it prints its usage."""
    command = [sys.executable, "-W", "ignore", "-c", HIDING, folder / "run_model.py", *arguments]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if not arguments:
        assert done.returncode == 1
        return done.stderr.strip()
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_every_kind_of_model_runs_in_onnxruntime_and_by_its_script(case, tmp_path, trained, console):
    run = shutil.copytree(trained(case), tmp_path / "run")
    certificate = export(open_finished(run, console, offline=True), onnx_format())
    measured = certificate["measured"]
    assert certificate["passed"]
    assert measured["effect_kl"] > 10 * measured["kl_mean"]
    assert (measured["same_ids"], measured["top1_agreement"]) == (True, 1)
    assert measured["answer_agreement"] == 1 or case == "reward"  # scores may differ in their last digit
    arguments = CASES[case][4] or [str(trained(case).parent / "3.wav")]
    tuned = FinishedRun(run)
    asked = dict(zip((*tuned.task.required_inputs, *tuned.task.optional_inputs), arguments, strict=False))
    expected = tuned.task.format_prediction(tuned.answer(asked)["prediction"])
    assert run_script(run / "onnx/float32").startswith("Run this model: python run_model.py ")
    written = run_script(run / "onnx/float32", *arguments)
    if case in ("classify-number", "reward"):
        assert float(written) == pytest.approx(float(expected.split()[-1]), rel=1e-2)
    elif case.startswith("classify"):  # the label, then the probabilities, which tests/test_calibrated_runs.py checks
        assert written.splitlines()[0] == expected.strip()
    elif case != "token-classify":
        assert written == expected.strip()
    else:
        assert len(written.splitlines()) == len(arguments[0].split())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classify", "token-classify", "qa"])
def test_the_script_cuts_a_text_at_the_positions_of_the_model_and_says_so(kind, tmp_path):
    task, rows, sections, arguments = CASES[kind][1:]
    model = families.build_bert(tmp_path / "bert", max_position_embeddings=40)
    recipe = pairs.recipe_of(tmp_path, model, rows, task, **sections)
    run_pipeline(load_recipe(str(recipe)), RunRequest(out=tmp_path / "run", until="train"), pairs.quiet())
    export(open_finished(tmp_path / "run", pairs.quiet(), offline=True), onnx_format())
    longer = [*arguments[:-1], arguments[-1] + " the red cat" * 100]
    command = [sys.executable, tmp_path / "run/onnx/float32/run_model.py", *longer]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Only the first 40 are read." in done.stderr


def test_a_float32_reference_stays_in_float32_where_auto_is_bfloat16(trained, console, monkeypatch):
    monkeypatch.setattr(device, "has_fast_bfloat16", lambda kind: True)
    tuned = load_tuned(open_finished(trained("classify"), console, offline=True))
    tuned.model.float()
    reference = make_reference(tuned)
    assert torch.equal(torch.cat(reference.logits), torch.cat(reference.read_logits(tuned.model)))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["chat", "translate"])
def test_models_that_write_are_rounded_in_blocks(case, tmp_path, trained, console):
    run = shutil.copytree(trained(case), tmp_path / "run")
    certificate = export(open_finished(run, console, offline=True), onnx_format(int8=True))
    assert certificate["passed"]
    assert certificate["format"] == "onnx-int8"
    assert b"MatMulNBits" in next((run / "onnx/int8").glob("*.onnx")).read_bytes()
    assert not [file for file in (run / "onnx/int8").iterdir() if file.name.startswith(("folded", "rounded"))]


# Planted faults


def forget(adapted, onto, part="", share=0.0):
    """Merge with a share of the adapter in the modules whose names contain `part`."""
    for name, parameter in adapted.model.named_parameters():
        if "lora_B" in name and part in name:
            parameter.data *= share
    return really_merge(adapted, onto)


def swap_labels(model, tuned, folder, dtype):
    really_save(model, tuned, folder, dtype)
    config = json.loads((folder / "config.json").read_text())
    names = config["id2label"]
    names["0"], names["2"] = names["2"], names["0"]
    (folder / "config.json").write_text(json.dumps(config))


FIRST, SECOND = "bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.attention.self.value"
FAULTS = {
    "adapter dropped": (forget, [f"differs is {FIRST}", "have 0% of its adapter's effect"]),
    "scale halved": (functools.partial(forget, share=0.5), [f"is {FIRST}", "have 50% of its adapter"]),
    "one layer": (functools.partial(forget, part=SECOND), [f"differs is {SECOND}", "have 0% of its adapter"]),
}


def fails(run, console, said, **options):
    with pytest.raises(GateFailed, match="the ONNX model differs") as raised:
        export(open_finished(run, console, offline=True), onnx_format(**options), run.parent / "out")
    assert not (run.parent / "out").exists()
    text = str(raised.value)
    assert all(words in text for words in said), text


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_with_its_cause(fault, tmp_path, trained, console, monkeypatch):
    wrong, said = FAULTS[fault]
    run = shutil.copytree(trained("classify"), tmp_path / "run")
    monkeypatch.setattr(exporting, "merge_weights", wrong)
    fails(run, console, said)


HIDDEN = "bert.encoder.layer.1.attention.output.dense"


def build_wide(folder):
    """Build a BERT with one channel between two layers that hides the others in 8 bits; its outputs are the same."""
    model = BertForMaskedLM.from_pretrained(families.build_bert(folder))
    attention = model.bert.encoder.layer[1].attention
    for part in (attention.self.value.weight, attention.self.value.bias):
        part.data[5] *= 1e4
    attention.output.dense.weight.data[:, 5] /= 1e4
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def outlier_run(tmp_path_factory, tiny_llama):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "build_wide", build_wide, raising=False)
        narrow = {"adapter": {"target_modules": ["query", "intermediate.dense"]}, **SILENT}
        tuned = {**narrow, "train": {"num_train_epochs": 3, "learning_rate": 1e-2}}
        patch.setitem(CASES, "wide", ("wide", "classify", COLOURS, tuned, []))
        return train(tmp_path_factory.mktemp("wide"), tiny_llama, "wide")


@pytest.mark.slow
def test_int8_leaves_a_layer_with_outliers_in_float32_and_names_it(outlier_run, tmp_path):
    result = invoke("deploy", "onnx", outlier_run, "--int8", "--out", tmp_path / "int8")
    assert result.exit_code == 0, result.output
    assert f"in float32, because int8 changes their outputs too much: {HIDDEN}" in result.output
    certificate = json.loads((tmp_path / "int8/certificate.json").read_text())
    assert (certificate["passed"], certificate["float32_layers"]) == (True, [HIDDEN])
    assert not [file for file in (tmp_path / "int8").iterdir() if file.name.startswith(("folded", "rounded"))]
    weights = onnx.load(tmp_path / "int8/model.onnx").graph.initializer
    assert [[*one.dims] for one in weights if one.data_type == onnx.TensorProto.FLOAT and len(one.dims) > 1] == [
        [64, 64]
    ]
    again = invoke("deploy", "certify", tmp_path / "int8", "--run", outlier_run)
    assert again.exit_code == 0, again.output
    float32 = export(open_finished(outlier_run, pairs.quiet(), offline=True), onnx_format(), tmp_path / "float32")
    assert float32["passed"]
    assert "float32_layers" not in float32
    assert certificate["weights_bytes"] < float32["weights_bytes"] / 2


@pytest.mark.slow
def test_int8_fails_if_too_many_layers_would_stay_in_float32(outlier_run, tmp_path, console, monkeypatch):
    monkeypatch.setattr(onnx_graphs, "FLOAT32_SHARE", 0.0)
    run = shutil.copytree(outlier_run, tmp_path / "run")
    fails(run, console, [f"first layer that differs is {HIDDEN}", "omit --int8"], int8=True)
    assert json.loads((tmp_path / "out.failed.json").read_text())["float32_layers"] == []


def test_labels_in_another_order_than_the_outputs_fail(tmp_path, trained, console, monkeypatch):
    run = shutil.copytree(trained("classify"), tmp_path / "run")
    monkeypatch.setattr(exporting, "save_settings", swap_labels)
    fails(
        run, console, ["its labels, or their order, are not those of the tuned model", "the largest logit difference"]
    )


# Scores, other people's files, refusals


def test_a_recipe_makes_and_scores_int8_and_a_bare_file_is_the_same_model(tmp_path, tiny_llama, console, monkeypatch):
    scored = ("bert", "classify", COLOURS, {"deploy": ["onnx-int8"], **SILENT}, [])
    monkeypatch.setitem(CASES, "scored", scored)
    run = train(tmp_path, tiny_llama, "scored", until="run")
    certificate = json.loads((run / "onnx/int8/certificate.json").read_text())
    score = certificate["score"]
    assert certificate["passed"]
    assert score["rows"] == 6
    assert score["runtime"].startswith("onnxruntime")
    assert score["bytes"] == certificate["weights_bytes"]
    plan = open_finished(run, console, offline=True).plan
    shutil.copy(run / "onnx/int8/model.onnx", tmp_path / "foreign.onnx")
    ids = torch.tensor([[5, 6, 7, 8]])
    ours, theirs = (open_onnx_export(path, plan).model for path in (run / "onnx/int8", tmp_path / "foreign.onnx"))
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_a_foreign_file_may_be_in_float16_next_to_other_xml_files(tmp_path, trained, console):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    run = shutil.copytree(trained("classify"), tmp_path / "run")
    context = open_finished(run, console, offline=True)
    export(context, onnx_format())
    file = run / "onnx/float32/model.onnx"
    onnx.save(convert_float_to_float16(onnx.load(file), keep_io_types=True), file)
    file.with_name("junit.xml").write_text("<testsuite/>")
    exported = open_export(file.parent, load_tuned(context))
    assert (exported.format, exported.limits) == ("onnx", LIMITS["rounded"])


@pytest.mark.parametrize("labels", [["red", "green"], {"red": "0"}, {"5": "red", "9": "green"}])
def test_labels_without_numbers_are_refused(labels, tmp_path, trained, console):
    plan = open_finished(trained("classify"), console, offline=True).plan
    (tmp_path / "config.json").write_text(json.dumps({"id2label": labels}))
    with pytest.raises(EnvironmentProblem, match="id2label does not number the labels from 0"):
        open_onnx_export(tmp_path, plan)


def test_openvino_files_are_refused_with_the_file_to_certify(tmp_path, trained, console):
    tuned = load_tuned(open_finished(trained("classify"), console, offline=True))
    for name in ("config.json", "model.bin", "model.xml"):
        (tmp_path / name).touch()
    for path in (tmp_path, tmp_path / "model.xml"):
        with pytest.raises(RecipeError, match=re.escape(RETIRED["deploy certify FILE.xml"])):
            open_export(path, tuned)


def test_missing_packages_and_models_with_other_states_are_refused(tmp_path, trained, console, monkeypatch):
    run = trained("classify")
    plan = open_finished(run, console, offline=True).plan
    config = plan.processor and exporting.find_class(plan.model_ref, plan.recipe, plan.task)[1]
    config.layer_types = ["linear_attention"]
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "find_class", lambda *about: (object, config))
        with pytest.raises(RecipeError, match=r"bert has another state \(linear_attention\)"):
            check_onnx(plan)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = invoke("deploy", "onnx", run)
    assert result.exit_code == 4
    assert "pip install 'llmtune-cli[onnx]'" in result.output
