"""Recordings: find their files, check them, and decode them to samples at the model's rate.

Decoded by libsndfile (wav, flac, mp3, ogg), mixed to one channel, resampled by soxr, scaled where it would clip.
Samples are kept as 16-bit integers: nearly all recordings are made in them, and they take half the space of float32.
Shape: N samples.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import numpy.typing as npt

from llmtune.data.rejected_rows import RowError, json_kind, nonempty_text
from llmtune.recipe.extras import require_extra
from llmtune.store.atomic_files import hash_recording

if TYPE_CHECKING:
    import soundfile

Waveform = npt.NDArray[np.int16]
FULL_SCALE = 32768
RATES = (1_000, 768_000)
"""Allowed sample rates: speech needs more than the lower bound; no sound card exceeds the upper one."""
CUT = re.compile(r"^data : (?!0xFFFFFFFF|4294967295|2147483647)\S+ \(should be", re.MULTILINE)
"""libsndfile's note on a wav file that is shorter than its header states, except for unfinished headers."""
OGG_PAGE_BYTES = 27 + 255 + 255 * 255
MP3_SLACK = 2 * 1152
"""Samples that an MP3 file may lack at its end: two frames, because encoders count differently."""
MP3_TAGS_BYTES = 4096
"""Bytes after the sound of an MP3 file that may stay unread: tags."""
MOST_OVERSHOOT = 1.5
"""Largest sample that is scaled to full scale. Lossy formats and mixes overshoot; more is another unit, as 32768."""
CANCELLED = 0.1
"""Channels cancel out if their mean varies by less than this share of one channel. Independent ones vary by more."""
AUDIO_COLUMNS = ("audio", "file_name")


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


def find_recording(value: object) -> str | None:
    """Return the file that a cell names: text, or a mapping with a `path`."""
    if isinstance(value, Mapping):
        value = value.get("path")
    return value if isinstance(value, str) and value else None


def _speech(row: Mapping[str, object], column: str) -> SpeechRow:
    name = find_recording(row[column])
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
        raise RowError("audio unreadable", f"{path}: {_decoder_message(error)}") from None
    low, high = RATES
    if not low <= info.samplerate <= high:
        raise RowError("audio with a wrong rate", f"{path}: {info.samplerate:,} samples a second")
    if CUT.search(info.extra_info):
        raise RowError("audio cut", f"{path} is shorter than its header states")
    if info.format == "OGG" and not _ends_with_a_page(path):
        raise RowError("audio cut", f"{path} ends within a page")
    if info.frames <= 0:
        raise RowError("audio empty", f"{path} has no samples")


def _decoder_message(error: soundfile.LibsndfileError) -> str:
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


def _counts_its_frames(path: Path) -> bool:
    """Whether an MP3 file states its length. For others libsndfile guesses it, badly, and reads no further."""
    with path.open("rb") as file:
        head = file.read(2**18)
    return b"Xing" in head or b"Info" in head


def decode_recording(path: Path, rate: int) -> Waveform:
    """Return the samples [N] of a recording, one channel at `rate` samples a second.

    Raises RowError if the file cannot be decoded.
    """
    check_recording(path)
    import soundfile
    import soxr

    try:
        with path.open("rb") as stream, soundfile.SoundFile(stream) as file:
            own_rate, announced, kind = file.samplerate, file.frames, file.format
            sound_NC = file.read(dtype="float32", always_2d=True)
            unread = path.stat().st_size - stream.tell()
    except soundfile.LibsndfileError as error:
        raise RowError("audio unreadable", f"{path}: {_decoder_message(error)}") from None
    if kind == "MP3" and not _counts_its_frames(path):
        if unread > MP3_TAGS_BYTES:
            what = f"{path} does not state its length, and only {len(sound_NC) / own_rate:.1f} s of it can be decoded"
            raise RowError("audio unreadable", f"{what}; write it again, as FLAC or with a Xing header")
    elif announced - len(sound_NC) > max(MP3_SLACK, announced // 100):
        raise RowError("audio cut", f"{path} has {len(sound_NC):,} samples, but its header states {announced:,}")
    if not len(sound_NC) or not np.isfinite(sound_NC).all():
        raise RowError("audio unreadable", f"{path}: no samples, or samples that are not numbers")
    sound_N = _mix_channels(sound_NC, path)
    if own_rate != rate:
        sound_N = soxr.resample(sound_N, own_rate, rate)
    if not len(sound_N):
        raise RowError("audio empty", f"{path} is shorter than one sample at {rate:,} a second")
    sound_N /= max(1.0, float(np.abs(sound_N).max()))  # scale what resampling and lossy formats overshoot
    rounded: Waveform = np.clip(np.rint(sound_N * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)
    return rounded


def _mix_channels(sound_NC: npt.NDArray[np.float32], path: Path) -> npt.NDArray[np.float32]:
    """Return the mean of the channels. Raises RowError if they cancel out, or if samples are far beyond full scale."""
    peak = float(np.abs(sound_NC).max())
    if peak > MOST_OVERSHOOT:
        fix = "divide them by the largest, or write the file with 16-bit samples"
        raise RowError("audio beyond full scale", f"{path} has samples up to {peak:,.6g}, but 1 is full scale; {fix}")
    mixed_N: npt.NDArray[np.float32] = sound_NC.mean(axis=1)
    if mixed_N.std() < CANCELLED * sound_NC.std(axis=0).mean():
        what = f"the {sound_NC.shape[1]} channels of {path} have opposite signs, so their mean is silence"
        raise RowError("audio channels cancel out", f"{what}; write one channel, or invert one")
    return mixed_N


def to_float(samples: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Return samples between -1 and 1, the input of feature extractors."""
    return np.asarray(samples, dtype=np.float32) / np.float32(FULL_SCALE)


def cut_windows(samples: Waveform, rate: int, seconds: float) -> Iterator[Waveform]:
    """Cut a recording into windows of at most `seconds`, at the quietest point in the last fifth of each."""
    size = int(seconds * rate)
    while len(samples) > size:
        end = _quietest(samples[size - size // 5 : size], rate) + size - size // 5
        yield samples[:end]
        samples = samples[end:]
    if len(samples):
        yield samples


def _quietest(samples: Waveform, rate: int) -> int:
    """Return the middle of the quietest twentieth of a second."""
    width = max(1, rate // 20)
    if len(samples) <= width:
        return max(1, len(samples))
    energy = np.concatenate([[0.0], np.cumsum(samples.astype(np.float64) ** 2)])
    return int(np.argmin(energy[width:] - energy[:-width])) + width // 2
