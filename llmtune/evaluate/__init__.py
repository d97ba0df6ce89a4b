"""Step 5, first half: what the tuning did, measured on rows that training never saw."""

from llmtune.evaluate.evaluator import evaluate
from llmtune.evaluate.gates import check_gates
from llmtune.evaluate.results import load_base, load_evaluation, save_evaluation
from llmtune.recipe import parse_gate

__all__ = ["check_gates", "evaluate", "load_base", "load_evaluation", "parse_gate", "save_evaluation"]
