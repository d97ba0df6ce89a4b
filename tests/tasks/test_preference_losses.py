"""Preference losses and their gradients equal those of TRL's trainers, for any split and padding of a step."""

from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.models import build_llama
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from llmtune.data.collators import collate_padded
from llmtune.data.example import Example
from llmtune.recipe.task_sections import PreferenceSection
from llmtune.tasks import preference_losses as preference
from llmtune.tasks.preference_losses import (
    kl_to_reference,
    preference_loss,
    row_scores,
    sequence_logps,
    step_statistics,
)

PAD = 3
PROMPTS = ["Which colour is the sky?", "How many legs has a cat?", "Name a bird, quickly", "one two"]
CHOSEN = [" The sky is blue.", " Four", " fox and dog and fish and cat", " three four five"]
REJECTED = [" red", " seven eight nine legs", " A recipe describes how", " one"]
THUMBS = [True, False, False, True]
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def settings_of(loss, **more):
    return PreferenceSection(loss=loss, **more)


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and two answers; for kto the second is the mismatched one."""

    prompt: list[int]
    first: list[int]
    second: list[int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = build_llama(tmp_path_factory.mktemp("preference") / "llama")
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # make answers differ in more than their length
    model.save_pretrained(path)
    return path


def open_tuned(folder, scorer=False, moved=True, **lora):
    """A model with LoRA in training mode, moved off its start if `moved`."""
    torch.manual_seed(1)
    if scorer:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    model = get_peft_model(model, LoraConfig(**{**lora_options(scorer), **lora}))
    if moved:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def lora_options(scorer):
    return {**LORA, "task_type": "SEQ_CLS" if scorer else "CAUSAL_LM"}


def example(prompt, answer):
    return Example([*prompt, *answer], [len(prompt), len(prompt) + len(answer)], len(answer))


def pair_batch(pairs):
    rows = [example(pair.prompt, pair.first) for pair in pairs] + [example(pair.prompt, pair.second) for pair in pairs]
    batch = collate_padded(rows, PAD)
    return {**batch, "prompts_S": preference.prompt_positions(batch)}


def thumb_batch(pairs, thumbs):
    mismatched = collate_padded([example(pair.prompt, pair.second) for pair in pairs], PAD)
    return {
        **collate_padded([example(pair.prompt, pair.first) for pair in pairs], PAD),
        **{f"kl_{key}": value for key, value in mismatched.items()},
        "desirable_R": torch.tensor(thumbs),
    }


def some_pairs(folder):
    encode = AutoTokenizer.from_pretrained(folder).encode
    rows = zip(PROMPTS, CHOSEN, REJECTED, strict=True)
    return [Pair(encode(prompt), encode(chosen), encode(rejected)) for prompt, chosen, rejected in rows]


def some_batches(folder, settings, cuts):
    """The rows of `some_pairs` as batches, cut at each of `cuts`."""
    pairs = some_pairs(folder)
    edges = [0, *cuts, len(pairs)]
    parts = [slice(start, end) for start, end in pairwise(edges)]
    if settings.loss == "kto":
        return [thumb_batch(pairs[part], THUMBS[part]) for part in parts]
    return [pair_batch(pairs[part]) for part in parts]


def step(model, batches, settings):
    """Loss, count, correct count and gradients of one optimiser step over `batches`."""
    model.zero_grad()
    surveys = [step_statistics(model, batch, settings, model.disable_adapter) for batch in batches]
    totals = [sum(values) for values in zip(*surveys, strict=True)]
    losses = [preference_loss(model, {**batch, "totals": totals}, settings, model.disable_adapter) for batch in batches]
    count = sum(loss.count for loss in losses)
    for loss in losses:
        (loss.sum / count).backward()
    mean = sum(float(loss.sum.detach()) for loss in losses) / count
    return SimpleNamespace(
        mean=mean, count=count, correct=sum(int(loss.correct) for loss in losses), gradients=gradients(model)
    )


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_equal_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert max(float(gradient.abs().max()) for gradient in theirs.values()) > 1e-3
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: name + text)


def trl_classes(kind):
    import trl

    if kind == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer, ORPOConfig
    name = {"dpo": "DPO", "kto": "KTO", "reward": "Reward"}[kind]
    return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")


def make_trainer(kind, folder, tuned, rows, output, **options):
    """A TRL trainer whose model has the weights of `tuned`; the reference is this model without the adapter."""
    trainer_class, config_class = trl_classes(kind)
    scorer = kind == "reward"
    auto_class = AutoModelForSequenceClassification if scorer else AutoModelForCausalLM
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    trainer = trainer_class(
        model=auto_class.from_pretrained(folder, **({"num_labels": 1} if scorer else {})),
        args=config_class(output_dir=str(output), per_device_train_batch_size=len(rows), **plain, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(**lora_options(scorer)),
    )
    trainer.model.load_state_dict(tuned.state_dict())
    trainer.model.train()
    return trainer


def referee(trainer, rows):
    """Loss, gradients and logged values from the trainer's own loss and collator."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    return SimpleNamespace(mean=float(loss.detach()), gradients=gradients(trainer.model))


