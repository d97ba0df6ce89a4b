"""What the tests of several tasks share, each made once: tiny models of the families, and tones with transcripts."""

import json

import pytest
from support import families
from support.audio import write_tone
from support.classifying import BUILDERS


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """`built("bert", **config)` is the folder of a tiny model, which no test may change."""
    made = {}

    def build(family, **config):
        key = family, json.dumps(config, sort_keys=True)
        if key not in made:
            builder = BUILDERS.get(family) or getattr(families, f"build_{family}")
            made[key] = builder(tmp_path_factory.mktemp("models") / family, **config)
        return made[key]

    return build


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A folder with tones of several lengths, whose pitch is their word."""
    folder = tmp_path_factory.mktemp("clips")
    lines = ["file_name,text"]
    words = ("one", "two", "three", "four", "five", "six")
    for i in range(30):
        write_tone(folder / f"{i}.wav", 0.4 + 0.02 * i, pitch_hz=200.0 * (1 + i % 6), seed=i)
        lines.append(f"{i}.wav,It's {words[i % 6]}.")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder
