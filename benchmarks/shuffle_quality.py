"""How well an epoch is shuffled, and what that costs: `python -m benchmarks.shuffle_quality`.

An index as large as ImageNet's training set: 1,281,167 samples sorted by class, in 1,300 shards. The orders of one
epoch, as one process sees them:

    ours        data_pipeline/order.py at several windows
    webdataset  its own shuffle of the shards, then its own shuffle of the samples at several buffer sizes, one worker
    streaming   MosaicML Streaming's algorithms and its partition over canonical nodes, run by the package itself in its
                environment (--streaming-python PATH; streaming_peer.py says how to make it)
    all         a permutation of all samples: the ideal

Figures: Spearman's rank correlation between places in storage of samples that are 1 to 64 places apart in the epoch
(ideal 0); how far a sample moves from its place in storage, in epochs (1/3); the share of neighbours from one shard;
classes in a batch of 128 (120.3 of 1,000 in the ideal) and the chi-square of its class counts over its degrees of
freedom (1; 128 where all are of one class). The cost: the most shards that are begun and not finished at a time, which
must be at hand (open, or in the cache of a remote split).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.streaming_peer import StreamingPeer
from data_pipeline.errors import run_cli
from data_pipeline.files import write_json
from data_pipeline.order import DEFAULT_WINDOW, EpochOrder

NUM_SAMPLES, NUM_SHARDS, NUM_CLASSES = 1_281_167, 1_300, 1_000  # ImageNet
BATCH = 128
LAGS = (1, 2, 4, 8, 16, 32, 64)
SEED = 0
WINDOWS = sorted({1 << 12, 1 << 14, 1 << 16, 1 << 18, DEFAULT_WINDOW})
BUFFERS = (1_000, 5_000, 10_000, 65_536)
# name: (algorithm, canonical nodes, shuffle block). At one node the package's own choice of block is 4,000,000.
STREAMING = {
    "py1e, its default": ("py1e", 1, 4_000_000),
    "py1e, block 262144": ("py1e", 1, 1 << 18),
    "py1e, block 65536": ("py1e", 1, 1 << 16),
    "py1br, block 262144": ("py1br", 1, 1 << 18),
    "py1br, block 65536": ("py1br", 1, 1 << 16),
    "py1s, its default": ("py1s", 64, 1 << 18),
}

FAMILIES = {
    "all": ("gray_r", "x"),
    "ours": ("Blues", "o"),
    "webdataset": ("Oranges", "s"),
    "streaming": ("Greens", "^"),
}

Order = NDArray[np.int64]  # sample numbers (places in storage), in the order of an epoch


@dataclass(frozen=True)
class Quality:
    """Of one order."""

    name: str
    spearman: dict[int, float]  # by lag
    displacement: float  # mean, in epochs
    same_shard: float  # share of neighbours
    classes: float  # different ones in a batch, mean
    chi_square: float  # of a batch's class counts over its degrees of freedom, mean
    shards_at_hand: int


def measure(name: str, order: Order, shard: NDArray[np.int64], label: NDArray[np.int64]) -> Quality:
    """The figures of an order; `shard` and `label` are those of the samples in storage: [num_samples]."""
    shards = shard[order]
    batches = label[order][: len(order) // BATCH * BATCH].reshape(-1, BATCH)
    return Quality(
        name=name,
        spearman={lag: float(np.corrcoef(order[:-lag], order[lag:])[0, 1]) for lag in LAGS},
        displacement=float(np.abs(order - np.arange(len(order))).mean() / len(order)),
        same_shard=float((shards[1:] == shards[:-1]).mean()),
        classes=float((np.diff(np.sort(batches, axis=1), axis=1) > 0).sum(axis=1).mean() + 1),
        chi_square=chi_square(batches, np.bincount(label) / len(label)),
        shards_at_hand=shards_at_hand(shards),
    )


def chi_square(batches: NDArray[np.int64], share: NDArray[np.float64]) -> float:
    """Of the class counts of batches [n, B] over their degrees of freedom, the mean; `share` is each class's."""
    num_classes, batch = len(share), batches.shape[1]
    cells = batches + num_classes * np.arange(len(batches))[:, None]
    counts = np.bincount(cells.reshape(-1), minlength=len(batches) * num_classes).reshape(-1, num_classes)
    expected = batch * share
    return float(((counts - expected) ** 2 / expected).sum(axis=1).mean() / (num_classes - 1))


def shards_at_hand(shards: NDArray[np.int64]) -> int:
    """The most shards that are begun and not finished; `shards` are those of the samples in the order of the epoch."""
    _, first = np.unique(shards, return_index=True)
    _, behind = np.unique(shards[::-1], return_index=True)
    change = np.zeros(len(shards) + 1, dtype=np.int64)
    np.add.at(change, first, 1)
    np.add.at(change, len(shards) - behind, -1)  # one after the last
    return int(np.cumsum(change).max())