def text_rows():
    names = ("prompt", "chosen", "rejected")
    return [dict(zip(names, row, strict=True)) for row in zip(PROMPTS, CHOSEN, REJECTED, strict=True)]


def encoded_pairs(rows):
    return [Pair(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]


@pytest.mark.parametrize(("loss", "theirs"), [("dpo", "sigmoid"), ("ipo", "ipo")])
@pytest.mark.parametrize("beta", [0.1, 0.6])
def test_dpo_and_ipo_match_trl(folder, tmp_path, loss, theirs, beta):
    tuned = open_tuned(folder)
    trainer = make_trainer("dpo", folder, tuned, text_rows(), tmp_path, loss_type=[theirs], beta=beta)
    rows = list(trainer.train_dataset)
    wanted = referee(trainer, rows)
    batch = pair_batch(encoded_pairs(rows))
    ours = step(tuned, [batch], settings_of(loss, beta=beta))
    assert ours.mean == pytest.approx(wanted.mean, abs=1e-5, rel=1e-5)
    assert_equal_gradients(ours.gradients, wanted.gradients)
    assert ours.correct / ours.count == pytest.approx(trainer._metrics["train"]["rewards/accuracies"][-1])


def test_smoothed_dpo_matches_trl_for_each_pair(folder, tmp_path):
    # TRL offers this form only in `aot`, which sorts over the batch; one pair needs no sorting
    tuned = open_tuned(folder)
    options = {"loss_type": ["aot"], "beta": 0.3, "label_smoothing": 0.2}
    trainer = make_trainer("dpo", folder, tuned, text_rows(), tmp_path, **options)
    for row in trainer.train_dataset:
        wanted = referee(trainer, [row])
        ours = step(tuned, [pair_batch(encoded_pairs([row]))], settings_of("dpo", beta=0.3, label_smoothing=0.2))
        assert ours.mean == pytest.approx(wanted.mean, abs=1e-5, rel=1e-5)
        assert_equal_gradients(ours.gradients, wanted.gradients)


@pytest.mark.parametrize("sign", [1, -1])
def test_kto_matches_trl(folder, tmp_path, sign):
    tuned = open_tuned(folder)
    with torch.no_grad():  # the estimate is above zero with one sign, clipped to zero with the other
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.mul_(sign)
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.8}
    rows = [
        {"prompt": prompt, "completion": answer, "label": thumb}
        for prompt, answer, thumb in zip(PROMPTS, CHOSEN, THUMBS, strict=True)
    ]
    trainer = make_trainer("kto", folder, tuned, rows, tmp_path, beta=0.4, **weights)
    encoded = list(trainer.train_dataset)
    wanted = referee(trainer, encoded)
    pairs = [Pair(row["prompt_ids"], row["completion_ids"], row["KL_completion_ids"]) for row in encoded]
    batch, settings = thumb_batch(pairs, THUMBS), settings_of("kto", beta=0.4, **weights)
    ours = step(tuned, [batch], settings)
    kl_sum, kl_rows = step_statistics(tuned, batch, settings, tuned.disable_adapter)
    assert (kl_sum > 0) == (sign > 0)
    assert max(0, kl_sum / kl_rows) == pytest.approx(trainer._metrics["train"]["kl"][-1], abs=1e-5)
    assert ours.mean == pytest.approx(wanted.mean, abs=1e-5, rel=1e-5)
    assert_equal_gradients(ours.gradients, wanted.gradients)


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_orpo_matches_trl_with_the_prompt_in_its_likelihood(folder, tmp_path):
    tuned = open_tuned(folder)
    trainer = make_trainer("orpo", folder, tuned, text_rows(), tmp_path, beta=0.7, max_length=128)
    rows = list(trainer.train_dataset)
    wanted = referee(trainer, rows)
    pairs = []
    for row in rows:
        start = row["chosen_labels"].count(-100)
        pairs.append(
            Pair(row["chosen_input_ids"][:start], row["chosen_input_ids"][start:], row["rejected_input_ids"][start:])
        )
    batch, settings = pair_batch(pairs), settings_of("orpo", beta=0.7)
    ours = step(tuned, [batch], settings)
    assert ours.mean == pytest.approx(wanted.mean, abs=1e-5, rel=1e-5)
    assert_equal_gradients(ours.gradients, wanted.gradients)
    logged = trainer._stored_metrics["train"]
    assert ours.correct / ours.count == pytest.approx(logged["rewards/accuracies"][-1])


@pytest.mark.parametrize("coefficient", [None, 0.05])
def test_the_reward_loss_matches_trl(folder, tmp_path, coefficient):
    tuned = open_tuned(folder, scorer=True)
    pairs = some_pairs(folder)
    rows = [{"chosen_ids": pair.prompt + pair.first, "rejected_ids": pair.prompt + pair.second} for pair in pairs]
    trainer = make_trainer("reward", folder, tuned, rows, tmp_path, center_rewards_coefficient=coefficient)
    wanted = referee(trainer, rows)
    batch = pair_batch(pairs)
    ours = step(tuned, [batch], settings_of("reward", center_rewards_coefficient=coefficient))
    assert ours.mean == pytest.approx(wanted.mean, abs=1e-5, rel=1e-5)
    assert any("score" in name for name in wanted.gradients)
    assert_equal_gradients(ours.gradients, wanted.gradients)
    assert ours.correct / ours.count == pytest.approx(trainer._metrics["train"]["accuracy"][-1])


