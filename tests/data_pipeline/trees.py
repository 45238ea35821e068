"""Comparing folders."""

from __future__ import annotations

import filecmp
from pathlib import Path


def same_tree(first: Path, second: Path) -> bool:
    """Whether two folders hold the same files with the same bytes."""
    compared = filecmp.dircmp(first, second)
    names = compared.common_files
    return (
        not (compared.left_only or compared.right_only)
        and filecmp.cmpfiles(first, second, names, shallow=False)[0] == names
        and all(same_tree(first / name, second / name) for name in compared.common_dirs)
    )
