"""The commands of `python -m evaluation.scaling`, one a file: each adds its options and prints its result."""

from __future__ import annotations

from evaluation.scaling.commands import compare, fit, frontier, isoflop, plot, predict, size

COMMANDS = (fit, predict, compare, frontier, isoflop, size, plot)  # modules with `add(subparsers)`
