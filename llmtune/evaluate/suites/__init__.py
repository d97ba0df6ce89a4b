"""What an evaluation measures beside the recipe's metrics: judges, swaps, group gaps, benchmarks, label errors."""
