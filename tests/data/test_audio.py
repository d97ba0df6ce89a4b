"""Recordings: all formats decode the same, and broken files are reported with their position."""

import struct

import numpy as np
import pytest
import soundfile
from support.audio import FORMATS, make_tone, write_cut, write_empty, write_no_audio, write_no_samples, write_tone
from support.rows import make_recipe, prepare, rows_of, write_jsonl

from llmtune.data.audio import check_recording
from llmtune.data.rejected_rows import RowError
from llmtune.data.sources import hash_sources
from llmtune.data.waveforms import cut_windows, decode_recording, to_float
from llmtune.errors import DataError

RATE = 16_000


def write_rate(path, rate):
    """Change the rate in the header of a wav file."""
    content = bytearray(write_tone(path).read_bytes())
    content[24:28] = struct.pack("<I", rate)
    path.write_bytes(content)
    return path


def write_opposite(path, offset=0.0, noise=0.0):
    """Write two channels of opposite sign."""
    tone = make_tone()
    hiss = noise * np.random.default_rng(1).standard_normal(len(tone))
    soundfile.write(path, np.stack([tone + offset, hiss - tone + offset], axis=1), RATE)
    return path


BROKEN = {
    "no.wav": (lambda path: path, "audio missing"),
    "bytes.flac": (write_empty, "audio empty"),
    "samples.wav": (write_no_samples, "audio empty"),
    "samples.ogg": (write_no_samples, "audio empty"),
    "cut.wav": (write_cut, "audio cut"),
    "cut.ogg": (lambda path: write_cut(path, 0.9, 2), "audio cut"),
    "text.wav": (write_no_audio, "audio unreadable"),
    "text.mp3": (write_no_audio, "audio unreadable"),
    "slow.wav": (lambda path: write_rate(path, 7), "audio with a wrong rate"),
    "fast.wav": (lambda path: write_rate(path, 2_000_000), "audio with a wrong rate"),
    "folder.wav": (lambda path: path.mkdir(), "audio missing"),
}
"""Errors that the header shows."""
DAMAGED = {
    "cut.flac": (write_cut, "audio unreadable"),
    "cut.mp3": (lambda path: write_cut(path, seconds=2), "audio cut"),
    "nan.wav": (lambda path: soundfile.write(path, np.full(99, np.nan, np.float32), RATE, "FLOAT"), "not numbers"),
    "inf.wav": (lambda path: soundfile.write(path, np.full(99, np.inf, np.float32), RATE, "FLOAT"), "not numbers"),
    "loud.wav": (lambda path: soundfile.write(path, 8 * make_tone(), RATE, "FLOAT"), "audio beyond full scale"),
    "units.wav": (lambda path: soundfile.write(path, 3e4 * make_tone(), RATE, "DOUBLE"), "audio beyond full scale"),
    "opposite.wav": (lambda path: write_opposite(path), "audio channels cancel out"),
    "offset.wav": (lambda path: write_opposite(path, offset=0.2), "audio channels cancel out"),
    "noisy.wav": (lambda path: write_opposite(path, noise=0.01), "audio channels cancel out"),
    "opposite.flac": (lambda path: write_opposite(path), "audio channels cancel out"),
    "one.wav": (lambda path: soundfile.write(path, np.zeros(2), 96_000), "audio empty"),
}
"""Errors that only decoding shows."""


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("kind", FORMATS)
def test_recordings_of_any_format_rate_and_channels_decode_the_same(kind, rate, channels, tmp_path):
    path = write_tone(tmp_path / f"tone.{kind}", seconds=0.5, rate=rate, channels=channels)
    samples = decode_recording(path, RATE)
    assert samples.dtype == np.int16
    assert len(samples) == RATE // 2
    mixed = make_tone(0.5) * (1 if channels == 1 else 0.75)  # the second channel has half the amplitude
    inner = slice(800, -800)  # a resampled or compressed tone differs at its ends
    heard, wanted = to_float(samples)[inner], mixed[inner]
    assert np.corrcoef(heard, wanted)[0, 1] > 0.99
    assert np.abs(heard).max() == pytest.approx(np.abs(wanted).max(), rel=0.1)


def test_samples_at_the_models_rate_are_unchanged(tmp_path):
    given = np.array([0, 1, -1, 32767, -32768, 123], np.int16)
    soundfile.write(tmp_path / "a.wav", given, RATE)
    assert decode_recording(tmp_path / "a.wav", RATE).tolist() == given.tolist()


def test_a_wav_file_with_an_unfinished_header_is_accepted(tmp_path):
    content = bytearray(write_tone(tmp_path / "a.wav").read_bytes())
    content[4:8] = content[40:44] = b"\xff" * 4  # the state after recording into a pipe
    (tmp_path / "a.wav").write_bytes(content)
    assert len(decode_recording(tmp_path / "a.wav", RATE)) == RATE // 2


