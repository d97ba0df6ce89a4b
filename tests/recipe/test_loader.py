from pathlib import Path

import pytest

from llmtune.errors import RecipeError
from llmtune.recipe.data_section import Source
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.train_section import CHOSEN_KEYS, TrainSection
from llmtune.recipe.training_rule import choose_training


def test_a_minimal_recipe_has_the_documented_defaults(write):
    recipe = load_recipe(write(name="support.yaml")).recipe
    assert recipe.name == "support"
    assert recipe.data.train == (Source(path=str(Path.cwd() / "rows.jsonl")),)
    assert (recipe.data.validation, recipe.data.test, recipe.data.max_length) == (0.05, 0.1, 1024)
    assert (recipe.adapter.method, recipe.adapter.r, recipe.adapter.lora_alpha) == ("lora", 16, 32)
    assert (recipe.train.learning_rate, recipe.train.batch_size, recipe.seed) == (2e-4, 16, 42)
    assert recipe.generation.max_new_tokens == 128
    assert "loss" in recipe.evaluate.metrics


def test_a_recipe_cannot_be_changed(write):
    recipe = load_recipe(write()).recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3


def test_nearer_files_override_values_and_mappings_are_merged(write):
    write("seed: 1\nadapter: {r: 4, lora_alpha: 8}\nevaluate: {gates: ['loss < base']}\n", "base.yaml", whole=True)
    write("extends: base.yaml\nadapter: {r: 5}\nseed: 2\n", "middle.yaml", whole=True)
    recipe = load_recipe(write("extends: middle.yaml\nseed: 3\n")).recipe
    assert (recipe.seed, recipe.adapter.r, recipe.adapter.lora_alpha) == (3, 5, 8)
    assert recipe.evaluate.gates == ("loss < base",)


def test_lists_and_sources_are_replaced_completely(write):
    base = "data: {train: {path: a.csv, columns: {prompt: q}}}\nevaluate: {metrics: [loss, chrf]}\n"
    write(base, "base.yaml", whole=True)
    text = "extends: base.yaml\ntask: chat\ndata: {train: {path: b.csv}}\nmodel: {name: m}\n"
    recipe = load_recipe(write(f"{text}evaluate: {{metrics: [chrf]}}\n", whole=True)).recipe
    assert recipe.data.train == (Source(path=str(Path.cwd() / "b.csv")),)
    assert recipe.evaluate.metrics == ("chrf",)


def test_set_overrides_every_file_and_is_parsed_as_yaml(write):
    write("seed: 1\n", "base.yaml", whole=True)
    sets = ["seed=5", "train.learning_rate=1e-5", "evaluate.gates=['loss < base']", "adapter={r: 2}", "seed=6"]
    recipe = load_recipe(write("extends: base.yaml\nseed: 2\nadapter: {lora_alpha: 7}\n"), sets).recipe
    assert recipe.seed == 6
    assert recipe.train.learning_rate == 1e-5
    assert recipe.evaluate.gates == ("loss < base",)
    assert (recipe.adapter.r, recipe.adapter.lora_alpha) == (2, 7)


def test_set_can_change_keys_of_sources(write):
    path = write("task: chat\ndata: {train: [a.jsonl, b.jsonl]}\nmodel: {name: m}\n", whole=True)
    recipe = load_recipe(path, ["data.train.1.limit=9", "data.test=0.2"]).recipe
    assert [source.limit for source in recipe.data.train] == [None, 9]
    assert load_recipe(write(), ["data.train.limit=3"]).recipe.data.train[0].limit == 3
    loaded = load_recipe(write(), ["data.train.0.limit=3", "data.train.0.format=csv"])
    assert loaded.recipe.data.train == (Source(path=str(Path.cwd() / "rows.jsonl"), limit=3, format="csv"),)
    assert loaded.origins["data.train.0.path"] == "recipe.yaml:2"


def test_a_null_without_inherited_value_is_a_wrong_type_and_an_empty_section_has_defaults(refuse, write):
    (problem,) = refuse("adapter: {r: null}\n")
    assert problem.what == "'adapter.r' is null"
    assert load_recipe(write("train:\nadapter:\n")).recipe.train.batch_size == 16


