import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.errors import RecipeError
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.validation import key_paths


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("sede: 3\n", "unknown key 'sede'", "Did you mean 'seed'? Allowed here: adapter, "),
        ("train: {learning_rat: 3}\n", "unknown key 'train.learning_rat'", "Did you mean 'learning_rate'?"),
        ("learning_rate: 3\n", "unknown key 'learning_rate'", "Did you mean 'train.learning_rate'?"),
        ("train: {gradient_accumulation_steps: 3}\n", "unknown key", "Use 'train.batch_size'"),
        ("lora: {}\n", "unknown key 'lora'", "Use 'adapter'."),
        ("output_dir: x\n", "unknown key 'output_dir'", "--out"),
        ("train: {batch_size: '8'}\n", "'train.batch_size' is '8'", "an integer. Write it without quotes"),
        ("train: {batch_size: 8.0}\n", "'train.batch_size' is 8.0", "It must be an integer."),
        ("train: {batch_size: true}\n", "'train.batch_size' is true", "It must be an integer."),
        ("train: {batch_size: 0}\n", "'train.batch_size' is 0", "It must be at least 1."),
        ("train: {learning_rate: 0}\n", "'train.learning_rate' is 0", "It must be above 0"),
        ("train: {learning_rate: .nan}\n", "'train.learning_rate' is nan", "It must be a finite number."),
        ("adapter: {lora_dropout: 1}\n", "'adapter.lora_dropout' is 1", "It must be below 1"),
        ("train: {weight_decay: 2}\n", "'train.weight_decay' is 2", "It must be at most 1"),
        ("train: {gradient_checkpointing: yes}\n", "is 'yes'", "true or false. In YAML 1.2 only"),
        ("train: {gradient_checkpointing: 3}\n", "is 3", "It must be true or false."),
        ("train: {loraplus_lr_ratio: 0.5}\n", "'train.loraplus_lr_ratio' is 0.5", "It must be at least 1."),
        ("train: {optim: adamw}\n", "'train.optim' is 'adamw'", "Allowed: adamw_torch, "),
        (
            "adapter: {method: qlra}\n",
            "'adapter.method' is 'qlra'",
            "Did you mean 'qlora'? Allowed: lora, qlora, full, hira, ",
        ),
        ("adapter: {init_lora_weights: loft}\n", "'adapter.init_lora_weights' is 'loft'", "pissa_niter_N"),
        ("adapter: {target_modules: 3}\n", "'adapter.target_modules' is 3", "It must be a list."),
        ("adapter: {target_modules: [3]}\n", "'adapter.target_modules.0' is 3", "It must be text."),
        ("adapter: {rank_pattern: {q: 0}}\n", "'adapter.rank_pattern.q' is 0", "It must be at least 1."),
        ("adapter: 3\n", "'adapter' is 3", "It must be a mapping"),
        ("name: a/b\n", "'name' is 'a/b'", "it names a folder"),
        ("name: 3\n", "'name' is 3", "It must be text."),
        ("recipe_version: 2\n", "'recipe_version' is 2", "Allowed: 1"),
        ("evaluate: {choices: [a]}\n", "'evaluate.choices'", "Give at least 2"),
        ("seed: -1\n", "'seed' is -1", "It must be at least 0."),
        ("adapter: {method: full, r: 8}\n", "'adapter.r' has no effect with adapter.method: full", "use lora or qlora"),
    ],
)
def test_an_invalid_key_or_value_is_refused_with_place_cause_and_fix(refuse, text, what, fix):
    (problem,) = refuse(text)
    assert problem.where == "recipe.yaml:4"
    assert what in problem.what
    assert fix in problem.fix


