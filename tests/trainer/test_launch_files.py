"""configs/launch: what the Slurm script starts and decides, with stand-ins for Slurm's commands; the host file."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile
from ranks import ROOT

LAUNCH = ROOT / "configs" / "launch"
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for rank in 0 1 2 3; do SLURM_PROCID=$rank SLURM_LOCALID=$((rank % 2)) "$@" || exit $?; done
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then printf 'node3\\nnode4\\n'; else echo "scontrol $@"; fi
"""
TRAINER = """#!/bin/bash
echo "rank $RANK local $LOCAL_RANK of $WORLD_SIZE/$LOCAL_WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT: $@"
[[ $EXIT -gt 128 ]] && kill -9 $$
exit $EXIT
"""


@pytest.mark.parametrize(
    ("code", "losses", "requeued", "losses_after"),
    [
        (0, 7, False, 7), (1, 0, False, 0), (2, 0, False, 0), (3, 0, True, 0), (3, 20, True, 20),
        (4, 0, True, 1), (137, 19, True, 20), (4, 20, False, 21), (5, 0, False, 0), (6, 7, False, 7), (7, 0, True, 1),
        (8, 3, True, 4), (8, 20, False, 21),
    ],
)  # fmt: skip
def test_the_slurm_script(tmp_path: Path, code: int, losses: int, requeued: bool, losses_after: int) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("trainer", TRAINER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[3-4]", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2"}
    environment = os.environ | slurm | {
        "SLURM_RESTART_COUNT": "50", "LOSSES": str(tmp_path / "losses"), "EXIT": str(code),
        "PYTHON": str(tmp_path / "trainer"), "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    if losses:
        (tmp_path / "losses").write_text(f"{losses}\n")
    done = subprocess.run(
        ["bash", str(LAUNCH / "train.sbatch"), "--config", "a b.yaml"], env=environment, text=True, capture_output=True
    )
    assert ("scontrol requeue 77" in done.stdout) == requeued
    assert done.returncode == (0 if requeued else code)
    assert (int((tmp_path / "losses").read_text()) if losses_after else 0) == losses_after
    ranks = range(4) if code == 0 else range(1)
    for rank in ranks:
        where = f"rank {rank} local {rank % 2} of 4/2 at node3:20077"
        assert f"{where}: trainer/run.py --config a b.yaml\n" in done.stdout


def test_the_host_file_is_one_that_deepspeed_reads() -> None:
    assert dict(fetch_hostfile(str(LAUNCH / "hostfile.example"))) == {"host0": 8, "host1": 8}