def test_null_resets_a_value_of_the_extended_recipe(write):
    write("model: {candidates: [a/b, c/d]}\nadapter: {r: 4}\ntrain: {seeds: [1]}\n", "base.yaml", whole=True)
    text = "extends: base.yaml\ntask: chat\ndata: {train: a}\nmodel: {name: m, candidates: null}\ntrain: null\n"
    loaded = load_recipe(write(text, whole=True), ["adapter.r=null"])
    assert loaded.recipe.model.candidates is None
    assert loaded.recipe.adapter.r == 16
    assert loaded.recipe.train.seeds == ()


def test_every_value_has_an_origin(write):
    write("# first\nseed: 1\nadapter:\n  r: 4\n", "base.yaml", whole=True)
    text = (
        "extends: base.yaml\ntask: chat\ndata:\n  train:\n    - a.jsonl\n    - path: b.jsonl\n      limit: 3\n"
        "model:\n  name: m\n  chat_template_kwargs: {thinking: false}\n"
    )
    origins = load_recipe(write(text, whole=True), ["train.batch_size=4"]).origins
    assert origins["seed"] == "base.yaml:2"
    assert origins["adapter.r"] == "base.yaml:4"
    assert origins["task"] == "recipe.yaml:2"
    assert origins["data.train.0.path"] == "recipe.yaml:5"
    assert origins["data.train.1.limit"] == "recipe.yaml:7"
    assert origins["model.chat_template_kwargs.thinking"] == "recipe.yaml:10"
    assert origins["train.batch_size"] == "--set"
    assert origins["train.optim"] == origins["name"] == origins["data.train.0.limit"] == "default"


def test_the_written_recipe_shows_each_origin_and_loads_to_the_same(write):
    text = "adapter: {method: full}\ntrain: {max_steps: 3}\n"
    sets = ["data.validation=0", "model.chat_template_kwargs={a b: [1, '☃ \"x\"', null], c: yes}", "data.train.limit=3"]
    loaded = load_recipe(write(text), sets)
    written = loaded.to_yaml()
    assert "seed: 42  # default" in written
    assert "  method: full  # recipe.yaml:4" in written
    assert "  validation: 0.0  # --set" in written
    assert "  # r: 16  # default, without effect here" in written
    again = load_recipe(write(written, "again/recipe.yaml", whole=True))
    assert again.recipe == loaded.recipe
    bare = load_recipe(write(loaded.to_yaml(with_origins=False), "bare/recipe.yaml", whole=True))
    assert bare.recipe == loaded.recipe
    assert "#" not in loaded.to_yaml(with_origins=False)


def test_paths_are_relative_to_their_recipe_file_and_set_paths_to_the_working_folder(write, tmp_path):
    (tmp_path / "far" / "local").mkdir(parents=True)
    base = "data: {validation: v.jsonl, test: ../t*.jsonl}\nmodel: {name: local, chat_template: t.jinja}\n"
    write(base, "far/base.yaml", whole=True)
    path = write("extends: far/base.yaml\ntask: chat\ndata: {train: rows}\n", whole=True)
    recipe = load_recipe(path, ["adapter.start_from=runs/x"]).recipe
    assert recipe.data.validation[0].path == str(tmp_path / "far/v.jsonl")
    assert recipe.data.test[0].path == str(tmp_path / "t*.jsonl")
    assert recipe.data.train[0].path == str(tmp_path / "rows")
    assert recipe.model.name == str(tmp_path / "far/local")
    assert recipe.model.chat_template == str(tmp_path / "far/t.jinja")
    assert recipe.adapter.start_from == str(tmp_path / "runs/x")


def test_hub_names_and_packaged_names_are_not_paths(write):
    text = "task: chat\ndata: {train: ['hub:a/b', 'builtin:q', ~/rows]}\nmodel: {candidates: [a/b, 'builtin:m', ./c]}\n"
    recipe = load_recipe(write(text, whole=True)).recipe
    assert [source.path for source in recipe.data.train] == ["hub:a/b", "builtin:q", str(Path("~/rows").expanduser())]
    assert recipe.model.candidates == ("a/b", "builtin:m", str(Path.cwd() / "c"))


def test_nothing_is_interpolated(write, monkeypatch):
    monkeypatch.setenv("WHERE", "elsewhere")
    recipe = load_recipe(write(), ["data.train=$WHERE/${WHERE}.jsonl"]).recipe
    assert recipe.data.train[0].path == str(Path.cwd() / "$WHERE/${WHERE}.jsonl")


def test_a_glob_works_in_a_folder_with_brackets(write):
    path = write("task: chat\ndata: {train: '*.jsonl'}\nmodel: {name: m}\n", "a[1]/recipe.yaml", whole=True)
    (path.parent / "x.jsonl").touch()
    import glob

    assert glob.glob(load_recipe(path).recipe.data.train[0].path) == [str(path.parent / "x.jsonl")]


