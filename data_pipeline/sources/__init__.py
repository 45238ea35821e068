"""Where images come from: each source is one module, known to `prepare` by a name."""

from __future__ import annotations

from data_pipeline.sources.base import Source
from data_pipeline.sources.cifar10 import Cifar10
from data_pipeline.sources.generated import Generated
from data_pipeline.sources.image_folder import ImageFolder

SOURCES: dict[str, type[Source]] = {source.kind: source for source in (Cifar10, ImageFolder, Generated)}
