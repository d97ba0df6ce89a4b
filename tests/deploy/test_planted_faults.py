"""Faults planted in merged folders of each kind: `certify` fails, and names the cause."""

import functools
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from support import pairs
from support.classifying import colour_rows
from support.exports import SILENT, judged, searched, spoken, train_family
from support.runs import invoke, write_sums

from llmtune.store.atomic_files import read_json

DECIDING = {"evaluate": {"metrics": None, "calibrate": True, "decide": {"risk": 0.5}}, "data": {"validation": 0.3}}
QUICK = {"train": {"num_train_epochs": 4, "learning_rate": 1e-2}}
PROMPTS = {"embed": {"query_prompt": "query: ", "passage_prompt": "passage: "}}
HEARD = {"speech": {"language": "fr", "window_seconds": 2}}


def talk(folder):
    path = write_sums(folder / "sums.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(folder):
    return [{"text": row["document"]} for row in pairs.DOCUMENTS]


FOLDERS = {
    "chat": ("llama", "chat", talk, {}),
    "completion": ("llama", "completion", texts, {}),
    "encoder-decoder": ("t5", "translate", pairs.PAIRS, {}),
    "classes": ("bert", "classify", colour_rows(120), {**SILENT, **DECIDING}),
    "tags": ("deberta", "token-classify", [pairs.entities(i) for i in range(120)], {**SILENT, **DECIDING}),
    "spans": ("bert", "qa", pairs.TASKS["qa"][1], {"qa": {"stride": 16}, **SILENT}),
    "whisper": ("whisper", "speech", spoken, HEARD),
    "ctc": ("wav2vec2", "speech", spoken, {"speech": {"window_seconds": 2}}),
    "vectors": ("bert", "embed", searched(40), {**SILENT, **PROMPTS}),
    "pairs": ("bert", "rerank", judged(40), SILENT),
}
"""By kind: the base's family, the task, rows, and sections of the recipe."""


def train(folder, tiny_llama, kind):
    """Train a run of the kind, and merge it; return the folders of the run and of its base."""
    family, task, rows, sections = FOLDERS[kind]
    run = train_family(folder, tiny_llama, family, task, rows, "run", deploy=["merged"], **QUICK, **sections)
    return run, tiny_llama if family == "llama" else folder / family


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama):
    return functools.cache(lambda kind: train(tmp_path_factory.mktemp(kind), tiny_llama, kind))


# Faults: each changes a merged folder, given the folder of the base


def change_weights(folder, base, share):
    """Undo a share of what tuning did to each weight that the base has, too; a trained head stays."""
    weights, original = load_file(folder / "model.safetensors"), load_file(base / "model.safetensors")
    for name in weights:
        before = next((original[one] for one in original if one == name or f".{one}".endswith(f".{name}")), None)
        before = next((original[one] for one in original if name.endswith(f".{one}")), before)
        if before is not None and before.shape == weights[name].shape:
            weights[name] = share * before + (1 - share) * weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps({**(read_json(path) or {}), **values}))


def drop_adapter(folder, base):
    change_weights(folder, base, 1.0)


def halve_adapter(folder, base):
    change_weights(folder, base, 0.5)


def swap_labels(folder, base):
    known = read_json(folder / "config.json")["id2label"]
    labels = [*known.values()][::-1]
    change_json(folder, "config.json", id2label=dict(zip(known, labels, strict=True)))
    change_json(folder, "config.json", label2id={label: i for i, label in enumerate(labels)})


def change_tokenizer(folder, base):
    """Exchange the ids of the words of a vocabulary."""
    file = folder / "tokenizer.json"
    path = file if file.exists() else folder / "vocab.json"
    content = read_json(path)
    vocabulary = content["model"]["vocab"] if file.exists() else content
    if isinstance(vocabulary, list):
        words = [i for i, (piece, _) in enumerate(vocabulary) if any(map(str.isalnum, piece)) and piece[0] not in "<["]
        pieces = [vocabulary[i] for i in words]
        for i, piece in zip(words, [*pieces[1:], pieces[0]], strict=True):
            vocabulary[i] = piece
    else:
        words = [word for word in vocabulary if any(map(str.isalnum, word)) and word[0] not in "<["]
        ids = [vocabulary[word] for word in words]
        vocabulary |= dict(zip(words, [*ids[1:], ids[0]], strict=True))
    path.write_text(json.dumps(content))


def change_template(folder, base):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("add_generation_prompt", "false"))


def forget_turns(folder, base):
    """Drop all earlier turns of conversations of more than three messages."""
    path = folder / "chat_template.jinja"
    path.write_text("{% if messages|length > 3 %}{% set messages = messages[-1:] %}{% endif %}" + path.read_text())


def move_positions(folder, base):
    """Change positions far from each other only."""
    rope = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0}
    is_t5 = "relative_attention_max_distance" in read_json(folder / "config.json")
    far = {"relative_attention_max_distance": 64} if is_t5 else {"rope_parameters": rope}
    change_json(folder, "config.json", **far)


def round_norms(folder, base):
    names = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "scale_embedding")
    name = next(name for name in names if name in read_json(folder / "config.json"))
    change_json(folder, "config.json", **{name: True if name == "scale_embedding" else 3e-6})


def writes(name, **values):
    return lambda folder, base: change_json(folder, name, **values)


def change_prompt(folder, base):
    prompts = read_json(folder / "config_sentence_transformers.json")["prompts"]
    change_json(folder, "config_sentence_transformers.json", prompts={**prompts, "query": ""})


