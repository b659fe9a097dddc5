"""Two plans side by side, layer by layer."""

from __future__ import annotations

from compress.records.allocation import Candidate
from compress.records.layers import Record
from compress.records.plan import Plan

__all__ = ["LayerDiff", "PlanDiff", "diff_plans"]

_SETTINGS = ("target", "observer", "steps", "iterations", "seed", "samples", "model_fingerprint", "data_fingerprint")


class LayerDiff(Record):
    """What two plans do to one layer; bytes and errors where the plans hold predictions."""

    layer: str
    first: str
    second: str
    changed: bool
    first_bytes: int | None = None
    second_bytes: int | None = None
    first_error: float | None = None
    second_error: float | None = None


class PlanDiff(Record):
    """All layers of both, and the settings that differ as ``{name: (first, second)}``."""

    layers: tuple[LayerDiff, ...]
    settings: dict[str, tuple[str, str]]
    first_totals: dict[str, float]
    second_totals: dict[str, float]


def diff_plans(first: Plan, second: Plan) -> PlanDiff:
    """Compare two plans, of one model or of two."""
    names = dict.fromkeys([*_layers(first), *_layers(second)])
    predicted = [_predicted(first), _predicted(second)]
    settings = {}
    for name in _SETTINGS:
        values = (str(getattr(first, name)), str(getattr(second, name)))
        if values[0] != values[1]:
            settings[name] = values
    return PlanDiff(
        layers=tuple(_layer(name, first, second, predicted[0].get(name), predicted[1].get(name)) for name in names),
        settings=settings,
        first_totals=first.allocation.predicted if first.allocation else {},
        second_totals=second.allocation.predicted if second.allocation else {},
    )


def _layers(plan: Plan) -> list[str]:
    """The model's own: thin ones are named by what they do the work of."""
    wholes = {part: split.layer for split in plan.splits for part in split.parts}
    names = [*(choice.layer for choice in plan.choices), *(skip.layer for skip in plan.skipped)]
    return list(dict.fromkeys(wholes.get(name, name) for name in names))


def _predicted(plan: Plan) -> dict[str, Candidate]:
    return {each.layer: each for each in plan.allocation.chosen} if plan.allocation else {}


def _layer(name: str, first: Plan, second: Plan, a: Candidate | None, b: Candidate | None) -> LayerDiff:
    texts = (_does(first, name), _does(second, name))
    return LayerDiff(
        layer=name,
        first=texts[0],
        second=texts[1],
        changed=texts[0] != texts[1],
        first_bytes=a.cost.size_bytes if a else None,
        second_bytes=b.cost.size_bytes if b else None,
        first_error=a.error if a else None,
        second_error=b.error if b else None,
    )


def _does(plan: Plan, layer: str) -> str:
    split = next((split for split in plan.splits if split.layer == layer), None)
    if split is not None:
        part = layer if split.form == "branch" else split.parts[0]
        return f"{_does(plan.model_copy(update={'splits': ()}), part)}, {split}"
    choice = plan.choice(layer)
    if choice is not None:
        return f"{choice.option} {choice.method}" + (" on floats" if choice.format == "float-weights" else "")
    return "float" if any(skip.layer == layer for skip in plan.skipped) else "not in the plan"
