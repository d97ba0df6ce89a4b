"""A failure that must be impossible in recipes: a key that is accepted and has no effect.

Each key is flipped, and an object resolved from the recipe must change. The pipeline does not run: the test looks for
each key in the object that its step makes.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import typing
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from rich.console import Console
from safetensors.torch import load_file
from support import families
from support.audio import write_tone
from support.models import build_llama
from support.runs import write_recipe

from llmtune.adapter.injection import inject
from llmtune.data.examples import encode_rows
from llmtune.data.preparation import prepare_rows
from llmtune.data.run_naming import default_folder
from llmtune.errors import LlmtuneError
from llmtune.evaluate.eval_inputs import EvalContext, make_inputs
from llmtune.evaluate.evaluator import ModelLoaders
from llmtune.evaluate.gates import check_gates
from llmtune.evaluate.scoring import ScoreRequest, score_run
from llmtune.model.kernels import check_kernels
from llmtune.model.loading import load_model
from llmtune.model.memory_plan import check_memory
from llmtune.model.resolve import resolve_model
from llmtune.plan import Plan, make_plan
from llmtune.recipe.data_section import Source
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.schema import Recipe
from llmtune.store.atomic_files import hash_path
from llmtune.train.accumulation import step_gradients, validation_loss
from llmtune.train.loop import train
from llmtune.train.optimizer import build_optimizer
from llmtune.train.setup import set_up

SECTIONS: dict[str, dict[str, Any]] = {
    "data": {"validation": 0.2, "test": 0.2},
    "train": {"max_steps": 4, "num_train_epochs": None, "eval_steps": 2, "batch_size": 4, "logging_steps": 1},
    "generation": {"max_new_tokens": 6},
    "evaluate": {"metrics": ["loss", "exact_match", "choice_accuracy"], "samples": 2, "choices": ["red", "green"]},
}
QUIET = Console(quiet=True)
BUDGET = 512


class Resolved:
    """The objects that each step makes from a recipe, made on first access."""

    def __init__(self, recipe_file: str, sets: tuple[str, ...], folder: Path) -> None:
        self.loaded, self.folder = load_recipe(recipe_file, sets), folder
        self.recipe = self.loaded.recipe

    @cached_property
    def made_rows(self) -> Any:
        return prepare_rows(self.recipe, self.folder / "data" / "rows", QUIET)

    @cached_property
    def plan(self) -> Plan:
        return make_plan(self.recipe, self.model_ref, "cpu", rows=self.made_rows)

    @cached_property
    def model_ref(self) -> Any:
        return resolve_model(self.recipe.model.name, self.recipe.model, QUIET, offline=True)

    @cached_property
    def made_examples(self) -> Any:
        plan = self.plan
        return encode_rows(self.made_rows, plan.task, plan.processor, plan.recipe, self.folder / "examples", QUIET)

    @cached_property
    def selected(self) -> Any:
        plan = self.plan
        return load_model(self.model_ref, plan.recipe, plan.task, plan.processor, device="cpu", training=True)

    @cached_property
    def adapted(self) -> Any:
        return inject(self.selected, self.plan.recipe, QUIET)

    @cached_property
    def training(self) -> Any:
        plan = self.plan
        return set_up(self.adapted, self.made_examples, plan.task, plan.recipe, self.folder, QUIET, "inputs")

    def name(self) -> object:
        return str(default_folder(self.loaded))

    def rows(self) -> object:
        rows = self.made_rows
        return [rows.content_hash, rows.counts, rows.dropped, rows.columns_hash]

    def examples(self) -> object:
        made = self.made_examples  # not its hash, which covers the template whether any row shows it or not
        return [*map(hash_path, made.files.values()), made.counts, made.dropped]

    def model(self) -> object:
        model = self.selected.model
        weights = [self.model_ref.content_hash, str(next(model.parameters()).dtype), len(self.selected.processor)]
        return [*weights, str(self.plan.task), str(model.config._attn_implementation)]

    def memory(self) -> object:
        return check_memory(self.selected.plan, self.recipe, QUIET)

    def kernels(self) -> object:
        return check_kernels(self.recipe, "cpu")

    def adapter(self) -> object:
        model = self.adapted.model
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        digest = hashlib.sha256(b"".join(value.detach().float().numpy().tobytes() for value in trained.values()))
        config = {name: str(value) for name, value in model.peft_config["default"].to_dict().items()}
        quantization = str(getattr(self.selected.model.config, "quantization_config", None))
        checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        return [[*trained], digest.hexdigest(), config, quantization, checkpointing]

    def optimizer(self) -> object:
        training, total = self.training, self.training.plan.total_steps
        groups = [
            {key: str(group[key]) for key in group if key != "params"} for group in training.optimizer.param_groups
        ]
        rates = [training.schedule.lr_lambdas[0](step) for step in range(total)]
        steps = [training.plan.rows(step).tolist() for step in range(1, total + 1)]
        trackers = [tracker.name for tracker in training.accelerator.trackers]
        return [str(type(training.optimizer.optimizer)), groups, rates, steps, training.packed, trackers]

    def gradients(self) -> object:
        step_gradients(self.training, 1, BUDGET, 1.0)
        return [float(parameter.grad.norm()) for parameter in self.training.parameters if parameter.grad is not None]

    def loss(self) -> object:
        return validation_loss(self.training, BUDGET)

    def events(self) -> object:
        """When the loop validates, logs, saves and stops; only the loop itself reads these keys."""
        task, recipe = self.plan.task, self.plan.recipe
        train(self.adapted, self.made_examples, task, recipe, self.folder, QUIET, budget=BUDGET, inputs="inputs")
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        curve = [(line["step"], line["loss"], line.get("validation_loss")) for line in lines]
        adapter = hashlib.sha256((self.folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
        return [curve, sorted(path.name for path in (self.folder / "checkpoints").iterdir()), adapter]

    def evaluation(self) -> object:
        """The untrained model serves as both base and tuned model."""
        plan, load = self.plan, partial(nullcontext, self.selected.model.eval())
        inputs = make_inputs(self.made_rows, self.made_examples, plan.task, self.selected.processor, plan.recipe)
        context = EvalContext(plan.recipe, plan.task, self.selected.processor, inputs, "cpu", QUIET)
        found = score_run(ScoreRequest(ModelLoaders(load, load), context, self.made_rows)).evaluation
        return {**asdict(found), "gates": [*map(asdict, check_gates(plan.recipe.evaluate, found))]}


@dataclass(frozen=True)
class Flip:
    """One key, another value, the object to check, and other settings that the key needs."""

    value: str
    look: str
    also: tuple[str, ...] = ()
    recipe: str = "tiny.yaml"


def flips(
    section: str, look: str, *also: str, recipe: str = "tiny.yaml", at: str = "", **values: str
) -> dict[str, Flip]:
    """Flips of a section's keys; `at` marks a further task in which the key is tested again."""
    return {f"{section}.{name}{at}": Flip(value, look, also, recipe) for name, value in values.items()}


