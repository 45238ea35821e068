"""`python -m evaluation.ema_sweep`: what was measured of a run's averages, by their length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tracking_records import eval_record, write_eval

from data_pipeline.errors import UserError
from evaluation.ema_sweep import curves, main, sweep_table
from trainer.tracking.records import EvalRecord


def measured(weights: str, value: float, nimg: int = 64, **how: object) -> EvalRecord:
    return replace(eval_record(nimg), value=value, measured={"weights": weights, "mode": "importance", **how})


RECORDS = [
    measured("power_0.1", 5.0), measured("power_0.05", 4.0), measured("power_0.07", 3.0), measured("ema", 1.0),
    measured("power_0.05", 9.0, clip_denoised=False), measured("power_0.1", 8.0, nimg=32), measured("model", 7.0),
]  # fmt: skip


def test_only_what_was_measured_in_the_same_way_is_a_curve() -> None:
    [curve] = curves(RECORDS, 64)
    assert [(sigma_rel, record.value) for sigma_rel, record in curve] == [(0.05, 4.0), (0.07, 3.0), (0.1, 5.0)]
    assert not curves(RECORDS, 32)
    lines = sweep_table([curve]).splitlines()
    assert [line.split()[2] for line in lines if line.endswith("lowest")] == ["0.07"]


def test_a_tracked_average_counts_before_a_reconstructed_one_of_its_length() -> None:
    made = replace(measured("power_0.05", 2.0), details={"reconstructed": {"profile_error": 0.223, "num_snapshots": 6}})
    for records in ([*RECORDS, made], [made, *RECORDS]):
        [curve] = curves(records, 64)
        assert [record.value for _, record in curve] == [4.0, 3.0, 5.0]
    [curve] = curves([made, *(r for r in RECORDS if r.measured["weights"] != "power_0.05")], 64)
    first, second = sweep_table([curve]).splitlines()[2:4]
    assert "reconstructed, profile error 0.22" in first
    assert "reconstructed" not in second


def test_the_command_draws_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["ema_sweep", str(tmp_path)])
    with pytest.raises(UserError, match=r"fewer than two averages.*--weights power_0\.05"):
        main()
    for number, record in enumerate(RECORDS):
        write_eval(tmp_path, record, key=f"k{number}")
    main()
    picture = tmp_path / "evals" / "000000000064" / "ema_sweep.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in capsys.readouterr().out
