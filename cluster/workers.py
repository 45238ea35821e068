"""What runs in a cluster's worker processes: a trial's keeper and an evaluator. Plain classes, without Ray."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from cluster.jobs import Status
from cluster.ranks import Ranks, RanksSpec, classify
from data_pipeline.errors import UserError, disk_message

_POLL_SECONDS = 0.2


class TrialWorker:
    """Starts a trial's processes where it runs itself, on the devices it was given, and watches them."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def run(self, spec: RanksSpec, cwd: Path) -> tuple[Status, str]:
        """Returns when they have ended: how, and why."""
        os.chdir(cwd)
        ranks = Ranks(spec)
        try:
            while (code := ranks.poll()) is None:
                if self._stop.is_set():
                    ranks.stop()
                time.sleep(_POLL_SECONDS)
        finally:
            ranks.stop()
        status, message = classify(code, ranks.output())
        if status == "done" and not (spec.folder / "result.json").exists():
            return "failed", "ended without a result file"  # completion is proved by the file, not by an exit code
        return status, message

    def stop(self) -> None:
        """Called from another thread while `run` waits."""
        self._stop.set()


class EvalWorker:
    """Evaluates one export after the other; what is slow to load is loaded once."""

    def __init__(self, has_gpu: bool) -> None:
        if not has_gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported

    def run(self, export: Path, request: Any, out: Path, shard: tuple[int, int], cwd: Path) -> tuple[Status, str]:
        os.chdir(cwd)
        from evaluation.chunks import Shard
        from evaluation.evaluate import evaluate_to

        try:
            evaluate_to(out, export, request, shard=Shard(*shard), progress=False)
        except UserError as error:
            return "user_error", str(error)
        except OSError as error:
            message = disk_message(error)
            if message is None:
                raise
            return "user_error", message
        return "done", ""