def test_the_fingerprint_ignores_name_gates_metrics_and_generation_only(write):
    plain = load_recipe(write()).fingerprint
    kept = ["name=x", "evaluate.gates=['loss < 3']", "evaluate.metrics=[loss]", "generation.max_new_tokens=5"]
    kept += ["deploy=merged", "train.seeds=[1, 2]"]
    assert {load_recipe(write(), [text]).fingerprint for text in kept} == {plain}
    changed = [
        "seed=1",
        "data.max_length=9",
        "model.dtype=float32",
        "adapter.r=2",
        "train.optim=sgd",
        "task=completion",
    ]
    others = [load_recipe(write(), [text]).fingerprint for text in changed]
    assert len({plain, *others}) == len(others) + 1


def test_a_teacher_changes_the_fingerprint_and_its_control_run_does_not(write):
    sets = ["distil.teacher=a/b"], ["distil={teacher: a/b, control: false}"], ["distil={teacher: a/b, weight: 0.3}"]
    plain, (alone, with_control, weighted) = load_recipe(write()), (load_recipe(write(), one) for one in sets)
    assert alone.fingerprint == with_control.fingerprint
    assert len({plain.fingerprint, alone.fingerprint, weighted.fingerprint}) == 3


@pytest.mark.parametrize("key", CHOSEN_KEYS)
def test_a_stated_default_that_replaces_a_choice_is_another_recipe(write, key: str):
    default = TrainSection.model_fields[key].default
    stated = [load_recipe(write(), [f"train.{key}={value}"]).fingerprint for value in (default, 2 * default)]
    assert len({load_recipe(write()).fingerprint, *stated}) == 3


@pytest.mark.parametrize("with_origins", [True, False])
def test_a_resolved_recipe_leaves_the_same_values_to_choose(write, with_origins: bool):
    plain = load_recipe(write(), ["train.batch_size=16"])
    again = load_recipe(write(plain.to_yaml(with_origins), "shown.yaml", whole=True))
    assert again.recipe.train.model_fields_set.intersection(CHOSEN_KEYS) == {"batch_size"}
    assert again.recipe.train == plain.recipe.train


def test_the_training_rule_chooses_the_chosen_keys(write):
    assert {*choose_training(load_recipe(write()).recipe, 100, 64, new_head=False)} == {*CHOSEN_KEYS}


def test_the_fingerprint_is_the_same_in_another_folder(write):
    assert load_recipe(write()).fingerprint == load_recipe(write(name="other/copy.yaml")).fingerprint


def test_cycles_and_missing_files_of_extends_are_refused_with_their_place(write):
    write("seed: 1\nextends: b.yaml\n", "a.yaml", whole=True)
    write("extends: a.yaml\n", "b.yaml", whole=True)
    with pytest.raises(RecipeError) as caught:
        load_recipe("a.yaml")
    (problem,) = caught.value.problems
    assert "cycle: a.yaml -> b.yaml -> a.yaml" in problem.what
    assert problem.where == "b.yaml:1"
    write("task: chat\nextends: nowhere.yaml\n", "c.yaml", whole=True)
    with pytest.raises(RecipeError, match=r"c\.yaml:2: the recipe to extend was not found"):
        load_recipe("c.yaml")
    write("extends: [a.yaml]\n", "d.yaml", whole=True)
    with pytest.raises(RecipeError, match="must be the path of one recipe file"):
        load_recipe("d.yaml")


def test_extending_a_file_that_is_not_a_recipe_is_refused_without_showing_it(write):
    write("root:*:19000:0:99999:7::: \ndaemon:*:19000:::\n", "shadow", whole=True)
    write("task: chat\nextends: shadow\n", "a.yaml", whole=True)
    with pytest.raises(RecipeError, match=r"a\.yaml:2: .*shadow is not a recipe") as caught:
        load_recipe("a.yaml")
    assert "19000" not in str(caught.value)


