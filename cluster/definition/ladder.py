"""The ladder of a study: the values of one config key, and what follows them.

A rung may be any value that YAML can write and the key takes: a number, a word, a switch, a list. Its name becomes
part of a folder's name, so it is made of letters, digits, dots and dashes, and never changes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from pydantic import Field, field_validator, model_validator

from trainer.config.section import Section
from trainer.config.tree import merge

# From small to large: light to dark, as in the figures; readable on white and by the colour-blind.
_COLOURS = ("#86d549", "#35b779", "#20938c", "#2e6e8e", "#404588", "#471365")
# Keys of a run that the study itself sets, and where it is told to.
OF_THE_STUDY = {
    "name": "ladder.label", "seed": "seeds", "run.folder": "--out", "train.budget_images": "budget.images",
    "train.budget_flops": "budget.flops", "train.export_images": "evaluation.images or evaluation.flops",
    "engine.num_cpu_threads": "resources.cpus", "tracking.mlflow": "tracking.mlflow",
}  # fmt: skip


class Rule(Section):
    """How another setting follows the ladder: by a power of the rung, or by a table.

    A power is value * (rung / at) ** power, such as lr = 1e-4 * (C / 128) ** -0.5, and with `round_to` the nearest
    multiple of it, an integer. A table is `values`, one a rung.
    """

    value: float | None = None
    at: float | None = Field(default=None, gt=0)
    power: float | None = None
    round_to: int | None = Field(default=None, ge=1)
    values: tuple[Any, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, tree: Any) -> Any:
        for key, value in tree.items() if isinstance(tree, dict) else ():
            if key not in cls.model_fields:
                raise ValueError(f"{key}={value!r}: unknown key; a rule has value, at, power, round_to, or values")
        return tree

    @model_validator(mode="after")
    def _one_kind(self) -> Rule:
        powers = {name: getattr(self, name) for name in ("value", "at", "power")}
        missing = [name for name, given in powers.items() if given is None]
        if self.values is None and missing:
            raise ValueError(
                f"{missing[0]}: missing; a rule is {{value, at, power}} for value * (rung / at) ** power, "
                "or {values: [...]} with one value a rung"
            )
        if self.values is not None and (len(missing) < len(powers) or self.round_to is not None):
            raise ValueError(f"values={list(self.values)} is a table, which takes no value, at, power or round_to")
        return self

    def at_rung(self, rung: Any, number: int) -> Any:
        """The setting at the ladder's rung number `number`."""
        if self.values is not None:
            return self.values[number]
        assert self.value is not None  # all three, says _one_kind
        assert self.at is not None
        assert self.power is not None
        exact = self.value * (rung / self.at) ** self.power
        return exact if self.round_to is None else max(1, round(exact / self.round_to)) * self.round_to


