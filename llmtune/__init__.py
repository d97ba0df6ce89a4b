"""llmtune: fine-tune a Hugging Face model from one recipe, and prove what the tuning did."""

__version__ = "0.1.0"
