"""Colours of attention: brighter is stronger; differences run from blue through dark to orange."""

from __future__ import annotations

from matplotlib.colors import Colormap, LinearSegmentedColormap

WEIGHT = ("#000004", "#1d1147", "#51127c", "#832681", "#b73779", "#e75263", "#fc8961", "#fec488", "#fcfdbf")
"""From 0 to the strongest: matplotlib's magma (van der Walt and Smith), in equal steps."""
DIFFERENCE = ("#b9e3ff", "#5fb0f5", "#2b6fc2", "#163a68", "#101216", "#6b3410", "#c9621a", "#f79a4b", "#ffdcae")
"""From the base's stronger through equal to the tuned's stronger."""
UNSEEN = "#e9ebef"
"""What a query cannot see."""


def weight_map(unseen: str = UNSEEN) -> Colormap:
    """Return the colours of weights."""
    return LinearSegmentedColormap.from_list("attention", list(WEIGHT)).with_extremes(bad=unseen)


def difference_map(unseen: str = UNSEEN) -> Colormap:
    """Return the colours of differences."""
    return LinearSegmentedColormap.from_list("difference", list(DIFFERENCE)).with_extremes(bad=unseen)