ALL = [
    settings_of("dpo", beta=0.3, label_smoothing=0.1),
    settings_of("ipo", beta=0.3),
    settings_of("kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5),
    settings_of("orpo", beta=0.5),
    settings_of("reward", center_rewards_coefficient=0.1),
]


def test_kto_counts_the_rows_on_the_right_side_of_the_estimate(folder):
    tuned, settings = open_tuned(folder), ALL[2]
    (batch,) = some_batches(folder, settings, [])
    ratios = preference._log_ratios(tuned, batch, tuned.disable_adapter, policy_gradient=False)
    for estimate in (float(ratios.min()) - 1, float(ratios.median()) + 0.01, float(ratios.max()) + 1):
        loss = preference_loss(tuned, {**batch, "totals": [4 * estimate, 4.0]}, settings, tuned.disable_adapter)
        above = ratios > max(0.0, estimate)
        assert int(loss.correct) == int((above == torch.tensor(THUMBS)).sum())


def test_orpo_stays_finite_for_answers_with_probability_one():
    logps = torch.tensor([0.0, -1e-9, -1e-3, -1.0, -50.0], requires_grad=True)
    odds = preference._log_odds(logps)
    odds.sum().backward()
    exact = logps.detach().double()[2:]
    torch.testing.assert_close(odds[2:].double(), exact - torch.log1p(-exact.exp()), atol=1e-5, rtol=1e-5)
    assert bool(torch.isfinite(odds).all())
    assert bool(torch.isfinite(logps.grad).all())


def test_dropout_affects_the_policy_but_not_the_reference_or_statistics(folder):
    tuned, settings = open_tuned(folder, lora_dropout=0.5), ALL[2]
    (batch,) = some_batches(folder, settings, [])
    tuned.base_model.model.model.layers[0].eval()
    modes = [module.training for module in tuned.modules()]
    state = torch.get_rng_state()
    totals = step_statistics(tuned, batch, settings, tuned.disable_adapter)
    kl_to_reference(tuned, batch, tuned.disable_adapter)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in tuned.modules()] == modes
    assert step_statistics(tuned, batch, settings, tuned.disable_adapter) == totals

    def policy(seed):
        torch.manual_seed(seed)
        loss = preference_loss(tuned, {**batch, "totals": totals}, settings, tuned.disable_adapter)
        return float(loss.sum.detach())

    assert policy(1) == policy(1) != policy(2)


def test_log_probabilities_match_a_plain_computation(folder):
    tuned = open_tuned(folder)
    pairs = some_pairs(folder)
    logps, counts = sequence_logps(tuned, pair_batch(pairs))
    for row, pair in enumerate(pairs):
        every = log_softmax(tuned(input_ids=torch.tensor([pair.prompt + pair.first])).logits[0, :-1], -1)
        answer = torch.tensor(pair.first)
        wanted = every[-len(answer) :].gather(1, answer[:, None]).sum()
        assert float(logps[row].detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
        assert int(counts[row]) == len(answer)


@pytest.mark.parametrize("elements", [1 << 22, 425 * 3, 1])
def test_the_kl_to_the_reference_matches_a_plain_computation_for_any_chunking(folder, monkeypatch, elements):
    monkeypatch.setattr(preference, "_CHUNK_ELEMENTS", elements)
    tuned, pairs = open_tuned(folder), some_pairs(folder)
    found = kl_to_reference(tuned, pair_batch(pairs), tuned.disable_adapter)
    with torch.no_grad():
        for row, pair in enumerate(pairs):
            ids = torch.tensor([pair.prompt + pair.first])
            places = slice(len(pair.prompt) - 1, ids.shape[1] - 1)
            policy = torch.distributions.Categorical(logits=tuned(input_ids=ids).logits[0, places])
            with tuned.disable_adapter():
                base = torch.distributions.Categorical(logits=tuned(input_ids=ids).logits[0, places])
            wanted = float(torch.distributions.kl_divergence(policy, base).sum())
            assert wanted > 0.01
            assert float(found[row]) == pytest.approx(wanted, rel=1e-4)


def test_a_reward_is_not_read_at_another_padding_token(folder):
    tuned, pairs = open_tuned(folder, scorer=True), some_pairs(folder)
    rows = [example(pair.prompt, pair.first) for pair in pairs]
    scores = row_scores(tuned, collate_padded(rows, PAD))
    for row, score in zip(rows, scores.tolist(), strict=True):
        assert float(row_scores(tuned, collate_padded([row], PAD)).detach()) == pytest.approx(score, abs=1e-5)
    with pytest.raises(AssertionError, match="padded with the pad token"):
        row_scores(tuned, collate_padded(rows, 0))
