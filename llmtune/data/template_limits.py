"""A chat template is a program of strangers: it may take so long, so much memory and so much text, and no more."""

from __future__ import annotations

from llmtune.errors import EnvironmentProblem

TEMPLATE_BYTES = 2**17
"""The longest templates of models have a quarter of it."""
SECONDS = 2.0
"""For one conversation; a thousand messages take a tenth of it."""
SECONDS_MORE = 0.05
"""For each further one in a batch."""
EXTRA_BYTES = 2**29
MAX_TEXT = 2**25
PROBE_TEXT = 2**17
ENDLESS = "Set model.chat_template to a Jinja file that renders a conversation in a moment."
"""How to replace a template that takes too long."""


def check_template(template: str, name: str) -> None:
    """Raise EnvironmentProblem for a template that takes long to read alone."""
    if len(template) > TEMPLATE_BYTES:
        what = f"the chat template has {len(template):,} characters, and may have {TEMPLATE_BYTES:,}"
        raise EnvironmentProblem.of(what, name, ENDLESS)


def check_text(text: str, name: str, limit: int = MAX_TEXT) -> None:
    """Raise EnvironmentProblem for what no tokenizer should get: text without end, halves of characters."""
    if len(text) > limit:
        what = f"the chat template writes {len(text):,} characters, and may write {limit:,}"
        raise EnvironmentProblem.of(what, name, ENDLESS)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EnvironmentProblem.of(f"the chat template writes what is no text: {error}", name, ENDLESS) from error
