"""llmtune: fine-tune a Hugging Face model from one recipe, and prove what the tuning did."""

from importlib import import_module

__version__ = "0.2.0"
__all__ = ["__version__", "load_run", "run"]


def __getattr__(name: str) -> object:
    """Import `run` and `load_run` on first use, which keeps `import llmtune` fast."""
    if name in ("load_run", "run"):
        return getattr(import_module("llmtune.launch.python_api"), name)
    raise AttributeError(f"module 'llmtune' has no attribute {name!r}")
