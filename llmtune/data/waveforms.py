"""Decodes recordings to samples at the model's rate, and cuts long ones.

Decoded by libsndfile (wav, flac, mp3, ogg), mixed to one channel, resampled by soxr, scaled where it would clip.
Samples are kept as 16-bit integers: nearly all recordings are made in them, and they take half the space of float32.
Shape: N samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmtune.data.audio import check_recording, decoder_message
from llmtune.data.rejected_rows import RowError

Waveform = npt.NDArray[np.int16]
FULL_SCALE = 32768
MP3_SLACK = 2 * 1152
"""Samples that an MP3 file may lack at its end: two frames, because encoders count differently."""
MP3_TAGS_BYTES = 4096
"""Bytes after the sound of an MP3 file that may stay unread: tags."""
MOST_OVERSHOOT = 1.5
"""Largest sample that is scaled to full scale. Lossy formats and mixes overshoot; more is another unit, as 32768."""
CANCELLED = 0.1
"""Channels cancel out if their mean varies by less than this share of one channel. Independent ones vary by more."""


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
        raise RowError("audio unreadable", f"{path}: {decoder_message(error)}") from None
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
