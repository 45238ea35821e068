"""Samples in fixed chunks, which any number of processes share and any later start goes on with.

A chunk is one batch through the networks. Whoever makes it makes the same batch, so its images are the same bits on
any number of processes of the same kind (device, threads), and after any interruption.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from evaluation.chunks import Advance, Arrays, Chunks, cut
from trainer.cascade import sample_cascade, total_calls
from trainer.sampling import Stage


def sample_chunks(
    stages: Sequence[Stage],
    numbers: range,
    *,
    base: Tensor | None = None,
    labels: Sequence[int] | None = None,
    seed: int = 0,
    batch: int,
    device: torch.device | str,
    chunks: Chunks,
    title: str = "",
    final: bool = False,
) -> Iterator[Arrays]:
    """The last stage's images number `numbers`, in order: {"images": uint8 [n, H, W, C]}, n being `batch` or fewer.

    Image i is a function of (seed, i, its class, its row of the base): its noise bit for bit, its pixels up to the
    rounding that the batch brings. So `batch` is part of what decides the bits; the folder of `chunks` must be named
    after it and all the rest.

    Args:
        base: uint8 [N, C, h, w], and `labels` [N]: of the numbers, as in `sample_cascade`.
        batch: images a network call (twice as many where guided).
        title: of the progress bar, which counts network calls; no bar without one.
        final: the images are the job's last chunks: processes other than the first end when their own are made.

    Raises:
        UserError: stages that do not fit together, unknown classes, guidance of a network that cannot be guided.
        FinishedElsewhere: another process has written the job's result, or will.
    """
    parts = cut(len(numbers), batch)
    calls = total_calls(stages)

    def make(number: int, advance: Advance) -> Arrays:
        part = parts[number]
        own = numbers[part]
        images = sample_cascade(
            stages, own, seed=seed, device=device, progress=lambda: advance(len(own)),
            base=None if base is None else base[part].contiguous(), labels=None if labels is None else labels[part],
        )  # fmt: skip
        return {"images": images[-1].permute(0, 2, 3, 1).contiguous().numpy()}

    def work(number: int) -> int:
        return calls * len(numbers[parts[number]])

    return chunks.results("samples", len(parts), make, work=work, unit="call", title=title, final=final)
