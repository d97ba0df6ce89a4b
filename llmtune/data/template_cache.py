"""Conversations of the same roles, rendered once with blanks for what is said; where that is proven to be the same.

Most chat templates write what a message says as it stands and never look into it. Whether one does is read off its
syntax tree: every expression is followed from `messages` on, and only a few uses of `content` are let through
(written out, joined to other text, trimmed, asked whether it is there). A template that does anything else with it, or
that has a construct whose effect is not known here, is rendered row by row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes

_OPEN, _CLOSE = "\ue000", "\ue001"
_BLANK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_ASKED = frozenset({"defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number", "boolean"})
"""Tests whose answer is the same for every text that is not empty (and for every message)."""


class _Kind(Enum):
    """What an expression may hold: nothing that was said, a text with it, a message, or a list of messages."""

    PLAIN = 0
    TEXT = 1
    MESSAGE = 2
    MESSAGES = 3


PLAIN, TEXT, MESSAGE, MESSAGES = _Kind


class _LooksInside(Exception):
    """The template may do something with what a message says besides writing it."""


@dataclass(frozen=True)
class Form:
    """A rendered conversation: fixed text with the contents of messages between."""

    parts: tuple[str, ...]
    """Fixed text, and at odd places what was a blank."""
    blanks: tuple[int, ...]
    """For each blank the number of the message whose content stands there."""

    def fill(self, contents: Sequence[str]) -> str:
        """Return the text with these contents."""
        parts = list(self.parts)
        parts[1::2] = [contents[k] for k in self.blanks]
        return "".join(parts)


def blank(number: int) -> str:
    """Return what stands for the content of a message while a form is rendered."""
    return f"{_OPEN}{number}{_CLOSE}"


def as_form(rendered: str) -> Form:
    """Return the form of a conversation that was rendered with blanks for contents."""
    parts = _BLANK.split(rendered)
    return Form(tuple(parts), tuple(int(number) for number in parts[1::2]))


@lru_cache(maxsize=64)
def writes_as_said(template: str) -> str | None:
    """Return which contents a template writes as they stand: `all` or `stripped` ones, none of them empty; or None.

    Messages have nothing but a role and a content, and there are no tools.
    """
    if _OPEN in template or _CLOSE in template:
        return None
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False).parse(template)  # noqa: S701
        reading = _Reading()
        while not reading.settled:
            reading.settled = True
            reading.follow(tree.body)
    except (jinja2.TemplateError, _LooksInside):
        return None
    return "stripped" if reading.trims else "all"


@dataclass
class _Reading:
    """Follows a template without running it: which variables may hold what; whatever the order of its statements."""

    names: dict[str, _Kind] = field(default_factory=lambda: {"messages": MESSAGES})
    trims: bool = False
    settled: bool = False

    def follow(self, body: Sequence[nodes.Node]) -> None:
        """Go through statements; raises _LooksInside."""
        for node in body:
            match node:
                case nodes.Output():
                    self._text(*node.nodes)
                case nodes.If():
                    self._test(node.test)
                    self.follow([*node.body, *node.elif_, *node.else_])
                case nodes.For(recursive=False):
                    self._loop(node)
                case nodes.Assign():
                    self._assign(node.target, self.kind(node.node))
                case nodes.Break() | nodes.Continue():
                    pass
                case _:
                    raise _LooksInside

    def _loop(self, node: nodes.For) -> None:
        over = self.kind(node.iter)
        if over in (TEXT, MESSAGE):
            raise _LooksInside
        self._assign(node.target, MESSAGE if over is MESSAGES else PLAIN)
        if node.test is not None:
            self._test(node.test)
        self.follow([*node.body, *node.else_])

    def _assign(self, target: nodes.Node, kind: _Kind) -> None:
        if isinstance(target, nodes.Name):
            before = self.names.get(target.name, PLAIN)
            if PLAIN not in (kind, before) and kind is not before:
                raise _LooksInside
            if before is PLAIN and kind is not PLAIN:
                self.names[target.name] = kind
                self.settled = False
        elif kind is not PLAIN:
            raise _LooksInside
        elif isinstance(target, nodes.Tuple):
            for item in target.items:
                self._assign(item, PLAIN)

    def _test(self, node: nodes.Node) -> None:
        """Follow a condition; what is said is not empty, and so are messages, whichever they are."""
        match node:
            case nodes.And() | nodes.Or():
                self._test(node.left)
                self._test(node.right)
            case nodes.Not():
                self._test(node.node)
            case _:
                self.kind(node)

    def _text(self, *parts: nodes.Node) -> _Kind:
        """Follow what becomes text; raises where it is a message or a list of them."""
        kinds = {self.kind(part) for part in parts}
        if kinds & {MESSAGE, MESSAGES}:
            raise _LooksInside
        return TEXT if TEXT in kinds else PLAIN

    def _plain(self, *parts: nodes.Node) -> _Kind:
        """Follow what must hold nothing that was said."""
        if any(self.kind(part) is not PLAIN for part in parts):
            raise _LooksInside
        return PLAIN

    def kind(self, node: nodes.Node) -> _Kind:
        """Return what an expression may hold; raises _LooksInside."""
        match node:
            case nodes.TemplateData() | nodes.Const():
                return PLAIN
            case nodes.Name(name="loop" | "lipsum"):
                raise _LooksInside  # but for what is asked of the loop, below
            case nodes.Name():
                return self.names.get(node.name, PLAIN)
            case nodes.Getattr():
                return self._member(node.node, node.attr)
            case nodes.Getitem():
                return self._item(node)
            case nodes.Add():
                return self._text(node.left, node.right)
            case nodes.Concat():
                return self._text(*node.nodes)
            case nodes.And() | nodes.Or():
                return self._text(node.left, node.right)
            case nodes.Not():
                self._test(node.node)
                return PLAIN
            case nodes.CondExpr():
                self._test(node.test)
                return self._text(*filter(None, (node.expr1, node.expr2)))
            case nodes.Filter():
                return self._filter(node)
            case nodes.Test():
                return self._asked(node)
            case nodes.Compare():
                return self._compare(node)
            case nodes.Call() | nodes.List() | nodes.Tuple() | nodes.Dict() | nodes.Pair() | nodes.Keyword():
                return self._plain(*node.iter_child_nodes())
            case nodes.BinExpr() | nodes.UnaryExpr() | nodes.Slice():
                return self._plain(*node.iter_child_nodes())
            case _:
                raise _LooksInside

    def _member(self, of: nodes.Node, name: Any) -> _Kind:
        if isinstance(of, nodes.Name) and of.name == "loop":
            return MESSAGE if name in ("previtem", "nextitem") else PLAIN
        holder = self.kind(of)
        if holder is PLAIN:
            return PLAIN
        if holder is not MESSAGE or not isinstance(name, str) or hasattr(dict, name):
            raise _LooksInside
        return TEXT if name == "content" else PLAIN

    def _item(self, node: nodes.Getitem) -> _Kind:
        constant = node.arg.value if isinstance(node.arg, nodes.Const) else None
        if isinstance(constant, str):
            return self._member(node.node, constant)
        holder = self.kind(node.node)
        self._plain(node.arg)
        if holder is PLAIN or (holder is MESSAGES and isinstance(node.arg, nodes.Slice)):
            return holder
        if holder is MESSAGES:
            return MESSAGE
        raise _LooksInside

    def _filter(self, node: nodes.Filter) -> _Kind:
        if node.node is None or node.name == "random":
            raise _LooksInside
        given = self.kind(node.node)
        rest = [child for child in node.iter_child_nodes() if child is not node.node]
        self._plain(*rest)
        if given is PLAIN:
            return PLAIN
        if given is TEXT and node.name == "trim" and not rest:
            self.trims = True
            return TEXT
        if given is MESSAGES and node.name in ("length", "count"):
            return PLAIN
        raise _LooksInside

    def _asked(self, node: nodes.Test) -> _Kind:
        given = self.kind(node.node)
        if given is not PLAIN and node.name not in _ASKED:
            raise _LooksInside
        return self._plain(*(child for child in node.iter_child_nodes() if child is not node.node))

    def _compare(self, node: nodes.Compare) -> _Kind:
        """Follow a comparison: of what is said only whether it is there, as `'content' in message` asks."""
        if len(node.ops) == 1:
            (operand,) = node.ops
            named = isinstance(node.expr, nodes.Const) and self.kind(operand.expr) is MESSAGE
            nothing = isinstance(operand.expr, nodes.Const) and operand.expr.value is None
            if (operand.op in ("in", "notin") and named) or (operand.op in ("eq", "ne") and nothing):
                self.kind(node.expr)
                return PLAIN
        return self._plain(node.expr, *(operand.expr for operand in node.ops))
