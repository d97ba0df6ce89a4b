"""The conformance suite: its reference, its verdicts, its page, and a few cases run through three tools."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TEXT = [("<|im_start|>user\nWhich colour?<|im_end|>\n<|im_start|>assistant\n", False), ("Blue.<|im_end|>", True)]


@pytest.fixture(scope="module")
def load() -> Any:
    """Import a module of the suite by its name."""
    sys.path.insert(0, str(BENCHMARKS))
    yield lambda name: importlib.import_module(f"conformance.{name}")
    sys.path.remove(str(BENCHMARKS))


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
    given = {"status": "done", "message": "", "log": "", "model": None, "configuration": {}, "documented": {}}
    return load("case").Result(**{**given, "job": {"learning_rate": 1.0}, **changes})


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
    named = {**case.right, **case.wrong}
    learned = {"the answers and their ends": "right", "the whole text": "silently wrong"}
    for name, verdict in learned.items():
        folder = step(tmp_path / name, reference.start, reference.of(named[name]))
        finding = case.decide(reference, {"run": result(load, model=folder)})
        assert (finding.verdict, finding.learned) == (verdict, name)
    folder = step(
        tmp_path / "half", reference.start, {n: 0.5 * g for n, g in reference.of(named["the whole text"]).items()}
    )
    assert case.decide(reference, {"run": result(load, model=folder)}).verdict == "unexplained"


def test_a_documented_choice_and_a_warning_are_not_silently_wrong(load: Any, reference: Any, tmp_path: Path) -> None:
    case = importlib.import_module("conformance.cases.answers_only").CASE
    folder = step(tmp_path / "whole", reference.start, reference.of(case.wrong["the whole text"]))
    documented = result(load, model=folder, documented={"the whole text": "https://example.com"})
    assert case.decide(reference, {"run": documented}).verdict == "documented otherwise"
    case = dataclasses.replace(case, reason="no mask")
    warned = result(load, model=folder, log="step 1\nWARNING: no mask found\n")
    assert case.decide(reference, {"run": warned}).verdict == "wrong, with a warning"


def test_an_error_is_a_refusal_only_if_it_names_the_reason(load: Any, reference: Any) -> None:
    case = importlib.import_module("conformance.cases.unknown_module").CASE
    refused = result(load, status="error", message="Target modules {'query_key_value'} not found in the base model")
    crashed = result(load, status="error", message="IndexError: list index out of range")
    absent = result(load, status="not offered", message="no LoRA")
    verdicts = [case.decide(reference, {"run": found}).verdict for found in (refused, crashed, absent)]
    assert verdicts == ["refused", "stopped", "not offered"]


def test_habits_of_a_tool_that_have_their_own_cases_hold_for_one_result_only(reference: Any) -> None:
    head = "model.embed_tokens"
    ids, _ = reference.encode(TEXT)
    with reference.allowing({"after": 0, "frozen": [head]}):
        assert reference.encode(TEXT)[0] == [*ids, 0]
        moved = reference.after_steps([[TEXT]], [0.1])
    assert [name for name, change in moved.items() if not change.any()] == [f"{head}.weight"]
    assert reference.encode(TEXT)[0] == ids
    assert all(change.any() for change in reference.after_steps([[TEXT]], [0.1]).values())


def test_absolute_paths_of_this_machine_are_hidden_and_addresses_are_not(load: Any) -> None:
    text = 'No rows in /home/me/x/rows.jsonl, see https://github.com/a/b/issues/1 and "/tmp/run-1/model"'
    hidden = 'No rows in rows.jsonl, see https://github.com/a/b/issues/1 and "model"'
    assert load("run").hide_folders(text) == hidden


def test_each_case_has_threads_and_a_place(load: Any) -> None:
    groups = load("page").GROUPS
    for name, case in load("run").list_cases().items():
        assert case.group in groups, name
        assert case.threads, f"{name} names no thread"
        assert all(link.startswith("https://github.com/") for link in case.threads), name
        assert case.judge or case.right, name
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


def test_the_page_is_that_of_the_table_and_has_every_case(load: Any) -> None:
    page: ModuleType = load("page")
    table = json.loads(page.TABLE.read_text(encoding="utf-8"))
    assert page.PAGE.read_text(encoding="utf-8") == page.render(table), "run `make conformance`"
    titles = {name: case.title for name, case in load("run").list_cases().items()}
    assert {name: case["title"] for name, case in table["cases"].items()} == titles
    wrong = [
        entry
        for case in table["cases"].values()
        for columns in case["findings"].values()
        for entry in columns.values()
        if entry["verdict"] == "silently wrong"
    ]
    assert all(entry["runs"] == 2 and entry["configuration"] for entry in wrong)


def test_the_page_claims_one_pass_only_for_results_of_one_clean_commit(load: Any) -> None:
    def say(*commits: str) -> str:
        tool = {"title": "The Tool", "version": "1", "libraries": {"torch": "2"}, "commits": list(commits)}
        return str(load("page").how_made({"machine": "x", "tools": {"tool": tool}}))

    assert "one pass, from commit abc, on x" in say("abc")
    assert "several passes, from commits abc, def" in say("abc", "def")
    assert "several passes" in say("abc-dirty")
    assert "- The Tool 1: torch 2" in say("abc")


def test_the_readme_has_the_summary_of_the_table(load: Any) -> None:
    page: ModuleType = load("page")
    readme = (BENCHMARKS.parent / "README.md").read_text(encoding="utf-8")
    table = json.loads(page.TABLE.read_text(encoding="utf-8"))
    assert "\n".join(page.short_summary(table)) in readme
    assert f"[{len(table['cases'])} " in readme


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
        right = [reference.of(gradient) for gradient in case.right.values()]
        for learned, gradient in case.wrong.items():
            assert min(distance(reference.of(gradient), found) for found in right) > 5 * tolerance, (name, learned)


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
