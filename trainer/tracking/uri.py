"""Addresses: where the default tracker is, and how one is shown without its credentials."""

from __future__ import annotations

import os
import re
from pathlib import Path

DEFAULT_URI = "sqlite:///runs/mlflow.db"
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@")
_SECRET_WORDS = ("password", "secret", "token", "credential", "api_key")
_SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


def default_uri() -> str:
    """The address in MLFLOW_TRACKING_URI, else a sqlite file in `runs/`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def redact(text: str, uri: str = "") -> str:
    """`text` without the user names, passwords and tokens of an address, of `uri` and of the environment."""
    user, _, password = _user_info(uri).partition(":")
    for secret in (password, user, *(os.environ.get(name, "") for name in _SECRETS)):
        if len(secret) > 3:
            text = text.replace(secret, "***")
    return _CREDENTIALS.sub("***@", text)


def is_secret(key: str) -> bool:
    """Whether a setting of this name may hold a credential; the address of a tracker may."""
    return key.lower() == "uri" or any(word in key.lower() for word in _SECRET_WORDS)


def public_place(place: str) -> str:
    """An address of data without user name, password, and query (where signatures stand); other texts as they are."""
    if "://" not in place:
        return place
    return _CREDENTIALS.sub("", place).partition("?")[0]


def sqlite_file(uri: str) -> Path | None:
    """The database file of a sqlite address, else None."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _user_info(uri: str) -> str:
    found = _CREDENTIALS.search(uri)
    return found.group()[:-1] if found else ""
