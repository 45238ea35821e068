"""What a device could compute at most: the denominator of MFU.

Named peaks are the vendor's dense rates, without structured sparsity: of the tensor cores with float32 accumulation
for bf16 and fp16, of the ordinary cores for fp32, that is without TF32 (where TF32 is allowed, an fp32 run may pass
its "peak"). Other devices are measured by a matrix product.
"""

from __future__ import annotations

import re
import time

import torch

from trainer.clock import Clock

# (the device's name, as a pattern, what it is): TFLOP/s in bf16, in fp16, in fp32; None where it has no such units.
# First match counts. Sources: NVIDIA's data sheets of each card; the sparse rates stated there are halved.
_NAMED: list[tuple[str, tuple[float | None, float, float]]] = [
    (r"B200\b", (2250.0, 2250.0, 75.0)),
    (r"H200 NVL", (835.5, 835.5, 60.0)),
    (r"H200\b", (989.4, 989.4, 66.9)),
    (r"H100 NVL", (835.5, 835.5, 60.0)),
    (r"H100 PCIe", (756.0, 756.0, 51.0)),
    (r"H100 80GB HBM3", (989.4, 989.4, 66.9)),  # SXM5
    (r"A100\b", (312.0, 312.0, 19.5)),
    (r"V100-SXM2", (None, 125.0, 15.7)),
    (r"V100-PCIE", (None, 112.0, 14.0)),
    (r"L40S\b", (362.05, 362.05, 91.6)),
    (r"L4\b", (121.0, 121.0, 30.3)),
    (r"A10\b", (125.0, 125.0, 31.2)),
    (r"RTX 4090$", (165.2, 165.2, 82.6)),
    (r"RTX 3090$", (71.0, 71.0, 35.6)),
    (r"T4\b", (None, 65.0, 8.1)),
]  # fmt: skip
_COLUMNS = ("bf16", "fp16", "fp32")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SECONDS = 0.5  # for a measurement


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """(FLOP/s of one device at "bf16", "fp16" or "fp32", where the figure is from).

    A CPU's is that of this process's threads, so all processes of a machine should measure at the same time: they
    will compute at the same time.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    peak = named_peak(name, precision)
    if peak is not None:
        return peak, f"{name}, data sheet, dense {precision}"
    measured, size = measure_matmul(device, DTYPES[precision])
    return measured, f"{name}, measured by a product of {size} x {size} matrices in {precision}"


def named_peak(name: str, precision: str) -> float | None:
    """FLOP/s of a GPU by the name that torch gives it; None for one that is not known."""
    for pattern, rates in _NAMED:
        if re.search(pattern, name):
            rate = rates[_COLUMNS.index(precision)]
            return None if rate is None else rate * 1e12
    return None


def measure_matmul(device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """(best FLOP/s of square products, their size); takes about `SECONDS`, a little more on a slow CPU.

    The best of several, since a neighbour on the machine only ever takes away from it.
    """
    largest = 8192 if device.type == "cuda" else 2048
    size, rates = 256, _matmul_rates(device, dtype, 256, seconds=0.0)
    while size < largest and 2 * (2 * size) ** 3 / rates[0] < SECONDS / 2:  # as large as leaves time for a few
        size *= 2
        rates = _matmul_rates(device, dtype, size, seconds=0.0)
    return max(rates + _matmul_rates(device, dtype, size, seconds=SECONDS)), size


def _matmul_rates(device: torch.device, dtype: torch.dtype, size: int, *, seconds: float) -> list[float]:
    """FLOP/s of products until the time is over, at least one."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    clock = Clock(device)
    rates: list[float] = []
    a @ b  # the kernel is chosen, the memory is there
    until = time.perf_counter() + seconds
    while not rates or time.perf_counter() < until:
        start = clock.now()
        a @ b
        rates.append(2 * size**3 / max(clock.seconds(start, clock.now()), 1e-9))
    return rates