def test_an_mp3_file_that_libsndfile_would_read_only_partly_is_refused(tmp_path):
    content = write_tone(tmp_path / "a.mp3", 4).read_bytes()
    at = max(content.find(b"Xing"), content.find(b"Info"))
    assert at > 0
    (tmp_path / "a.mp3").write_bytes(content[:at] + b"None" + content[at + 4 :])
    assert len(soundfile.read(tmp_path / "a.mp3")[0]) < 3 * RATE
    with pytest.raises(RowError, match=r"does not state its length, and only \d\.\d s of it can be decoded"):
        decode_recording(tmp_path / "a.mp3", RATE)


@pytest.mark.parametrize("name", BROKEN)
def test_an_unreadable_recording_is_reported_with_file_and_line(name, tmp_path):
    make, reason = BROKEN[name]
    make(tmp_path / name)
    write_tone(tmp_path / "good.wav")
    rows = [{"audio": "good.wav", "text": "a tone"}, {"audio": name, "text": "another"}]
    with pytest.raises(DataError) as error:
        prepare(tmp_path, str(write_jsonl(tmp_path / "rows.jsonl", rows)), "speech")
    assert error.value.exit_code == 3
    (told,) = [problem for problem in error.value.problems if problem.where]
    assert told.what.startswith(reason)
    assert name in told.what
    assert told.where.endswith("rows.jsonl:2")


@pytest.mark.parametrize("name", DAMAGED)
def test_errors_that_only_decoding_shows_are_reported_then(name, tmp_path):
    make, reason = DAMAGED[name]
    make(tmp_path / name)
    check_recording(tmp_path / name)
    with pytest.raises(RowError, match=reason) as error:
        decode_recording(tmp_path / name, RATE)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"audio": 3, "text": "a"}, "must be the name of a file"),
        ({"audio": {"bytes": ""}, "text": "a"}, "must be the name of a file"),
        ({"audio": "good.wav", "text": " "}, "text"),
        ({"audio": "good.wav", "text": None}, "text"),
    ],
)
def test_a_row_without_recording_or_text_is_named(row, reason, tmp_path):
    write_tone(tmp_path / "good.wav")
    rows = [{"audio": "good.wav", "text": "a tone"}, row]
    with pytest.raises(DataError, match=reason) as error:
        prepare(tmp_path, str(write_jsonl(tmp_path / "rows.jsonl", rows)), "speech")
    assert any(str(problem.where).endswith("rows.jsonl:2") for problem in error.value.problems)


def texts_of(rows):
    """The files by text, with paths below the test's folder."""
    return {row["text"]: row["audio"] for row in rows_of(rows)}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_folder_of_recordings_is_read_by_its_metadata(kind, tmp_path):
    folder = tmp_path / "clips"
    write_tone(folder / "a.wav")
    write_tone(folder / "deep" / "er" / "b, c.flac", pitch_hz=300)
    write_jsonl(folder / "others.jsonl", [{"file_name": "a.wav", "text": "no row of this data"}])
    if kind == "csv":
        (folder / "metadata.csv").write_text('file_name,text\na.wav,one\n"deep/er/b, c.flac",two\n')
    else:
        rows = [{"file_name": "a.wav", "text": "one"}, {"file_name": "deep/er/b, c.flac", "text": "two"}]
        write_jsonl(folder / "metadata.jsonl", rows)
    found = texts_of(prepare(tmp_path, str(folder), "speech"))
    assert found == {"one": str(folder / "a.wav"), "two": str(folder / "deep" / "er" / "b, c.flac")}


def test_subfolders_with_their_own_metadata_are_read_too(tmp_path):
    for number, name in enumerate(("x", "y")):
        write_tone(tmp_path / "clips" / name / "a.wav", pitch_hz=300 + number)
        (tmp_path / "clips" / name / "metadata.csv").write_text(f"file_name,text\na.wav,{name}\n")
    found = texts_of(prepare(tmp_path, str(tmp_path / "clips"), "speech"))
    assert found == {name: str(tmp_path / "clips" / name / "a.wav") for name in ("x", "y")}


def test_a_cell_may_be_a_mapping_with_a_path_and_columns_may_have_other_names(tmp_path):
    write_tone(tmp_path / "a.wav")
    path = write_jsonl(tmp_path / "rows.jsonl", [{"clip": {"path": "a.wav"}, "sentence": "one"}])
    source = {"path": str(path), "columns": {"audio": "clip", "text": "sentence"}}
    assert texts_of(prepare(tmp_path, source, "speech")) == {"one": str(tmp_path / "a.wav")}


def test_all_shipped_recordings_can_be_decoded(tmp_path):
    rows = prepare(tmp_path, "builtin:asterisk-prompts", "speech", deduplicate="none")
    assert rows.counts["train"] == rows.rows_in > 100
    assert not rows.dropped


