"""Colours: ordered by model size, one a form of the law. Small sizes are light, large sizes dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from numpy.typing import NDArray

from evaluation.report.style import size_label

INK, MUTED, GRID = "#1a1a1a", "#6b6b6b", "#e6e6e6"
PAPER = "#2c5aa0"  # what others have published
MAX_GROUPS = 12  # more sizes than this share colours with their neighbours
# None of these is in the sizes' palette.
_FORMS = {"power": "#c0392b", "power_constant": "#d98200", "broken": "#b0399a"}
_OTHER_FORM = "#8a5a2b"
_CATEGORIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1a1a1a", "#b8a900")


@dataclass(frozen=True)
class SizeGroup:
    """Sizes that share a colour: one size where they are few."""

    label: str
    colour: str
    sizes: frozenset[int]


def size_groups(sizes: Sequence[int]) -> list[SizeGroup]:
    """Groups in ascending order; points of unknown size (0) form one of their own."""
    ordered = sorted(set(sizes))
    groups = [part for part in np.array_split(ordered, min(len(ordered), MAX_GROUPS)) if len(part)] if ordered else []
    colours = ordered_colours(len(groups))
    return [
        SizeGroup(_label(part), colour, frozenset(part.tolist())) for part, colour in zip(groups, colours, strict=True)
    ]


def form_colour(form: str) -> str:
    """The colour of a form of the law."""
    return _FORMS.get(form, _OTHER_FORM)


def ordered_colours(num: int) -> list[str]:
    """So many colours from light to dark."""
    return [to_hex(colour) for colour in colormaps["viridis_r"](np.linspace(0.18, 0.95, num))]


def category_colour(number: int) -> str:
    """The colour of the so-manieth of a few things that have no order (Okabe & Ito 2008); more than eight repeat."""
    return _CATEGORIES[number % len(_CATEGORIES)]


def _label(sizes: NDArray[np.int64]) -> str:
    low, high = size_label(int(sizes[0])), size_label(int(sizes[-1]))
    return low if low == high else f"{low} to {high}"
