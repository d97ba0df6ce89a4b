"""Damaged and hostile exports of others: `certify` refuses them by name, without a traceback or an escape code."""

import functools
import json
import shutil
import struct

import numpy as np
import onnx
import pytest
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from support import pairs
from support.classifying import colour_rows
from support.exports import SILENT, train_family
from support.runs import finish_run, invoke

from llmtune.deploy.export import export
from llmtune.deploy.gguf_export import gguf_format
from llmtune.plan import open_finished
from llmtune.store.atomic_files import read_json

RED = "\x1b[31mred"
SHORT = {"train": {"num_train_epochs": 1}, "deploy": ["merged"]}
SEARCHED = [{"query": f"number {i} cat", "passage": f"The cat number {i} is red."} for i in range(30)]


def train(folder, tiny_llama, kind):
    """Return the run folder of a kind, with its merged folder, and a GGUF file of a chat."""
    if kind == "chat":
        run = finish_run(folder, tiny_llama, **SHORT)
        export(open_finished(run, pairs.quiet(), offline=True), gguf_format(number_format="f32"))
        return run
    task, rows = {"classes": ("classify", colour_rows(40)), "vectors": ("embed", SEARCHED)}[kind]
    return train_family(folder, tiny_llama, "bert", task, rows, "run", **SHORT, **SILENT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama):
    return functools.cache(lambda kind: train(tmp_path_factory.mktemp(kind), tiny_llama, kind))


def refuse(capfd, run, export):
    """Certify, and return what the terminal got."""
    capfd.readouterr()
    result = invoke("deploy", "certify", export, "--run", run)
    shown = result.output + "".join(capfd.readouterr())
    assert result.exit_code in (4, 6), (shown, result.exception)
    assert "\x1b" not in shown
    assert "Traceback" not in shown
    return " ".join(shown.split())


# GGUF files


def rewrite(source, target, fields, change_tensor=lambda part: part):
    """Copy a GGUF file with other fields; None leaves a field out."""
    read = GGUFReader(source)
    writer = GGUFWriter(target, str(fields.get("general.architecture") or "llama"))
    known = {name: (field.contents(), field.types) for name, field in read.fields.items() if name[:5] != "GGUF."}
    for name, (value, types) in known.items():
        if name == "general.architecture":
            continue
        stated = fields.get(name, value)
        if stated is None:
            continue
        kinds = types if name not in fields else [guess_type(stated)]
        sub = kinds[1] if len(kinds) > 1 else guess_type(stated[0]) if isinstance(stated, list) else None
        writer.add_key_value(name, stated, kinds[0], sub)
    for tensor in read.tensors:
        part = change_tensor(np.array(tensor.data))
        writer.add_tensor(tensor.name, part)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def guess_type(value):
    kinds = {str: GGUFValueType.STRING, bool: GGUFValueType.BOOL, int: GGUFValueType.INT64, list: GGUFValueType.ARRAY}
    return kinds[type(value)]


