"""Where images come from: each source is one module, known to `prepare` by a name."""

from __future__ import annotations

from data_pipeline.sources.base import Source
from data_pipeline.sources.cifar10 import Cifar10
from data_pipeline.sources.downsampled_imagenet import DownsampledImageNet
from data_pipeline.sources.generated import Generated
from data_pipeline.sources.image_folder import ImageFolder
from data_pipeline.sources.imagenet import ImageNet
from data_pipeline.sources.webdataset_shards import WebDatasetShards

SOURCES: dict[str, type[Source]] = {
    source.kind: source for source in (Cifar10, ImageNet, DownsampledImageNet, ImageFolder, WebDatasetShards, Generated)
}