class Ladder(Section):
    """One trial a value and seed."""

    key: str = Field(min_length=1, description="config key that changes, such as model.channels")
    values: tuple[Any, ...] = Field(min_length=1)
    label: str = "{key}={value}"  # how a size is called in tables and charts
    rules: dict[str, Rule] = Field(default={})  # config key -> how it follows the ladder

    @field_validator("rules", mode="before")
    @classmethod
    def _dotted(cls, rules: Any) -> Any:
        """`ladder.rules.train.lr.power=-1` on the command line comes as sections, a file's `train.lr: ...` does not.

        A rule that is null is none: so one can be taken back that a base has.
        """
        if not isinstance(rules, dict):
            return rules
        return {key: rule for key, rule in _flat(rules).items() if rule is not None}

    @model_validator(mode="after")
    def _usable(self) -> Ladder:
        names = [value_name(value) for value in self.values]
        for number, value in enumerate(self.values):
            if value in self.values[:number] or names[number] in names[:number]:
                raise ValueError(f"ladder.values={list(self.values)} names {value!r} twice; each rung is one size")
            if isinstance(value, dict):
                raise ValueError(f"ladder.values: {value} is a section; a rung is the value of one key")
        for key, owner in OF_THE_STUDY.items():
            if key == self.key or key in self.rules:
                raise ValueError(f"ladder: {key} is set by the study itself; use {owner}")
        if self.key in self.rules:
            raise ValueError(f"ladder.rules.{self.key}: a rule for the ladder's own key; its values are ladder.values")
        for key, rule in self.rules.items():
            self._check(key, rule)
        self._check_label()
        return self

    def settings(self, number: int) -> dict[str, Any]:
        """The config keys, dotted, that make rung number `number`."""
        rung = self.values[number]
        return {self.key: rung} | {key: rule.at_rung(rung, number) for key, rule in self.rules.items()}

    def size_label(self, number: int) -> str:
        """How the size is called in tables and charts."""
        value = self.values[number]
        return self.label.format(key=self._short, value=value if _is_number(value) else _plain(value))

    def rung_name(self, number: int) -> str:
        """What the folder of a trial begins with; its seed follows."""
        return f"{_slug(self._short)}{value_name(self.values[number])}"

    def colour(self, number: int) -> str:
        """Numbers from light to dark as they grow; other values in their order."""
        ordered = sorted(self.values) if _are_numbers(self.values) else list(self.values)
        position = ordered.index(self.values[number]) / max(1, len(ordered) - 1)
        return _COLOURS[round(position * (len(_COLOURS) - 1))]

    @property
    def _short(self) -> str:
        return self.key.rpartition(".")[2]

    def _check(self, key: str, rule: Rule) -> None:
        if rule.values is not None and len(rule.values) != len(self.values):
            raise ValueError(
                f"ladder.rules.{key}: {len(rule.values)} values={list(rule.values)} for {len(self.values)} "
                f"ladder.values={list(self.values)}; give one a rung"
            )
        if rule.values is None and not (_are_numbers(self.values) and min(self.values) > 0):
            raise ValueError(
                f"ladder.values={list(self.values)}: the rule for {key} is a power of the rung, which must be a "
                "positive number; give a table instead, {values: [...]} with one value a rung"
            )

    def _check_label(self) -> None:
        labels = []
        for number, value in enumerate(self.values):
            try:
                labels.append(self.size_label(number))
            except (KeyError, IndexError, ValueError, AttributeError):
                raise ValueError(
                    f"ladder.label={self.label!r}: only {{key}} and {{value}} can stand in it, and numbers alone can "
                    f"have a format (here the value is {value!r})"
                ) from None
        if len(set(labels)) < len(labels):
            raise ValueError(f"ladder.label={self.label!r} makes {labels}: each size needs a label of its own")


def value_name(value: Any) -> str:
    """A value as a part of a file's name: `64`, `cosine`, `true`, `1-2-2`.

    Where signs had to be replaced, a few digits of a hash keep what differs apart.
    """
    text = _plain(value)
    clean = _slug(text)
    if _is_number(value) or (clean == text and not _is_nested(value)):
        return clean
    return f"{clean}-{hashlib.sha256(json.dumps(value).encode()).hexdigest()[:6]}"


def _flat(rules: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in rules.items():
        items = value.values() if isinstance(value, dict) and not value.keys() & Rule.model_fields.keys() else ()
        is_section = bool(items) and all(isinstance(item, dict) or item is None for item in items)
        found = {f"{key}.{name}": rule for name, rule in _flat(value).items()} if is_section else {key: value}
        flat = merge(flat, found)
    return flat


def _plain(value: Any) -> str:
    """A value in words: a list's items joined by dashes."""
    if isinstance(value, list | tuple):
        return "-".join(_plain(item) for item in value)
    return str(value) if isinstance(value, str) or _is_number(value) else json.dumps(value)  # true, false, null


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(_is_number(value) for value in values)


def _is_nested(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(item, list | tuple) for item in value)
