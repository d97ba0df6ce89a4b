"""Where a recipe runs: on one machine, on several, or on a scheduler. The recipe itself never says."""
