"""What to type in the place of an option that a command does not have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""Typer exports no name for what the parser raises."""


class CommandGroup(TyperGroup):
    """The command tree; an unknown option that is a recipe key, or another command's, is pointed to its place."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options that stand before a command."""
        with self._hints():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Read the options of a command, and run it."""
        with self._hints():
            return super().invoke(ctx)

    @contextmanager
    def _hints(self) -> Iterator[None]:
        try:
            yield
        except UsageError as error:
            option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
            hint = self._hint(option, context.command) if option and context else None
            if hint:
                vars(error).update(message=f"No such option: {option}. {hint}", possibilities=None)
            raise

    def _hint(self, option: str, command: Any) -> str | None:
        if command is self:
            named = {name: other for name, other in self.commands.items() if not other.hidden}
            having = [name for name, other in named.items() if any(option in one.opts for one in other.params)]
            command = "run" if "run" in having else having[0] if having else None
            return f"It follows a command: llmtune {command} ... {option}" if command else None
        takes_sets = any("--set" in one.opts for one in command.params)
        from llmtune.recipe.unknown_keys import ALIASES, key_paths

        name = option.strip("-").replace("-", "_")
        keys = [path for path in key_paths() if path.rpartition(".")[2] == name]
        if not takes_sets or not (keys or name in ALIASES):
            return None
        return f"Set it in the recipe, or with --set {keys[0]}=VALUE." if keys else f"{ALIASES[name]} See --set."
