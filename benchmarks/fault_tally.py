"""The tally of rehearsals as a page: `python -m benchmarks.fault_tally TALLY.json [...] --out docs/faults.md`."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.fault_kinds import FAULTS
from benchmarks.fault_tables import TOLERANCE
from data_pipeline.errors import run_cli
from data_pipeline.files import write_atomic

_GIVEN_BY_RAY = re.compile(r"The actor [0-9a-f]{16,}")  # a number, without which messages are alike

INTRODUCTION = f"""# Faults injected, and survived

This page is written by a script that anyone can run; it ends with exit code 1 if anything below is not as it should be:

```
python -m benchmarks.faults --rounds 2 --out faults.md            # nodes are processes of this machine
python -m benchmarks.faults --rounds 2 --hosts --out hosts.md     # nodes are network namespaces (Linux, root)
python -m benchmarks.fault_tally faults.json hosts.json --out docs/faults.md
```

It runs `python -m cluster.study run` on a real Ray of a head and several nodes, once undisturbed and then under faults,
which come one after the other in one run of the study. A seed decides their order, their moments (by progress of the
training), their victims and how long they last. Nothing in the study knows of them. A fault counts as survived when

- the work that it interrupted went on, without anybody's help, until every trial that it struck was further than before
  (where all were struck, with their driver, one of them); only a killed driver and a killed MLflow server are started
  again, by the command that started them;
- nothing that had been finished before it (a trial, an evaluation) was made again: the files are the same;
- the study's journal says which job was tried again, and why, where one was (not for a killed driver, a frozen process
  or a killed tracker: they leave no job that has failed).

A study counts as good when all faults were survived and, in the end, its table has the very points of the undisturbed
one: bit for bit, or, behind the point at which a fault changed a trial's layout (its number of processes), within
{TOLERANCE} bits/dim; when there is one result of each evaluation; when MLflow holds each point once, with the table's
value; and when no process of the study is left.
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fault_tally", description=__doc__)
    parser.add_argument("tallies", nargs="+", type=Path, help="JSON files that benchmarks.faults wrote")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file")
    args = parser.parse_args()
    write_atomic(args.out, page([json.loads(path.read_text()) for path in args.tallies]))
    return 0


def page(tallies: Sequence[dict[str, Any]]) -> str:
    """`benchmarks.faults.rehearse`'s tallies as one page."""
    return "\n".join([INTRODUCTION, *(markdown(tally) for tally in tallies)])


def markdown(tally: dict[str, Any]) -> str:
    """One tally as tables."""
    parts = [f"## {_title(tally)}", _about(tally), _kinds(tally), _rounds(tally)]
    parts += [_faults(one) for one in tally["rounds"]]
    parts += [f"Not struck: {kind}: {why}." for kind, why in tally["skipped"].items()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(tally: dict[str, Any]) -> str:
    where = "hosts in network namespaces" if tally["hosts"] else "nodes on one machine"
    wide = tally["scale"]["processes"]
    return f"{where[0].upper()}{where[1:]}, {'one process a trial' if wide == 1 else f'{wide} processes a trial'}"


def _about(tally: dict[str, Any]) -> str:
    scale = tally["scale"]
    trials = len(scale["sizes"]) * len(scale["seeds"])
    wide = f", each on {scale['processes']} nodes" if scale["processes"] > 1 else ""
    return (
        f"{trials} trials of {scale['budget']:,} images{wide}, a checkpoint every {scale['checkpoint']} images, "
        f"{tally['nodes']} nodes of {tally['cpus']} logical CPUs on {tally['cores']} cores in all. {tally['versions']}."
    )


def _kinds(tally: dict[str, Any]) -> str:
    """One line a kind of fault."""
    struck = [one for found in tally["rounds"] for one in found["struck"]]
    rows = []
    for name in dict.fromkeys(one["kind"] for one in struck):
        mine = [one for one in struck if one["kind"] == name]
        back = [one["back"] for one in mine if one["back"] is not None]
        seconds = f"{median(back):.0f} s" + (f" (largest {max(back):.0f} s)" if len(back) > 1 else "") if back else "-"
        survived = sum(one["survived"] for one in mine)
        rows.append([FAULTS[name].about, len(mine), survived, sum(len(one["told"]) for one in mine), seconds])
    rows.append(["**all**", len(struck), sum(one["survived"] for one in struck), "", ""])
    return _table(["fault", "struck", "survived", "jobs tried again", "work further than before it after"], rows)


def _rounds(tally: dict[str, Any]) -> str:
    """One line a study."""
    usual = tally["undisturbed"]["seconds"]
    rows: list[list[Any]] = [["undisturbed", 0, f"{usual:.0f} s", "", "", "", ""]]
    for found in tally["rounds"]:
        compared = found["comparison"]
        same = f"{compared['num_identical']} of {compared['num_points']}" if compared else "no table"
        relaid = str(compared["num_relaid"]) if compared else ""
        largest = f"{compared['largest']:.1e}" if compared and compared["num_relaid"] else "-"
        good = "yes" if found["good"] else "NO"
        seconds = f"{found['seconds']:.0f} s"
        rows.append([f"seed {found['seed']}", len(found["struck"]), seconds, same, relaid, largest, good])
    header = [
        "study", "faults", "time", "points identical", "points behind another layout",
        "their largest difference (bits/dim)", "good",
    ]  # fmt: skip
    return _table(header, rows)


def _faults(found: dict[str, Any]) -> str:
    """What happened in one study, fault by fault."""
    rows = [
        [
            f"{one['at']:.0f} s", one["kind"], one["what"], f"{one['away']:.0f} s" if one["away"] else "",
            f"{one['back']:.0f} s" if one["back"] is not None else "never",
            _again(one["told"]), "yes" if one["survived"] else "NO",
        ]
        for one in found["struck"]
    ]  # fmt: skip
    header = ["at", "fault", "what was struck", "lasted", "back after", "tried again, and why", "survived"]
    notes = "\n".join(f"- {_short(text, 300)}" for text in _notes(found))
    return "\n\n".join([f"Seed {found['seed']}:", _table(header, rows), *([notes] if notes else [])])


def _again(told: Sequence[str]) -> str:
    """Jobs that were tried again, those with the same message together."""
    jobs: dict[str, list[str]] = {}
    for text in told:
        key, _, message = text.partition(": ")
        jobs.setdefault(_short(_GIVEN_BY_RAY.sub("The actor", message)), []).append(key.split("/")[0])
    parts = []
    for message, names in jobs.items():
        who = ", ".join(f"{name} ({names.count(name)}×)" for name in dict.fromkeys(names))
        parts.append(f"{who}: {message}")
    return "; ".join(parts) or "-"


def _notes(found: dict[str, Any]) -> Iterable[str]:
    yield from found["problems"]
    for one in found["struck"]:
        yield from (f"after {one['kind']}: {end}" for end in one["ends"])
        yield from (f"after {one['kind']}: made again: {name}" for name in one["repeated"])
    yield from (f"{kind}: found nothing to strike" for kind in found["unstruck"])
    yield from (found["comparison"] or {}).get("wrong", ())
    yield from (f"another layout: {what}" for what in (found["comparison"] or {}).get("relaid", ()))


def _short(text: str, width: int = 110) -> str:
    flat = " ".join(text.split()).replace("|", "\\|")
    return flat if len(flat) <= width else flat[: width - 3] + "..."


def _table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    run_cli(main)
