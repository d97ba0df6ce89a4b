"""The layer that averages tokens: its first token has the mean, and other models are left as they are."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from llmtune.model.mean_layer import add_mean_layer, initialize_mean_layer, name_mean_layer


def sentence_base(folder, target, pooling="mean_tokens"):
    """Copy a model, and say how sentence-transformers pools its tokens."""
    shutil.copytree(folder, target)
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (target / "modules.json").write_text(json.dumps(modules))
    (target / "1_Pooling").mkdir()
    (target / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    return target


def with_layer(folder):
    config = AutoConfig.from_pretrained(folder)
    add_mean_layer(config)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder, config=config).eval()


def test_the_first_token_has_the_mean_of_the_layer_before(built, tmp_path):
    model = with_layer(sentence_base(built("bert"), tmp_path / "base"))
    initialize_mean_layer(model)
    ids = torch.randint(5, 90, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 5:], mask[1, 9:] = 0, 0
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    weights_BT1 = mask[..., None].float()
    means_BD = (states[-2] * weights_BT1).sum(1) / weights_BT1.sum(1)
    wanted_BD = torch.nn.functional.layer_norm(means_BD, means_BD.shape[-1:])
    assert torch.nn.functional.cosine_similarity(states[-1][:, 0], wanted_BD).min() > 0.99
    assert name_mean_layer(model)[1] == "bert.pooler"


def test_all_layers_before_are_those_of_the_files(built, tmp_path):
    base = sentence_base(built("bert"), tmp_path / "base")
    plain, model = AutoModelForSequenceClassification.from_pretrained(base), with_layer(base)
    old = dict(plain.bert.encoder.named_parameters())
    assert all(torch.equal(model.bert.encoder.get_parameter(name), one) for name, one in old.items())
    assert len(model.bert.encoder.layer) == len(plain.bert.encoder.layer) + 1


@pytest.mark.parametrize(
    ("family", "pooling"),
    [("bert", None), ("bert", "cls_token"), ("bert", "weighted_mean_tokens"), ("roberta", "mean_tokens")],
)
def test_other_models_get_no_layer(built, tmp_path, family, pooling):
    folder = built(family) if pooling is None else sentence_base(built(family), tmp_path / "base", pooling)
    config = AutoConfig.from_pretrained(folder)
    layers = config.num_hidden_layers
    add_mean_layer(config)
    assert config.num_hidden_layers == layers


def test_a_layer_is_added_once(built, tmp_path):
    config = AutoConfig.from_pretrained(sentence_base(built("bert"), tmp_path / "base"))
    layers = config.num_hidden_layers
    add_mean_layer(config)
    add_mean_layer(config)
    assert config.num_hidden_layers == layers + 1
