"""The real scheduler and driver on a simulated cluster: order, packing, retries, resumption, user errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.scheduling.driver import Summary, is_complete, run_jobs, waiting_trials
from cluster.scheduling.jobs import Changes, EvalJob, Job, Outcome, Resources, Shape, Status, TrialJob
from cluster.scheduling.scheduler import Scheduler
from cluster.scheduling.simulate import NodeEvent, SimulatedCluster, SimulatedTrial, lower_bound, simulated_eval
from cluster.scheduling.troubles import Retry, RetryPolicy, Troubles
from data_pipeline.errors import UserError

ONE = Resources(cpus=1)
EIGHT_GPUS = Resources(cpus=32, gpus=8)


def trial(name: str, seconds: float, *shapes: Shape | Resources, priority: int = 0) -> TrialJob:
    wanted = tuple(shape if isinstance(shape, Shape) else Shape(shape) for shape in shapes or (ONE,))
    return TrialJob(name, Path(name), wanted, seconds, priority)


def evaluations(name: str, nimg: int) -> list[EvalJob]:
    return [simulated_eval(name, nimg, shape=Shape(ONE), seconds=1.0)]


def cluster(
    jobs: list[TrialJob], cpus: float = 2, exports: tuple[tuple[float, int], ...] = (),
    fate: Callable[[Job, int], Status] = lambda job, attempt: "done", nodes: dict[str, Resources] | None = None,
    node_events: tuple[NodeEvent, ...] = (),
) -> SimulatedCluster:  # fmt: skip
    world = {job.key: SimulatedTrial(job, exports) for job in jobs}
    return SimulatedCluster(nodes or {"here": Resources(cpus=cpus)}, world, evaluations, fate, node_events)


def drive(world: SimulatedCluster, jobs: list[TrialJob], **policy: float) -> Summary:
    retry = RetryPolicy(attempts=int(policy.get("attempts", 3)), losses=int(policy.get("losses", 20)))
    scheduler = Scheduler(waiting_trials(jobs, world), retry=retry, eval_share=policy.get("eval_share", 0.25))
    return run_jobs(jobs, world, world, scheduler)


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
    summary = run_jobs(jobs, world, world, scheduler, stop_requested=lambda: world.clock >= stop_at)
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
    with pytest.raises(UserError, match="trial huge needs 8 CPUs and 8 GPUs, but the largest of 1 nodes has 2 CPUs"):
        drive(world, jobs)
    assert not world.log


# ---- nodes --------------------------------------------------------------------------------------------------------


def spans_of(world: SimulatedCluster, key: str) -> list[tuple[str, float, float]]:
    return [(span.node, span.start, span.end) for span in world.spans if span.key == key]


def test_a_job_runs_on_one_node_and_never_on_what_is_free_on_two() -> None:
    jobs = [trial("a", 10, Resources(cpus=2)), trial("b", 10, Resources(cpus=2)), trial("wide", 9, Resources(cpus=3))]
    world = cluster(jobs, nodes={"n0": Resources(cpus=3), "n1": Resources(cpus=3)})
    drive(world, jobs)
    assert {spans_of(world, "a")[0][0], spans_of(world, "b")[0][0]} == {"n0", "n1"}
    assert spans_of(world, "wide")[0][1] == 10.0  # a CPU was free on both nodes, three on none


def test_a_trial_of_two_nodes_takes_two_at_once() -> None:
    pair = Shape(Resources(gpus=8, cpus=8), num_nodes=2, num_processes=16)
    jobs = [trial("pair", 10, pair), trial("one", 30, EIGHT_GPUS)]
    world = cluster(jobs, nodes={f"n{i}": EIGHT_GPUS for i in range(2)})
    drive(world, jobs)
    (one,) = spans_of(world, "one")
    assert sorted(spans_of(world, "pair")) == [("n0", 30.0, 40.0), ("n1", 30.0, 40.0)]
    assert one[1:] == (0.0, 30.0)


def test_a_small_job_goes_where_it_leaves_the_least() -> None:
    jobs = [trial("small", 50, Resources(cpus=1)), trial("wide", 40, Resources(cpus=4))]
    world = cluster(jobs, nodes={"big": Resources(cpus=4), "little": Resources(cpus=2)})
    drive(world, jobs)
    assert spans_of(world, "small")[0][0] == "little"
    assert spans_of(world, "wide")[0] == ("big", 0.0, 40.0)


def test_a_wide_trial_is_not_starved_by_narrow_ones() -> None:
    """Without a reservation the narrow ones, of which there is always one that fits, would all go first."""
    narrow = [trial(f"n{i}", 10.0 + i) for i in range(20)]
    jobs = [trial("first", 30, priority=2), trial("wide", 100, Resources(cpus=4), priority=1), *narrow]
    world = cluster(jobs, cpus=4)
    drive(world, jobs)
    (span,) = spans_of(world, "wide")
    assert span[1] == 30.0
    before = [s for s in world.spans if s.key.startswith("n") and s.start < 30.0]
    assert before  # what ends in time goes past it
    assert all(s.end <= 30.0 for s in before)


def test_a_wide_trial_is_not_starved_by_a_stream_of_evaluations() -> None:
    """Each evaluation is short and within its share; together they would keep every node in part."""
    steady = [trial(f"s{i}", 200.0 + 40 * i) for i in range(8)]
    wide = trial("wide", 50, Resources(cpus=4))
    exports = tuple((k / 100, k) for k in range(1, 101))
    world = cluster([*steady, wide], nodes={"n0": Resources(cpus=4), "n1": Resources(cpus=4)}, exports=exports)
    world.evaluations = lambda name, nimg: [simulated_eval(name, nimg, shape=Shape(ONE), seconds=4.0)]
    drive(world, [*steady, wide])
    (span,) = spans_of(world, "wide")
    ends = sorted(end for s in steady for node, _, end in spans_of(world, s.key) if node == span[0])
    assert span[1] <= ends[3] + 0.25 * 50 + 4.0  # the fourth of its node has ended, and evaluations had their share


def test_a_trial_that_is_dropped_and_wanted_again_goes_on() -> None:
    jobs = [trial("a", 100)]
    world = cluster(jobs, cpus=1, exports=((0.2, 20), (0.4, 40), (1.0, 100)))
    changes = iter([Changes(dropped={"a": "no longer in the study file"}, added=(jobs[0],))])
    world.changes = lambda: next(changes, Changes())  # type: ignore[method-assign]
    summary = run_jobs(jobs, world, world, Scheduler(waiting_trials(jobs, world)))
    assert is_complete(jobs, world)
    assert [r.message for r in summary.retries] == []
    assert started(world).count("a") == 2


def test_a_cancelled_trials_evaluations_come_back_with_it() -> None:
    jobs = [trial("a", 100), trial("b", 100)]
    world = cluster(jobs, cpus=2, exports=((0.5, 50), (1.0, 100)))
    steps = iter([Changes(dropped={"a": "cancelled"}), Changes(), Changes(added=(jobs[0],))])
    world.changes = lambda: next(steps, Changes())  # type: ignore[method-assign]
    run_jobs(jobs, world, world, Scheduler(waiting_trials(jobs, world)))
    assert is_complete(jobs, world)


@pytest.mark.parametrize("how", ["out of memory", "dropped and wanted again"])
def test_a_trial_that_comes_back_before_the_one_with_the_reservation_starts(how: str) -> None:
    """Both want the only device: the reservation of the one is taken over by the other, which must then be placed."""
    big, small = trial("big", 50), trial("small", 5)
    scheduler, nodes = Scheduler([big, small]), {"n": ONE}
    assert [p.job.key for p in scheduler.choose(nodes, 0.0)] == ["big"]
    if how == "out of memory":
        scheduler.ended(Outcome(big, "out_of_memory", "oom"), 2.0, remedy="micro-batch 4 instead of 8")
    else:
        scheduler.drop("big", "cancelled")
        scheduler.choose(nodes, 1.0)
        scheduler.add_trials([big])
        scheduler.ended(Outcome(big, "stopped"), 2.0)
    assert [p.job.key for p in scheduler.choose(nodes, 2.0)] == ["big"]


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_every_trial_ends(seed: int) -> None:
    """Nodes come and go, jobs fail, trials are cancelled, wanted again and given other priorities, at random."""
    import random

    draw = random.Random(seed)
    pair = (Shape(Resources(2), 2, 4), Shape(Resources(2), 1, 2))
    shapes = [(Shape(ONE),), (Shape(Resources(2)),), pair, (Shape(Resources(4)),)]
    jobs = [trial(f"t{i}", draw.uniform(1, 40), *draw.choice(shapes), priority=draw.randint(0, 2)) for i in range(15)]
    nodes = {f"n{i}": Resources(4) for i in range(3)}
    events = [NodeEvent(draw.uniform(0, 60), f"n{draw.randint(0, 2)}") for _ in range(4)]
    events += [NodeEvent(70.0 + i, node, has) for i, (node, has) in enumerate(nodes.items())]
    exports = ((0.3, 1), (0.6, 2), (1.0, 3))
    ends: list[Status] = ["done", "done", "failed", "lost", "no_space", "stopped", "out_of_memory"]

    def fate(job: Job, attempt: int) -> Status:
        return draw.choice(ends) if attempt < 3 else "done"

    world = cluster(jobs, nodes=nodes, exports=exports, fate=fate, node_events=tuple(events))
    world.shrink_micro_batch = lambda trial: "halved"  # type: ignore[method-assign]
    away: dict[str, TrialJob] = {}

    def changes() -> Changes:
        if draw.random() < 0.9:
            return Changes()
        if away:
            _, job = away.popitem()
            return Changes(added=(replace(job, priority=draw.randint(0, 2)),))
        job = draw.choice(jobs)
        if job.key in world.done or world.clock > 200:
            return Changes()
        away[job.key] = job
        return Changes(dropped={job.key: "cancelled"})

    world.changes = changes  # type: ignore[method-assign]
    scheduler = Scheduler(waiting_trials(jobs, world), retry=RetryPolicy(attempts=50, losses=50))
    turns = 0

    def too_long() -> bool:
        nonlocal turns
        turns += 1
        return turns > 20_000

    summary = run_jobs(jobs, world, world, scheduler, stop_requested=too_long)
    assert not summary.stopped
    assert {job.key for job in jobs} - world.done <= away.keys()
    for node in nodes:
        mine = [span for span in world.spans if span.node == node]
        for moment in {span.start for span in mine}:
            held = sum((s.resources for s in mine if s.start <= moment < s.end), Resources())
            assert held.fits_in(Resources(4))


def test_pauses_end_growing_and_never_overflow() -> None:
    troubles = Troubles(RetryPolicy(longest_pause=60.0))
    job = trial("a", 1)
    for i in range(3000):
        verdict = troubles.verdict(Outcome(job, "no_space"), i, float(i), progress=0, remedy=None)
        assert isinstance(verdict, Retry)
    assert isinstance(verdict, Retry)
    assert verdict.pause == 60.0


def test_a_trial_that_was_interrupted_does_not_lose_its_turn() -> None:
    jobs = [trial("a", 40), trial("b", 35), trial("c", 30), trial("d", 30)]
    exports = ((0.9, 9), (1.0, 10))
    world = cluster(jobs, cpus=1, exports=exports, fate=lambda job, n: "lost" if job.key == "a" and n == 1 else "done")
    world.evaluations = lambda name, nimg: []
    world.job = lambda name: replace(world.trials[name].job, seconds=4.0)  # type: ignore[method-assign]
    drive(world, jobs)
    assert started(world) == ["a", "b", "a", "c", "d"]  # a waits five seconds, in which b begins


def test_higher_priority_goes_first_whatever_its_length() -> None:
    jobs = [trial("long", 50), trial("urgent", 5, priority=3), trial("middle", 20)]
    world = cluster(jobs, cpus=1)
    drive(world, jobs)
    assert started(world) == ["urgent", "long", "middle"]


def test_evaluations_hold_no_more_than_their_share_while_trials_wait() -> None:
    jobs = [trial(f"t{i}", 10) for i in range(12)]
    exports = tuple((k / 40, k) for k in range(1, 41))
    world = cluster(jobs, cpus=4, exports=exports)
    held: list[tuple[float, int]] = []
    scheduler = Scheduler(waiting_trials(jobs, world), eval_share=0.25)
    original = world.wait

    def wait(seconds: float) -> list[Outcome]:
        evaluating = sum("/" in key for key in scheduler.running)
        held.append((scheduler.num_waiting[0], evaluating))
        return original(seconds)

    world.wait = wait  # type: ignore[method-assign]
    run_jobs(jobs, world, world, scheduler)
    assert is_complete(jobs, world)
    assert max(evaluating for waiting, evaluating in held if waiting) == 1
    assert max(evaluating for waiting, evaluating in held if not waiting) == 4  # then all devices are theirs


def test_a_lost_node_costs_what_came_after_the_last_checkpoint() -> None:
    jobs = [trial("a", 100)]
    events = (NodeEvent(55.0, "n0"), NodeEvent(60.0, "n1", ONE))
    world = cluster(jobs, exports=((0.5, 50), (1.0, 100)), nodes={"n0": ONE}, node_events=events)
    summary = drive(world, jobs)
    assert [(r.status, r.job.key) for r in summary.retries] == [("lost", "a")]
    assert [node for node, _, _ in spans_of(world, "a")] == ["n0", "n1"]
    assert spans_of(world, "a")[1][2] == pytest.approx(110.0, abs=1)  # 60 + the second half


def test_machines_that_are_taken_away_every_hour_do_not_end_a_trial_that_moves_on() -> None:
    jobs = [trial("a", 1000)]
    exports = tuple((k / 100, k) for k in range(1, 101))
    events = []
    for i in range(30):
        events += [NodeEvent(40.0 * i + 35, "n"), NodeEvent(40.0 * i + 36, "n", ONE)]
    world = cluster(jobs, exports=exports, nodes={"n": ONE}, node_events=tuple(events))
    summary = drive(world, jobs, losses=3)
    assert len(summary.retries) > 20
    assert not summary.failures
    assert "a" in world.done


def test_a_trial_goes_on_with_fewer_processes_when_its_devices_do_not_come_back() -> None:
    two, one = Shape(Resources(cpus=2), num_processes=2), Shape(ONE, num_processes=1)
    jobs = [trial("a", 100, two, one)]
    events = (NodeEvent(51.0, "n0"), NodeEvent(51.0, "n1", ONE))
    exports = ((0.5, 50), (1.0, 100))
    world = cluster(jobs, exports=exports, nodes={"n0": Resources(cpus=2)}, node_events=events)
    drive(world, jobs)
    second = spans_of(world, "a")[1]
    assert second[0] == "n1"
    assert second[1] >= 50 + 120  # they had time to come back
    assert second[2] - second[1] == pytest.approx(100)  # the other half, at half the speed


def test_a_disk_that_is_full_is_waited_for() -> None:
    jobs = [trial("a", 10)]
    world = cluster(jobs, fate=lambda job, attempt: "no_space" if attempt < 9 else "done")
    summary = drive(world, jobs, attempts=2)
    assert not summary.failures
    assert [r.pause for r in summary.retries][:3] == [5.0, 10.0, 20.0]
    assert max(r.pause for r in summary.retries) == 300.0


def test_one_job_tries_a_disk_that_was_full_for_all() -> None:
    jobs = [trial(f"t{i}", 30) for i in range(8)]
    freed = 100.0

    def fate(job: Job, attempt: int) -> Status:
        return "no_space" if world.clock < freed else "done"

    world = cluster(jobs, cpus=8, fate=fate)
    summary = drive(world, jobs)
    assert not summary.failures
    assert is_complete(jobs, world)
    first = [when for when, event, _ in world.log if event == "start"]
    assert first[:8] == [0.0] * 8
    while_full = [when for when in first[8:] if when < freed]
    assert 1 <= len(while_full) <= 4  # instead of all eight again and again
    assert len(set(while_full)) == len(while_full)


def test_a_diverged_trial_ends_for_good_and_the_study_goes_on() -> None:
    jobs = [trial("bad", 10), trial("good", 5)]
    world = cluster(jobs, fate=lambda job, attempt: "diverged" if job.key == "bad" else "done")
    summary = drive(world, jobs)
    assert [(f.job.key, f.state, f.attempts) for f in summary.failures] == [("bad", "diverged", 1)]
    assert world.verdicts == {"bad": "diverged"}
    assert is_complete(jobs, world)


def test_out_of_memory_is_mended_once() -> None:
    jobs = [trial("a", 10)]
    world = cluster(jobs, fate=lambda job, attempt: "out_of_memory")
    remedies = iter(["micro-batch 4 instead of 8"])
    world.shrink_micro_batch = lambda trial: next(remedies, None)  # type: ignore[method-assign]
    summary = drive(world, jobs)
    assert [(r.status, r.pause, r.message) for r in summary.retries] == [
        ("out_of_memory", 0.0, "simulated out_of_memory; micro-batch 4 instead of 8")
    ]
    assert [f.attempts for f in summary.failures] == [2]


def test_trials_come_and_go_while_a_study_runs() -> None:
    jobs = [trial("a", 10), trial("b", 20), trial("c", 15)]
    world = cluster(jobs, cpus=1)
    new = trial("new", 5)
    world.trials["new"] = SimulatedTrial(new, ())
    changes = iter([Changes(), Changes(added=(new,), dropped={"a": "cancelled", "b": "cancelled"})])
    world.changes = lambda: next(changes, Changes())  # type: ignore[method-assign]
    scheduler = Scheduler(waiting_trials(jobs, world))
    summary = run_jobs(jobs, world, world, scheduler)
    assert not summary.failures
    assert started(world) == ["b", "c", "new"]
    assert world.done == {"b", "c", "new"}
    assert scheduler.finished


def test_packing_is_close_to_what_no_schedule_can_beat() -> None:
    sizes = [(Resources(cpus=4, gpus=1), 20.0), (Resources(cpus=8, gpus=2), 50.0), (Resources(cpus=32, gpus=8), 90.0)]
    jobs = [trial(f"t{i}", sizes[i % 3][1] + i % 7, sizes[i % 3][0]) for i in range(60)]
    nodes = {f"n{i}": EIGHT_GPUS for i in range(4)}
    world = cluster(jobs, exports=((0.5, 1), (1.0, 2)), nodes=nodes)
    drive(world, jobs)
    bound = lower_bound(list(world.trials.values()), nodes, evaluations)
    assert bound <= world.clock < 1.15 * bound


@pytest.mark.parametrize("seed", range(5))
def test_no_node_ever_holds_more_than_it_has(seed: int) -> None:
    import random

    draw = random.Random(seed)
    jobs = [trial(f"t{i}", draw.uniform(1, 30), Resources(draw.randint(1, 4), draw.randint(0, 2))) for i in range(40)]
    nodes = {f"n{i}": Resources(draw.randint(4, 8), draw.randint(2, 4)) for i in range(4)}
    events = (NodeEvent(20.0, "n0"), NodeEvent(40.0, "n0", nodes["n0"]))
    world = cluster(
        jobs, exports=((0.5, 1), (1.0, 2)), nodes=nodes, node_events=events,
        fate=lambda job, attempt: draw.choice(["done", "done", "done", "failed", "lost"]) if attempt < 3 else "done",
    )  # fmt: skip
    drive(world, jobs, attempts=10)
    assert is_complete(jobs, world)
    for node, has in nodes.items():
        mine = [span for span in world.spans if span.node == node]
        for moment in {span.start for span in mine}:
            held = sum((s.resources for s in mine if s.start <= moment < s.end), Resources())
            assert held.fits_in(has), (node, moment)


def test_decisions_do_not_grow_with_the_square_of_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in questions whether something fits, a job, on a cluster that grows with the study."""
    asked = 0
    fits_in = Resources.fits_in

    def counting(need: Resources, free: Resources) -> bool:
        nonlocal asked
        asked += 1
        return fits_in(need, free)

    monkeypatch.setattr(Resources, "fits_in", counting)

    def questions_a_job(num: int) -> float:
        nonlocal asked
        shapes = [Resources(cpus=4, gpus=1), Resources(cpus=8, gpus=2), Resources(cpus=32, gpus=8)]
        jobs = [trial(f"t{i}", 100.0 + i % 7, shapes[i % 3]) for i in range(num)]
        nodes = {f"n{i}": EIGHT_GPUS for i in range(num // 8)}
        world = cluster(jobs, exports=tuple((k / 10, k) for k in range(1, 11)), nodes=nodes)
        asked = 0
        drive(world, jobs)
        assert len(world.done) == 11 * num
        return asked / (11 * num)

    assert questions_a_job(800) < 2 * questions_a_job(80)
