"""A fitted L(N, D) in plain text."""

from __future__ import annotations

from evaluation.scaling.sizes.robust import Loss
from evaluation.scaling.sizes.size_data import SizeDataFit

_SUMS: dict[Loss, str] = {
    "huber": "sum of Huber losses of log residuals, delta {delta:g}",
    "lad": "sum of absolute log residuals",
    "lsq": "sum of (weighted) squared log residuals",
}


def fit_text(fit: SizeDataFit) -> str:
    """The parameters with their intervals, and the certificate, one a line."""
    status = f"{fit.status}: {fit.message}" if fit.message else fit.status
    lines = [
        "form       size_data: L(N, D) = E + A N^-alpha + B D^-beta",
        f"status     {status}",
        f"points     {fit.num_points} of {fit.num_runs} runs",
    ]
    if fit.curve is None:
        return "\n".join(lines)
    values = fit.curve.to_json()
    for name, label in (
        ("E", "E"), ("A", "A"), ("alpha", "alpha"), ("B", "B"), ("beta", "beta"),
        ("size_exponent", "N* ~ C^a"), ("data_exponent", "D* ~ C^b"),
    ):  # fmt: skip
        lines.append(f"{label:<10} {values[name]:<12.6g}{_interval(fit, name)}".rstrip())
    lines.append(f"R2         {fit.r2_log:.6f} (log)")
    lines.append(f"objective  {fit.objective:.10g} ({_SUMS[fit.loss].format(delta=fit.delta)})")
    lines.append(
        f"optimum    {fit.share_of_starts:.0%} of {fit.num_starts} starts agree, gradient {fit.imbalance:.1e}, "
        f"condition number {fit.condition_number:.3g} ({fit.projected_condition_number:.3g} projected)"
    )
    if fit.outliers:
        numbers = ", ".join(str(i + 1) for i in fit.outliers[:5]) + (", …" if len(fit.outliers) > 5 else "")
        lines.append(f"outliers   {len(fit.outliers)} of the points lie far off the law: numbers {numbers}")
    if fit.bootstrap is not None and fit.bootstrap.message:
        lines.append(f"bootstrap  {fit.bootstrap.status}: {fit.bootstrap.message}")
    return "\n".join(lines)


def _interval(fit: SizeDataFit, name: str) -> str:
    if fit.bootstrap is None or name not in fit.bootstrap.intervals:
        return ""
    low, high = fit.bootstrap.intervals[name]
    return f"   {fit.bootstrap.confidence:.0%} of rounds {low:.6g} .. {high:.6g}"
