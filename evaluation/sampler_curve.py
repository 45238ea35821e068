"""What samplers make of one network with few network calls, as a figure.

    python -m evaluation.sampler_curve RUN/exports/000064000000 --data data/cifar10/test --calls 5,10,20,50,100 \\
        --samplers ddim,dpmpp_2m:logsnr,heun:karras,ancestral --metrics nll,fd --num-samples 5000 --out curve

Every sampler gets as many steps as fit into each number of calls, on the spacing behind its colon (default: even), and
its samples are measured as `evaluation.evaluate` measures them. `nll` is the bound of the chain with as many steps
(Nichol & Dhariwal 2021, section 4), which no sampler changes. The folder --out gets `curve.png`, `curve.json` and the
records, one file a measurement. What is there already is not measured again, so a command that was interrupted, or
that asks for more, goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_pipeline.errors import ConfigError, UserError, run_cli
from data_pipeline.files import write_json
from evaluation.evaluate import evaluate_to
from evaluation.nll.settings import NllSettings
from evaluation.report.figures import draw, save_figure
from evaluation.report.sampler_chart import CallPoint, sampler_chart
from evaluation.report.text_table import Table
from evaluation.request import ACCURACY, MEMORISATION, EvalRequest
from evaluation.results import key_of
from trainer.config.diffusion import DiffusionConfig
from trainer.config.sampling import SamplingConfig
from trainer.config.tree import validate
from trainer.diffusion.respacing import count_timesteps
from trainer.export import Export, open_export
from trainer.sampling import num_calls
from trainer.tracking.records import EvalRecord, read_result

BOUND = "bound of a chain of as many steps"


@dataclass(frozen=True)
class Way:
    """A sampler on a spacing: one line of the figure."""

    sampler: str
    spacing: str = ""  # what stands before the number of steps in a respacing

    @property
    def label(self) -> str:
        return f"{self.sampler} ({self.spacing})" if self.spacing else self.sampler

    def sampling(self, num_steps: int) -> SamplingConfig:
        """Raises ConfigError for a sampler that is not known."""
        settings = {"sampler": self.sampler, "respacing": f"{self.spacing}{num_steps}"}
        return validate(SamplingConfig, settings, source=f"--samplers {self.sampler}")

    def within(self, calls: int, diffusion: DiffusionConfig) -> SamplingConfig | None:
        """With the most steps that take at most so many network calls a sample; None where that is none."""
        for num_steps in range(calls, 0, -1):
            sampling = self.sampling(num_steps)
            if _fits(diffusion, sampling) and num_calls(diffusion, sampling) <= calls:
                return sampling
        return None


def _fits(diffusion: DiffusionConfig, sampling: SamplingConfig) -> bool:
    try:
        count_timesteps(diffusion.num_timesteps, sampling.respacing)
    except ConfigError:
        return False
    return True


def read_ways(text: str, num_timesteps: int) -> list[Way]:
    """`ddim,dpmpp_2m:logsnr` as ways. Raises UserError for none, ConfigError for samplers or spacings not known."""
    ways = [Way(*word.strip().split(":", 1)) for word in text.split(",") if word.strip()]
    if not ways:
        raise UserError("--samplers names none; give such as ddim,dpmpp_2m:logsnr.")
    for way in ways:
        count_timesteps(num_timesteps, way.sampling(2).respacing)
    return ways


def read_calls(text: str) -> list[int]:
    """`5,10,20` as numbers of network calls, ascending. Raises UserError for anything else."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) >= 1 for word in words):
        raise UserError(f"--calls {text}: numbers of network calls are expected, such as 5,10,20,50.")
    return sorted({int(word) for word in words})


def requests(
    base: EvalRequest, ways: Sequence[Way], calls: Sequence[int], export: Export
) -> Iterator[tuple[str, int, EvalRequest]]:  # fmt: skip
    """What is to be measured: the line it belongs to, its network calls a sample, the request.

    A number of calls too small for a sampler, or at which no spacing has steps, is left out of its line.
    """
    diffusion = export.config.diffusion
    kinds = tuple(metric for metric in base.metrics if metric != "nll")
    for num in calls:
        if "nll" in base.metrics and num <= diffusion.num_timesteps:
            yield BOUND, num, replace(base, metrics=("nll",), nll=replace(base.nll, respacing=str(num)))
        for way in ways if kinds else ():
            sampling = way.within(num, diffusion)
            if sampling is not None:
                yield way.label, num_calls(diffusion, sampling), replace(base, metrics=kinds, sampling=sampling)