def webdataset_order(sizes: NDArray[np.int64], buffer: int) -> Order:
    """Of `WebDataset(shards, shardshuffle=NUM_SHARDS).shuffle(buffer)`: its own functions, without files."""
    from webdataset.filters import shuffle

    starts = np.cumsum(sizes) - sizes
    shards = shuffle(len(sizes), seed=SEED)(iter(range(len(sizes))))
    samples = (number for shard in shards for number in range(starts[shard], starts[shard] + sizes[shard]))
    return np.fromiter(shuffle(buffer, seed=SEED)(samples), dtype=np.int64, count=int(sizes.sum()))


def streaming_order(peer: StreamingPeer, sizes: NDArray[np.int64], name: str) -> Order:
    """Of MosaicML Streaming, made by itself."""
    algorithm, nodes, block = STREAMING[name]
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/sizes.npy", sizes)
        out = f"{folder}/order.npy"
        peer(
            "order",
            shard_sizes=f"{folder}/sizes.npy",
            algorithm=algorithm,
            nodes=nodes,
            block=block,
            batch=BATCH,
            out=out,
        )
        order: Order = np.load(out)
    return order


def orders(sizes: NDArray[np.int64], peer: StreamingPeer | None) -> Iterator[tuple[str, Order]]:
    """All that are compared, by name."""
    yield "all", np.random.default_rng(SEED).permutation(int(sizes.sum()))
    for window in WINDOWS:
        yield f"ours, window {window}", EpochOrder(sizes, seed=SEED, window=window).epoch(0)
    for buffer in BUFFERS:
        yield f"webdataset, buffer {buffer}", webdataset_order(sizes, buffer)
    for name in STREAMING if peer is not None else ():
        assert peer is not None
        yield f"streaming {name}", streaming_order(peer, sizes, name)


def index_like_imagenet() -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Samples in each shard, and each sample's shard and class: sorted by class, nearly equal shards and classes."""
    sizes = np.diff(np.arange(NUM_SHARDS + 1) * NUM_SAMPLES // NUM_SHARDS)
    shard = np.repeat(np.arange(NUM_SHARDS), sizes)
    return sizes, shard, np.arange(NUM_SAMPLES) * NUM_CLASSES // NUM_SAMPLES


def draw(rows: list[Quality], path: Path) -> None:
    """Correlation against lag; class mixing against what must be at hand."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for family, (map_name, marker) in FAMILIES.items():
        members = [row for row in rows if row.name.startswith(family)]
        shades = np.linspace(0.35, 0.95, len(members)) if len(members) > 1 else [1.0]
        for row, shade in zip(members, shades, strict=True):
            style: dict[str, Any] = {"color": colormaps[map_name](shade), "marker": marker, "label": row.name}
            left.plot(LAGS, [max(abs(value), 1e-4) for value in row.spearman.values()], markersize=4, **style)
            right.plot(row.shards_at_hand, row.chi_square, linestyle="", **style)
    left.set(
        xscale="log", yscale="log", xlabel="places apart in the epoch", ylabel="|rank correlation| of places in storage"
    )
    left.set_xticks(LAGS, [str(lag) for lag in LAGS])
    left.minorticks_off()
    right.set(xscale="log", yscale="log", xlabel="shards at hand", ylabel=f"chi-square / df of the classes in {BATCH}")
    right.axhline(1, color="k", linewidth=0.8)
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=150)


def report(rows: list[Quality]) -> str:
    """The table."""
    lines = [
        f"{'order':32}{'lag 1':>9}{'lag 64':>9}{'moved':>8}{'1 shard':>9}{'classes':>9}{'chi2/df':>9}{'at hand':>9}"
    ]
    for row in rows:
        lines.append(
            f"{row.name:32}{row.spearman[1]:>9.4f}{row.spearman[64]:>9.4f}{row.displacement:>8.3f}{row.same_shard:>9.4f}"
            f"{row.classes:>9.1f}{row.chi_square:>9.2f}{row.shards_at_hand:>9,}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--streaming-python", type=Path, help="interpreter of an environment with MosaicML Streaming")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--figure", type=Path, help="draw them into this PNG file")
    options = parser.parse_args(arguments)
    peer = StreamingPeer(options.streaming_python) if options.streaming_python else None
    print("MosaicML Streaming " + (peer.version if peer else "is left out: see --streaming-python"))
    sizes, shard, label = index_like_imagenet()
    rows = []
    for name, order in orders(sizes, peer):
        assert len(np.unique(order)) == NUM_SAMPLES, name
        rows.append(measure(name, order, shard, label))
    print(report(rows))
    if peer is not None:
        peer.close()
    if options.json is not None:
        found: dict[str, Any] = {"samples": NUM_SAMPLES, "shards": NUM_SHARDS, "classes": NUM_CLASSES, "batch": BATCH}
        found["streaming"] = peer.version if peer else None
        write_json(options.json, found | {"rows": [asdict(row) for row in rows]})
    if options.figure is not None:
        draw(rows, options.figure)
    return 0


if __name__ == "__main__":
    run_cli(main)
