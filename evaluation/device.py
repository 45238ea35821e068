"""Where an evaluation computes."""

from __future__ import annotations

import os

import torch


def pick_device(num_threads: int | None = None) -> torch.device:
    """This process's GPU where there is one (of a launcher's LOCAL_RANK), else the CPU with so many threads.

    Figures that are to be published are made in full float32: torch would let convolutions on a GPU round their inputs
    to TF32's 10 bits.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    if num_threads:
        torch.set_num_threads(num_threads)
    return torch.device("cpu")
