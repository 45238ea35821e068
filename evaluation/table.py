"""A table of all that was measured of runs or exports.

python -m evaluation.table RUN [RUN ...]
python -m evaluation.table STUDY
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from data_pipeline.errors import UserError, run_cli
from evaluation.report.tables import metrics_table
from trainer.tracking.records import EvalRecord, read_eval_records, read_result


def records_in(folder: Path) -> list[EvalRecord]:
    """The evaluation records of a run, of all runs of a study, or of an export that lies alone; runs by folder name.

    Raises UserError where there are none.
    """
    if (folder.resolve().parent.parent / "run.json").exists():  # an export of a run
        folder = folder.resolve().parent.parent
    runs = sorted(path.parent for path in folder.glob("trials/*/run.json")) or [folder]
    records = [dataclasses.replace(record, run=run.name) for run in runs for record in read_eval_records(run)]
    for path in sorted(folder.glob("evals/*.json")):
        records += [dataclasses.replace(record, run=folder.name) for record in read_result(path)]
    if not records:
        raise UserError(f"{folder} holds no evaluations; make some: python -m evaluation.evaluate EXPORT --data SPLIT")
    return records


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="A table of all that was measured of runs or exports.")
    parser.add_argument("folders", type=Path, nargs="+", help="run folders, study folders, or exports")
    parser.add_argument("--json", action="store_true", help="print the records instead")
    a = parser.parse_args()
    records = [record for folder in a.folders for record in records_in(folder)]
    print(json.dumps([r.to_json() for r in records], indent=2) if a.json else metrics_table(records))
    return 0


if __name__ == "__main__":
    run_cli(main)
