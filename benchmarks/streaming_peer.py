"""MosaicML Streaming, driven through a pipe by the data benchmarks: runs in an environment of its own.

It wants older versions of packages that this project has, so it cannot be installed beside it:

    python -m venv streaming-env
    streaming-env/bin/pip install torch 'numpy<2.2' pillow tqdm xxhash zstd Brotli python-snappy filelock catalogue
    streaming-env/bin/pip install --no-deps mosaicml-streaming==0.13.0
    python -m benchmarks.data_throughput --streaming-python streaming-env/bin/python

(Its other requirements, torchvision, transformers and the SDKs of clouds, are only imported by the parts that are used
here, never called; the first two are replaced by empty modules where they are not installed.)

`StreamingPeer` is the project's end of the pipe; the rest of the file is run by that interpreter and needs nothing of
the project. A command is one JSON line, `{"do": NAME, ...}`, and so is its answer.
"""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import time
import types
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_UNUSED = {  # module: names imported from it
    "torchvision.datasets": ("VisionDataset", "CIFAR10"),
    "torchvision.transforms.functional": ("to_tensor",),
    "transformers.models.auto.tokenization_auto": ("AutoTokenizer",),
    "transformers.feature_extraction_utils": ("BatchFeature",),
    "transformers.tokenization_utils_base": ("BatchEncoding",),
}


class StreamingPeer:
    """MosaicML Streaming in a process of its own.

    Raises:
        UserError: `python` cannot be run or lacks the package.
    """

    def __init__(self, python: Path) -> None:
        from data_pipeline.errors import UserError

        try:
            self._process = subprocess.Popen(
                [str(python), __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            self.version = str(self._answer()["version"])
        except (OSError, EOFError) as error:
            raise UserError(
                f"--streaming-python {python} does not run MosaicML Streaming ({error}); benchmarks/streaming_peer.py "
                "says how to make an environment for it. Leave the flag out to measure without this peer."
            ) from None

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Run one of `main`'s commands and wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EOFError("its process ended")
        return json.loads(line)


def replace_unused() -> None:
    """Empty modules for what is imported and not used, where it is not installed."""
    missing = {name for name in ("torchvision", "transformers") if importlib.util.find_spec(name) is None}
    for path, names in _UNUSED.items():
        parts = path.split(".")
        if parts[0] not in missing:
            continue
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(parts[end - 1]))
        for name in names:
            setattr(sys.modules[path], name, type(name, (), {}))


def write(shards: str, out: str, column: str) -> None:
    """The samples of tar shards, in their order, as a data set of MDS shards of 8 MB; raw images become arrays."""
    from streaming import MDSWriter

    stored = "bytes" if column in ("png", "jpeg") else column
    with MDSWriter(out=out, columns={"image": stored, "label": "int"}, size_limit=1 << 23) as writer:
        for path in sorted(Path(shards).glob("*.tar")):
            with tarfile.open(path) as tar:
                files = [(member.name.rpartition(".")[2], tar.extractfile(member)) for member in tar]
                content = [(kind, file.read()) for kind, file in files if file is not None]
            for sample in map(dict, zip(content[0::2], content[1::2], strict=True)):  # two members a sample
                label = int(sample.pop("cls"))
                kind, image = sample.popitem()
                writer.write({"image": np.load(io.BytesIO(image)) if kind == "npy" else image, "label": label})
    # Its own encoder would compress anew. Bytes and images are stored alike, so only the name has to be mended.
    path = Path(out, "index.json")
    index = json.loads(path.read_text())
    for shard in index["shards"]:
        shard["column_encodings"] = [column if name == "bytes" else name for name in shard["column_encodings"]]
    path.write_text(json.dumps(index))


_opened: dict[str, Any] = {}


def epoch(place: str, batch: int, indexed: bool) -> dict[str, Any]:
    """One shuffled epoch as batches of images [B, H, W, C] (raw ones as stored): its images and CPU seconds.

    By iteration, or `indexed`: the samples one by one in an order of ours.
    """
    from streaming import StreamingDataset

    if place not in _opened:
        _opened[place] = StreamingDataset(local=place, shuffle=True, batch_size=batch, num_canonical_nodes=1)
    began, count = time.process_time(), 0
    dataset = _opened[place]
    samples = (dataset[int(i)] for i in np.random.permutation(len(dataset))) if indexed else iter(dataset)
    while group := list(islice(samples, batch)):
        images = np.stack([np.asarray(sample["image"]) for sample in group])
        labels = np.array([sample["label"] for sample in group])
        assert len(images) == len(labels)
        count += len(labels)
    return {"count": count, "seconds": time.process_time() - began}


def order(shard_sizes: str, algorithm: str, nodes: int, block: int, batch: int, out: str) -> None:
    """Write the sample numbers in the order in which one process sees them in an epoch."""
    from streaming.base.partition import get_partitions
    from streaming.base.shuffle import get_shuffle

    sizes = np.load(shard_sizes)
    shuffled = get_shuffle(algorithm, sizes, nodes, 0, 0, block)
    places: NDArray[np.int64] = get_partitions("relaxed", int(sizes.sum()), nodes, 1, 1, 1, batch).reshape(-1)
    np.save(out, shuffled[places[places >= 0]])


def main() -> None:
    """Answer commands until the pipe is closed."""
    replace_unused()
    import streaming

    answers, sys.stdout = sys.stdout, sys.stderr  # what it prints itself must not get between the answers
    print(json.dumps({"version": streaming.__version__}), file=answers, flush=True)
    commands: dict[str, Callable[..., Any]] = {"write": write, "epoch": epoch, "order": order}
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(commands[command.pop("do")](**command)), file=answers, flush=True)


if __name__ == "__main__":
    main()
