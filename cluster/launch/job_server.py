"""The second seam to Ray: its job server, which runs a command on the cluster's head. No Ray runs here for that."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from data_pipeline.errors import UserError

_CONNECT_SECONDS = 10.0
_PATIENCE_SECONDS = 60.0  # right after `ray start` the server answers 500 for a while
_PAUSE_SECONDS = 1.0
# They tell of every upload and of the end of every log.
_TALKATIVE = ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging")
_TOKEN = (
    "It wants a token: set RAY_AUTH_MODE=token here, and the cluster's token in RAY_AUTH_TOKEN, or in a file that "
    "RAY_AUTH_TOKEN_PATH names (default: ~/.ray/auth_token)."
)

T = TypeVar("T")


@dataclass(frozen=True)
class JobState:
    """How a job stands."""

    status: str  # PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED
    exit_code: int | None  # of its command, once that has ended
    message: str  # Ray's

    @property
    def ended(self) -> bool:
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


class JobServer:
    """A cluster's job server at `http://HOST:PORT`. All methods raise UserError saying what is wrong there."""

    def __init__(self, address: str, *, patience: float = _PATIENCE_SECONDS) -> None:
        """Connect; wait `patience` seconds, here and later, for a server that is not ready."""
        self.address = address.rstrip("/")
        self._patience = patience
        _check_answers(self.address)
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address  # before RAY_ADDRESS, which else wins over the argument
        from ray.job_submission import JobSubmissionClient

        for name in _TALKATIVE:
            logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
        self._client: Any = self._patiently(lambda: JobSubmissionClient(self.address))

    def versions(self) -> tuple[str, str]:
        """Ray's version here and there."""
        import ray

        return ray.__version__, str(self._client._server_ray_version)

    def submit(self, job: str, command: str, *, working_dir: Path, environment: Mapping[str, str]) -> None:
        """Send `working_dir` (links are followed, .gitignore is heeded) and have `command` run in it."""
        runtime_env = {"working_dir": str(working_dir), "env_vars": dict(environment)}

        def attempt() -> None:
            try:
                self._client.submit_job(entrypoint=command, submission_id=job, runtime_env=runtime_env)
            except RuntimeError as error:
                if "already exists" not in str(error):  # else an earlier attempt arrived, and its answer did not
                    raise

        self._patiently(attempt)

    def state(self, job: str) -> JobState:
        info = self._patiently(lambda: self._client.get_job_info(job))
        return JobState(info.status.value, info.driver_exit_code, info.message or "")

    def log(self, job: str) -> str:
        return self._patiently(lambda: str(self._client.get_job_logs(job)))

    def follow(self, job: str, write: Callable[[str], object]) -> None:
        """Hand on what the job prints until it has ended, or the connection is lost."""

        async def tail() -> None:
            async for text in self._client.tail_job_logs(job):
                write(text)

        try:
            asyncio.run(tail())
        except (RuntimeError, OSError) as error:  # aiohttp's are of both kinds
            raise self._explained(error) from None

    def _patiently(self, call: Callable[[], T]) -> T:
        deadline = time.monotonic() + self._patience
        while True:
            try:
                return call()
            except Exception as error:
                if not _is_not_ready(error) or time.monotonic() > deadline:
                    raise self._explained(error) from None
            time.sleep(_PAUSE_SECONDS)

    def _explained(self, error: Exception) -> Exception:
        text = str(error).strip()
        said = text.splitlines()[-1] if text else type(error).__name__
        where = f"--address {self.address}"
        if type(error).__name__ == "AuthenticationError":
            return UserError(f"the cluster at {where} refused: {text.splitlines()[0]} {_TOKEN}")
        if _is_not_ready(error):
            return UserError(
                f"the job server at {where} is not ready after {self._patience:.0f} s ({said}). Look at `ray status` "
                "and at dashboard.log among Ray's logs on the head, then submit again."
            )
        if isinstance(error, ValueError) or "404" in text:  # no JSON, no such page: something else lives there
            return UserError(
                f"what answers at {where} is not a Ray job server of 2.0 or newer ({said}). Give the dashboard's "
                "address, http://HOST:8265 unless set otherwise, on a head that has ray[default] installed."
            )
        if isinstance(error, OSError):
            return UserError(f"the connection to {where} was lost ({said}). Check that the cluster is up.")
        if isinstance(error, RuntimeError):
            return UserError(f"the job server at {where} refused: {said}")
        return error


def _is_not_ready(error: Exception) -> bool:
    response = getattr(error, "response", None)
    return (response is not None and response.status_code >= 500) or "failed with status code 5" in str(error)


def _check_answers(address: str) -> None:
    """A wrong host or port is said in seconds; the client itself would wait for minutes."""
    parts = urlsplit(address)
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        socket.create_connection((parts.hostname or "", port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"nothing answers at --address {address} ({error}). Check host and port: the head's dashboard, by default "
            "8265 on its loopback, to which `ssh -L 8265:127.0.0.1:8265 HEAD` makes a tunnel."
        ) from None
