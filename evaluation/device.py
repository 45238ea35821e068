"""Where an evaluation computes."""

from __future__ import annotations

import os
import platform

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


def computed_on(device: torch.device) -> dict[str, object]:
    """What the last digits of a result depend on, for its record: the device, a CPU's threads, torch's version."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    return {"device": platform.machine(), "num_threads": torch.get_num_threads(), "torch": torch.__version__}
