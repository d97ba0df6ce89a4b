"""Where a recipe runs: processes of this machine. A recipe never says it."""
