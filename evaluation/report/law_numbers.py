"""A fit in words and numbers: its parameters with intervals, and how far they can be trusted."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from evaluation.report.style import form_label, status_label
from evaluation.scaling.law import LawFit
from evaluation.scaling.points import Interval

_ANCHORS = ("amplitude", "reference_compute")  # where the curve hangs, not what it says


@dataclass(frozen=True)
class Parameter:
    """One parameter of a fitted curve."""

    name: str
    value: float
    interval: Interval | None

    def __str__(self) -> str:
        text = f"{self.name.replace('_', ' ')} {self.value:.4g}"
        return text if self.interval is None else f"{text} [{self.interval[0]:.3g}, {self.interval[1]:.3g}]"


def parameters(law_fit: LawFit) -> list[Parameter]:
    """The parameters of a fit, whatever its form; none where there is no curve."""
    fit, found = law_fit.fit, law_fit.uncertainty
    if fit.curve is None:
        return []
    resampled = found.intervals if found is not None else {}
    result = []
    for field in dataclasses.fields(fit.curve):
        value = getattr(fit.curve, field.name)
        if field.name in _ANCHORS or (field.name == "constant" and value == 0 and fit.form == "power"):
            continue
        profile = fit.constant_interval if field.name == "constant" else None
        interval = resampled.get(field.name, profile)  # a profile takes the points of one run as independent
        result.append(Parameter(field.name, float(value), interval))
    return result


def legend_text(law_fit: LawFit) -> str:
    """One line for a figure's legend, with every reason for doubt that has a name."""
    fit, found = law_fit.fit, law_fit.uncertainty
    name = form_label(fit.form)
    if fit.curve is None:
        return f"{name}: {status_label(fit.status)}"
    if fit.status != "ok":
        return f"{name}: {status_label(fit.status)}, not drawn ({fit.message.rstrip('.')})"
    words = [str(p) for p in parameters(law_fit)]
    words += [] if fit.r2_log is None else [f"R² {fit.r2_log:.3f}"]
    if found is not None and found.status != "ok":
        words.append(f"intervals {found.status}")
    return f"{name}: {', '.join(words)}"
