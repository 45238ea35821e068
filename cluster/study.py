"""Run, plan, watch and report a study:

    python -m cluster.study run    STUDY.yaml [--address ADDR] [--out DIR] [key=value ...]
    python -m cluster.study plan   STUDY.yaml
    python -m cluster.study status STUDY.yaml
    python -m cluster.study report STUDY.yaml

`run` goes on where it stopped and repeats nothing finished. Without --address it starts a Ray of its own here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cluster.heartbeat import heartbeat
from data_pipeline.errors import UserError, run_cli


def main() -> int:
    args = _arguments()
    with heartbeat("reading the study"):  # torch, which counts the FLOPs, takes seconds to import
        from cluster import run
        from cluster.folder import StudyFolder
        from cluster.plan import plan_text
        from cluster.spec import load_study
        from cluster.trials import make_trials

        study = load_study(args.study, args.overrides)
        trials = make_trials(study)
        folder = StudyFolder(args.out or Path("runs") / study.name, study, trials)
    if args.action == "plan":
        print(plan_text(study, trials))
        return 0
    if args.action == "status":
        from cluster.display import status_table

        print(status_table(folder))
        return 0
    with folder.lock():
        if args.action == "report":
            run.show_report(folder)
            return 0
        return run.run_study(folder, address=args.address, command=_command(args))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("run", "plan", "status", "report"))
    parser.add_argument("study", type=Path, help="a study's YAML file, such as those in configs/studies")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces the file's value")
    parser.add_argument("--address", help="of a Ray cluster, such as auto or ray://HOST:10001 (default: this machine)")
    parser.add_argument("--out", type=Path, help="folder of the study (default: runs/NAME)")
    args = parser.parse_intermixed_args()
    if args.address is not None and args.action != "run":
        raise UserError(f"--address has no meaning for {args.action!r}: it reads files only.")
    return args


def _command(args: argparse.Namespace) -> str:
    """The command that continues."""
    words = ["python -m cluster.study run", str(args.study), *args.overrides]
    words += ["--address", args.address] if args.address else []
    words += ["--out", str(args.out)] if args.out else []
    return " ".join(words)


if __name__ == "__main__":
    run_cli(main)
