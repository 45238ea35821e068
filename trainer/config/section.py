"""What the sections of a config tree have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """A part of the tree: typed, unknown keys refused, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


# A folder or a URL, as text: a Path would swallow one of "s3://"'s slashes.
Place = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
