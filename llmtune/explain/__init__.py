"""Looking inside a model: attention, generation, positions, architecture, and where the tuning went."""