PAIRS = "data.train.path=pairs.jsonl"
WEIGHED = "data.train=[{path: pairs.jsonl, weight: 1}, {path: rows.jsonl}]"
HIGH_RATE = ("train.learning_rate=3.0", "train.max_grad_norm=0")
STATES = "adapter.init_lora_weights=false"
GENERATION = {"max_new_tokens": "2", "do_sample": "true", "repetition_penalty": "50.0", "num_beams": "3"}
DRAWING = {"temperature": "5.0", "top_k": "2", "top_p": "0.1", "min_p": "0.9"}
BENCHMARK = "evaluate.benchmarks"
QUIZ = "evaluate.benchmarks.task=quiz.yaml"

FLIPS = {
    "name": Flip("other", "name"),
    "task": Flip("completion", "rows", ("data.train=pairs.jsonl",)),
    "seed": Flip("8", "adapter"),
    **flips("data", "rows", train="pairs.jsonl", validation="0.4", test="0.4", split_by="group"),
    **flips("data", "rows", "data.train=twice.jsonl", deduplicate="none"),
    **flips("data", "rows", "data.train=holes.jsonl", max_dropped="0.0"),
    **flips("data.train", "rows", PAIRS, "task=completion", format="text"),
    **flips("data.train", "rows", PAIRS, columns="{prompt: completion, completion: prompt}"),
    **flips("data", "rows", PAIRS, columns="{prompt: completion, completion: prompt}"),
    **flips(
        "data", "rows", "data.max_dropped=0.5", "data.train=desk.jsonl", roles="{user: customer, assistant: agent}"
    ),
    **flips("data.train", "rows", "data.train.path=latin.csv", "task=completion", encoding="cp1252"),
    **flips("data.train", "rows", WEIGHED, weight="2.0"),
    **flips("data.train", "rows", "data.train.path=rows.jsonl", limit="30"),
    **flips("data", "examples", train_on="all", max_length="20", system_prompt="Be brief."),
    **flips("data", "examples", "data.train=thoughts.jsonl", "data.max_dropped=1", reasoning="drop"),
    **flips("data", "examples", "data.train=thoughts.jsonl", "data.max_dropped=1", special_tokens_in_text="refuse"),
    **flips("data", "examples", "data.max_length=50", on_overlong="drop"),
    **flips("data", "optimizer", packing="false"),
    **flips("model", "model", name="other-model", dtype="bfloat16", add_tokens="['<colour>']"),
    **flips("model", "model", attn_implementation="eager"),
    **flips("model", "model", "model.name=remote-code", trust_remote_code="true"),
    **flips("model", "model", "model.name=pickled", use_safetensors="false"),
    **flips("model", "examples", chat_template="other.jinja"),
    **flips("model", "examples", "model.chat_template=other.jinja", chat_template_kwargs="{shout: true}"),
    **flips("model", "memory", check_memory="false"),
    **flips("adapter", "adapter", method="qlora", r="2", lora_alpha="4", lora_dropout="0.5", bias="all"),
    **flips("adapter", "adapter", target_modules="[q_proj]", exclude_modules="[q_proj]", modules_to_save="[norm]"),
    **flips("adapter", "adapter", "adapter.target_modules=[q_proj]", layers_to_transform="[1]"),
    **flips("adapter", "adapter", use_dora="true", use_rslora="true", init_lora_weights="pissa", start_from="start"),
    **flips("adapter", "adapter", rank_pattern="{q_proj: 2}", alpha_pattern="{q_proj: 2}"),
    **flips("adapter", "adapter", "adapter.method=qlora", bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant="false"),
    **flips("train", "optimizer", learning_rate="1e-3", max_steps="3", batch_size="2", optim="sgd", weight_decay="0.5"),
    **flips("train", "optimizer", "train.max_steps=null", "train.num_train_epochs=1", num_train_epochs="0.5"),
    **flips("train", "optimizer", "train.batch_size=null", batch_tokens="300"),
    **flips("train", "optimizer", loraplus_lr_ratio="16", adam_beta1="0.5", adam_beta2="0.5", adam_epsilon="0.1"),
    **flips("train", "optimizer", lr_scheduler_type="cosine", warmup_steps="3", report_to="[tensorboard]"),
    **flips("train", "optimizer", "train.lr_scheduler_type=cosine", lr_scheduler_kwargs="{num_cycles: 2}"),
    **flips("train", "gradients", max_grad_norm="0.001"),
    **flips("train", "events", loss_type="dft"),
    **flips("train", "events", "data.packing=false", neftune_noise_alpha="5.0"),
    **flips("train", "optimizer", "train.optim=sgd", optim_args="{momentum: 0.5}"),
    **flips("train", "adapter", gradient_checkpointing="true"),
    **flips("train", "kernels", torch_compile="true", use_liger_kernel="true"),
    **flips("train", "events", logging_steps="2", eval_steps="1", save_steps="1"),
    **flips("train", "events", "train.save_steps=1", save_total_limit="1"),
    **flips(
        "train",
        "events",
        "train.eval_steps=1",
        "train.save_steps=1",
        "train.learning_rate=4.0",
        "train.max_grad_norm=0",
        "train.optim=sgd",
        "train.lr_scheduler_type=constant",
        load_best_model_at_end="false",
    ),
    **flips("train", "events", *HIGH_RATE, "train.eval_steps=1", early_stopping_patience="1"),
    **flips("train", "events", "train.early_stopping_patience=1", "train.eval_steps=1", early_stopping_threshold="5.0"),
    **flips("generation", "evaluation", **GENERATION),
    **flips("generation", "evaluation", "generation.do_sample=true", **DRAWING),
    **flips("generation", "evaluation", recipe="t5.yaml", at="@t5", **GENERATION),
    **flips("generation", "evaluation", "generation.do_sample=true", recipe="t5.yaml", at="@t5", **DRAWING),
    **flips("generation", "evaluation", recipe="speech.yaml", at="@whisper", **GENERATION),
    **flips("generation", "evaluation", "generation.do_sample=true", recipe="speech.yaml", at="@whisper", **DRAWING),
    **flips("evaluate", "evaluation", metrics="[loss, exact_match, rougeL]", gates="['loss < base']", limit="3"),
    **flips("evaluate", "evaluation", choices="[red, green, blue]", samples="1", slices="[group]", calibrate="false"),
    **flips("evaluate.forgetting", "evaluation", "evaluate.forgetting.questions=[]", texts="[other.jinja]"),
    **flips("evaluate.forgetting", "evaluation", "evaluate.forgetting.texts=[other.jinja]", questions="[quiz.jsonl]"),
    **flips("evaluate.fairness", "evaluation", swaps="[words.csv]", groups="[group]"),
    **flips(BENCHMARK, "evaluation", task="quiz.yaml"),
    **flips(BENCHMARK, "evaluation", QUIZ, num_fewshot="2", limit="3", apply_chat_template="true"),
    **flips("completion", "model", recipe="masked.yaml", objective="causal"),
    **flips("completion", "loss", recipe="masked.yaml", mask_probability="0.5"),
    **flips("translate", "examples", recipe="translate.yaml", source_language="French", target_language="French"),
    **flips("translate", "examples", recipe="translate.yaml", prompt="'Say in German: {source}'"),
    **flips("summarize", "examples", recipe="summarize.yaml", prompt="'In short: {document}'"),
    **flips("qa", "model", recipe="qa.yaml", style="generative"),
    **flips("qa", "examples", recipe="qa.yaml", stride="8"),
    **flips("qa", "evaluation", recipe="qa.yaml", max_answer_length="1", null_score_diff_threshold="-100.0"),
    **flips("qa", "examples", recipe="answers.yaml", prompt="'{question} {context}'", no_answer="nothing"),
    **flips("classify", "examples", recipe="classify.yaml", kind="multi", labels="[green, red, blue, black]"),
    **flips("classify", "loss", recipe="classify.yaml", class_weights="{red: 5.0}"),
    **flips("classify", "rows", recipe="classify.yaml", rename="{red: crimson}"),
    **flips("token_classify", "examples", recipe="tags.yaml", labels="[THING, COLOUR]"),
    **flips("token_classify", "rows", recipe="tags.yaml", rename="{COLOUR: HUE}"),
    **flips("rerank", "examples", recipe="rerank.yaml", max_relevance="4.0"),
    **flips("speech", "examples", recipe="speech.yaml", language="fr", task="translate", window_seconds="0.1"),
    **flips("speech", "evaluation", recipe="speech.yaml", normalizer="none"),
    **flips("embed", "loss", recipe="embed.yaml", scale="5.0", dimensions="[64, 16]", pooling="cls"),
    **flips("embed", "examples", recipe="embed.yaml", query_prompt="'Find: '", passage_prompt="'Found: '"),
    **flips("embed", "evaluation", recipe="embed.yaml", normalize="false"),
    **flips("data", "evaluation", recipe="embed.yaml", corpus="passages.txt"),
    **flips("embed", "loss", recipe="embed-classes.yaml", margin="1.5"),
    **flips("embed", "loss", recipe="embed-scores.yaml", loss="cosine"),
    **flips("preference", "loss", STATES, recipe="preference.yaml", loss="ipo", beta="0.5", label_smoothing="0.3"),
    **flips("preference", "loss", recipe="thumbs.yaml", desirable_weight="3.0", undesirable_weight="3.0"),
    **flips("preference", "loss", "preference.loss=reward", recipe="preference.yaml", center_rewards_coefficient="0.5"),
    **flips("reinforce", "events", recipe="reinforce.yaml", method="filter", rewards="{reward.py:score: 2.0}"),
    **flips("reinforce", "events", recipe="reinforce.yaml", samples="3", max_new_tokens="4", mask_truncated="true"),
    **flips("reinforce", "events", recipe="reinforce.yaml", temperature="2.0", top_p="0.5", top_k="5"),
    **flips("reinforce", "events", recipe="reinforce.yaml", loss="grpo", scale_rewards="group", beta="5.0"),
    **flips("reinforce", "events", recipe="reinforce.yaml", rounds="1"),
    **flips("reinforce", "events", "reinforce.rounds=1", recipe="reinforce.yaml", epsilon="0.0001"),
    **flips("reinforce", "events", recipe="filter.yaml", accept="0.75"),
}
HUB = "data/test_hub_datasets.py"
JUDGE = "evaluate/suites/test_judge.py"
MINING = "test_mining.py"
SELECTIVE = "evaluate/test_decision.py"
ELSEWHERE = {
    "reinforce.control": "test_control_runs.py::test_grpo_is_compared_with_the_filter_on_as_many_samples",
    "reinforce.audit": "test_reinforce_runs.py::test_both_models_are_sampled_and_rated_on_every_test_prompt",
    "distil.control": "test_control_runs.py::test_without_a_control_run_the_verdict_says_what_it_does_not_know",
    "distil.teacher": "test_distil.py::test_a_teacher_that_was_trained_further_makes_its_predictions_stale",
    "distil.top_k": "test_distil.py::test_only_what_changes_the_predictions_records_them_again",
    "distil.temperature": "test_distil.py::test_only_what_changes_the_predictions_records_them_again",
    "distil.weight": "test_distil.py::test_only_what_changes_the_predictions_records_them_again",
    "distil.answers": "test_distil_answers.py::test_the_teacher_answers_train_and_validation_and_leaves_test",
    "evaluate.controls": "evaluate/test_controls.py::test_a_recipe_with_a_gate_or_a_control_that_cannot_be_is_refused",
    "chat.images": "tasks/test_image_chat.py::test_the_key_images_decides_whether_the_model_keeps_its_towers",
    "adapter.train_projector": "adapter/test_image_adapters.py::test_full_training_reaches_the_projector_on_request",
    "model.image_pixels": "tasks/test_image_chat.py::test_limits_of_pixels_are_saved_with_the_model",
    "extends": "recipe/test_loader.py::test_nearer_files_override_values_and_mappings_are_merged",
    "recipe_version": "recipe/test_validation.py::test_an_invalid_key_or_value_is_refused_with_place_cause_and_fix",
    "model.candidates": "model/test_model_selection.py::test_the_model_that_knows_the_rows_best_is_chosen",
    "model.licences": "model/test_model_selection.py::test_a_candidate_with_a_forbidden_or_unknown_licence_is_skipped",
    "model.trials": "model/test_model_trials.py::test_a_run_uses_the_winner_of_the_trials_and_reports_both_orders",
    "model.revision": "model/test_resolve.py::test_a_download_pins_the_commit_and_skips_pickles_and_code",
    "data.train.config": f"{HUB}::test_rows_come_from_the_hashed_commit_even_if_the_branch_moves",
    "data.train.split": f"{HUB}::test_a_missing_split_is_reported",
    "data.train.revision": f"{HUB}::test_rows_of_another_commit_are_refused_offline",
    "data.unknown_tokens": "data/test_examples.py::test_an_unknown_target_is_a_bad_row_unless_allowed",
    "data.negatives.mine": f"{MINING}::test_every_setting_that_changes_mined_negatives_is_in_their_hash",
    "data.negatives.below": f"{MINING}::test_every_setting_that_changes_mined_negatives_is_in_their_hash",
    "data.negatives.model": f"{MINING}::test_a_reranker_learns_from_pairs_with_mined_negatives",
    "evaluate.champion": "evaluate/test_champion.py::"
    "test_an_unchanged_recipe_is_compared_with_its_champion_and_again_with_another_one",
    "evaluate.benchmarks.network": "evaluate/suites/test_lm_eval.py::"
    "test_named_tasks_need_the_network_and_files_do_not_unless_the_recipe_says_so",
    "evaluate.suspects": "evaluate/suites/test_label_errors.py::"
    "test_planted_label_errors_are_listed_with_line_and_suggestion",
    "evaluate.metric_seconds": "evaluate/suites/test_own_metrics.py::"
    "test_a_metric_that_sleeps_ends_at_its_limit_with_row_and_line",
    "evaluate.metric_network": "evaluate/suites/test_own_metrics.py::test_the_recipe_may_allow_the_network",
    "evaluate.judge.endpoint": f"{JUDGE}::test_the_key_is_sent_and_written_nowhere",
    "evaluate.judge.model": f"{JUDGE}::test_another_question_or_model_asks_anew",
    "evaluate.judge.question": f"{JUDGE}::test_another_question_or_model_asks_anew",
    "evaluate.judge.labelled": f"{JUDGE}::test_the_known_biases_of_a_judge_are_measured_and_corrected",
    "evaluate.judge.api_key_env": f"{JUDGE}::test_the_key_is_sent_and_written_nowhere",
    "evaluate.decide.risk": f"{SELECTIVE}::test_risk_and_confidence_change_the_threshold",
    "evaluate.decide.confidence": f"{SELECTIVE}::test_risk_and_confidence_change_the_threshold",
    "evaluate.sets": f"{SELECTIVE}::test_coverage_and_per_class_change_the_sets",
    "evaluate.out_of_scope": f"{SELECTIVE}::test_the_share_of_false_alarms_changes_what_is_out_of_scope",
    "evaluate.when_unsure": "evaluate/test_gates.py::test_a_gate_on_an_interval_separates_worse_from_too_few_rows",
    "evaluate.max_disagreement": "evaluate/test_new_rows.py::"
    "test_too_much_disagreement_ends_the_run_before_training_if_the_recipe_says_so",
    "evaluate.looks": "evaluate/test_looks.py::test_gates_and_plans_use_the_level_of_one_look",
    "train.eval_metrics": "train/test_validation_metrics.py::"
    "test_validation_metrics_match_those_of_evaluate_for_the_same_checkpoint",
    "train.metric_for_best_model": "train/test_validation_metrics.py::"
    "test_the_best_checkpoint_and_early_stopping_follow_the_named_metric",
    "train.seeds": "test_seeds.py::test_each_further_seed_equals_a_run_with_that_seed_alone",
    "deploy.limit": "deploy/test_export_score.py::test_a_limit_scores_an_export_on_some_rows_and_says_so",
    "deploy.products": "recipe/test_loader.py::test_a_list_of_exports_is_short_for_a_section_with_a_limit",
}
"""Keys that have one value, or need a hub, several trainings or a trained model, each with its test."""


