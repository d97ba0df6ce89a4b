"""Thin Typer layer: parse, call one function, print."""

from llmtune.cli.app import main

__all__ = ["main"]
