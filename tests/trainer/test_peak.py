"""Peaks: known names are found and no other, what is measured is a rate."""

from __future__ import annotations

import re

import pytest
import torch

from trainer.peak import _NAMED, measure_matmul, named_peak, peak_flops

TFLOP = 1e12


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756.0, 51.0),
        ("NVIDIA H100 NVL", 835.5, 60.0),
        ("NVIDIA H200", 989.4, 66.9),
        ("NVIDIA H200 NVL", 835.5, 60.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("NVIDIA A100 80GB PCIe", 312.0, 19.5),
        ("NVIDIA A10", 125.0, 31.2),
        ("NVIDIA L4", 121.0, 30.3),
        ("NVIDIA L40S", 362.05, 91.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    ],
)
def test_known_cards(name: str, bf16: float, fp32: float) -> None:
    assert named_peak(name, "bf16") == pytest.approx(bf16 * TFLOP)
    assert named_peak(name, "fp16") == pytest.approx(bf16 * TFLOP)
    assert named_peak(name, "fp32") == pytest.approx(fp32 * TFLOP)


@pytest.mark.parametrize("name", ["NVIDIA A10G", "NVIDIA L40", "NVIDIA GeForce RTX 4090 D", "NVIDIA T400", "2 CPU"])
def test_neighbours_of_known_cards_are_not_taken_for_them(name: str) -> None:
    assert named_peak(name, "bf16") is None


def test_what_a_card_cannot_do_is_measured() -> None:
    assert named_peak("Tesla T4", "fp16") == 65 * TFLOP
    assert named_peak("Tesla T4", "bf16") is None


def test_low_precision_is_never_slower_in_the_table() -> None:
    for pattern, (bf16, fp16, fp32) in _NAMED:
        assert fp16 > 4 * fp32 or re.search("RTX|L4|A10|L40S", pattern)
        assert fp16 > fp32
        assert bf16 in (None, fp16)


def test_a_cpu_is_measured_and_says_so() -> None:
    flops, where_from = peak_flops(torch.device("cpu"), "fp32")
    assert 1e8 < flops < 1e14
    assert "measured" in where_from
    assert "CPU threads" in where_from


def test_a_rate_counts_two_operations_a_multiply_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that says that every product took 0.1 s."""
    monkeypatch.setattr("trainer.peak.Clock.seconds", lambda *_: 0.1)
    rate, size = measure_matmul(torch.device("cpu"), torch.float32)
    assert rate == pytest.approx(2 * size**3 / 0.1)
