"""Recordings: find their files, and check their headers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from llmtune.data.rejected_rows import RowError, find_file, json_kind, nonempty_text
from llmtune.recipe.extras import require_extra
from llmtune.store.atomic_files import hash_recording

if TYPE_CHECKING:
    import soundfile

RATES = (1_000, 768_000)
"""Allowed sample rates: speech needs more than the lower bound; no sound card exceeds the upper one."""
CUT = re.compile(r"^data : (?!0xFFFFFFFF|4294967295|2147483647)\S+ \(should be", re.MULTILINE)
"""libsndfile's note on a wav file that is shorter than its header states, except for unfinished headers."""
OGG_PAGE_BYTES = 27 + 255 + 255 * 255


class SpeechRow(TypedDict):
    """A recording and its transcript."""

    audio: str
    """The file's path."""
    content: str
    """The file's hash."""
    text: str


def speech_from_columns(row: Mapping[str, object]) -> SpeechRow:
    """Read `audio` (a file, or `{path}`) and `text`."""
    return _speech(row, "audio")


def speech_from_folder(row: Mapping[str, object]) -> SpeechRow:
    """Read `file_name` and `text`, the columns of an audio folder's metadata."""
    return _speech(row, "file_name")


def _speech(row: Mapping[str, object], column: str) -> SpeechRow:
    name = find_file(row[column])
    if name is None:
        raise RowError("wrong type", f"'{column}' is {json_kind(row[column])}; it must be the name of a file")
    path = Path(name)
    check_recording(path)
    return {"audio": str(path), "content": hash_recording(path), "text": nonempty_text(row, "text")}


def check_recording(path: Path) -> None:
    """Check a recording's header. Raises RowError if the file is missing, empty or damaged, or its rate impossible."""
    require_extra("speech", "task")
    import soundfile

    if not path.is_file():
        raise RowError("audio missing", f"file not found: {path}")
    if path.stat().st_size == 0:
        raise RowError("audio empty", f"{path} has no bytes")
    try:
        info = soundfile.info(str(path), verbose=True)
    except soundfile.LibsndfileError as error:
        raise RowError("audio unreadable", f"{path}: {decoder_message(error)}") from None
    low, high = RATES
    if not low <= info.samplerate <= high:
        raise RowError("audio with a wrong rate", f"{path}: {info.samplerate:,} samples a second")
    if CUT.search(info.extra_info):
        raise RowError("audio cut", f"{path} is shorter than its header states")
    if info.format == "OGG" and not _ends_with_a_page(path):
        raise RowError("audio cut", f"{path} ends within a page")
    if info.frames <= 0:
        raise RowError("audio empty", f"{path} has no samples")


def decoder_message(error: soundfile.LibsndfileError) -> str:
    """Return libsndfile's message. For an existing file that is no MP3 it says "does not exist"; correct that."""
    message = str(error.error_string)
    return "Format not recognised." if "does not exist" in message else message


def _ends_with_a_page(path: Path) -> bool:
    """Whether the last page of an Ogg file is complete: 27 bytes, a byte per segment with its size, the segments.

    RFC 3533, section 6.
    """
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2 * OGG_PAGE_BYTES))
        tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    return len(page) > 26 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
