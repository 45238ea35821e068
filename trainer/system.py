"""How busy this machine is: what MLflow's "System metrics" tab shows.

The names are those of MLflow's own monitor (`mlflow.system_metrics`); the tab shows whatever begins with `system/`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

PREFIX = "system/"


class SystemMetrics:
    """Reads the counters of the machine it is on; nothing runs between two readings."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """`folder`: on the file system to watch. `device`: this process's."""
        self._folder, self._device = folder, device
        self._nvml = _open_nvml()
        self._network, self._time = psutil.net_io_counters(), time.perf_counter()
        psutil.cpu_percent()  # what it says next is since now

    def values(self) -> dict[str, float]:
        """Metrics by name: means since the reading before for CPU and network, the present state for the rest."""
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(self._folder))
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / 1e6,
        }
        values |= self._network_rates() | self._gpus()
        return {f"{PREFIX}{name}": float(value) for name, value in values.items()}

    def _network_rates(self) -> dict[str, float]:
        network, now = psutil.net_io_counters(), time.perf_counter()
        seconds, before = max(now - self._time, 1e-9), self._network
        self._network, self._time = network, now
        if network is None or before is None:  # a machine without network interfaces
            return {}
        return {
            "network_receive_megabytes_per_second": (network.bytes_recv - before.bytes_recv) / 1e6 / seconds,
            "network_transmit_megabytes_per_second": (network.bytes_sent - before.bytes_sent) / 1e6 / seconds,
        }

    def _gpus(self) -> dict[str, float]:
        if self._nvml is not None:  # all of the machine's, in its own order
            values: dict[str, float] = {}
            with contextlib.suppress(self._nvml.NVMLError):  # a GPU that is lost must not end the training on others
                for number in range(self._nvml.nvmlDeviceGetCount()):
                    values |= {f"gpu_{number}_{name}": value for name, value in _gpu(self._nvml, number)}
            return values
        if self._device.type != "cuda":
            return {}
        # Only this process's own: to look at another GPU by CUDA is to take some of its memory.
        free, total = torch.cuda.mem_get_info(self._device)
        index = self._device.index or 0
        return {
            f"gpu_{index}_memory_usage_megabytes": (total - free) / 1e6,
            f"gpu_{index}_memory_usage_percentage": 100 * (total - free) / total,
        }


def _gpu(nvml: Any, number: int) -> Iterator[tuple[str, float]]:
    """What NVIDIA's management library says of a GPU; some do not tell everything."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(number)
    except nvml.NVMLError:
        return
    with contextlib.suppress(nvml.NVMLError):
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        yield "memory_usage_megabytes", memory.used / 1e6
        yield "memory_usage_percentage", 100 * memory.used / memory.total
    with contextlib.suppress(nvml.NVMLError):
        yield "utilization_percentage", nvml.nvmlDeviceGetUtilizationRates(handle).gpu
    with contextlib.suppress(nvml.NVMLError):
        yield "power_usage_watts", nvml.nvmlDeviceGetPowerUsage(handle) / 1e3


def _open_nvml() -> Any:
    """NVIDIA's management library, None where it or a GPU is not there (pip install nvidia-ml-py)."""
    if not torch.cuda.is_available():
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, no driver, no permission: the metrics are a courtesy
        return None
    return pynvml