REPEATED = {key for key in FLIPS if "@" in key} - {"generation.num_beams@t5", "generation.do_sample@whisper"}
BENCHMARKED = {key for key, flip in FLIPS.items() if QUIZ in flip.also}
MARKS = [(pytest.mark.slow, REPEATED), (pytest.mark.needs("lm_eval"), BENCHMARKED)]
"""Keys that the default suite flips for another kind of model; one of search and one of sampling stay in it."""


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, about in model.model_fields.items():
        sections = [part for part in (about.annotation, *typing.get_args(about.annotation)) if isinstance(part, type)]
        section = next((part for part in sections if issubclass(part, BaseModel) and part.model_fields), None)
        if section is None:
            yield prefix + name
        else:
            yield from keys_of(section, f"{prefix}{name}.")


def test_every_key_of_the_schema_is_tested() -> None:
    known = {key for key in keys_of(Recipe) if not key.startswith("data.train.")}
    known |= {"extends", "data.train", *(f"data.train.{name}" for name in Source.model_fields if name != "path")}
    flipped = {key.partition("@")[0] for key in FLIPS}
    assert not flipped & ELSEWHERE.keys()
    assert known == flipped | ELSEWHERE.keys()
    for key, test in ELSEWHERE.items():
        file, _, name = test.partition("::")
        text = (Path(__file__).parents[1] / file).read_text()
        assert f"def {name}(" in text, test
        assert key.rpartition(".")[2] in text, test


