import math

import pytest

from llmtune.display.number_format import count, duration, score, short, signed, size


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (score(0.79731), "0.7973"),
        (score(-1.0411), "−1.041"),
        (score(79.314), "79.31"),
        (score(434.71), "434.7"),
        (score(0), "0.0000"),
        (score(2e-6), "2e-06"),
        (score(None), "–"),
        (score(math.nan), "–"),
        (signed(0.2), "+0.2000"),
        (signed(-0.2), "−0.2000"),
        (count(1234567), "1,234,567"),
        (size(538e6), "538 MB"),
        (size(1.527e9), "1.53 GB"),
        (size(12), "12 B"),
        (duration(4.2), "4.2 s"),
        (duration(59.7), "1 min 0 s"),
        (duration(7500), "2 h 5 min"),
        (short(2e-4), "2e-4"),
        (short(15000), "15k"),
    ],
)
def test_numbers_read_well(written, expected):
    assert written == expected