def pool_otherwise(folder, base):
    modes = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    change_json(folder, "1_Pooling/config.json", **modes)


def leave_lengths(folder, base):
    modules = read_json(folder / "modules.json")
    (folder / "modules.json").write_text(json.dumps([one for one in modules if "Normalize" not in one["type"]]))


def hear_otherwise(folder, base):
    known = read_json(folder / "preprocessor_config.json")
    other = {"do_normalize": not known["do_normalize"]} if "do_normalize" in known else {"dither": 0.5}
    change_json(folder, "preprocessor_config.json", **other)


def decide_otherwise(folder, base):
    threshold = read_json(folder / "decision.json")["threshold"]
    change_json(folder, "decision.json", threshold={**threshold, "value": 0.01})


SIDE = writes("tokenizer_config.json", truncation_side="left")
SHORT = writes("tokenizer_config.json", model_max_length=5)
SAMPLES = writes("generation_config.json", do_sample=True, temperature=3.0, repetition_penalty=2.0)
IDENTITY = writes("config.json", sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"})
WORDS = ("chat", "completion", "encoder-decoder", "classes", "tags", "spans", "whisper", "ctc", "vectors", "pairs")
TEXTS = tuple(kind for kind in WORDS if kind not in ("whisper", "ctc"))
GENERATING = ("chat", "completion", "encoder-decoder", "whisper")
FAULTS = {
    "adapter dropped": (WORDS, drop_adapter, "the adapter is lost"),
    "adapter halved": (WORDS, halve_adapter, "of what tuning did"),
    "labels swapped": (("classes", "tags"), swap_labels, "its labels, or their order, are not those"),
    "tokenizer": (WORDS, change_tokenizer, "other token ids"),
    "template": (("chat",), change_template, "produce other token ids"),
    "template of later turns": (("chat",), forget_turns, "produce other token ids"),
    "positions": (("chat", "completion", "encoder-decoder"), move_positions, "config.json: r"),
    "network": (WORDS, round_norms, "config.json: "),
    "end token": (GENERATING, writes("generation_config.json", eos_token_id=5), "its answers do not end at"),
    "sampling settings": (GENERATING, SAMPLES, "temperature is 3.0; the run has 1.0"),
    "length": (TEXTS, SHORT, "model_max_length is 5"),
    "truncation side": (TEXTS, SIDE, "truncation_side is 'left'; the run has 'right'"),
    "pooling": (("vectors",), pool_otherwise, "pooling is 'cls'; the run has 'mean'"),
    "prompt": (("vectors",), change_prompt, "the prompt of queries is ''; the run has 'query: '"),
    "normalisation": (("vectors",), leave_lengths, "normalize is False; the run has True"),
    "activation": (("pairs",), IDENTITY, "activation_fn is 'torch.nn.modules.linear.Identity'"),
    "temperature": (("classes", "tags"), writes("calibration.json", temperature=9.0), "temperature is 9.0"),
    "threshold": (("classes", "tags"), decide_otherwise, "threshold.value is 0.01"),
    "problem type": (
        ("classes",),
        writes("config.json", problem_type="multi_label_classification"),
        "problem_type is 'multi_label_classification'",
    ),
    "audio features": (("whisper", "ctc"), hear_otherwise, "preprocessor_config.json: d"),
    "language": (("whisper",), writes("generation_config.json", language="en"), "language is 'en'; the run has 'fr'"),
}
"""By promise: the kinds of folder that make it, the fault, and what the message says."""
CHOSEN = {("chat", "sampling settings"), ("vectors", "pooling"), ("pairs", "activation"), ("classes", "temperature")}
CHOSEN |= {("chat", "template of later turns"), ("chat", "positions"), ("classes", "network")}
CHOSEN |= {("chat", "adapter dropped"), ("chat", "end token"), ("chat", "tokenizer"), ("classes", "labels swapped")}
"""The cells of the default suite."""


def cell(kind, fault):
    reason = f"`certify` exits with 6 and says: {FAULTS[fault][2]}"
    marks = [pytest.mark.promise("folder", fault, refused=reason)]
    return pytest.param(kind, fault, marks=marks if (kind, fault) in CHOSEN else [*marks, pytest.mark.slow])


CELLS = [cell(kind, fault) for fault, (kinds, *_) in FAULTS.items() for kind in kinds]


def plant(trained, kind, fault, folder):
    run, base = trained(kind)
    shutil.copytree(run / "merged", folder)
    FAULTS[fault][1](folder, base)
    return invoke("deploy", "certify", folder, "--run", run)


@pytest.mark.parametrize(("folder", "fault"), CELLS)
def test_a_planted_fault_fails_with_its_cause(folder, fault, trained, tmp_path):
    result = plant(trained, folder, fault, tmp_path / "merged")
    assert result.exit_code == 6, result.output
    assert FAULTS[fault][2] in " ".join(result.output.split())


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.promise("folder", "without a fault", equal="the tuned model, within the limits of docs/deploy.md")
def test_a_folder_without_a_fault_passes(folder, trained, tmp_path):
    run, _ = trained(folder)
    shutil.copytree(run / "merged", tmp_path / "merged")
    result = invoke("deploy", "certify", tmp_path / "merged", "--run", run)
    assert result.exit_code == 0, result.output
    assert not read_json(run / "certified/merged/certificate.json")["breaches"]