TEMPLATE = "tokenizer.chat_template"
GGUF_FAULTS = {
    "a template of 10 GB": {TEMPLATE: "{{ 'x' * 10000000000 }}"},
    "a template without an end": {
        TEMPLATE: "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    },
    "a template that is no Jinja": {TEMPLATE: "{% for"},
    "a template that calls nothing": {TEMPLATE: "{{ nothing.at.all() }}"},
    "a template that raises escape codes": {TEMPLATE: "{{ raise_exception('" + RED + "') }}"},
    "a long template": {TEMPLATE: "x" * 2**18},
    "a template of numbers": {TEMPLATE: [1, 2]},
    "tokens that are numbers": {"tokenizer.ggml.tokens": [1, 2, 3]},
    "few token types": {"tokenizer.ggml.token_type": [1, 1]},
    "a start token out of range": {"tokenizer.ggml.bos_token_id": 10**9},
    "merges without a space": {"tokenizer.ggml.merges": ["ab", RED]},
    "no tokenizer model": {"tokenizer.ggml.model": None},
    "no tokens": {"tokenizer.ggml.tokens": None},
    "a file type that is a text": {"general.file_type": RED},
    "an unknown architecture": {"general.architecture": RED},
    "heads that do not divide": {"llama.attention.head_count": 7},
    "no layers": {"llama.block_count": 0},
}
QUICK = (
    "a template of 10 GB",
    "a template of numbers",
    "nan",
    "deep",
    "foreign module",
    "weights that are not numbers",
)


def some_slow(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("fault", some_slow(GGUF_FAULTS))
def test_a_hostile_gguf_file_is_refused(fault, trained, tmp_path, capfd):
    run = trained("chat")
    (source,) = (run / "gguf/f32").glob("*.gguf")
    rewrite(source, tmp_path / "model.gguf", GGUF_FAULTS[fault])
    refuse(capfd, run, tmp_path / "model.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_a_cut_gguf_file_is_refused(share, trained, tmp_path, capfd):
    run = trained("chat")
    (source,) = (run / "gguf/f32").glob("*.gguf")
    content = source.read_bytes()
    (tmp_path / "model.gguf").write_bytes(content[: int(share * len(content))])
    refuse(capfd, run, tmp_path / "model.gguf")


@pytest.mark.slow
def test_a_gguf_file_whose_weights_are_not_numbers_is_refused(trained, tmp_path, capfd):
    run = trained("chat")
    (source,) = (run / "gguf/f32").glob("*.gguf")
    rewrite(source, tmp_path / "model.gguf", {}, lambda part: np.full_like(part, np.nan))
    assert "its outputs are not finite numbers" in refuse(capfd, run, tmp_path / "model.gguf")


# ONNX files


def write_graph(path, nodes, kind=TensorProto.FLOAT, shape=("b", 3), ids=TensorProto.INT64, extra=()):
    inputs = [helper.make_tensor_value_info(name, ids, ["b", "t"]) for name in ("input_ids", "attention_mask")]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name, axes in extra]
    outputs = [helper.make_tensor_value_info("logits", kind, shape)]
    constants = [
        numpy_helper.from_array(np.array([[1.0, 2.0, 3.0]], dtype=np.float32), "weights"),
        numpy_helper.from_array(np.array([1]), "axis"),
        numpy_helper.from_array(np.array([7, 11]), "sizes"),
    ]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, path)


READ = [
    helper.make_node("Cast", ["input_ids"], ["floats"], to=TensorProto.FLOAT),
    helper.make_node("ReduceSum", ["floats", "axis"], ["sums"], keepdims=1),
]
LOGITS = [*READ, helper.make_node("Mul", ["sums", "weights"], ["logits"])]
ONNX_FAULTS = {
    "another model": (LOGITS, {}),
    "nan": (
        [
            *READ,
            helper.make_node("Sub", ["sums", "sums"], ["zero"]),
            helper.make_node("Div", ["zero", "zero"], ["one"]),
            helper.make_node("Mul", ["one", "weights"], ["logits"]),
        ],
        {},
    ),
    "inputs of another type": (LOGITS, {"ids": TensorProto.DOUBLE}),
    "text outputs": (
        [
            *READ,
            helper.make_node("Mul", ["sums", "weights"], ["x"]),
            helper.make_node("Cast", ["x"], ["logits"], to=TensorProto.STRING),
        ],
        {"kind": TensorProto.STRING},
    ),
    "an unknown input": (LOGITS, {"extra": [("position", ["b"])]}),
    "a cache of unknown size": (LOGITS, {"extra": [("past_key_values.0.key", ["b", "h", "p", "w"])]}),
    "a cache of no axes": (LOGITS, {"extra": [("past_key_values.0.key", [])]}),
    "outputs that depend on no row": ([helper.make_node("Identity", ["weights"], ["logits"])], {"shape": (1, 3)}),
    "a step that fails with escape codes": (
        [
            *READ,
            helper.make_node("Reshape", ["sums", "sizes"], ["shaped"], name=RED),
            helper.make_node("Mul", ["shaped", "weights"], ["logits"]),
        ],
        {"shape": None},
    ),
    "no rank": (LOGITS, {"shape": None}),
    "double outputs": (
        [
            *READ,
            helper.make_node("Mul", ["sums", "weights"], ["x"]),
            helper.make_node("Cast", ["x"], ["logits"], to=TensorProto.DOUBLE),
        ],
        {"kind": TensorProto.DOUBLE},
    ),
}


@pytest.mark.parametrize("fault", some_slow(ONNX_FAULTS))
def test_a_hostile_onnx_file_is_refused(fault, trained, tmp_path, capfd):
    nodes, options = ONNX_FAULTS[fault]
    write_graph(tmp_path / "model.onnx", nodes, **options)
    said = refuse(capfd, trained("classes"), tmp_path / "model.onnx")
    if fault == "nan":
        assert "its outputs are not finite numbers" in said


@pytest.mark.slow
@pytest.mark.parametrize("content", ["[" * 10**5, '{"id2label": 3}', '{"id2label": {"x": 1}}', "[]", '"' + RED])
def test_a_hostile_configuration_next_to_an_onnx_file_is_refused(content, trained, tmp_path, capfd):
    write_graph(tmp_path / "model.onnx", LOGITS)
    (tmp_path / "config.json").write_text(content)
    refuse(capfd, trained("classes"), tmp_path / "model.onnx")


@pytest.mark.slow
def test_a_cut_onnx_file_is_refused(trained, tmp_path, capfd):
    write_graph(tmp_path / "model.onnx", LOGITS)
    content = (tmp_path / "model.onnx").read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 5):
        (tmp_path / "model.onnx").write_bytes(content[:size])
        refuse(capfd, trained("classes"), tmp_path / "model.onnx")


# Folders


def sets(name, **values):
    def change(folder):
        content = {**(read_json(folder / name) or {}), **values}
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return change


def writes(name, content):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def fill(value):
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        filled = {name: torch.full_like(part, value) for name, part in weights.items()}
        save_file(filled, folder / "model.safetensors", {"format": "pt"})

    return change


