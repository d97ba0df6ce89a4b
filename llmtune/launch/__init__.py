"""Where a recipe runs: processes of this machine or of several, or what a scheduler gives. A recipe never says it."""
