"""The k of metrics such as `recall@k` and `pass@k`."""

from __future__ import annotations

import re


def at_ten(metric: str) -> str:
    """Return a metric of the first k at 10, as `TaskFacts.metrics` lists it for all k; others unchanged."""
    return re.sub(r"^(ndcg|mrr|recall|pass)@[1-9][0-9]{0,3}$", r"\1@10", metric)


def samples_needed(metric: str) -> int:
    """Return the k of `pass@k`; 0 for other metrics."""
    match = re.fullmatch(r"pass@([0-9]+)", metric)
    return int(match[1]) if match else 0
