import pytest
import torch
from support.adapting import build_family, open_model, recipe_with

from llmtune.evaluate.greedy_decoding import write_greedily
from llmtune.serve.continuous_batch import HEADROOM, LiveRows

ARRIVALS = {0: [9, 40], 3: [5], 4: [60, 2], 11: [17]}
"""By step, the lengths of the prompts that join."""
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
}


def prompts_of(lengths: list[int], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 400, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def write_together(model, arrivals, answer_lengths):
    """Greedy answers by LiveRows; row i leaves after `answer_lengths[i]` tokens."""
    rows, names, tokens = LiveRows(model, "cpu"), [], []
    prompts, answers = [], []
    for step in range(400):
        if names:
            tokens = rows.step(torch.tensor(tokens)).argmax(-1).tolist()
        if step in arrivals:
            joining = prompts_of(arrivals[step], step)
            names += range(len(prompts), len(prompts) + len(joining))
            prompts += joining
            answers += [[] for _ in joining]
            tokens += rows.join(joining).argmax(-1).tolist()
        for name, token in zip(names, tokens, strict=True):
            answers[name].append(token)
        ended = [place for place, name in enumerate(names) if len(answers[name]) == answer_lengths[name]]
        if ended:
            taken = rows.leave(ended)
            names, tokens = [names[place] for place in taken], [tokens[place] for place in taken]
        if not names and step > max(arrivals):
            break
    return prompts, answers


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_join_and_leave_at_any_step_say_what_each_says_alone(tmp_path, family):
    model = open_model(recipe_with(build_family(tmp_path / family, family, **FAMILIES[family])), training=False).model
    lengths = [12, 30, 7, 1, 25, 14]
    prompts, answers = write_together(model, ARRIVALS, lengths)
    with torch.inference_mode():
        alone = [write_greedily(model, [p], n, set(), "cpu")[0] for p, n in zip(prompts, lengths, strict=True)]
    assert answers == alone
    assert len({tuple(answer) for answer in answers}) == len(answers)


def test_an_answer_longer_than_what_is_reserved_goes_on(tmp_path):
    model = open_model(recipe_with(build_family(tmp_path / "llama", "llama", max_position_embeddings=512))).model
    lengths = [HEADROOM * 2 + 5, 3]
    prompts, answers = write_together(model.eval(), {0: [6], HEADROOM + 9: [30]}, lengths)
    with torch.inference_mode():
        assert answers[0] == write_greedily(model, [prompts[0]], lengths[0], set(), "cpu")[0]
        assert answers[1] == write_greedily(model, [prompts[1]], lengths[1], set(), "cpu")[0]


def test_when_all_have_left_nothing_is_kept(tmp_path):
    model = open_model(recipe_with(build_family(tmp_path / "llama", "llama")), training=False).model
    rows = LiveRows(model, "cpu")
    with torch.inference_mode():
        rows.join(prompts_of([5, 9], 0))
    assert rows.columns.kept
    assert rows.leave([1, 0]) == []
    assert len(rows) == 0
    assert not rows.columns.kept