def add_words(folder):
    """Give all tokens ids that the model does not have."""
    content = read_json(folder / "tokenizer.json")
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {word: i + (0 if word[0] == "[" else 5000) for word, i in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DEEP = "[" * 10**5 + "]" * 10**5
CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
FOLDER_FAULTS = {
    "deep": ("classes", writes(CONFIG, DEEP)),
    "a configuration that is a list": ("classes", writes(CONFIG, "[]")),
    "a size that is a text": ("classes", sets(CONFIG, hidden_size=RED)),
    "a size of zero": ("classes", sets(CONFIG, hidden_size=0)),
    "ten million layers": ("classes", sets(CONFIG, num_hidden_layers=10**7)),
    "huge": ("classes", sets(CONFIG, intermediate_size=10**12)),
    "heads that do not divide": ("classes", sets(CONFIG, num_attention_heads=7)),
    "labels in a list": ("classes", sets(CONFIG, id2label=["a", "b", "c"])),
    "an unknown type": ("classes", sets(CONFIG, model_type=RED)),
    "another type": ("classes", sets(CONFIG, model_type="gpt2")),
    "an unknown activation": ("classes", sets(CONFIG, hidden_act=RED)),
    "an unknown dtype": ("classes", sets(CONFIG, dtype=RED)),
    "a damaged quantisation": (
        "classes",
        sets(CONFIG, quantization_config={"quant_method": "compressed-tensors", "config_groups": 3}),
    ),
    "a tokenizer of garbage": ("classes", writes(TOKENIZER, b"\xff\xfe" * 50)),
    "an empty tokenizer": ("classes", writes(TOKENIZER, "{}")),
    "deep tokenizer": ("classes", writes(TOKENIZER, DEEP)),
    "words that the model lacks": ("classes", add_words),
    "a length that is a text": ("classes", sets("tokenizer_config.json", model_max_length=RED)),
    "a negative length": ("classes", sets("tokenizer_config.json", model_max_length=-3)),
    "a side that is a number": ("classes", sets("tokenizer_config.json", truncation_side=3)),
    "rules that are a list": ("classes", writes("calibration.json", "[1]")),
    "a long header": ("classes", writes(WEIGHTS, struct.pack("<Q", 2**62) + b"{}")),
    "a header of garbage": ("classes", writes(WEIGHTS, struct.pack("<Q", 8) + b"garbage!")),
    "no weights": ("classes", writes(WEIGHTS, b"")),
    "cut weights": ("classes", cut),
    "weights that are not numbers": ("classes", fill(float("nan"))),
    "infinite weights": ("classes", fill(float("inf"))),
    "chat weights that are not numbers": ("chat", fill(float("nan"))),
    "chat settings of garbage": ("chat", writes("generation_config.json", RED)),
    "chat settings of other types": ("chat", sets("generation_config.json", eos_token_id=RED, temperature=[1])),
    "a chat template of 10 GB": ("chat", writes("chat_template.jinja", "{{ 'x' * 10000000000 }}")),
    "vectors that are not numbers": ("vectors", fill(float("nan"))),
    "modules in an object": ("vectors", writes("modules.json", "{}")),
    "modules of numbers": ("vectors", writes("modules.json", "[1]")),
    "modules without a path": ("vectors", writes("modules.json", '[{"type": "sentence_transformers.models.Pooling"}]')),
    "foreign module": ("vectors", writes("modules.json", '[{"type": "antigravity.Pooling", "path": "1_Pooling"}]')),
    "a further layer": (
        "vectors",
        writes("modules.json", '[{"type": "sentence_transformers.models.Dense", "path": "x"}]'),
    ),
    "deep modules": ("vectors", writes("modules.json", DEEP)),
    "a pooling in a list": ("vectors", writes("1_Pooling/config.json", "[]")),
    "two poolings": ("vectors", sets("1_Pooling/config.json", pooling_mode_cls_token=True)),
    "prompts in a list": ("vectors", writes("config_sentence_transformers.json", '{"prompts": [1]}')),
    "a prompt that is a number": ("vectors", writes("config_sentence_transformers.json", '{"prompts": {"query": 3}}')),
    "a length of vectors that is a text": ("vectors", sets("sentence_bert_config.json", max_seq_length=RED)),
    "a negative length of vectors": ("vectors", sets("sentence_bert_config.json", max_seq_length=-1)),
    "lengths in a list": ("vectors", writes("sentence_bert_config.json", "[]")),
}


@pytest.mark.parametrize("fault", some_slow(FOLDER_FAULTS))
def test_a_hostile_folder_is_refused(fault, trained, tmp_path, capfd):
    kind, change = FOLDER_FAULTS[fault]
    folder = shutil.copytree(trained(kind) / "merged", tmp_path / "merged")
    change(folder)
    said = refuse(capfd, trained(kind), folder)
    if "not numbers" in fault:
        assert "its outputs are not finite numbers" in said
