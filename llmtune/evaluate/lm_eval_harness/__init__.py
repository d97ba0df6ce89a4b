"""Public benchmarks by lm-evaluation-harness, asked of base and tuned model while they are loaded."""

from llmtune.evaluate.lm_eval_harness.study import make_benchmarks
from llmtune.evaluate.lm_eval_harness.tasks import check_benchmarks, load_benchmarks

__all__ = ["check_benchmarks", "load_benchmarks", "make_benchmarks"]