def test_copies_of_a_recording_are_one_row_and_equal_texts_of_two_recordings_are_two(tmp_path):
    for name, pitch in (("a.wav", 440.0), ("copy.wav", 440.0), ("b.wav", 330.0)):
        write_tone(tmp_path / name, pitch_hz=pitch)
    rows = [{"audio": name, "text": "the same words in each of them"} for name in ("a.wav", "copy.wav", "b.wav")]
    found = prepare(tmp_path, str(write_jsonl(tmp_path / "rows.jsonl", rows)), "speech", deduplicate="near")
    assert found.counts["train"] == 2
    assert found.dropped == {"exact duplicate": 1}


@pytest.mark.parametrize("listed", ["rows.jsonl", "clips"])
def test_a_recording_changed_in_place_changes_the_hash_of_the_data(listed, tmp_path):
    write_tone(tmp_path / "clips" / "a.wav")
    write_tone(tmp_path / "clips" / "unused.wav")
    write_jsonl(tmp_path / "rows.jsonl", [{"audio": {"path": "clips/a.wav"}, "text": "one"}])
    (tmp_path / "clips" / "metadata.csv").write_text("file_name,text\na.wav,one\n")
    recipe = make_recipe(tmp_path, str(tmp_path / listed), "speech")
    before = hash_sources(recipe.data, "speech")
    write_tone(tmp_path / "clips" / "unused.wav", pitch_hz=100)
    assert hash_sources(recipe.data, "speech") == before
    write_tone(tmp_path / "clips" / "a.wav", seed=1)
    assert hash_sources(recipe.data, "speech") != before


def test_a_long_recording_is_cut_at_quiet_points_without_loss():
    tone = (make_tone(10) * 20_000).astype(np.int16)
    pauses = [int(second * RATE) for second in (3.7, 7.4)]
    for start in pauses:
        tone[start : start + 1600] = 0
    windows = list(cut_windows(tone, RATE, 4.0))
    assert np.concatenate(windows).tolist() == tone.tolist()
    assert all(0 < len(window) <= 4 * RATE for window in windows)
    ends = np.cumsum([len(window) for window in windows])[:2]
    assert all(start <= end <= start + 1600 for start, end in zip(pauses, ends, strict=True))
    assert [len(window) for window in cut_windows(tone[: 4 * RATE], RATE, 4.0)] == [4 * RATE]


def test_cutting_into_windows_of_any_length_terminates(tmp_path):
    tone = (make_tone(0.2) * 20_000).astype(np.int16)
    for seconds in (0.001, 0.003, 0.05):
        windows = list(cut_windows(tone, RATE, seconds))
        assert sum(map(len, windows)) == len(tone)
        assert min(map(len, windows)) > 0


def test_samples_beyond_full_scale_are_scaled_and_not_clipped(tmp_path):
    tone = make_tone()
    loud = 1.4 * tone / np.abs(tone).max()
    soundfile.write(tmp_path / "loud.wav", loud, RATE, "FLOAT")
    heard = to_float(decode_recording(tmp_path / "loud.wav", RATE))
    assert heard == pytest.approx(loud / np.abs(loud).max(), abs=2 / 32768)
    assert np.count_nonzero(np.abs(heard) > 0.999) < 5


@pytest.mark.parametrize("rate", [8_000, 48_000])
def test_resampling_does_not_clip(tmp_path, rate):
    square = np.sign(np.sin(2 * np.pi * 300 * np.arange(rate) / rate))
    soundfile.write(tmp_path / "square.wav", square, rate)
    heard = to_float(decode_recording(tmp_path / "square.wav", RATE))
    assert np.count_nonzero(np.abs(heard) > 0.9999) < 0.02 * len(heard)


SUBTYPES = ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")


@pytest.mark.parametrize("subtype", SUBTYPES)
def test_samples_of_any_type_decode_the_same(tmp_path, subtype):
    tone = make_tone()
    soundfile.write(tmp_path / "tone.wav", tone, RATE, subtype)
    heard = to_float(decode_recording(tmp_path / "tone.wav", RATE))
    assert heard == pytest.approx(tone, abs=0.02 if subtype in ("PCM_U8", "ULAW", "ALAW") else 2 / 32768)


@pytest.mark.parametrize("second", ["silence", "independent", "equal", "offset"])
def test_usual_channels_are_mixed(tmp_path, second):
    tone = make_tone()
    other = {
        "silence": np.zeros(len(tone)),
        "independent": make_tone(pitch_hz=600, seed=2),
        "equal": tone,
        "offset": np.full(len(tone), 0.3),
    }[second]
    soundfile.write(tmp_path / "two.wav", np.stack([tone, other], axis=1), RATE)
    heard = to_float(decode_recording(tmp_path / "two.wav", RATE))
    assert heard == pytest.approx((tone + other) / 2, abs=2 / 32768)


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_silence_with_or_without_an_offset_is_decoded(tmp_path, offset):
    soundfile.write(tmp_path / "silence.wav", np.full((800, 2), offset), RATE)
    assert to_float(decode_recording(tmp_path / "silence.wav", RATE)) == pytest.approx(offset, abs=1e-4)
