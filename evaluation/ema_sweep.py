"""What is known of a run's averages of different length, as a table and a figure:

    python -m trainer.posthoc_ema RUN --sigma-rel 0.03 0.07 0.15
    for w in power_0.03 power_0.07 power_0.15; do
        python -m evaluation.evaluate RUN/posthoc_ema/000000008192 --data data/cifar10/test --metrics fd --weights $w
    done
    python -m evaluation.ema_sweep RUN

Takes every average of power profile that was evaluated at one moment, tracked ones too; those measured in the same way
are a curve. Of a length that was both tracked and reconstructed the tracked one counts, which is exact. The figure goes
to RUN/evals/<images seen>/ema_sweep.png or to --out.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from data_pipeline.errors import UserError, run_cli
from evaluation.report.ema_chart import Point, ema_chart
from evaluation.report.figures import draw, save_figure
from evaluation.report.tables import reconstruction
from evaluation.report.text_table import Table
from trainer.averages.rules import PowerProfile
from trainer.tracking.records import EvalRecord, read_eval_records


def curves(records: list[EvalRecord], at: int) -> list[list[Point]]:
    """What was measured at `at` images, by metric and way, each in order of length; single points are left out."""
    found: dict[str, dict[float, EvalRecord]] = defaultdict(dict)
    for record in sorted(records, key=lambda r: r.reconstructed is None):  # tracked ones come last, and so count
        profile = PowerProfile.from_name(str(record.measured.get("weights")))
        if record.nimg == at and profile is not None:
            way = {key: value for key, value in record.way.items() if key != "weights"}
            same = json.dumps([record.metric, record.split, record.data, record.seeds, way], sort_keys=True)
            found[same][profile.sigma_rel] = record
    return [sorted(points.items()) for points in found.values() if len(points) > 1]


def sweep_table(found: list[list[Point]]) -> str:
    """The same in words, the best value of each curve marked."""
    rows = []
    for curve in found:
        best = min(record.value for _, record in curve)
        for sigma_rel, record in curve:
            stderr = "" if record.stderr is None else f"± {record.stderr:.4f}"
            mark = "lowest" if record.value == best else ""
            words = [record.metric, record.split, f"{sigma_rel:g}", f"{record.value:.5g}", stderr]
            rows.append([*words, reconstruction(record), mark])
    return str(Table(["metric", "split", "sigma_rel", "value", "", "", ""], rows, left=(0, 1, 4, 5, 6)))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.ema_sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--at", type=int, metavar="IMAGES", help="images seen (default: the last evaluated)")
    parser.add_argument("--out", type=Path, help="the figure's file: .png, .svg or .pdf")
    args = parser.parse_args()
    records = read_eval_records(args.run)
    moments = {r.nimg for r in records if PowerProfile.from_name(str(r.measured.get("weights")))}
    at = args.at if args.at is not None else max(moments, default=0)
    found = curves(records, at)
    if not found:
        raise UserError(
            f"{args.run}: fewer than two averages of power profile were evaluated in the same way at {at:,} images; "
            "evaluate some with --weights power_0.05 and the like."
        )
    out = args.out or args.run / "evals" / f"{at:012d}" / "ema_sweep.png"
    save_figure(draw(ema_chart(found, title=f"Averages of the weights after {at:,} images")), out)
    print(sweep_table(found))
    print(f"figure: {out}")
    return 0


if __name__ == "__main__":
    run_cli(main)
