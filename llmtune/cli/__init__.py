"""Thin Typer layer: parse, call one function, print."""

from llmtune.store.process_environment import gc_paused

with gc_paused():
    from llmtune.cli.app import main

__all__ = ["main"]
