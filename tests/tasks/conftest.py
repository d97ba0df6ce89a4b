"""Fixtures that several tasks share, made once: tones with transcripts."""

import pytest
from support.audio import write_tone


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A folder of tones of several lengths; the pitch is the word."""
    folder = tmp_path_factory.mktemp("clips")
    lines = ["file_name,text"]
    words = ("one", "two", "three", "four", "five", "six")
    for i in range(30):
        write_tone(folder / f"{i}.wav", 0.4 + 0.02 * i, pitch_hz=200.0 * (1 + i % 6), seed=i)
        lines.append(f"{i}.wav,It's {words[i % 6]}.")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder
