"""Merging models of other tasks: heads, encoder-decoders, speech models; reloaded by plain transformers."""

import functools
import json
import shutil

import pytest
import torch
import transformers
from support import pairs
from support.classifying import colour_rows
from support.exports import MANY, NUMBERS, SILENT, spoken, train_family
from transformers import AutoProcessor, AutoTokenizer, pipeline

from llmtune.deploy.export import export
from llmtune.deploy.merged_model import merged_format
from llmtune.deploy.parity import measure_distance
from llmtune.plan import open_finished
from llmtune.serve.finished_run import FinishedRun

ROWS = {task: rows for task, (_, rows) in pairs.TASKS.items()} | {"classify": colour_rows(40)}
TEXTS = [{"text": row["document"]} for row in pairs.DOCUMENTS]
JUDGED = [
    {"prompt": f"{i}. Which colour?", "chosen": f"The fox is {c}.", "rejected": f"one two {c}"}
    for i, c in enumerate([*pairs.COLOURS] * 6)
]


QLORA = {"adapter": {"method": "qlora"}}
HEARD = {"window_seconds": 2}
CASES = {
    "classify": ("bert", "classify", ROWS["classify"], SILENT),
    "classify-qlora": ("roberta", "classify", ROWS["classify"], {**QLORA, **SILENT}),
    "classify-many": ("bert", "classify", MANY, SILENT),
    "classify-number": ("bert", "classify", NUMBERS, SILENT),
    "token-classify": ("deberta", "token-classify", ROWS["token-classify"], SILENT),
    "qa": ("bert", "qa", ROWS["qa"], {"qa": {"stride": 16}, **SILENT}),
    "masked": ("modernbert", "completion", TEXTS, {"completion": {"objective": "masked"}, **SILENT}),
    "translate": ("t5", "translate", pairs.PAIRS, {}),
    "translate-qlora": ("bart", "translate", pairs.PAIRS, QLORA),
    "whisper": ("whisper", "speech", spoken, {"speech": {"language": "fr", **HEARD}}),
    "letters": ("wav2vec2", "speech", spoken, {"speech": HEARD}),
    "reward": ("llama", "preference", JUDGED, {"preference": {"loss": "reward"}, **SILENT}),
    "dpo": ("llama", "preference", JUDGED, {"preference": {"loss": "dpo"}}),
    "summarize-by-prompt": ("llama", "summarize", pairs.DOCUMENTS, {}),
}
QUICK = ("classify", "classify-qlora", "qa", "translate", "whisper", "letters")


def train(folder, tiny_llama, case):
    """Train one of CASES without evaluation."""
    family, task, rows, sections = CASES[case]
    return train_family(folder, tiny_llama, family, task, rows, **sections)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama):
    """The run folder of a case, trained once for all tests."""
    return functools.cache(lambda case: train(tmp_path_factory.mktemp(case), tiny_llama, case))


def merge(run, console):
    return export(open_finished(run, console, offline=True), merged_format())


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_every_task_merges_into_a_plain_model_folder(case, tmp_path, trained, console):
    run = shutil.copytree(trained(case), tmp_path / "run")
    certificate = merge(run, console)
    measured = certificate["measured"]
    assert certificate["passed"]
    assert measured["effect_kl"] > 10 * measured["kl_mean"]
    assert (measured["same_ids"], measured["answer_agreement"], measured["top1_agreement"]) == (True, 1, 1)
    assert (certificate["other"] is not None) == ("qlora" in case)
    config = (run / "merged/config.json").read_text()
    plain = getattr(transformers, json.loads(config)["architectures"][0])
    model, info = plain.from_pretrained(run / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert "llmtune_other_classes" not in config
    if case == "classify":
        assert set(model.config.id2label.values()) == {"red", "green", "blue"}
        said = pipeline("text-classification", model=str(run / "merged"))("the green fox number 3")
        asked = {"prompt": "the green fox number 3"}
        assert said[0]["label"] == FinishedRun(run).answer(asked)["prediction"]["label"]
    if case == "translate":
        tokenizer = AutoTokenizer.from_pretrained(run / "merged")
        ids = model.generate(**tokenizer("The sky is blue.", return_tensors="pt"), max_new_tokens=8)
        asked = FinishedRun(run).answer({"prompt": "The sky is blue."})
        assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == asked["text"]
    if case == "whisper":
        assert (model.generation_config.language, model.generation_config.task) == ("fr", "transcribe")
        processor = AutoProcessor.from_pretrained(run / "merged")
        heard = processor(torch.zeros(16_000).numpy(), sampling_rate=16_000, return_tensors="pt")
        assert processor.batch_decode(model.generate(heard["input_features"], max_new_tokens=4))
    if case == "letters":
        assert type(AutoProcessor.from_pretrained(run / "merged")).__name__ == "Wav2Vec2Processor"


def test_regression_and_multi_label_outputs_have_their_own_distance():
    ones = [torch.tensor([[1.0]]), torch.tensor([[3.0]])]
    moved = measure_distance(ones, [one + 1 for one in ones], "number")
    assert (moved.kl_mean, moved.top1_agreement) == (pytest.approx(0.5), 0)
    assert measure_distance(ones, ones, "number").top1_agreement == 1
    scores, other = torch.tensor([[2.0, -2.0]]), torch.tensor([[1.0, -2.0]])
    assert measure_distance([scores], [scores], "yes-no").kl_mean == 0
    assert measure_distance([scores], [-scores], "yes-no").top1_agreement == 0
    p, q = scores.sigmoid(), other.sigmoid()
    wanted = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert measure_distance([scores], [other], "yes-no").kl_mean == pytest.approx(float(wanted), rel=1e-4)
