"""The conformance suite: its reference, its verdicts, its page, and a few cases run through three tools."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TEXT = [("<|im_start|>user\nWhich colour?<|im_end|>\n<|im_start|>assistant\n", False), ("Blue.<|im_end|>", True)]


@pytest.fixture(scope="module")
def load(load_benchmark: Callable[[str], Any]) -> Callable[[str], Any]:
    """Import a module of the suite by its name."""
    return lambda name: load_benchmark(f"conformance.{name}")


@pytest.fixture(scope="module")
def reference(load: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = load("models").build_model("qwen2.5", tmp_path_factory.mktemp("models") / "qwen2.5")
    return load("reference").Reference(folder)


def step(folder: Path, start: Mapping[str, torch.Tensor], gradient: Mapping[str, torch.Tensor]) -> Path:
    """Save what a tool would after one step of SGD with rate 1."""
    folder.mkdir()
    save_file(
        {name: (weight - gradient[name]).contiguous() for name, weight in start.items()}, folder / "m.safetensors"
    )
    return folder


def result(load: Any, **changes: Any) -> Any:
    given = {"status": "done", "message": "", "log": "", "model": None, "configuration": {}}
    return load("case").Result(**{**given, "job": {"learning_rate": 1.0, "column": "default"}, **changes})


def search(load: Any, outcome: str) -> Any:
    """Return statements of which one says that the documentation does not name an outcome."""
    statements = load("statements")
    return statements.Statements(searches=[statements.Search("a case", outcome, "docs/ at 0123456", "2026-11-30")])


def test_the_reference_learns_the_marked_tokens_only(reference: Any) -> None:
    ids, labels = reference.encode(TEXT)
    assert reference.tokenizer.decode([label for label in labels if label != -100]) == "Blue.<|im_end|>"
    total, count = reference.loss(ids, labels)
    log_p = torch.log_softmax(reference.model(torch.tensor([ids])).logits[0], dim=-1)
    by_hand = -sum(log_p[place - 1, ids[place]] for place in range(len(ids)) if labels[place] != -100)
    assert count == sum(label != -100 for label in labels)
    assert total.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_the_gradient_is_the_slope_of_the_mean_over_the_tokens_of_all_texts(reference: Any) -> None:
    other = [(TEXT[0][0], False), ("Red, green, or black.<|im_end|>", True)]
    gradient = reference.gradient([TEXT, other])
    name = "model.layers.0.mlp.up_proj.weight"
    place = divmod(int(gradient[name].abs().argmax()), gradient[name].shape[1])
    weight = dict(reference.model.named_parameters())[name]
    means = []
    for shift in (1e-2, -2e-2, 1e-2):  # the last one restores the weight
        with torch.no_grad():
            weight[place] += shift
        losses = [reference.loss(*reference.encode(text)) for text in (TEXT, other)]
        means.append(sum(total.item() for total, _ in losses) / sum(count for _, count in losses))
    assert (means[0] - means[1]) / 2e-2 == pytest.approx(gradient[name][place].item(), rel=1e-2)


def test_a_step_of_a_lora_is_the_full_gradient_times_its_scale_and_a(load: Any) -> None:
    down, gradient = torch.randn(2, 5), {"up.weight": torch.randn(3, 5)}
    saved = {
        "base_model.model.up.lora_A.weight": down,
        "base_model.model.up.lora_B.weight": -0.1 * 4 * gradient["up.weight"] @ down.T,
    }
    moved, project = load("reference").adapter_step(saved, {"r": 2, "lora_alpha": 8}, 0.1)
    assert load("reference").distance(moved, project(gradient)) < 1e-6


def test_a_step_is_named_after_what_it_learned(load: Any, reference: Any, tmp_path: Path) -> None:
    case = importlib.import_module("conformance.cases.answers_only").CASE
    statements = search(load, "the whole text")
    named = {**case.right, **case.wrong}
    learned = {"the answers and their ends": "right", "the whole text": "silently wrong"}
    for name, verdict in learned.items():
        folder = step(tmp_path / name, reference.start, reference.of(named[name]))
        finding = case.decide(reference, {"run": result(load, model=folder)}, statements)
        assert (finding.verdict, finding.learned) == (verdict, name)
    assert finding.searched == "docs/ at 0123456, 2026-11-30"
    folder = step(
        tmp_path / "half", reference.start, {n: 0.5 * g for n, g in reference.of(named["the whole text"]).items()}
    )
    assert case.decide(reference, {"run": result(load, model=folder)}, statements).verdict == "unexplained"


def test_another_result_is_unexplained_until_the_documentation_was_searched(
    load: Any, reference: Any, tmp_path: Path
) -> None:
    case = importlib.import_module("conformance.cases.answers_only").CASE
    folder = step(tmp_path / "whole", reference.start, reference.of(case.wrong["the whole text"]))
    results = {"run": result(load, model=folder)}
    verdicts = {
        "nothing": load("statements").Statements(),
        "another outcome": search(load, "only the last answer"),
        "this outcome": search(load, "the whole text"),
    }
    assert {name: case.decide(reference, results, stated).verdict for name, stated in verdicts.items()} == {
        "nothing": "unexplained",
        "another outcome": "unexplained",
        "this outcome": "silently wrong",
    }


@pytest.mark.parametrize(
    ("column", "configuration", "verdict"),
    [
        ("default", {}, "documented otherwise"),
        ("documented", {}, "unexplained"),
        ("default", {"mask": {"prompt": True}}, "unexplained"),
    ],
)
def test_an_address_excuses_one_column_and_one_setting(
    load: Any, reference: Any, tmp_path: Path, column: str, configuration: dict[str, Any], verdict: str
) -> None:
    case = importlib.import_module("conformance.cases.answers_only").CASE
    folder = step(tmp_path / "whole", reference.start, reference.of(case.wrong["the whole text"]))
    choice = load("statements").Choice("the whole text", "default", "mask.prompt", "https://example.com")
    job = {"learning_rate": 1.0, "column": column}
    trained = result(load, model=folder, configuration=configuration, job=job)
    assert case.decide(reference, {"run": trained}, load("statements").Statements([choice])).verdict == verdict


def test_a_statement_applies_to_the_case_that_it_names(load: Any) -> None:
    statements = search(load, "the whole text")
    assert statements.of("a case").find_search("the whole text")
    assert not statements.of("another case").find_search("the whole text")


def test_a_warning_is_a_line_that_names_the_reason(load: Any, reference: Any, tmp_path: Path) -> None:
    case = importlib.import_module("conformance.cases.answers_only").CASE
    folder = step(tmp_path / "whole", reference.start, reference.of(case.wrong["the whole text"]))
    case, statements = dataclasses.replace(case, reason="no mask"), search(load, "the whole text")
    logs = {
        "step 1\nWARNING: no mask found\n": "wrong, with a warning",
        "loading 50%|#####     | no mask": "silently wrong",
        'Traceback (most recent call last):\n  File "masks.py", line 3, in no mask\n    x = 1\n': "silently wrong",
    }
    found = {log: case.decide(reference, {"run": result(load, model=folder, log=log)}, statements) for log in logs}
    assert {log: finding.verdict for log, finding in found.items()} == logs


def test_a_row_that_is_left_out_is_refused_only_if_the_output_names_the_reason(load: Any, tmp_path: Path) -> None:
    run = load("run")
    for name in ("answer_cut_off", "image_in_text_model", "null_answer"):
        case = run.list_cases()[name]
        assert case.left_out, name
        assert not case.right, name
    reference = load("reference").Reference(run.model_folder(case.make_jobs()["run"], tmp_path))
    outcome, gradient = next(iter(case.left_out.items()))
    folder = step(tmp_path / "left-out", reference.start, reference.of(gradient))
    verdicts = {
        log: case.decide(reference, {"run": result(load, model=folder, log=log)}, search(load, outcome)).verdict
        for log in ("skipped 1 row: its content is null", "done")
    }
    assert list(verdicts.values()) == ["refused", "silently wrong"]


def test_an_error_is_a_refusal_only_if_it_names_the_reason(load: Any, reference: Any) -> None:
    case, statements = importlib.import_module("conformance.cases.unknown_module").CASE, load("statements").Statements()
    refused = result(load, status="error", message="Target modules {'query_key_value'} not found in the base model")
    frames = "Traceback (most recent call last):\n  File 'a.py', line 1, in find\n    raise Missing(query_key_value)\n"
    crashed = result(load, status="error", message="IndexError: list index out of range", log=f"{frames}IndexError: x")
    absent = result(load, status="not offered", message="no LoRA")
    other = result(load, status="not run", message="the adapter has no LoRA")
    verdicts = [case.decide(reference, {"run": one}, statements).verdict for one in (refused, crashed, absent, other)]
    assert verdicts == ["refused", "stopped", "not offered", "not run"]


def test_a_validation_loss_below_that_of_unseen_rows_shows_rows_that_were_learned(
    load: Any, reference: Any, tmp_path: Path
) -> None:
    module = importlib.import_module("conformance.cases.copies_across_the_split")
    folder = step(tmp_path / "untrained", reference.start, {name: 0 * w for name, w in reference.start.items()})
    way = next(iter(load("conversations").RIGHT))
    with torch.no_grad():
        means = [module.losses_of(reference, turns, way)[0] for turns in module.TURNS]
    mean = sum(means) / len(means)  # the model has learned no row
    verdicts = []
    for reported in (mean, 0.75 * min(means), 2 * max(means)):
        trained = result(load, model=folder, found={"losses": [9.0, reported]})
        verdicts.append(module.judge(module.CASE, reference, {"run": trained}).verdict)
    assert verdicts == ["right", "silently wrong", "unexplained"]


def test_a_loss_near_a_known_one_is_not_named_after_it(load: Any, reference: Any, tmp_path: Path) -> None:
    module = importlib.import_module("conformance.cases.evaluation_loss_of_batches")
    folder = step(tmp_path / "untrained", reference.start, {name: 0 * w for name, w in reference.start.items()})
    texts = [load("conversations").qwen(*turns) for turns in module.ROWS]
    mean_of_means = load("shipped").loss_of(reference, reference.start, texts, by_row=True)
    verdicts = []
    for reported in (mean_of_means, mean_of_means * (1 + 6e-4)):
        trained = result(load, model=folder, found={"losses": [reported]})
        verdicts.append(module.judge(module.CASE, reference, {"run": trained}).verdict)
    assert verdicts == ["silently wrong", "unexplained"]


def test_a_passage_of_several_rows_counts_once_in_recall(load: Any, reference: Any) -> None:
    module = importlib.import_module("conformance.cases.repeated_passages")
    rankings = [[("blue", 0.9, 1), ("red", 0.1, 0), ("blue ", 0.9, 1), ("dog", 0.2, 0)]]
    verdicts = {
        recall: module.judge(
            module.CASE, reference, {"run": result(load, found={"recall@1": recall, "rankings": rankings})}
        )
        for recall in (1.0, 0.5, 0.25)
    }
    assert [finding.verdict for finding in verdicts.values()] == ["right", "silently wrong", "silently wrong"]
    assert [finding.learned.split(":")[0] for finding in verdicts.values()] == [
        "recall@1 1.000", "a passage counted for each row", "another ranking"
    ]  # fmt: skip


def test_a_passage_may_have_the_score_of_any_of_its_spellings_and_counts_once(load: Any, reference: Any) -> None:
    module = importlib.import_module("conformance.cases.passages_with_white_space")
    blue = [("blue", 0.3, 1), ("red", 0.4, 0), ("blue", 0.3, 1), ("blue ", 0.9, 1)]
    two = [("two", 0.6, 1), ("one", 0.5, 0), ("two", 0.6, 1), ("two ", 0.1, 1)]
    rankings = [blue, blue, two, two, two]
    judged = {
        recall: module.CASE.judge(
            module.CASE, reference, {"run": result(load, found={"recall@1": recall, "rankings": rankings})}
        )
        for recall in (0.6, 0.4, 1.0, 0.5, 1 / 3)  # first, last and best spelling; each spelling, each row
    }
    assert [finding.verdict for finding in judged.values()] == ["right"] * 3 + ["silently wrong"] * 2
    assert [judged[recall].learned for recall in (0.5, 1 / 3)] == [
        "a passage counted for each spelling: recall@1 0.500; with each passage once, 0.400 or 0.600 or 1.000",
        "a passage counted for each row: recall@1 0.333; with each passage once, 0.400 or 0.600 or 1.000",
    ]


def test_habits_of_a_tool_that_have_their_own_cases_hold_for_one_result_only(reference: Any) -> None:
    head = "model.embed_tokens"
    ids, _ = reference.encode(TEXT)
    with reference.allowing({"after": 0, "frozen": [head]}):
        assert reference.encode(TEXT)[0] == [*ids, 0]
        moved = reference.after_steps([[TEXT]], [0.1])
    assert [name for name, change in moved.items() if not change.any()] == [f"{head}.weight"]
    assert reference.encode(TEXT)[0] == ids
    assert all(change.any() for change in reference.after_steps([[TEXT]], [0.1]).values())


def test_each_case_has_threads_and_a_place(load: Any) -> None:
    groups = load("page").GROUPS
    for name, case in load("run").list_cases().items():
        assert case.group in groups, name
        assert case.threads, f"{name} names no thread"
        assert all(link.startswith("https://github.com/") for link in case.threads), name
        assert case.judge or case.right or case.left_out, name
        assert case.make_jobs()


PRINTED = [
    '    "mask_truncated_completions": false,',
    '    "attn_decontaminates_packing": false,',
    '    "chat_template": "tokenizer_default",',
    '    "load_in_4bit": false,',
    '    "vproj"',
    "Truncating train dataset: 100%|██████████| 1/1 [00:00<00:00, 99.00 examples/s]",
    "Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'.",
    "Dropping the following result as it does not have all the necessary fields:",
    '  File "benchmarks/conformance/adapter.py", line 105, in isolated',
    "Failed to load a revision of the kernels",
    "score.weight | MISSING |",
    "Trainable parameters: 74.169% (0.074M/0.100M)",
    "trainable params: 2,560 || all params: 102,400 || trainable%: 2.5000",
    "{'loss': '5.682', 'grad_norm': '6.962', 'learning_rate': '1', 'epoch': '1'}",
    '  "rope_parameters": {',
    '    "lora_target_modules": ["query_key_value"],',
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call>",
]
"""Lines that axolotl, TRL, unsloth, transformers or this suite print in every run."""


def test_no_reason_is_found_in_what_tools_print_in_every_run(load: Any) -> None:
    for name, case in load("run").list_cases().items():
        found = [line for line in PRINTED if re.search(case.reason, line, re.IGNORECASE)]
        assert not found, f"{name}: {case.reason}"


def test_thoughts_are_in_the_content_for_tools_without_a_key_for_them(load: Any) -> None:
    answer = {"role": "assistant", "reasoning_content": "Two and three.", "content": "5"}
    for write in (load("formats").as_sharegpt, load("formats").as_two_conversations):
        [turn] = write({"messages": [dict(answer)]})["messages"]
        assert turn == {"role": "assistant", "content": "<think>\nTwo and three.\n</think>\n\n5"}


def test_the_reference_imports_no_tool() -> None:
    code = (
        "import sys; import conformance.reference, conformance.conversations, conformance.models; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    assert not {"llmtune", "trl", "peft", "axolotl", "llamafactory", "swift"} & set(done.stdout.split())


@pytest.mark.slow
def test_right_and_wrong_gradients_of_each_case_are_apart(load: Any, tmp_path: Path) -> None:
    distance, tolerance = load("reference").distance, load("reference").TOLERANCE
    for name, case in load("run").list_cases().items():
        reference = load("reference").Reference(
            load("run").model_folder(next(iter(case.make_jobs().values())), tmp_path)
        )
        groups = [case.right, case.left_out, case.wrong]
        for before, after in ((0, 1), (0, 2), (1, 2)):
            allowed = [reference.of(gradient) for gradient in groups[before].values()]
            for learned, gradient in groups[after].items():
                apart = [distance(reference.of(gradient), one) for one in allowed]
                assert min(apart, default=1.0) > 5 * tolerance, (name, learned)


@pytest.mark.slow
def test_three_tools_run_through_cases(load: Any, tmp_path: Path) -> None:
    cases = ["accumulation", "adapter_step", "answers_only", "unknown_module"]
    command = [sys.executable, "benchmarks/conformance/run.py", "--no-page", "--cache", tmp_path, "--cases", *cases]
    subprocess.run([*command, "--tools", "llmtune", "trl", "trainer"], cwd=BENCHMARKS.parent, check=True, timeout=590)
    found = {
        tool: {name: read(tmp_path / "findings" / tool / f"{name}.json") for name in cases}
        for tool in ("llmtune", "trl", "trainer")
    }
    computed = {"accumulation": "right", "adapter_step": "right", "unknown_module": "refused"}
    assert found["llmtune"] == {**computed, "answers_only": "right"}
    assert found["trl"] == {**computed, "answers_only": "right"}
    assert found["trainer"] == {**computed, "answers_only": "documented otherwise"}


def read(path: Path) -> str:
    """Return the verdict on the documented setting."""
    columns = json.loads(path.read_text())["columns"]
    return str((columns.get("documented") or columns["default"])["verdict"])
