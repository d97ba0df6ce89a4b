"""What is wrong with a model folder is told by name, before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapting import open_model, quiet, recipe_with
from transformers import AutoModelForCausalLM

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.model import resolve_model


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


def test_a_whole_folder_is_found_and_hashed(folder):
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


def test_a_missing_weight_file_is_named(folder):
    (folder / "model.safetensors").unlink()
    assert "no weight file" in refused(folder, EnvironmentProblem)


def test_a_missing_shard_is_named(folder):
    gone = shard(folder)[1]
    find(folder)
    gone.unlink()
    message = refused(folder, EnvironmentProblem)
    assert str(gone) in message
    assert "is missing" in message


@pytest.mark.parametrize("keep", [0, 4, 100, 4000, -1])
def test_a_cut_weight_file_is_named_with_its_sizes(folder, keep):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    message = refused(folder, EnvironmentProblem)
    assert str(path) in message
    assert f"{len(whole[:keep]):,} bytes" in message


def test_every_damaged_shard_is_told_at_once(folder):
    shards = shard(folder)
    for path in shards[:2]:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EnvironmentProblem) as caught:
        find(folder)
    assert [problem.where for problem in caught.value.problems] == [str(path) for path in shards[:2]]


def test_a_header_that_is_no_json_is_told(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:12] = b"\xff\xff\xff\xff"
    path.write_bytes(bytes(content))
    assert "header that cannot be read" in refused(folder, EnvironmentProblem)


def test_a_git_lfs_pointer_is_recognised(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in refused(folder, EnvironmentProblem)


def test_pickled_weights_are_refused_until_they_are_asked_for(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    message = refused(folder, RecipeError)
    assert "pytorch_model.bin" in message
    assert "model.use_safetensors: false" in message
    recipe = recipe_with(folder, model={"use_safetensors": False})
    loaded = open_model(recipe).model.state_dict()
    assert torch.equal(loaded["model.norm.weight"], weights["model.norm.weight"])


def test_own_code_is_refused_until_it_is_trusted_and_never_run(folder):
    code = folder / "modeling_own.py"
    code.write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}, model_type="own")
    message = refused(folder, RecipeError)
    assert "model.trust_remote_code: true" in message
    assert "modeling_own.OwnForCausalLM" in message
    assert not (folder / "ran").exists()
    find(folder, trust_remote_code=True)


def test_own_code_for_the_tokenizer_is_refused_too(folder):
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokens.OwnTokenizer"]})
    assert "tokens.OwnTokenizer" in refused(folder, RecipeError)


def test_code_that_transformers_has_taken_over_is_not_needed(folder):
    """Folders older than transformers' own class name code that is neither needed nor run."""
    (folder / "modeling_llama.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    open_model(recipe_with(folder))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("content", ["{", "[]", "", "null", '{"hidden_size": 64}'])
def test_a_damaged_configuration_is_named(folder, content):
    (folder / "config.json").write_text(content)
    assert str(folder / "config.json") in refused(folder, EnvironmentProblem)


def test_a_configuration_with_values_that_cannot_be_is_told(folder):
    edit(folder / "config.json", num_attention_heads="many")
    with pytest.raises(EnvironmentProblem) as caught:
        open_model(recipe_with(folder))
    assert str(folder / "config.json") in str(caught.value)


def test_an_unknown_model_type_is_told_with_the_way_out(folder):
    edit(folder / "config.json", model_type="fromthefuture")
    with pytest.raises(EnvironmentProblem, match="pip install -U transformers"):
        open_model(recipe_with(folder))


def test_an_adapter_folder_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter.start_from" in refused(tmp_path, EnvironmentProblem)


def test_a_gguf_folder_is_no_model(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "GGUF" in refused(tmp_path, EnvironmentProblem)


def test_a_weight_that_no_file_holds_is_told(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(EnvironmentProblem, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        open_model(recipe_with(folder))


def test_weights_of_another_shape_are_told(folder):
    edit(folder / "config.json", intermediate_size=96)
    with pytest.raises(EnvironmentProblem):
        open_model(recipe_with(folder))
