"""Rows of the test side with the answers of both models, for a person to read."""

from __future__ import annotations

from llmtune.evaluate.eval_inputs import Plan
from llmtune.evaluate.inference import Answers
from llmtune.evaluate.token_batches import cut_evenly


def pick_samples(plan: Plan, base: Answers, tuned: Answers, wanted: int) -> tuple[dict[str, str], ...]:
    """Return rows side by side, spread evenly over those that were answered; never chosen by how the answers look."""
    shown = list(base.texts or base.scores)
    return tuple(show_row(shown[at], plan, base, tuned) for at in cut_evenly(len(shown), wanted))


def show_row(i: int, plan: Plan, base: Answers, tuned: Answers) -> dict[str, str]:
    """Return row `i` of the plan with what either model said; what was not asked of both is absent."""
    sample = {"origin": plan.origins[i], "prompt": plan.prompts[i], "reference": plan.references[i]}
    if i in base.texts and i in tuned.texts:
        sample |= {"base": base.texts[i], "tuned": tuned.texts[i]}
    if i in base.scores:
        sample |= {"base_choice": base.choice(i, plan.choices), "tuned_choice": tuned.choice(i, plan.choices)}
    return sample
