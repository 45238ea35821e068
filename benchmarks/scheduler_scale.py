"""The real scheduler and driver on a simulated cluster, up to 3,000 trials on 3,000 GPUs: what does deciding cost?

    python -m benchmarks.scheduler_scale [--trials 100 300 1000 3000] [--json FILE]

Trials of six sizes (one GPU to two whole nodes) with ten evaluations each, as many GPUs as trials in nodes of eight,
and one trial in twenty that loses its node or fails on the way. Reported are the driver's CPU time for each job that it
placed and saw end, its memory, and the makespan against a bound that no schedule can go below. A cost a job that does
not grow with the study is what "no quadratic blow-up" means.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
import zlib
from pathlib import Path

from cluster.planning.plan import format_table
from cluster.scheduling.driver import run_jobs, waiting_trials
from cluster.scheduling.jobs import EvalJob, Job, Resources, Shape, Status, TrialJob
from cluster.scheduling.scheduler import Scheduler
from cluster.scheduling.simulate import SimulatedCluster, SimulatedTrial, lower_bound, simulated_eval

NUM_EVALUATIONS = 10  # a trial
GPUS_A_NODE = 8
NODE = Resources(cpus=96, gpus=GPUS_A_NODE)
# (GPUs, hours) of the ladder's rungs: the large ones train longer, on more devices.
RUNGS = ((1, 4.0), (1, 6.0), (2, 8.0), (4, 10.0), (8, 12.0), (16, 16.0))


def shape(gpus: int) -> Shape:
    nodes = max(1, gpus // GPUS_A_NODE)
    return Shape(Resources(cpus=12 * gpus / nodes, gpus=gpus / nodes), nodes, gpus)


def study(num_trials: int, seed: int = 0) -> SimulatedCluster:
    """Trials, their evaluations and the cluster."""
    draw = random.Random(seed)
    exports = tuple(((k + 1) / NUM_EVALUATIONS, k + 1) for k in range(NUM_EVALUATIONS))
    trials = {}
    for i in range(num_trials):
        gpus, hours = RUNGS[i % len(RUNGS)]
        job = TrialJob(
            f"t{i}", Path(f"t{i}"), (shape(gpus),), 3600 * hours * draw.uniform(0.8, 1.2), draw.randint(0, 2)
        )
        trials[job.key] = SimulatedTrial(job, exports)

    def evaluations(trial: str, nimg: int) -> list[EvalJob]:
        return [simulated_eval(trial, nimg, shape=shape(1), seconds=900.0)]

    def fate(job: Job, attempt: int) -> Status:
        return "lost" if attempt == 1 and zlib.crc32(job.key.encode()) % 20 == seed else "done"

    nodes = {f"n{i}": NODE for i in range(max(2, num_trials // GPUS_A_NODE))}
    return SimulatedCluster(nodes, trials, evaluations, fate)


def measure(num_trials: int) -> dict[str, float]:
    """One study, in this process."""
    world = study(num_trials)
    jobs = [trial.job for trial in world.trials.values()]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    run_jobs(jobs, world, world, Scheduler(waiting_trials(jobs, world)))
    seconds = time.process_time() - began
    bound = lower_bound(list(world.trials.values()), world.devices, world.evaluations)
    num_jobs = num_trials * (1 + NUM_EVALUATIONS)
    assert len(world.done) == num_jobs
    return {
        "trials": num_trials, "evaluations": num_trials * NUM_EVALUATIONS,
        "gpus": len(world.devices) * GPUS_A_NODE, "cpu_seconds": seconds, "ms_a_job": 1000 * seconds / num_jobs,
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "grown_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3,
        "makespan_hours": world.clock / 3600, "over_bound": world.clock / bound,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 300, 1000, 3000])
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # a process of its own for each: memory is a peak
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args.one)))
        return
    found = []
    for num in args.trials:
        command = [sys.executable, "-m", "benchmarks.scheduler_scale", "--one", str(num)]
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    header = ["trials", "evaluations", "GPUs", "CPU s", "ms a job", "memory MB", "of it the study", "hours", "x bound"]
    rows = [
        [f"{r['trials']:,}", f"{r['evaluations']:,}", f"{r['gpus']:,}", f"{r['cpu_seconds']:.2f}",
         f"{r['ms_a_job']:.3f}", f"{r['memory_mb']:.0f}", f"{r['grown_mb']:.0f}", f"{r['makespan_hours']:.1f}",
         f"{r['over_bound']:.3f}"]
        for r in found
    ]  # fmt: skip
    print(format_table(header, rows))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
