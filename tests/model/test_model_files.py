"""Problems of a model folder are reported by name before anything is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapting import open_model, quiet, recipe_with
from transformers import AutoModelForCausalLM

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.model.resolve import resolve_model


@pytest.fixture
def folder(tiny_llama, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def find(folder: Path, **model: object):
    recipe = recipe_with(folder, model=model)
    return resolve_model(str(folder), recipe.model, quiet(), offline=True)


def refused(folder: Path, error: type[Exception], **model: object) -> str:
    with pytest.raises(error) as caught:
        find(folder, **model)
    return str(caught.value)


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def shard(folder: Path) -> list[Path]:
    """Split the weights into several files with an index."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    found = sorted(folder.glob("model-*.safetensors"))
    assert len(found) > 2
    return found


def test_a_complete_folder_is_found_and_hashed(folder):
    place = find(folder)
    assert (place.path, place.revision, len(place.content_hash)) == (folder, None, 64)
    assert find(folder) == place


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "chat_template.jinja", "config.json"])
def test_any_file_that_matters_changes_the_hash(folder, name):
    before = find(folder).content_hash
    path = folder / name
    if name == "model.safetensors":
        tensors = load_file(path)
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        path.write_text(path.read_text().replace(" ", "  ", 1))
    assert find(folder).content_hash != before


def lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def break_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:12] = b"\xff\xff\xff\xff"
    path.write_bytes(bytes(content))


def write_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def lose_a_shard(folder: Path) -> None:
    shard(folder)[1].unlink()


def turn_into_an_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def turn_into_gguf(folder: Path) -> None:
    (folder / "config.json").rename(folder / "model.gguf")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_weights, "no weight file"),
        (break_header, "is damaged or truncated"),
        (write_pointer, "git lfs pull"),
        (lose_a_shard, "is missing, but model.safetensors.index.json names it"),
        (turn_into_an_adapter, "adapter.start_from"),
        (turn_into_gguf, "GGUF"),
    ],
)
def test_problems_of_a_folder_are_named(folder, damage, message):
    damage(folder)
    text = refused(folder, EnvironmentProblem)
    assert message in text
    assert str(folder) in text


@pytest.mark.parametrize("keep", [0, 4, 100, 4000, -1])
def test_a_truncated_weight_file_is_named_with_its_sizes(folder, keep):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    message = refused(folder, EnvironmentProblem)
    assert str(path) in message
    assert f"{len(whole[:keep]):,} bytes" in message


def test_all_damaged_shards_are_reported_at_once(folder):
    shards = shard(folder)
    for path in shards[:2]:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EnvironmentProblem) as caught:
        find(folder)
    assert [problem.where for problem in caught.value.problems] == [str(path) for path in shards[:2]]


def test_pickled_weights_are_refused_unless_allowed(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    message = refused(folder, RecipeError)
    assert "pytorch_model.bin" in message
    assert "model.use_safetensors: false" in message
    recipe = recipe_with(folder, model={"use_safetensors": False})
    loaded = open_model(recipe).model.state_dict()
    assert torch.equal(loaded["model.norm.weight"], weights["model.norm.weight"])


def test_own_code_is_refused_unless_trusted_and_never_run(folder):
    code = folder / "modeling_own.py"
    code.write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}, model_type="own")
    message = refused(folder, RecipeError)
    assert "model.trust_remote_code: true" in message
    assert "modeling_own.OwnForCausalLM" in message
    assert not (folder / "ran").exists()
    find(folder, trust_remote_code=True)
    edit(folder / "config.json", auto_map=None, model_type="llama")
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokens.OwnTokenizer"]})
    assert "tokens.OwnTokenizer" in refused(folder, RecipeError)


def test_code_that_transformers_now_includes_is_not_needed(folder):
    """Folders older than transformers' own class name code that is neither needed nor run."""
    (folder / "modeling_llama.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    open_model(recipe_with(folder))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("content", ["{", "[]", "", "null", '{"hidden_size": 64}'])
def test_a_damaged_configuration_is_named(folder, content):
    (folder / "config.json").write_text(content)
    assert str(folder / "config.json") in refused(folder, EnvironmentProblem)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": "many"}, "config.json"),
        ({"model_type": "fromthefuture"}, "pip install -U transformers"),
        ({"intermediate_size": 96}, "weights"),
    ],
)
def test_a_configuration_that_does_not_match_transformers_or_the_weights_is_refused(folder, change, message):
    edit(folder / "config.json", **change)
    with pytest.raises(EnvironmentProblem, match=message):
        open_model(recipe_with(folder))


def test_a_missing_weight_is_reported(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(EnvironmentProblem, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        open_model(recipe_with(folder))
