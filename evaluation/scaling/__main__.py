"""Scaling laws of any points: `python -m evaluation.scaling fit|predict|compare|frontier|isoflop|size|plot POINTS`."""

from __future__ import annotations

import argparse

from data_pipeline.errors import run_cli
from evaluation.scaling.commands import COMMANDS


def main() -> int:
    """Run the command."""
    root = argparse.ArgumentParser(prog="python -m evaluation.scaling", description=__doc__)
    subparsers = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(subparsers)
    arguments = root.parse_args()
    code: int = arguments.run(arguments)
    return code


if __name__ == "__main__":
    run_cli(main)