@pytest.mark.parametrize(
    ("data", "what", "fix"),
    [
        ("{}", "the key 'data.train' is missing", "The training rows"),
        ("{train: []}", "'data.train' is empty", "at least 1"),
        ("{train: 3}", "'data.train' is 3", "It must be a list."),
        ("{train: [3]}", "'data.train.0' is 3", "a mapping"),
        ("{train: {pth: a}}", "unknown key 'data.train.0.pth'", "Did you mean 'path'?"),
        ("{train: {limit: 3}}", "the key 'data.train.0.path' is missing", "A file, a glob, a folder"),
        ("{train: a, test: 1}", "'data.test' is 1", "below 1"),
        ("{train: a, test: true}", "'data.test' is true", "a number"),
        ("{train: a, test: [{path: b, limit: 0}]}", "'data.test.0.limit' is 0", "at least 1"),
        (
            "{train: a, validation: {path: b, formt: csv}}",
            "unknown key 'data.validation.0.formt'",
            "Did you mean 'format'?",
        ),
        ("{train: ''}", "'data.train.0.path' is empty", "at least 1"),
        ("{train: a, max_length: 4}", "'data.max_length' is 4", "at least 8"),
    ],
)
def test_sources_and_shares_are_checked_in_every_form(refuse, data, what, fix):
    problems = refuse(f"task: chat\nmodel: {{name: m}}\ndata: {data}\n", whole=True)
    found = [problem for problem in problems if what in problem.what]
    assert found, problems
    assert fix in found[0].fix
    assert found[0].where == "recipe.yaml:3"


def test_all_missing_keys_are_reported_at_once(refuse):
    problems = refuse("seed: 3\n", whole=True)
    assert [problem.what for problem in problems] == [
        f"the key '{key}' is missing" for key in ("task", "data", "model")
    ]
    assert all(problem.where == "recipe.yaml:1" for problem in problems)


def test_one_error_has_the_problems_of_all_files_and_kinds(write):
    write("seed: x\nadapter: {rr: 3}\n", "base.yaml", whole=True)
    path = write(
        "extends: base.yaml\ntrain: {optim: sgd, adam_beta1: 0.5}\nevaluate: {gates: [foo]}\ndeploy: [merged, merged]\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["data.max_length=4"])
    places = [problem.where for problem in caught.value.problems]
    assert places == [
        "--set data.max_length",
        "base.yaml:1",
        "base.yaml:2",
        "recipe.yaml:5",
        "recipe.yaml:6",
        "recipe.yaml:7",
    ]


def test_problems_that_follow_from_a_wrong_value_are_not_reported(refuse):
    (problem,) = refuse("generation: {do_sample: 'yes', temperature: 0.7}\n")
    assert problem.what == "'generation.do_sample' is 'yes'"


PATHS = [*key_paths(), "data.train.weight", "data.train.0.format", "data.test.limit", "data.train.columns"]
SCALARS = [None, True, False, 0, 1, 3, -1, 0.5, 1e-4, 1e300, "", "x", "[", "(*"]
WORDS = ["auto", "loss", "loss > base", "merged"]
CHOICES = ["full", "qlora", "lora", "chat", "completion", "qa", "sgd", "constant", "cosine_with_min_lr", "pissa"]
PLACES = ["hub:x", "builtin:", "a://b", {"path": "x"}, {"path": "x", "weight": 2.0}, [{"path": "y"}, "z"]]
SHAPES = [[], ["x"], ["loss", "loss"], [1, 2], {}, {"x": 1}]
LEAVES = st.sampled_from([*SCALARS, *WORDS, *CHOICES, *PLACES, *SHAPES])
CHANGES = st.lists(st.tuples(st.sampled_from(PATHS), LEAVES), min_size=1, max_size=6)


@settings(max_examples=400, deadline=None)
@given(changes=CHANGES, bare=st.booleans())
def test_any_keys_with_any_values_are_loaded_or_refused(tmp_path_factory, changes, bare):
    path = Path(tmp_path_factory.getbasetemp()) / "keys.yaml"
    path.write_text("seed: 1\n" if bare else "task: chat\ndata: {train: a}\nmodel: {name: b}\n", encoding="utf-8")
    sets = [f"{key}={json.dumps(value)}" for key, value in changes]
    try:
        loaded = load_recipe(path, sets)
    except RecipeError as error:
        complete = [problem.what and problem.where and problem.fix for problem in error.problems]
    else:
        path.write_text(loaded.to_yaml(), encoding="utf-8")
        complete = [load_recipe(path).recipe == loaded.recipe]
    assert all(complete)
