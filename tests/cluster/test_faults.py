"""Whatever happens, the study finishes, with the very points of an undisturbed one; on a real Ray of several nodes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fault_cluster import LocalCluster
from benchmarks.fault_kinds import FAULTS
from benchmarks.fault_marks import environment, found, kill_all
from benchmarks.fault_round import Planned, plan, run_round
from benchmarks.fault_stage import Scale, make_data, stage
from benchmarks.fault_tables import compare
from benchmarks.fault_watch import StudyWatch, new_or_changed, started_again
from benchmarks.faults import KINDS, WIDE, rehearse


def complaints(tally: dict[str, Any]) -> list[str]:
    """All that speaks against a rehearsal, for the test's message."""
    (found,) = tally["rounds"]
    lost = [one for one in found["struck"] if not one["survived"]]
    return [*tally["undisturbed"]["problems"], *found["problems"], *map(str, lost), *found["comparison"]["wrong"]]


def weights(exports: Path) -> dict[str, str]:
    """Checksums of a run's exported tensors."""
    manifests = {path.parent.name: json.loads(path.read_text()) for path in exports.glob("*/manifest.json")}
    return {
        f"{export}/{name}": about["sha256"]
        for export, manifest in manifests.items() for name, about in manifest["files"].items()
        if name.endswith(".safetensors")
    }  # fmt: skip


@pytest.mark.timeout(600)
def test_a_study_that_lost_a_node_and_a_process_trains_what_an_undisturbed_trainer_does(tmp_path: Path) -> None:
    scale = Scale(sizes=(4, 8), seeds=(0,), budget=1024, checkpoint=128, points=2, splits=("test",), distance=False)
    planned = [Planned(FAULTS["trainer"], 0.1, 0.0), Planned(FAULTS["node"], 0.4, 1.0)]
    data, out = make_data(tmp_path), tmp_path / "study" / "out"
    cluster = partial(LocalCluster, "twin", num_nodes=2, cpus=1)
    with stage(tmp_path / "study", cluster, scale=scale, data=data, mlflow=False, small_disk=False) as there:
        result = run_round(there, planned, seed=0, say=print)
    assert result.good, result
    assert [one.kind for one in result.struck] == ["trainer", "node"]
    assert all(one.told for one in result.struck)
    trials = [out / "trials" / name for name in ("channels4-seed0", "channels8-seed0")]
    alone = [
        subprocess.Popen(
            [sys.executable, "trainer/run.py", "--config", trial / "trial.yaml", f"run.folder={tmp_path / trial.name}"]
        )
        for trial in trials
    ]
    assert [process.wait() for process in alone] == [0, 0]
    for trial in trials:
        assert len(weights(trial / "exports")) == 4  # two exports of the weights and their average
        assert weights(trial / "exports") == weights(tmp_path / trial.name / "exports")
        assert len(list(trial.glob("evals/*/*.json"))) == 2


@pytest.mark.prove
@pytest.mark.timeout(1800)
def test_a_study_survives_everything_in_one_run(tmp_path: Path) -> None:
    kinds = [*KINDS, *WIDE]
    tally = rehearse(tmp_path / "faults", kinds, rounds=1, seed=0, scale=Scale(processes=2))
    assert tally["good"], complaints(tally)
    (found,) = tally["rounds"]
    assert {one["kind"] for one in found["struck"]} | tally["skipped"].keys() == set(kinds)
    compared = found["comparison"]
    assert compared["num_points"] == 4 * (4 * 3 + 1)  # NLL of two splits and their gap; at the end a distance
    assert compared["num_identical"] >= compared["num_points"] - compared["num_relaid"] > 0
    assert compared["num_relaid"] > 0  # a trial had to go on with fewer processes


def test_the_seed_decides_which_faults_come_when() -> None:
    first, again, other = (plan(list(FAULTS), seed) for seed in (1, 1, 2))
    assert first == again
    assert [one.fault.name for one in first] != [one.fault.name for one in other]
    assert [one.at for one in first] == sorted(one.at for one in first)
    assert all(one.fault.away[0] <= one.away <= one.fault.away[1] for one in first)


def made_study(folder: Path, values: dict[int, float], *, processes: dict[int, int]) -> StudyWatch:
    """What a study leaves: a table of one trial (images -> NLL) and its checkpoints (images -> processes)."""
    rows = [f"a,nll,test,{images},{value!r},0.01,7" for images, value in values.items()]
    (folder / "law").mkdir(parents=True)
    (folder / "law" / "points.csv").write_text("\n".join(["run,metric,split,images,value,stderr,seed", *rows]) + "\n")
    for images, number in processes.items():
        state = folder / "trials" / "a" / "checkpoints" / f"{images:012d}" / "state.json"
        state.parent.mkdir(parents=True)
        state.write_text(json.dumps({"nimg": images, "layout": {"num_processes": number}}))
    return StudyWatch(folder, budget=3, num_trials=1)


@pytest.mark.parametrize(
    ("value", "processes", "wrong", "relaid"),
    [
        (5.0, 2, 0, 0),
        (5.0000001, 2, 1, 0),  # where the layout is the same, so is every bit
        (5.009, 1, 0, 1),
        (5.011, 1, 1, 1),
    ],
)
def test_points_are_the_same_or_near_behind_another_layout(
    tmp_path: Path, value: float, processes: int, wrong: int, relaid: int
) -> None:
    usual = made_study(tmp_path / "usual", {1: 6.0, 2: 5.5, 3: 5.0}, processes={1: 2, 2: 2, 3: 2})
    other = made_study(tmp_path / "other", {1: 6.0, 2: 5.5, 3: value}, processes={1: 2, 2: 2, 3: processes})
    comparison = compare(usual, other)
    assert (len(comparison.wrong), comparison.num_relaid) == (wrong, relaid)
    assert comparison.equal is (wrong == 0)


def test_a_missing_point_is_told(tmp_path: Path) -> None:
    usual = made_study(tmp_path / "usual", {1: 6.0, 2: 5.5}, processes={1: 1, 2: 1})
    other = made_study(tmp_path / "other", {1: 6.0}, processes={1: 1, 2: 1})
    assert not compare(usual, other).equal


def test_what_is_done_twice_is_told() -> None:
    finished = {"trials/a/result.json": (1, 1), "trials/a/evals/000000000008/k.json": (2, 2)}
    started = [
        {"event": "started", "time": time, "key": key}
        for time, key in ((1.0, "a"), (3.0, "b"), (4.0, "a"), (5.0, "a/000000000008/k 1/2"), (6.0, "a/000000000016/k"))
    ]
    assert started_again(started, finished, since=2.0) == ["a", "a/000000000008/k 1/2"]
    assert new_or_changed(finished, finished) == []
    assert new_or_changed(finished, finished | {"trials/a/result.json": (9, 1)}) == ["trials/a/result.json"]


def test_a_marked_tree_of_processes_dies_at_once(tmp_path: Path) -> None:
    nested = f"{sys.executable} -c 'import time; time.sleep(60)' & wait"
    process = subprocess.Popen(["sh", "-c", nested], env=environment("mark7/here"), start_new_session=True)
    deadline = time.monotonic() + 30
    while len(found("mark7")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert found("mark") == found("mark7/there") == []
    assert kill_all("mark7") == 2
    assert process.wait(5) == -9
    assert found("mark7") == []
