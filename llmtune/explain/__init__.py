"""Look inside a model: attention, generation, positions, architecture, and which modules the tuning changed."""
