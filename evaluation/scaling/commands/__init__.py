"""The commands of `python -m evaluation.scaling`, one a file: each adds its options and prints its result."""

from __future__ import annotations

from evaluation.scaling.commands import fit

COMMANDS = (fit,)  # modules with `add(subparsers)`
