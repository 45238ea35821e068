"""Stores of MLflow for tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.tracking.mlflow_store import Tracker


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables, made once: that takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    Tracker(f"sqlite:///{path}", "warm-up")
    return path


@pytest.fixture
def database(tmp_path: Path, empty_store: Path) -> Path:
    path = tmp_path / "store" / "mlflow.db"
    path.parent.mkdir()
    path.write_bytes(empty_store.read_bytes())
    return path


@pytest.fixture
def tracker(database: Path) -> Tracker:
    return Tracker(f"sqlite:///{database}", "s")
