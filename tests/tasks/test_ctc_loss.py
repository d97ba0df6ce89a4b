"""The CTC loss: it equals transformers' loss, summed, and padding does not change a row's loss."""

import pytest
import torch
from support.variants import CTC
from transformers import AutoConfig, AutoModelForCTC

LETTER_MODELS = {
    "wav2vec2": {},
    "hubert": {},
    "wavlm": {},
    "unispeech": {},
    "unispeech-sat": {},
    "wav2vec2-conformer": {},
    "data2vec-audio": {},
    "sew": {"squeeze_factor": 1},
}


def letters_model(family, norm="layer", **config):
    """A random CTC model of any family that reads waves."""
    shape = {"conv_dim": (16, 16, 16), "conv_kernel": (10, 8, 8), "conv_stride": (5, 8, 8), "vocab_size": 32}
    shape |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 3}
    shape |= {"feat_extract_norm": norm, "do_stable_layer_norm": norm == "layer", "mask_time_prob": 0.0}
    torch.manual_seed(0)
    made = AutoConfig.for_model(family, **{**shape, **LETTER_MODELS[family], **config})
    return AutoModelForCTC.from_config(made).eval()


def waves(lengths=(9_000, 16_000, 6_001), seed=0):
    """A batch of noise, padded, with letters."""
    generator = torch.Generator().manual_seed(seed)
    values_BN = torch.zeros(len(lengths), max(lengths))
    mask_BN = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    labels_BT = torch.full((len(lengths), 8), -100)
    for i, size in enumerate(lengths):
        values_BN[i, :size] = torch.randn(size, generator=generator)
        mask_BN[i, :size] = 1
        labels_BT[i, : 4 + i] = torch.randint(5, 32, (4 + i,), generator=generator)
    sizes = torch.tensor(lengths)
    named = {"input_values": values_BN, "attention_mask": mask_BN, "labels": labels_BT, "samples_R": sizes}
    return {**named, "n_rows": len(lengths)}


def row_of(batch, row):
    """A single row of a batch without its padding."""
    size = int(batch["samples_R"][row])
    cut = {name: batch[name][row : row + 1, :size] for name in ("input_values", "attention_mask")}
    labels = batch["labels"][row : row + 1]
    samples = batch["samples_R"][row : row + 1]
    return {**cut, "labels": labels[:, labels[0] >= 0], "samples_R": samples, "n_rows": 1}


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")  # from WavLM
@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("family", LETTER_MODELS)
def test_padding_does_not_change_the_loss_of_a_row(family, norm):
    model, batch = letters_model(family, norm), waves()
    with torch.no_grad():
        together = CTC.loss(model, batch, True)
        alone = [CTC.loss(model, row_of(batch, row), True) for row in range(3)]
    torch.testing.assert_close(together.row_sums, torch.cat([loss.row_sums for loss in alone]), rtol=1e-4, atol=1e-3)
    assert together.count == sum(loss.count for loss in alone) == 4 + 5 + 6


def test_padding_does_not_change_the_loss_after_a_models_adapter_layers():
    model = letters_model("wav2vec2", add_adapter=True, num_adapter_layers=1)
    batch = waves((20_000, 30_000))
    with torch.no_grad():
        together = CTC.loss(model, batch, True)
        alone = [CTC.loss(model, row_of(batch, row), True).row_sums for row in range(2)]
    torch.testing.assert_close(together.row_sums, torch.cat(alone), rtol=1e-4, atol=1e-3)


def test_the_summed_loss_matches_transformers():
    model, batch = letters_model("wav2vec2"), waves()
    model.config.ctc_loss_reduction = "sum"
    names = ("input_values", "attention_mask", "labels")
    with torch.no_grad():
        ours = CTC.loss(model, batch, True)
        theirs = [model(**{name: row_of(batch, row)[name] for name in names}).loss for row in range(3)]
        together = model(**{name: batch[name] for name in names}).loss
    torch.testing.assert_close(ours.row_sums, torch.stack(theirs), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours.sum, together, rtol=1e-4, atol=1e-3)