def measure(
    export: Export, base: EvalRequest, ways: Sequence[Way], calls: Sequence[int], out: Path
) -> list[tuple[CallPoint, EvalRecord]]:  # fmt: skip
    """Measure what is not there yet; every point of the figure with its record."""
    found: list[tuple[CallPoint, EvalRecord]] = []
    for label, num, request in requests(base, ways, calls, export):
        result = out / "records" / f"{key_of(export, request)}.json"
        print(f"{label}, {num} calls a sample", flush=True)
        evaluate_to(result, export, request)
        for record in read_result(result):
            point = CallPoint(label, record.metric, num, record.value, record.stderr, record.details.get("floor"))
            found.append((point, record))
    return found


def _table(points: Sequence[CallPoint]) -> Table:
    rows = [
        [p.way, str(p.num_calls), p.metric, f"{p.value:.5g}", "" if p.stderr is None else f"{p.stderr:.2g}"]
        for p in sorted(points, key=lambda p: (p.metric, p.way, p.num_calls))
    ]
    return Table(["sampler", "calls", "metric", "value", "±"], rows, left=(0, 2))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.sampler_curve", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("export", type=Path, help="RUN/exports/<images seen>")
    add("--data", required=True, help="the data split that samples are compared with, or its URL")
    add("--samplers", default="ancestral,ddim,dpmpp_2m", help="comma-separated, each NAME or NAME:SPACING")
    add("--calls", default="5,10,20,50,100", help="network calls a sample, comma-separated")
    add("--metrics", default="fd", help="nll and metrics of samples, comma-separated")
    add("--num-samples", type=int, default=2048)
    add("--repeats", type=int, default=1, help="sets of samples, of seeds --seed, --seed + 1, ...")
    add("--nll-calls", type=int, default=2048, help="network calls of each estimate of the bound")
    add("--num-reference", type=int, help="real images to compare with (default: the whole split)")
    add("--feature-net", default="efflite0", help="efflite0 or inception")
    add("--feature-weights", type=Path, help="the feature net's weights file")
    add("--weights", default="ema", help="ema, model (the bare ones), or such as ema_0.999")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=64, help="samples a network call")
    add("--num-threads", type=int, help="CPU threads")
    add("--out", type=Path, required=True, help="folder of the figure and the records")
    return parser.parse_args()


def main() -> int:
    """The command line."""
    a = _parse()
    metrics = tuple(metric for metric in a.metrics.split(",") if metric)
    for metric in (MEMORISATION, ACCURACY):
        if metric in metrics:
            raise UserError(f"--metrics {metric} is no matter of network calls: ask evaluation.evaluate for it.")
    base = EvalRequest(
        data=a.data, metrics=metrics, weights=a.weights, seed=a.seed, nll=NllSettings(num_calls=a.nll_calls),
        num_samples=a.num_samples, repeats=a.repeats, batch=a.batch, num_reference=a.num_reference,
        feature_net=a.feature_net, feature_weights=a.feature_weights, num_threads=a.num_threads,
    )  # fmt: skip
    base.check()
    base.check_data()
    export, calls = open_export(a.export), read_calls(a.calls)
    ways = read_ways(a.samplers, export.config.diffusion.num_timesteps)
    found = measure(export, base, ways, calls, a.out)
    points = [point for point, _ in found]
    if not points:
        raise UserError(f"--calls {a.calls}: none of these samplers can do with so few; give larger numbers.")
    write_json(a.out / "curve.json", {"points": [asdict(p) | {"record": r.to_json()} for p, r in found]})
    title = f"{export.config.name}, {export.info['nimg']:,} images seen"
    save_figure(draw(sampler_chart(points, title=title)), a.out / "curve.png")
    print(_table(points))
    print(f"{a.out}/curve.png, curve.json")
    return 0


if __name__ == "__main__":
    run_cli(main)
