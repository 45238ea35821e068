"""The machine's own figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor

from trainer.system import SystemMetrics


def test_names_are_those_of_mlflows_own_monitor(tmp_path: Path) -> None:
    theirs: set[str] = set()
    for monitor in (CPUMonitor(), DiskMonitor()):
        monitor.collect_metrics()
        theirs |= {f"system/{name}" for name in monitor.aggregate_metrics()}
    ours = set(SystemMetrics(tmp_path, torch.device("cpu")).values())
    assert {name for name in ours if "network" not in name} <= theirs


def test_values_are_what_the_machine_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counters:
        def __init__(self, received: float, sent: float) -> None:
            self.bytes_recv, self.bytes_sent = received, sent

    counters = iter([Counters(0, 0), Counters(3e6, 8e6)])
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(psutil, "net_io_counters", lambda: next(counters))
    monkeypatch.setattr("trainer.system.time.perf_counter", lambda: next(clock))
    values = SystemMetrics(tmp_path, torch.device("cpu")).values()
    assert values["system/network_receive_megabytes_per_second"] == pytest.approx(1.5)
    assert values["system/network_transmit_megabytes_per_second"] == pytest.approx(4.0)
    assert 0 < values["system/system_memory_usage_percentage"] < 100
    assert values["system/disk_usage_percentage"] == pytest.approx(psutil.disk_usage(str(tmp_path)).percent, abs=2)
    assert not any("gpu" in name for name in values)


def test_gpus_as_nvml_tells_them(tmp_path: Path) -> None:
    class Nvml:
        """Two GPUs, of which the second does not tell its power."""

        class NVMLError(Exception):
            pass

        def nvmlDeviceGetCount(self) -> int:
            return 2

        def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
            return number

        def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
            return type("Memory", (), {"used": 20e9, "total": 80e9})

        def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
            return type("Rates", (), {"gpu": 97})

        def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
            if handle:
                raise self.NVMLError
            return 350_000

    metrics = SystemMetrics(tmp_path, torch.device("cpu"))
    metrics._nvml = Nvml()
    values = metrics.values()
    assert values["system/gpu_0_utilization_percentage"] == 97.0
    assert values["system/gpu_0_memory_usage_percentage"] == 25.0
    assert values["system/gpu_0_power_usage_watts"] == 350.0
    assert values["system/gpu_1_memory_usage_megabytes"] == 20_000.0
    assert "system/gpu_1_power_usage_watts" not in values
