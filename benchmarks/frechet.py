"""The Fréchet distance at d = 2048 against scipy's sqrtm, and memory against N: `python -m benchmarks.frechet`.

Time is CPU time of the process, so that threads and neighbours do not flatter anybody. Memory is the peak of a process
that gathers the features of N images, as large as Inception-v3's; one process for each N.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from scipy.linalg import sqrtm

from benchmarks.unet_step import machine
from data_pipeline.errors import UserError, run_cli
from data_pipeline.files import write_json
from evaluation.chunks import Arrays, cut
from evaluation.features import Features
from evaluation.features.feature_set import gather
from evaluation.metrics.frechet import frechet_distance
from evaluation.moments import Gaussian, moments_of

Array = NDArray[np.float64]

DIM, SPATIAL_DIM, NUM_CLASSES = 2048, 2023, 1008  # Inception-v3's
CHUNK = 256
FEW, MANY = 500, 8192  # images: fewer and more than dimensions
ROOT = Path(__file__).resolve().parents[1]


def gaussian(num: int, decades: int, seed: int) -> Gaussian:
    """Of `num` vectors whose covariance has eigenvalues over so many decades; with other seeds much alike."""
    rng = np.random.default_rng(seed)
    scales = np.geomspace(1, 10 ** (-decades / 2), DIM) * rng.uniform(0.9, 1.1, DIM)
    basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((DIM, DIM)))
    return moments_of(rng.standard_normal((num, DIM)) * scales @ basis + 0.1 * seed * scales).gaussian()


def by_square_root(x: Gaussian, y: Gaussian) -> float:
    """The distance as it is usually computed: by the square root of the product of both covariances."""
    root = sqrtm(x.covariance @ y.covariance)
    delta = x.mean - y.mean
    return float(delta @ delta + np.trace(x.covariance) + np.trace(y.covariance) - 2 * np.trace(np.real(root)))


def timed(work: Callable[[], float], repeats: int) -> tuple[float, list[float]]:
    """The value, and CPU seconds of each repeat."""
    seconds, value = [], 0.0
    for _ in range(repeats):
        start = time.process_time()
        value = work()
        seconds.append(time.process_time() - start)
    return value, seconds


def compare_speed(repeats: int, scipy_repeats: int) -> list[dict[str, Any]]:
    """Ours and scipy's: well and badly conditioned covariances, and fewer images than dimensions."""
    rows = []
    for num, decades in ((MANY, 4), (MANY, 6), (MANY, 8), (FEW, 6)):
        samples, reference = gaussian(num, decades, 2), gaussian(MANY, decades, 1)
        ours, our_seconds = timed(partial(frechet_distance, samples, reference), repeats)
        theirs, their_seconds = timed(partial(by_square_root, samples, reference), scipy_repeats)
        rows.append({
            "dim": DIM, "num_samples": num, "num_reference": MANY, "eigenvalue_decades": decades,
            "value": ours, "scipy_value": theirs, "relative_difference": abs(ours - theirs) / abs(theirs),
            "seconds": our_seconds, "scipy_seconds": their_seconds,
            "times_faster": statistics.median(their_seconds) / statistics.median(our_seconds),
        })  # fmt: skip
    return rows


@dataclass(frozen=True)
class LargeNet:
    """Stands for Inception-v3 in size; its features are drawn, no images are looked at."""

    name: str = "drawn"
    dim: int = DIM
    spatial_dim: int = SPATIAL_DIM
    num_classes: int = NUM_CLASSES
    weights_sha256: str = ""
    resize: int = 0

    def __call__(self, images: torch.Tensor) -> Features:
        raise NotImplementedError("a stand-in with drawn features has none of images")

    def drawn(self, num: int) -> Iterator[Arrays]:
        rng = np.random.default_rng(0)
        for part in cut(num, CHUNK):
            size = part.stop - part.start
            probs = rng.random((size, self.num_classes), dtype=np.float32)
            yield {
                "pool": rng.random((size, self.dim), dtype=np.float32),
                "spatial": rng.random((size, self.spatial_dim), dtype=np.float32),
                "probs": probs / probs.sum(axis=1, keepdims=True),
            }


def gather_once(num: int) -> dict[str, Any]:
    """Peak memory in MiB and CPU seconds of gathering `num` images' features, in this process."""
    net, start = LargeNet(), time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gather(net, net.drawn(num), data="", num=num)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    feature_bytes = num * 4 * (DIM + SPATIAL_DIM + NUM_CLASSES)
    return {
        "num": num,
        "features_mib": feature_bytes / 2**20,
        "peak_growth_mib": (peak - before) / 2**10,
        "seconds": time.process_time() - start,
    }


def measure_memory(num: int) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.frechet", "--gather", str(num)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"gathering {num} images failed:\n{done.stderr[-3000:]}")
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=3, help="of ours")
    parser.add_argument("--scipy-repeats", type=int, default=2, help="of scipy's, 10 to 40 s each; 0: leave it out")
    parser.add_argument("--nums", default="4096,16384,65536", help="comma-separated numbers of images, for the memory")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--gather", type=int, help=argparse.SUPPRESS)  # what this script starts itself as
    options = parser.parse_args()
    if options.gather:
        print(json.dumps(gather_once(options.gather)))
        return 0
    memory = []
    for num in map(int, options.nums.split(",")):
        memory.append(measure_memory(num))
        line = "{num:>7,} images: {features_mib:6.0f} MiB of features, {peak_growth_mib:5.0f} MiB of memory"
        print(line.format(**memory[-1]))
    speed = compare_speed(options.repeats, options.scipy_repeats) if options.scipy_repeats else []
    for row in speed:
        print(
            "{num_samples:>5} x {num_reference} vectors, d = {dim}, eigenvalues over {eigenvalue_decades} decades: "
            "{times_faster:.1f} times faster than sqrtm, "
            "values differ by {relative_difference:.1e}".format(**row)
        )
    if options.json is not None:
        found = {
            "machine": machine(torch.device("cpu")),
            "scipy": scipy.__version__,
            "threads": torch.get_num_threads(),
        }
        write_json(options.json, found | {"memory": memory, "speed": speed})
    return 0


if __name__ == "__main__":
    run_cli(main)
