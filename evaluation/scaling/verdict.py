"""A law in plain words: how well it holds, and every reason to doubt it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evaluation.scaling.fitting.broken import BrokenCurve
from evaluation.scaling.fitting.forms import FORMULAS

if TYPE_CHECKING:
    from evaluation.scaling.law import Law, LawFit

# A law "holds" if it explains the frontier this well and predicts beyond its range this much better than "no change".
GOOD_R2 = 0.98
USEFUL_SHARE = 0.5
ENOUGH_DECADES = 1.5


def describe(law: Law) -> list[str]:
    """Sentences about the law; the first is the verdict."""
    if not law.has_fit:
        return [f"No law is fitted to the frontier: {law.of('power').fit.message}"]
    notes = [_verdict(law.of("power")), *_constant_notes(law), *_break_notes(law), *_range_notes(law)]
    for law_fit in law.fits:
        name = FORMULAS[law_fit.fit.form]
        chi2 = law_fit.fit.chi2_per_dof
        if chi2 is not None and chi2 > 2 and law_fit.fit.status != "no_break":
            notes.append(
                f"{name}: the points lie {chi2**0.5:.1f} times further from the fit than their own standard errors "
                "say: runs differ, or the form is wrong."
            )
    doubts = [
        f"Intervals {f.uncertainty.status}: {f.uncertainty.message}"
        for f in law.fits
        if f.uncertainty is not None and f.uncertainty.message
    ]
    notes += dict.fromkeys(doubts)
    return notes


def _verdict(power: LawFit) -> str:
    fit, held_out = power.fit, power.hold_out
    if fit.status not in ("ok", "misfit") or fit.r2_log is None:
        return f"A pure power law is not established ({fit.status}): {fit.message}"
    explains = f"R² {fit.r2_log:.3f} in log space on {fit.num_points} frontier points"
    error, no_change = held_out.mean_relative_error, held_out.no_change_error
    if error is None or no_change is None:
        return f"A pure power law fits with {explains}; it could not be tested beyond its range: {held_out.message}"
    tested = (
        f"fitted on the lower two thirds of (log) compute it misses the {len(held_out.points)} held-out frontier "
        f"points by {error:.1%} (assuming no change: {no_change:.1%})"
    )
    useful = error <= USEFUL_SHARE * no_change
    if fit.r2_log >= GOOD_R2 and useful:
        return f"A pure power law holds over this range: {explains}; {tested}."
    if useful:
        return f"A pure power law holds roughly: {explains}; {tested}."
    return f"A pure power law does not extrapolate: {explains}, but {tested}."


def _constant_notes(law: Law) -> list[str]:
    fit = law.of("power_constant").fit
    if fit.curve is None or fit.constant_interval is None:
        return [f"With a constant: not fitted ({fit.status}): {fit.message}"]
    if fit.status == "unidentified":
        return [f"The irreducible constant is unidentified: {fit.message}"]
    if fit.status != "ok":
        return [f"With a constant: {fit.status}: {fit.message}"]
    found = law.of("power_constant").uncertainty
    (low, high), kind = fit.constant_interval, "95 % profile interval, points taken as independent"
    if found is not None and "constant" in found.intervals:
        low, high = found.intervals["constant"]
        kind = f"{found.confidence:.0%} interval over runs" + ("" if found.status == "ok" else f", {found.status}")
    if low == 0:
        return [f"No constant is needed: any c from 0 to {high:.4g} fits about as well as the pure power law ({kind})."]
    notes = [f"The frontier bends: c = {fit.curve.constant:.4g} ({kind}: {low:.4g} to {high:.4g})."]
    errors = [law.of(form).hold_out.mean_relative_error for form in ("power", "power_constant")]
    if errors[0] is not None and errors[1] is not None:
        better = "with" if errors[1] < errors[0] else "without"
        notes.append(
            f"Beyond its range the form {better} the constant predicts better: "
            f"{errors[1]:.1%} with against {errors[0]:.1%} without."
        )
    return notes


def _break_notes(law: Law) -> list[str]:
    fit = law.of("broken").fit
    if fit.status != "ok" or not isinstance(fit.curve, BrokenCurve):
        return []  # no break is the usual case
    curve = fit.curve
    return [
        f"A break explains more: exponent {curve.exponent_below:.3f} below {curve.break_compute:.2g} FLOPs, "
        f"{curve.exponent_above:.3f} above."
    ]


def _range_notes(law: Law) -> list[str]:
    frontier = law.frontier
    notes = []
    trained = sorted({p.num_params for p in frontier.candidates} - {0})
    reached = sorted(set(frontier.sizes) - {0})
    if len(trained) > 1 and len(reached) == 1:
        notes.append(
            f"Only one of {len(trained)} sizes ({reached[0]:,} parameters) reaches the frontier: "
            "the law is that size's learning curve."
        )
    elif len(trained) > 1:
        notes.append(f"{len(reached)} of {len(trained)} sizes reach the frontier.")
    if frontier.points and frontier.decades < ENOUGH_DECADES:
        notes.append(f"The frontier spans only {frontier.decades:.1f} decades: too short to trust an exponent.")
    if any(p.stderr is None for p in frontier.points) and any(p.stderr is not None for p in frontier.points):
        notes.append("Some points have no standard error: all are weighted as if none had.")
    return notes