@pytest.mark.parametrize(
    "key", [pytest.param(key, marks=[mark for mark, keys in MARKS if key in keys]) for key in FLIPS]
)
def test_a_flipped_key_changes_a_resolved_object(place: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")  # only the request for a compiler matters
    if key == "model.check_memory":
        monkeypatch.setattr("llmtune.model.memory_plan.device_memory", lambda device: 1000)
    flip = FLIPS[key]
    plain = look(place, flip, flip.also)
    flipped = look(place, flip, (*flip.also, f"{key.partition('@')[0]}={flip.value}"))
    assert plain != flipped
    assert not (plain.startswith("refused") and flipped.startswith("refused")), (plain, flipped)


@pytest.mark.guarantee(
    10,
    cannot="a key that is accepted and does nothing",
    kept="A test flips every key of the schema and checks that an object resolved from the recipe changes. A key "
    "without effect in a recipe is refused.",
    shows="error full.yaml:... 'adapter.r' has no effect with adapter.method: full -> Remove it, or use lora or qlora.",
    also=["test_a_flipped_key_changes_a_resolved_object", "test_every_key_of_the_schema_is_tested"],
)
def test_flipping_finds_a_key_that_nothing_reads(place, run, without, shows):
    def forgetful(model, recipe, device):
        train = recipe.train.model_copy(update={"adam_beta1": 0.9})
        return build_optimizer(model, recipe.model_copy(update={"train": train}), device)

    def resolved(*sets: str) -> object:
        return Resolved("tiny.yaml", sets, Path(tempfile.mkdtemp(dir=place))).optimizer()

    plain = resolved()
    with without("llmtune.train.setup.build_optimizer", forgetful):
        assert resolved("train.adam_beta1=0.5") == plain, "accepted without effect"
    assert resolved("train.adam_beta1=0.5") != plain
    shows(run("prepare", recipe="full.yaml", code=2, adapter={"method": "full", "r": 8}))


LOOKED: dict[tuple[str, ...], str] = {}


def look(place: Path, flip: Flip, sets: tuple[str, ...]) -> str:
    """The object that the recipe resolves to with these settings, as text."""
    known = (flip.recipe, flip.look, *sets)
    if known not in LOOKED or flip.look == "memory":
        folder = place / f"look-{len(LOOKED)}"
        try:
            resolved = getattr(Resolved(flip.recipe, sets, folder), flip.look)()
            LOOKED[known] = json.dumps(resolved, sort_keys=True, default=str).replace(str(folder), "")
        except LlmtuneError as error:
            LOOKED[known] = f"refused: {error}".replace(str(folder), "")
    return LOOKED[known]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files that a flip may name."""
    place = tmp_path_factory.mktemp("keys")
    colours, things = ["red", "green", "blue", "black"], [f"{a} {b}" for a in ["cat", "dog", "fox"] for b in "1234"]
    rows = [
        (f"Which colour has the {thing} on day {i * 7}?", colours[(i + j) % 4])
        for i, thing in enumerate(things)
        for j in range(4)
    ]
    questions = [(f"{question} Say it the {j}th time.", answer) for j, (question, answer) in enumerate(rows)]
    chat = [chat_row(question, answer, i % 3) for i, (question, answer) in enumerate(questions)]
    (place / "rows.jsonl").write_text("".join(chat))
    (place / "twice.jsonl").write_text("".join(chat + chat[:20]))
    thoughts = [chat_row(question, f"<think>So</think><|im_end|> is {answer}", 0) for question, answer in questions]
    (place / "thoughts.jsonl").write_text("".join(thoughts))
    (place / "holes.jsonl").write_text("".join([*chat, '{"messages": []}\n']))
    talks = [talk.replace('"user"', '"customer"').replace('"assistant"', '"agent"') for talk in chat[:20]]
    (place / "desk.jsonl").write_text("".join(chat + talks))
    pairs = [json.dumps({"prompt": f"{question} ", "completion": f"{answer}."}) for question, answer in questions]
    (place / "pairs.jsonl").write_text("\n".join(pairs) + "\n")
    lines = ["prompt,completion", *(f"{question},é {answer}" for question, answer in questions)]
    (place / "latin.csv").write_text("\n".join(lines), encoding="cp1252")
    (place / "passages.txt").write_text("The fox is brown.\nNobody is here.\n")
    (place / "words.csv").write_text("cat,dog\n")
    (place / "quiz.yaml").write_text(LM_EVAL_TASK)
    build_llama(place / "model")
    build_llama(place / "other-model", seed=1)
    (place / "other.jinja").write_text(OTHER_TEMPLATE)
    (place / "quiz.jsonl").write_text('{"question": "Which colour?", "choices": ["red", "cat"], "answer": "red"}\n')
    make_odd_models(place)
    make_tasks(place, questions)
    return place


def make_tasks(place: Path, questions: list[tuple[str, str]]) -> None:
    """A small recipe with rows and a model for each task that has its own keys."""
    families.build_bert(place / "encoder")
    families.build_whisper(place / "hearing", multilingual=True)
    told = [(question, f"{question} It is {answer} there.", answer) for question, answer in questions]
    rows: dict[str, list[dict[str, Any]]] = {
        "text": [{"text": text} for _, text, _ in told],
        "translation": [{"source": question, "target": answer} for question, _, answer in told],
        "summary": [{"document": text, "summary": answer} for _, text, answer in told],
        "facts": [
            {"question": "Which colour?", "context": f"{text} " * 3, "answer": answer if i % 4 else None}
            for i, (_, text, answer) in enumerate(told)
        ],
        "labels": [{"text": text, "label": answer} for _, text, answer in told],
        "tags": [
            {"tokens": ["it", answer, question], "tags": ["O", "B-COLOUR", "B-THING"]} for question, _, answer in told
        ],
        "ranked": [
            {"query": question, "passages": [text, "no idea"], "relevances": [1, 0]} for question, text, _ in told
        ],
        "pairs-of-answers": [
            {"prompt": question, "chosen": f"{answer} it is", "rejected": "no idea"} for question, _, answer in told
        ],
        "thumbs": [
            {"prompt": question, "completion": answer, "label": i % 2 == 0}
            for i, (question, _, answer) in enumerate(told)
        ],
        "found": [{"query": question, "passage": text} for question, text, _ in told],
        "scored": [
            {"query": question, "passage": text, "score": i % 5 / 4} for i, (question, text, _) in enumerate(told)
        ],
        "sounds": [{"audio": f"tone-{i}.wav", "text": answer} for i, (_, _, answer) in enumerate(told[:16])],
    }
    for name, found in rows.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    for i in range(16):
        write_tone(place / f"tone-{i}.wav", seconds=0.4, seed=i)
    write = partial(_write_task, place)
    quiet: dict[str, Any] = {"generation": None}
    pointing = {"qa": {"stride": 20, "style": "extractive"}, "data": {"max_length": 80}}
    languages = {"source_language": "English", "target_language": "German"}
    write("masked", "completion", "encoder", "text", ["loss"], completion={"objective": "masked"}, **quiet)
    families.build_t5(place / "t5")
    write("t5", "translate", "t5", "translation", ["loss", "chrf"])
    write("translate", "translate", "model", "translation", ["loss", "chrf"], translate=languages)
    write("summarize", "summarize", "model", "summary", ["loss", "rougeL"])
    write("qa", "qa", "encoder", "facts", ["exact_match", "f1"], **pointing, **quiet)
    write("answers", "qa", "model", "facts", ["exact_match", "f1"], data={"max_length": 256})
    write("classify", "classify", "encoder", "labels", ["loss", "accuracy"], **quiet)
    write("tags", "token-classify", "encoder", "tags", ["loss", "f1"], **quiet)
    write("rerank", "rerank", "encoder", "ranked", ["loss", "ndcg@10"], **quiet)
    write("speech", "speech", "hearing", "sounds", ["wer"], data={"max_length": 60}, speech={"language": "en"})
    write("embed", "embed", "encoder", "found", ["mrr@10"], data={"validation": 0.3}, **quiet)
    write("embed-classes", "embed", "encoder", "labels", ["mrr@10"], **quiet)
    write("embed-scores", "embed", "encoder", "scored", ["spearman"], **quiet)
    write("preference", "preference", "model", "pairs-of-answers", ["margin"], **quiet)
    write("thumbs", "preference", "model", "thumbs", ["margin"], preference={"loss": "kto"}, **quiet)
    (place / "reward.py").write_text("def score(row, answer):\n    return len(answer) * 7 % 5 / 4\n")
    rewarded = {"rewards": {"reward.py:score": 1.0}, "samples": 4, "max_new_tokens": 6}
    write(
        "filter", "reinforce", "model", "rows", ["reward"], reinforce={**rewarded, "method": "filter", "accept": 0.25}
    )
    write("reinforce", "reinforce", "model", "rows", ["reward"], reinforce={**rewarded, "mask_truncated": False})


def _write_task(place: Path, name: str, task: str, model: str, rows: str, metrics: list[str], **sections: Any) -> None:
    """Write a recipe of a task next to its rows; sections that the task does not read are omitted."""
    data = {"validation": 0.2, "test": 0.2, **sections.pop("data", {})}
    train = {"max_steps": 2, "num_train_epochs": None, "batch_size": 4, "logging_steps": 1}
    evaluation = {"metrics": metrics, "samples": 2, "choices": None}
    settings = {"task": task, "data": data, "train": train, "evaluate": evaluation, "generation": {"max_new_tokens": 6}}
    write_recipe(place / f"{name}.yaml", f"./{model}", f"{rows}.jsonl", **{**settings, **sections})


def chat_row(question: str, answer: str, group: int) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns, "group": group}) + "\n"


OTHER_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ (m['role'] | upper) if shout else m['role'] }}: {{ m['content'] }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>{{ 'ASSISTANT' if shout else 'assistant' }}: {% endif %}"
)
LM_EVAL_TASK = """
task: quiz
dataset_path: json
dataset_kwargs: {data_files: {test: pairs.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{prompt}}"
doc_to_target: "{{completion}}"
metric_list: [{metric: perplexity}]
"""
REMOTE_CODE = "from transformers import LlamaForCausalLM\n\n\nclass Odd(LlamaForCausalLM):\n    pass\n"


def make_odd_models(place: Path) -> None:
    remote = build_llama(place / "remote-code")
    config = json.loads((remote / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_odd.Odd"}
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "modeling_odd.py").write_text(REMOTE_CODE)
    pickled = build_llama(place / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()


@pytest.fixture
def place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    if not (folder / "tiny.yaml").exists():
        write_recipe(folder / "tiny.yaml", "./model", "rows.jsonl", **SECTIONS)
        Resolved("tiny.yaml", ("adapter.init_lora_weights=false",), folder / "first").adapted.model.save_pretrained(
            folder / "start"
        )
    return folder
