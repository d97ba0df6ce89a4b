"""The conformance suite's cases on rewards: their reference, and the mistakes that they name."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

ROWS = [0] * 4 + [1] * 4
ANSWERS = [
    " red<|im_end|>", " blue cat<|im_end|>", " dog dog dog<|im_end|>", " fish cat red blue",
    " green<|im_end|>", " cat<|im_end|>", " bird bird<|im_end|>", " red red red red",
]  # fmt: skip


@pytest.fixture(scope="module")
def load(load_benchmark: Callable[[str], Any]) -> Callable[[str], Any]:
    """Import a module of the suite by its name."""
    return lambda name: load_benchmark(f"conformance.{name}")


@pytest.fixture(scope="module")
def reference(load: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = load("models").build_model("qwen2.5-words-ends", tmp_path_factory.mktemp("models") / "qwen2.5-words-ends")
    return load("reference").Reference(folder)


@pytest.fixture
def judge(load: Any, reference: Any, tmp_path: Path) -> Any:
    """Return a function that judges a step on answers, given as texts or ids, of one job of a case."""

    def judge(name: str, answers: Sequence[Any], rows: Sequence[int], step: Any = None, job: str = "run") -> Any:
        case = load(f"cases.{name}").CASE
        ids = [reference.tokenizer(one)["input_ids"] if isinstance(one, str) else one for one in answers]
        settings = case.make_jobs()[job] | {"column": "default"}
        made = make_step(load, reference, name, ids, rows)
        pairs = zip(rows, ids, made.rewards(), strict=True)
        found = {"samples": [{"row": row, "ids": one, "reward": reward} for row, one, reward in pairs]}
        weights = step(made) if step else {}
        moved = {key: weight - weights.get(key, 0.0) for key, weight in reference.start.items()}
        save_file({key: weight.contiguous() for key, weight in moved.items()}, tmp_path / "m.safetensors")
        result = load("case").Result("done", "", "", tmp_path, {}, settings, found)
        finding = case.judge(case, reference, {job: result})
        return finding.verdict, finding.learned

    return judge


def make_step(load: Any, reference: Any, name: str, ids: Sequence[list[int]], rows: Sequence[int]) -> Any:
    samples = load("samples")
    pairs = zip(rows, ids, strict=True)
    return samples.SampledStep(reference, load(f"cases.{name}").CASE.rows, [samples.Sample(*pair) for pair in pairs])


def test_the_policy_gradient_with_advantages_of_one_is_that_of_plain_losses(load: Any, reference: Any) -> None:
    conversations, samples = load("conversations"), load("samples")
    ids = [reference.tokenizer(answer)["input_ids"] for answer in ANSWERS]
    step = make_step(load, reference, "truncated_answers", ids, ROWS)
    questions = [row["messages"][-1]["content"] for row in step.rows]
    prompts = [conversations.qwen(("system", samples.SYSTEM), ("user", question)) for question in questions]
    texts = [
        [*prompts[row], ("<|im_start|>assistant\n", False), (answer, True)]
        for row, answer in zip(ROWS, ANSWERS, strict=True)
    ]
    ones, distance = [1.0] * len(ROWS), load("reference").distance
    mean, mean_of_means = reference.gradient(texts), reference.mean_of_means(texts)
    assert distance(step.gradient("dapo", ones, 4), mean) < 1e-5
    assert distance(step.gradient("grpo", ones, 4), mean_of_means) < 1e-5
    share = sum(step.lengths) / (len(ROWS) * 4)
    assert distance(step.gradient("dr_grpo", ones, 4), {name: weight * share for name, weight in mean.items()}) < 1e-5


def test_advantages_are_those_of_each_prompts_answers(load: Any, reference: Any) -> None:
    ids = [reference.tokenizer(answer)["input_ids"] for answer in ANSWERS]
    step = make_step(load, reference, "dead_groups", ids, ROWS)
    assert step.rewards()[:4] == [91.7] * 4
    assert step.advantages(scaled=True)[:4] == [0.0] * 4
    letters = torch.tensor([len(answer.removesuffix("<|im_end|>").strip()) / 10 for answer in ANSWERS[4:]])
    expected = (letters - letters.mean()) / (letters.std() + 1e-4)
    torch.testing.assert_close(torch.tensor(step.advantages(scaled=True)[4:]), expected)


def equal_rewards(advantage: float, **divisor: Any) -> Any:
    """Return a step in which answers with equal rewards have an advantage."""

    def step(made: Any) -> Any:
        pairs = zip(made.advantages(scaled=True), ROWS, strict=True)
        return made.gradient("grpo", [value + advantage * (row == 0) for value, row in pairs], 8, **divisor)

    return step


def test_a_reward_that_all_answers_share_is_seen_in_the_step_if_its_mean_is_rounded(judge: Any) -> None:
    way = "grpo, advantages over the group's deviation"
    assert judge("dead_groups", ANSWERS, ROWS, equal_rewards(0.0), "mixed") == ("right", f"{way}")
    rounded = judge("dead_groups", ANSWERS, ROWS, equal_rewards(-0.07), "mixed")
    assert rounded == ("silently wrong", f"mixed: equal rewards have an advantage of -0.070: {way}")
    left_out = judge("dead_groups", ANSWERS, ROWS, equal_rewards(0.0, answers=4), "mixed")
    assert left_out == ("silently wrong", f"mixed: the prompt with equal rewards left out of the divisor: {way}")


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("advantage", [0.0, -0.07])
def test_a_step_of_its_own_shows_it_too_before_or_after_the_other(
    load: Any, reference: Any, judge: Any, first: int, advantage: float
) -> None:
    module, way = load("cases.dead_groups"), "dr_grpo, advantages"
    ids = [reference.tokenizer(answer)["input_ids"] for answer in [*ANSWERS[:4]] * 4]
    rows = [first] * 8 + [1 - first] * 8

    def step(made: Any) -> Any:
        halves = made.samples[:8], made.samples[8:]
        live, dead = module.take_steps(reference, module.CASE.rows, halves, "dr_grpo", way, advantage)
        return {name: weight + advantage * dead[name] for name, weight in live.items()}

    named = f"alone: equal rewards have an advantage of -0.070: {way}"
    assert judge("dead_groups", ids, rows, step, "alone") == (
        ("silently wrong", named) if advantage else ("right", way)
    )


def test_an_answer_ends_at_each_end_token_which_is_learned(judge: Any) -> None:
    answers = [
        " red<|im_end|>",
        " cat blue<|endoftext|>",
        " dog dog<|endoftext|>",
        " fish<|im_end|>",
        " red cat<|im_end|>",
    ]
    rows, way = [0, 0, 1, 1, 1], "dapo, advantages over the group's deviation"
    other = [answer.endswith("<|endoftext|>") for answer in answers]

    def learning(*lengths: int) -> Any:
        return lambda made: made.gradient("dapo", made.advantages(True), 12, lengths or None)

    steps = {
        way: learning(),
        f"answers with the other end token masked: {way}": learning(2, 0, 0, 2, 3),
        f"the other end token not learned: {way}": learning(2, 2, 2, 2, 3),
    }
    for number, (learned, step) in enumerate(steps.items()):
        assert judge("several_ends", answers, rows, step) == ("silently wrong" if number else "right", learned)
    without = [answer.removesuffix("<|endoftext|>") for answer in answers]
    dropped = f"the sampled end token is not learned in {sum(other)} of 5 answers: {way}"
    assert judge("several_ends", without, rows, learning()) == ("silently wrong", dropped)
    late = [answer.replace("<|endoftext|>", "<|endoftext|> red<|im_end|>") for answer in answers]
    assert judge("several_ends", late, rows)[1] == "answers continue after an end token: 2 of 5"


def truncated(loss: str, masked: Sequence[int], all_counted: bool = False, answers: int | None = None) -> Any:
    """Return a step in which answers are masked, by their numbers."""

    def step(made: Any) -> Any:
        kept = [0 if number in masked else length for number, length in enumerate(made.lengths)]
        counted = made.lengths if all_counted else None
        return made.gradient(loss, made.advantages(False), 4, kept, counted, answers)

    return step


@pytest.mark.parametrize(
    ("loss", "step", "learned"),
    [
        ("dapo", truncated("dapo", [3, 7]), ""),
        ("grpo", truncated("grpo", [3, 7]), ""),
        ("dr_grpo", truncated("dr_grpo", [3, 7]), ""),
        ("dapo", truncated("dapo", [3, 7], all_counted=True), "truncated answers in the divisor"),
        ("grpo", truncated("grpo", [3, 7], answers=6), "truncated answers left out of the divisor"),
        ("dr_grpo", truncated("dr_grpo", []), "truncated answers learned"),
        ("grpo", truncated("grpo", [2, 3, 7]), "answers that end at the longest length masked"),
        (
            "dapo",
            truncated("dapo", [2, 3, 7], all_counted=True),
            "truncated answers in the divisor, answers that end at the longest length masked",
        ),
    ],
)
def test_truncated_answers_are_masked_and_divided_as_the_loss_says(
    judge: Any, loss: str, step: Any, learned: str
) -> None:
    found = judge("truncated_answers", ANSWERS, ROWS, step, loss)
    expected = f"{loss}: {learned}: {loss}, advantages" if learned else f"{loss}, advantages"
    assert found == ("silently wrong" if learned else "right", expected)


def test_the_settings_that_answers_were_sampled_with_are_named(load: Any, reference: Any, judge: Any) -> None:
    module, samples = load("cases.sampling_settings"), load("samples")
    found = {}
    for names in ((), ("top_k",), ("repetition_penalty",), tuple(module.PICKY)):
        settings = samples.SAMPLING | {name: module.PICKY[name] for name in names}
        torch.manual_seed(1)
        rows = [row for row in (0, 1) for _ in range(8)]
        ids = [draw(load, reference, row, settings) for row in rows]
        found[names] = judge("sampling_settings", ids, rows)
    assert found[()][0] == "right"
    assert found[("top_k",)] == ("silently wrong", "top_k of the model")
    assert found[("repetition_penalty",)] == ("silently wrong", "repetition_penalty of the model")
    assert found[tuple(module.PICKY)][0] == "silently wrong"


def draw(load: Any, reference: Any, row: int, settings: dict[str, Any]) -> list[int]:
    """Sample an answer token by token."""
    module, sample, ids = load("cases.sampling_settings"), load("samples").Sample, list[int]()
    made = make_step(load, reference, "sampling_settings", [], [])
    while len(ids) < module.LONGEST and ids[-1:] not in ([0], [2]):
        before, logits = made.logits(sample(row, [*ids, 2]))
        probabilities = module.warp(logits[-1].detach(), [*before, *ids], settings).softmax(-1)
        ids.append(int(probabilities.multinomial(1)))
    return ids
