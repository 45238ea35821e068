"""Run, plan, watch, change and report a study:

    python -m cluster.study plan    STUDY.yaml [--figure FILE.png] [--json]
    python -m cluster.study run     STUDY.yaml [--address ADDR] [--root DIR] [--out DIR] [key=value ...]
    python -m cluster.study submit  STUDY.yaml --address http://HOST:8265 [--root DIR] [--env NAME] [--follow]
    python -m cluster.study status  STUDY.yaml [--watch]
    python -m cluster.study logs    STUDY.yaml [--trial TRIAL] [--follow]
    python -m cluster.study update  STUDY.yaml [key=value ...]
    python -m cluster.study cancel  STUDY.yaml [--trial TRIAL ...]
    python -m cluster.study restart STUDY.yaml --trial TRIAL ...
    python -m cluster.study report  STUDY.yaml

`run` goes on where it stopped and repeats nothing finished. Without --address it starts a Ray of its own here. While it
runs, its study file may be edited (sizes and seeds added, priorities changed), here or by `update` from elsewhere;
`cancel` ends trials, or without --trial asks the driver to save and end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.heartbeat import heartbeat
from data_pipeline.errors import UserError, run_cli
from data_pipeline.files import mark_of

if TYPE_CHECKING:  # torch, which counts the FLOPs, takes seconds to import
    from cluster.definition.spec import StudyConfig
    from cluster.definition.trials import Trial
    from cluster.files.folder import StudyFolder

# Which actions an option has a meaning for.
_MEANT_FOR = {
    "address": ("run", "submit"), "env": ("submit",), "follow": ("submit", "logs"),
    "trial": ("logs", "cancel", "restart"), "watch": ("status",), "figure": ("plan",), "json": ("plan",),
}  # fmt: skip


def main() -> int:
    args = _arguments()
    file = args.study.absolute()
    if args.action == "submit":
        from cluster.submit import submit_study

        return submit_study(
            file, address=args.address, root=args.root, out=args.out, overrides=args.overrides, env=args.env,
            follow=args.follow,
        )  # fmt: skip
    read_at = mark_of(file)
    with heartbeat("reading the study"):
        study, trials = _load(file, args.overrides)
        if args.root is not None:
            _enter(args.root)
        folder = _folder(args, study, trials)
    if args.action == "run":
        return _run(args, folder, file, read_at)
    return _ACTIONS[args.action](args, folder)


def _run(args: argparse.Namespace, folder: StudyFolder, file: Path, read_at: tuple[int, int] | None) -> int:
    from cluster.files.edits import Edits
    from cluster.run import run_study

    with folder.lock():
        edits = Edits(folder, file, lambda path: _load(path, args.overrides if path == file else []), read_at=read_at)
        return run_study(folder, edits, address=args.address, command=_command(args))


def _plan(args: argparse.Namespace, folder: StudyFolder) -> int:
    from cluster.planning.fits import check_fits_storage
    from cluster.planning.plan import plan_report

    trials = list(folder.trials.values())
    report = plan_report(folder.study, trials)
    print(json.dumps(report.to_json(), indent=2) if args.json else report.text())
    if args.figure is not None:
        try:
            report.figure(args.figure)
        except ValueError as error:  # matplotlib's, which names the formats that it knows
            raise UserError(f"--figure {args.figure}: {error}") from None
        print(f"figure: {args.figure}", file=sys.stderr)
    try:
        check_fits_storage(folder.study, trials, folder.path)
    except UserError as error:
        if args.out is not None:
            raise
        print(f"warning: {error}", file=sys.stderr)  # it may well be meant for another machine
    return 0


def _status(args: argparse.Namespace, folder: StudyFolder) -> int:
    from cluster.watching.status_table import status_table, watch

    if args.watch:
        watch(folder)
    else:
        print(status_table(folder))
    return 0


def _logs(args: argparse.Namespace, folder: StudyFolder) -> int:
    from cluster.watching.logs import show_logs

    show_logs(folder, _known(args.trial, folder), follow=args.follow)
    return 0


def _report(args: argparse.Namespace, folder: StudyFolder) -> int:
    from cluster.run import show_report

    with folder.lock():
        show_report(folder)
    return 0


def _update(args: argparse.Namespace, folder: StudyFolder) -> int:
    from cluster.definition.portable import save_portable
    from cluster.files.edits import NEXT

    driver = _driver(folder, "there is nothing to tell: `run` reads the file anyway")
    save_portable(folder.study, folder.path, NEXT)
    print(f"told {driver}: it takes the study file over, or says in its output and in `status` why not")
    return 0


def _cancel(args: argparse.Namespace, folder: StudyFolder) -> int:
    from cluster.files.verdicts import ask_to_stop, write_verdict

    if not args.trial:
        driver = _driver(folder, "there is nothing to stop")
        ask_to_stop(folder.path)
        print(f"asked {driver} to save what is running and to end; `run` goes on from there")
        return 0
    for name in _known(args.trial, folder):
        record = folder.last_record(name)
        verdict = write_verdict(folder.run_folder(name), "cancelled", "by request", record.nimg if record else 0)
        print(f"{name}: {verdict.state} at {verdict.nimg:,} images ({verdict.reason}); `restart` takes it back")
    return 0


def _restart(args: argparse.Namespace, folder: StudyFolder) -> int:
    from cluster.files.verdicts import remove_verdict

    if not args.trial:
        raise UserError("restart needs --trial NAME: `status` shows which trials were cancelled or diverged.")
    for name in _known(args.trial, folder):
        removed = remove_verdict(folder.run_folder(name))
        print(
            f"{name}: "
            + ("goes on with the next `run`, or at once where one is under way" if removed else "was not ended")
        )
    return 0


_ACTIONS = {
    "plan": _plan, "status": _status, "logs": _logs, "report": _report, "update": _update, "cancel": _cancel,
    "restart": _restart,
}  # fmt: skip


def _load(file: Path, overrides: list[str]) -> tuple[StudyConfig, list[Trial]]:
    from cluster.definition.spec import load_study
    from cluster.definition.trials import make_trials

    study = load_study(file, overrides)
    return study, make_trials(study)


def _folder(args: argparse.Namespace, study: StudyConfig, trials: list[Trial]) -> StudyFolder:
    from cluster.files.folder import StudyFolder

    return StudyFolder(args.out or Path("runs") / study.name, study, trials)


def _enter(root: Path) -> None:
    try:
        os.chdir(root)
    except OSError as error:
        raise UserError(f"--root {root}: {error.strerror}; name a folder that all nodes see.") from None


def _driver(folder: StudyFolder, otherwise: str) -> str:
    driver = folder.driver()
    if driver is None:
        raise UserError(f"nobody drives the study in {folder.path}: {otherwise}.")
    return driver


def _known(names: list[str], folder: StudyFolder) -> list[str]:
    for name in names:
        if name not in folder.trials:
            raise UserError(f"--trial {name}: there is no such trial; known: {', '.join(folder.trials)}.")
    return names


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = ("run", "submit", *_ACTIONS)
    parser.add_argument("action", choices=actions)
    parser.add_argument("study", type=Path, help="a study's YAML file, such as those in configs/studies")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces the file's value")
    parser.add_argument("--address", help="of a Ray cluster, such as auto or HOST:6379 (default: this machine); of its "
                        "job server, http://HOST:8265, for submit")  # fmt: skip
    parser.add_argument("--root", type=Path, help="folder that relative paths of data and runs begin in, on all nodes")
    parser.add_argument("--out", type=Path, help="folder of the study (default: runs/NAME)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME", help="environment variable to hand on")
    parser.add_argument("--trial", action="append", default=[], metavar="NAME", help="which trial; may be repeated")
    parser.add_argument("--follow", action="store_true", help="show new output until the end")
    parser.add_argument("--watch", action="store_true", help="show the table again and again")
    parser.add_argument("--figure", type=Path, help="file for a picture of the schedule")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    args = parser.parse_intermixed_args()
    for option, meant_for in _MEANT_FOR.items():
        if getattr(args, option) and args.action not in meant_for:
            raise UserError(f"--{option} has no meaning for {args.action!r}, but for {' and '.join(meant_for)}.")
    if args.action == "submit" and not args.address:
        raise UserError("submit needs --address http://HOST:8265, where the cluster's job server is.")
    return args


def _command(args: argparse.Namespace) -> str:
    """The command that continues."""
    words = ["python -m cluster.study run", str(args.study), *args.overrides]
    for option in ("address", "root", "out"):
        value = getattr(args, option)
        words += [f"--{option}", str(value)] if value else []
    return " ".join(words)


if __name__ == "__main__":
    run_cli(main)
