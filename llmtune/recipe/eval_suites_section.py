"""The sections of `evaluate` that ask more of base and tuned model than the test rows do."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated

from pydantic import Field

from llmtune.recipe.base_section import Many, Section

OWN = "own"
"""What llmtune brings along, in place of a file."""
STUDY_METRICS = {
    "forgetting": ("perplexity", "bits_per_byte", "accuracy", "accuracy_norm"),
    "fairness": ("gap", "stereotype", "stereotype_distance", "swap_changes", "lm_score", "icat"),
}
"""What each study measures, as gates call it behind the study's name; of benchmarks it is `TASK.METRIC`."""
Place = Annotated[str, Field(min_length=1)]


class ForgettingSection(Section):
    """What the base model could do and the tuned one cannot: general text and general questions."""

    texts: Many[Place] = Field(
        default=(OWN,),
        description="General text whose perplexity is taken before and after: `own` (public domain, comes with "
        "llmtune), or text files. Default `own`: any text that the tuning is not about tells of forgetting.",
    )
    questions: Many[Place] = Field(
        default=(OWN,),
        description="Questions with a few answers to choose from, answered by likelihood: `own`, or JSON lines files "
        "of `question`, `choices` and `answer`. Default `own`: common knowledge in plain words.",
    )


class FairnessSection(Section):
    """Whether groups of people are spoken of, or served, differently; base against tuned."""

    pairs: Many[Place] = Field(
        default=(OWN,),
        description="Paired sentences that differ in a group alone: `own`, files in the form of CrowS-Pairs (CSV), "
        "StereoSet (JSON) or JSON lines of `more` and `less`, or `hub:OWNER/NAME[/CONFIG]`; only for models of "
        "language. Default `own`: a small set that comes with llmtune.",
    )
    swaps: Many[Place] = Field(
        default=(OWN,),
        description="Pairs of words for groups, such as woman and man, that are swapped in the prompts of the test "
        "rows: `own`, or CSV files of two columns without a head. Default `own`: English words for women and men.",
    )
    groups: Many[Place] = Field(
        default=(),
        description="Columns that say which group a test row is about: the gap of every metric between their values "
        "is measured. Default none: rows seldom say so.",
    )


class BenchmarkSection(Section):
    """One benchmark of lm-evaluation-harness. A plain text stands for its `task`."""

    task: Place = Field(
        description="Name of a task, group or tag of lm-eval, or a task file (YAML) with rows of your own. Required."
    )
    num_fewshot: int | None = Field(
        default=None, ge=0, le=100, description="Examples before each question. Default none: as the task says."
    )
    limit: int | None = Field(default=None, ge=1, description="Most questions. Default none: all; a limit saves time.")
    apply_chat_template: bool = Field(
        default=False,
        description="Put each question as a chat message. Default false, as in lm-eval, so that numbers are those of "
        "its own command line.",
    )


def study_name(task: str) -> str:
    """Return what the scores of a benchmark are called by: the task's name, of a task file its stem, made plain."""
    return plain_name(PurePath(task).stem if task.endswith((".yaml", ".yml")) else task)


def plain_name(name: str) -> str:
    """Return a name of lm-eval's as a gate can call it: letters, digits, single dashes, underscores; a letter first."""
    plain = re.sub(r"-{2,}", "-", re.sub(r"[^A-Za-z0-9_-]+", "_", name)).strip("-")
    return plain if plain[:1].isalpha() and plain not in ("low", "high") else f"n{plain}"
