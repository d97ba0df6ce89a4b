"""Training texts of conversations before tokenization: their supervised segments, and the tokens of their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import cast

from llmtune.data.chat_messages import list_pictures
from llmtune.data.chat_template import Expand, PreparedChat
from llmtune.data.pictures import Picture
from llmtune.data.tokenization import Segment


@dataclass(frozen=True)
class Turn:
    """An answer and its position in the rendered conversation."""

    index: int
    answer: str
    """The answer's text; it ends with an end-of-turn token."""
    answer_bytes: int
    """Bytes of the message in `answer`, without the text that the template adds around it."""
    history: str
    """A text that starts with the answer's prompt; the turns of a long conversation share it."""
    upto: int
    """How many characters of `history` come before the answer."""
    lead: str
    """The prompt's text after them: `<think>`, or thoughts that are not supervised."""

    @property
    def prompt(self) -> str:
        """Everything before the answer."""
        return self.history[: self.upto] + self.lead

    @property
    def start(self) -> int:
        """The number of characters before the answer."""
        return self.upto + len(self.lead)

    def is_in(self, text: str, last: Turn) -> bool:
        """Whether the text of the turn `last` begins with this turn's."""
        same = text.startswith(self.lead + self.answer, self.upto)
        return same and (self.history is last.history or text.startswith(self.history[: self.upto]))


@dataclass(frozen=True)
class Draft:
    """A training text before tokenization."""

    chat: PreparedChat
    messages: int
    """How many messages of the conversation it contains."""
    segments: Sequence[Segment]
    answer_bytes: Sequence[int]
    """Bytes of messages in each supervised segment; a single number if everything is supervised."""

    @cached_property
    def pictures(self) -> list[Picture]:
        """The pictures in it."""
        return list_pictures(self.chat.messages[: self.messages])

    def expand(self, expand: Expand) -> Draft | str:
        """Return the draft with the tokens of its pictures, or why it cannot have them."""
        if not (pictures := self.pictures):
            return self
        texts = expand([segment.text for segment in self.segments], pictures)
        if isinstance(texts, str):
            return texts
        segments = [Segment(text, one.learned) for text, one in zip(texts, self.segments, strict=True)]
        return replace(self, segments=segments)

    @cached_property
    def text(self) -> str:
        """All segments, joined."""
        return "".join(segment.text for segment in self.segments)

    @cached_property
    def borders(self) -> list[int]:
        """Return the positions of the borders between segments, including both ends."""
        return list(accumulate((len(segment.text) for segment in self.segments), initial=0))


Drafts = list[Draft] | str
"""The training texts of a conversation, or the reason why it has none."""


def expand_each(drafts: Drafts, expand: Expand) -> Drafts:
    """Return drafts with the tokens of their pictures, or the reason why one cannot have them."""
    expanded = drafts if isinstance(drafts, str) else [draft.expand(expand) for draft in drafts]
    reason = next((one for one in expanded if isinstance(one, str)), None)
    return expanded if isinstance(expanded, str) else reason or cast(list[Draft], expanded)
