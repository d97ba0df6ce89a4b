"""Tiny real audio files: tones in any format that libsndfile writes, and broken ones."""

from pathlib import Path

import numpy as np
import soundfile

FORMATS = ("wav", "flac", "mp3", "ogg")


def make_tone(seconds: float = 0.5, rate: int = 16_000, pitch_hz: float = 440.0, seed: int = 0) -> np.ndarray:
    """Return a tone with a little noise, between -0.5 and 0.5; float32 of shape (samples,)."""
    times = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal(len(times))
    return (0.4 * np.sin(2 * np.pi * pitch_hz * times) + 0.01 * noise).astype(np.float32)


def write_tone(
    path: Path, seconds: float = 0.5, rate: int = 16_000, channels: int = 1, pitch_hz: float = 440.0, seed: int = 0
) -> Path:
    """Write a tone in the format of the file's extension; each further channel is half as loud as the previous one."""
    tone = make_tone(seconds, rate, pitch_hz, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.stack([tone / 2**channel for channel in range(channels)], axis=1), rate)
    return path


def write_silence(path: Path, seconds: float = 0.5, rate: int = 16_000) -> Path:
    """Write a valid file that only contains zeros."""
    soundfile.write(path, np.zeros(round(seconds * rate), np.float32), rate)
    return path


def write_no_samples(path: Path, rate: int = 16_000) -> Path:
    """Write a valid file without samples."""
    return write_silence(path, 0.0, rate)


def write_cut(path: Path, share: float = 0.5, seconds: float = 0.5) -> Path:
    """Write a tone and keep the first `share` of the file's bytes."""
    content = write_tone(path, seconds).read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def write_no_audio(path: Path) -> Path:
    """Write text to an audio file name."""
    path.write_text("This is no audio. " * 50, "utf-8")
    return path


def write_empty(path: Path) -> Path:
    """Write an empty file."""
    path.write_bytes(b"")
    return path
