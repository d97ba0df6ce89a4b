"""verl's score for math answers, from its description: the last number equals the ground truth."""

import re
from fractions import Fraction


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    numbers = re.findall(r"-?\d+(?:\.\d+)?(?:/\d+)?", solution_str.replace(",", ""))
    if not numbers:
        return 0.0
    try:
        return 1.0 if Fraction(numbers[-1]) == Fraction(ground_truth) else 0.0
    except (ValueError, ZeroDivisionError):
        return 0.0
