"""The real scheduler and driver on a simulated cluster: order, packing, retries, resumption, user errors."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.driver import Watcher, is_complete, run_jobs, waiting_trials
from cluster.jobs import EvalJob, Job, Resources, Status, TrialJob
from cluster.scheduler import Scheduler
from cluster.simulate import SimulatedCluster, SimulatedTrial, simulated_eval
from data_pipeline.errors import UserError

ONE = Resources(cpus=1)


def trial(name: str, seconds: float, resources: Resources = ONE) -> TrialJob:
    return TrialJob(name, Path(name), 1, resources, seconds)


def evaluations(name: str, nimg: int) -> list[EvalJob]:
    return [simulated_eval(name, nimg, resources=ONE, seconds=1.0)]


def cluster(
    jobs: list[TrialJob], cpus: float = 2, exports: tuple[tuple[float, int], ...] = (),
    fate: Callable[[Job, int], Status] = lambda job, attempt: "done",
) -> SimulatedCluster:  # fmt: skip
    world = {job.key: SimulatedTrial(job, exports) for job in jobs}
    return SimulatedCluster(Resources(cpus=cpus), world, evaluations, fate)


def drive(world: SimulatedCluster, jobs: list[TrialJob], **retry: float):  # type: ignore[no-untyped-def]
    scheduler = Scheduler(waiting_trials(jobs, world), attempts=int(retry.get("attempts", 3)), first_pause=5.0)
    return run_jobs(jobs, world, world, scheduler, Watcher())


def started(world: SimulatedCluster) -> list[str]:
    return [key for _, event, key in world.log if event == "start"]


def test_trials_go_longest_first_and_fill_the_slots() -> None:
    jobs = [trial("a", 10), trial("b", 40), trial("c", 20), trial("d", 30)]
    world = cluster(jobs)
    drive(world, jobs)
    assert started(world) == ["b", "d", "c", "a"]
    assert world.clock == 50  # b 0-40, d 0-30, c 30-50, a 40-50: no slot was idle


def test_evaluations_start_as_exports_appear_and_before_new_trials() -> None:
    jobs = [trial("a", 10), trial("b", 10), trial("c", 10)]
    world = cluster(jobs, cpus=1, exports=((0.5, 5), (1.0, 10)))
    drive(world, jobs)
    assert started(world) == ["a", "a/5", "a/10", "b", "b/5", "b/10", "c", "c/5", "c/10"]


def test_an_evaluation_does_not_wait_for_its_trial_where_a_slot_is_free() -> None:
    jobs = [trial("a", 10)]
    world = cluster(jobs, cpus=2, exports=((0.5, 5), (1.0, 10)))
    drive(world, jobs)
    starts = {key: when for when, event, key in world.log if event == "start"}
    assert starts["a/5"] == 5.0


def test_a_job_that_fits_goes_past_one_that_does_not() -> None:
    jobs = [trial("wide", 50, Resources(cpus=2)), trial("narrow", 10), trial("long", 60)]
    world = cluster(jobs)
    drive(world, jobs)
    assert started(world) == ["long", "narrow", "wide"]


def test_a_failed_job_is_tried_again_after_a_pause() -> None:
    jobs = [trial("a", 10)]
    world = cluster(jobs, fate=lambda job, attempt: "failed" if attempt < 3 else "done")
    summary = drive(world, jobs)
    assert [(retry.attempt, retry.pause) for retry in summary.retries] == [(1, 5.0), (2, 10.0)]
    assert not summary.failures
    begins = [when for when, event, _ in world.log if event == "start"]
    assert begins[1] - begins[0] >= 15
    assert begins[2] - begins[1] >= 20


def test_a_job_that_keeps_failing_is_given_up_and_the_rest_goes_on() -> None:
    jobs = [trial("bad", 10), trial("good", 5)]
    world = cluster(jobs, fate=lambda job, attempt: "failed" if job.key == "bad" else "done")
    summary = drive(world, jobs)
    assert [(f.job.key, f.attempts) for f in summary.failures] == [("bad", 3)]
    assert "good" in world.done
    assert started(world).count("bad") == 3


def test_a_preempted_trial_counts_as_a_failure_to_be_tried_again() -> None:
    jobs = [trial("a", 10)]
    world = cluster(jobs, fate=lambda job, attempt: "stopped" if attempt == 1 else "done")
    assert len(drive(world, jobs).retries) == 1


def test_a_users_mistake_stops_the_study_with_its_message() -> None:
    jobs = [trial("good", 100), trial("wrong", 10)]
    world = cluster(jobs, fate=lambda job, attempt: "user_error" if job.key == "wrong" else "done")
    with pytest.raises(UserError, match="wrong: simulated user_error"):
        drive(world, jobs)
    assert world.log[-1] == (10, "stopped", "good")  # saved, not abandoned


def test_a_second_driver_repeats_nothing() -> None:
    jobs = [trial("a", 10), trial("b", 20)]
    world = cluster(jobs, exports=((0.5, 5), (1.0, 10)))
    drive(world, jobs)
    before = list(world.log)
    assert is_complete(jobs, world)
    drive(world, jobs)
    assert world.log == before


def test_a_driver_that_died_is_continued() -> None:
    jobs = [trial("a", 10), trial("b", 20), trial("c", 30)]
    world = cluster(jobs, exports=((0.5, 5), (1.0, 10)))
    scheduler = Scheduler(waiting_trials(jobs, world))
    stop_at = 25.0
    summary = run_jobs(jobs, world, world, scheduler, Watcher(stop_requested=lambda: world.clock >= stop_at))
    assert summary.stopped
    finished = set(world.done)
    assert finished
    assert finished < {"a", "b", "c", *(f"{n}/{i}" for n in "abc" for i in (5, 10))}
    first_life = len(world.log)
    drive(world, jobs)
    assert is_complete(jobs, world)
    second = {key for _, event, key in world.log[first_life:] if event == "start"}
    assert not second & finished


def test_a_trial_that_can_never_fit_is_refused_at_once() -> None:
    jobs = [trial("a", 10), trial("huge", 10, Resources(cpus=8, gpus=8))]
    world = cluster(jobs)
    with pytest.raises(UserError, match="trial huge needs 8 CPUs and 8 GPUs, but the largest node has 2 CPUs"):
        drive(world, jobs)
    assert not world.log


def test_a_thousand_trials_are_decided_quickly() -> None:
    jobs = [trial(f"t{i}", 100.0 + i % 7) for i in range(1000)]
    world = cluster(jobs, cpus=1000, exports=tuple((k / 10, k) for k in range(1, 11)))
    began = time.monotonic()
    drive(world, jobs)
    assert len(world.done) == 11_000
    assert time.monotonic() - began < 60
