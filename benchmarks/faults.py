"""Whatever happens, the study finishes: `python -m benchmarks.faults [--rounds N] [--seed S] [--hosts] [--out FILE]`.

Runs a small study once undisturbed and then N times under faults, on a real Ray of several nodes on this machine, and
compares the final tables: bit for bit, or within 0.01 bits/dim behind a point where a fault changed a trial's layout.
The seed decides the order of the faults, the moments (by progress of the training) and the victims. Prints a tally and
writes it as Markdown, and as JSON beside it. `--hosts`: the nodes are network namespaces with cables (Linux, root).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.fault_cluster import LocalCluster, Nodes
from benchmarks.fault_kinds import FAULTS
from benchmarks.fault_round import Planned, Round, judge, plan, run_round
from benchmarks.fault_stage import Scale, make_data, stage
from benchmarks.fault_tally import markdown, page
from benchmarks.fault_watch import StudyWatch
from data_pipeline.errors import UserError, run_cli
from data_pipeline.files import write_atomic, write_json

KINDS = ("driver", "trainer", "node", "mlflow", "disk", "evaluator", "worker", "freeze", "head")
_ON_HOSTS = ("cable",)
# Where a trial has several processes, it can go on with fewer.
WIDE = ("long node",)


def main() -> int:
    args = _arguments()
    signal.signal(signal.SIGTERM, _end)
    scale = Scale(budget=args.budget, processes=args.processes)
    folder = Path(args.keep or tempfile.mkdtemp(prefix="faults-", dir=args.tmp))
    try:
        tally = rehearse(folder, args.kinds, rounds=args.rounds, seed=args.seed, scale=scale, hosts=args.hosts)
    finally:
        if args.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{markdown(tally)}")
    if args.out is not None:
        write_atomic(args.out, page([tally]))
        write_json(args.out.with_suffix(".json"), tally)
    return 0 if tally["good"] else 1


def _end(number: int, _frame: object) -> None:
    """Not without ending what was started, and asking again does not hurry that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + number)


def rehearse(
    folder: Path, kinds: Sequence[str], *, rounds: int, seed: int, scale: Scale, hosts: bool = False,
    num_nodes: int = 2, cpus: int = 2,
) -> dict[str, Any]:  # fmt: skip
    """One undisturbed study and `rounds` disturbed ones. Returns the tally, as plain data."""
    data = make_data(folder)
    play = _Rehearsal(folder, data, scale, kinds=kinds, hosts=hosts, num_nodes=num_nodes, cpus=cpus)
    undisturbed, reference = play.once("undisturbed", [], seed)
    results: list[Round] = []
    skipped: dict[str, str] = {}
    for number in range(rounds):
        seed_here = seed + number
        result, watch = play.once(f"round{number}", plan(_possible(kinds, play, skipped), seed_here), seed_here)
        judge(reference, watch, result)
        results.append(result)
    good = undisturbed.good and all(result.good for result in results)
    rows = [asdict(result) | {"good": result.good, "seed": seed + i} for i, result in enumerate(results)]
    for row, result in zip(rows, results, strict=True):
        row["struck"] = [asdict(one) | {"survived": one.survived} for one in result.struck]
    return {
        "good": good, "undisturbed": asdict(undisturbed), "rounds": rows, "skipped": skipped, "scale": asdict(scale),
        "nodes": num_nodes, "cpus": cpus, "hosts": hosts, "cores": os.cpu_count(), "versions": _versions(),
    }  # fmt: skip


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "deepspeed", "mlflow"))


def _possible(kinds: Sequence[str], play: _Rehearsal, skipped: dict[str, str]) -> list[str]:
    if play.no_disk:
        skipped |= {"disk": play.no_disk} if "disk" in kinds else {}
        return [kind for kind in kinds if kind != "disk"]
    return list(kinds)


class _Rehearsal:
    """Studies on fresh clusters, one after the other."""

    def __init__(
        self, folder: Path, data: Path, scale: Scale, *, kinds: Sequence[str], hosts: bool, num_nodes: int, cpus: int
    ) -> None:  # fmt: skip
        self._folder, self._data, self._scale, self._hosts = folder, data, scale, hosts
        self._kinds, self._num_nodes, self._cpus = kinds, num_nodes, cpus
        self.no_disk = ""

    def once(self, name: str, planned: Sequence[Planned], seed: int) -> tuple[Round, StudyWatch]:
        """One study on a cluster of its own. Its files are kept beside it, off its small disk."""
        print(f"{name}: {', '.join(f'{one.fault.name} at {one.at:.0%}' for one in planned) or 'no faults'}", flush=True)
        folder = self._folder / name
        with stage(
            folder,
            self._cluster,
            scale=self._scale,
            data=self._data,
            mlflow="mlflow" in self._kinds,
            small_disk="disk" in self._kinds,
        ) as there:
            self.no_disk = there.no_disk if there.disk is None else ""
            result = run_round(there, planned, seed=seed, say=lambda text: print(text, flush=True))
            kept = folder / "kept"
            shutil.copytree(there.watch.out, kept, ignore=shutil.ignore_patterns("*.safetensors", ".ballast"))
        print(f"{name}: {result.seconds:.0f} s, exit code {result.code}, {len(result.problems)} problems", flush=True)
        return result, StudyWatch(kept, budget=self._scale.budget, num_trials=self._scale.num_trials)

    def _cluster(self) -> Nodes:
        token = f"f{uuid.uuid4().hex[:8]}"
        if not self._hosts:
            return LocalCluster(token, num_nodes=self._num_nodes, cpus=self._cpus)
        from benchmarks.fault_hosts import HostCluster

        return HostCluster(token, num_nodes=self._num_nodes, cpus=self._cpus)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1, help="disturbed studies (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the next take the next numbers")
    parser.add_argument("--hosts", action="store_true", help="nodes as network namespaces with cables (Linux, root)")
    parser.add_argument("--kinds", nargs="*", metavar="KIND", help=f"faults of a round, of: {', '.join(FAULTS)}")
    parser.add_argument("--processes", type=int, default=2, help="of a trial, each on another node (default 2)")
    parser.add_argument("--budget", type=int, default=Scale.budget, help="images a trial (default %(default)s)")
    parser.add_argument("--out", type=Path, help="file for the tally (.md); the JSON goes beside it")
    parser.add_argument("--keep", type=Path, help="folder to keep everything in (default: a temporary one)")
    parser.add_argument("--tmp", type=Path, help="where that temporary folder is made")
    args = parser.parse_args()
    args.kinds = args.kinds or [*KINDS, *(_ON_HOSTS if args.hosts else ()), *(WIDE if args.processes > 1 else ())]
    unknown = [kind for kind in args.kinds if kind not in FAULTS]
    if unknown:
        raise UserError(f"--kinds {unknown[0]}: no such fault; there are {', '.join(FAULTS)}.")
    if "cable" in args.kinds and not args.hosts:
        raise UserError("--kinds cable: nodes have cables with --hosts only.")
    return args


if __name__ == "__main__":
    run_cli(main)