def test_a_long_chain_of_extends_is_refused(write):
    for i in range(12):
        write(f"extends: r{i + 1}.yaml\n", f"r{i}.yaml", whole=True)
    with pytest.raises(RecipeError, match="more than 8 files deep"):
        load_recipe("r0.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed", "is not KEY=VALUE"),
        ("=3", "is not KEY=VALUE"),
        ("a..b=3", "is not KEY=VALUE"),
        (".".join("a" * 99) + "=1", "is not KEY=VALUE"),
        ("seed=[1", "not valid YAML"),
        ("extends=x.yaml", "cannot set 'extends'"),
        ("seed.x=3", "has no keys"),
        ("data.train.path.x=3", "which has no keys"),
        ("deploy.0=merged", "is a list of 0"),
        ("seed=x", "'seed' is 'x'"),
    ],
)
def test_an_invalid_set_is_refused_by_name(write, text, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write("seed: 4\ndeploy: []\n"), [text])
    assert words in str(caught.value)
    assert all((problem.where or "").startswith("--set") for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("stated", "sets", "formats", "limit"),
    [
        ("[merged, gguf]", [], ("merged", "gguf"), None),
        ("gguf", [], ("gguf",), None),
        ("{products: onnx, limit: 50}", [], ("onnx",), 50),
        ("[merged, gguf]", ["deploy.limit=20"], ("merged", "gguf"), 20),
        ("gguf", ["deploy={limit: 20}"], ("gguf",), 20),
        ("{products: [gguf], limit: 50}", ["deploy=[onnx]"], ("onnx",), 50),
        ("{products: [gguf], limit: 50}", ["deploy.products.0=onnx", "deploy.limit=null"], ("onnx",), None),
        ("[merged, gguf]", ["deploy.1=onnx"], ("merged", "onnx"), None),
        ("[]", ["deploy.limit=20"], (), 20),
    ],
)
def test_a_list_of_exports_is_short_for_a_section_with_a_limit(write, stated, sets, formats, limit):
    loaded = load_recipe(write(f"deploy: {stated}\n"), sets)
    assert (loaded.recipe.deploy.products, loaded.recipe.deploy.limit) == (formats, limit)
    path = write(loaded.to_yaml(), "again.yaml", whole=True)
    assert load_recipe(path).recipe.deploy == loaded.recipe.deploy
    above = write("extends: recipe.yaml\ndeploy: {limit: 7}\n", "above.yaml", whole=True)
    assert load_recipe(above).recipe.deploy.products == load_recipe(write(f"deploy: {stated}\n")).recipe.deploy.products


@pytest.mark.parametrize(
    ("stated", "said"),
    [("{products: [gguf], limit: 0}", "limit"), ("[ggf]", "gguf"), ("{product: gguf}", "products"), ("5", "deploy")],
)
def test_a_wrong_export_or_limit_is_refused_with_its_line(write, stated, said):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(f"deploy: {stated}\n"))
    assert said in str(caught.value)
    assert "recipe.yaml:" in (caught.value.problems[0].where or "")


def test_a_key_from_set_replaces_the_key_that_it_excludes(write):
    recipe = write("train: {num_train_epochs: 2, batch_size: 4}\n")
    train = load_recipe(recipe, ["train.max_steps=5", "train.batch_tokens=100"]).recipe.train
    assert (train.max_steps, train.batch_tokens) == (5, 100)
    assert load_recipe("quickstart", ["model.candidates=[a/b, c/d]"]).recipe.model.name is None
    with pytest.raises(RecipeError, match="has no effect with"):
        load_recipe(recipe, ["train.max_steps=5", "train.num_train_epochs=2"])


@pytest.mark.parametrize("address", ["tickets", "tickets@1a2b3c4d", "release:tickets", "release:tickets@1a2b3c4d"])
def test_an_address_of_a_run_or_release_stays_unless_a_folder_has_its_name(write, tmp_path, address):
    path = write(f"evaluate: {{champion: '{address}'}}\n")
    assert load_recipe(path).recipe.evaluate.champion == address
    (tmp_path / address).mkdir()
    stated = load_recipe(path).recipe.evaluate.champion
    assert stated == (address if address.startswith("release:") else str(tmp_path / address))


def test_a_chat_recipe_keeps_the_fingerprint_that_it_had_without_keys_for_pictures(tmp_path):
    file = tmp_path / "recipe.yaml"
    text = "task: chat\nmodel: {name: x/y}\ndata: {train: rows.jsonl}\n"
    file.write_text(text)
    assert load_recipe(file).fingerprint.startswith("9d43068a6067")
    for line in ("chat: {images: true}\n", "adapter: {train_projector: true}\n"):
        file.write_text(text + "chat: {images: true}\n" * ("adapter" in line) + line)
        assert not load_recipe(file).fingerprint.startswith("9d43068a6067")
