"""Do the layers that a plan splits by two thin ones: the best for the layer's data and for the grids to come."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from compress.calib.factors import Thin, balanced, best_factors, correction
from compress.calib.frontier import Frontier
from compress.calib.gram import SeenRows, rows_read_by
from compress.graph.layers import layer_calls
from compress.graph.split import split_layer
from compress.graph.traced import TracedModel
from compress.records.layers import QuantOption
from compress.records.plan import Plan

__all__ = ["split_layers"]


def split_layers(
    traced: TracedModel, plan: Plan, inputs: tuple[Tensor, ...] | None, scratch: Path
) -> tuple[TracedModel, list[str]]:
    """Carry out ``plan``'s splits on the float graph ``traced``, in place.

    Args:
        inputs: calibration samples, one tensor [N, ...] a graph input; None: by the weights' own singular values.
        scratch: folder for values on disk.

    Returns:
        The graph that calibration is to come close to, in which every split layer still gives what it gave whole
        (:func:`compress.graph.split.split_layer`), and sentences for the report.
    """
    if not plan.splits:
        return traced, []
    rows = _watch(traced, [split.layer for split in plan.splits], inputs, scratch) if inputs is not None else {}
    found: dict[str, Thin] = {}
    lost = []
    for split in plan.splits:
        weight = traced.tensor(f"{split.layer}.weight")
        seen = rows.get(split.layer)
        gram = seen.gram() if seen is not None else None
        if split.form == "branch":
            whole = plan.choice(split.layer)
            option = whole.option if whole is not None else QuantOption(bits=4, symmetric=False)
            thin = correction(weight, gram, split.rank, option)
        else:
            factors = best_factors(weight, gram)
            lost.append(float(factors.relative_errors()[split.rank]))
            thin = Thin.of(factors.truncated(split.rank), weight)
        choice = plan.choice(split.parts[-1])
        if choice is not None and seen is not None:
            thin = balanced(thin, seen.sample(), choice.option)
        found[split.layer] = thin
    reference = traced.copy()
    # Branches first: a reference is not to be edited once a layer in it is kept whole.
    for split in sorted(plan.splits, key=lambda split: split.form):
        thin = found[split.layer]
        split_layer(traced, split, thin.down, thin.up.flatten(1))
        split_layer(reference, split, thin.down, thin.up.flatten(1), reference=split.form == "factors")
    what = "outputs" if inputs is not None else "weights"
    branches = len(plan.splits) - len(lost)
    return reference, [
        *(
            [
                f"low rank: {len(lost)} layers are done by two thin ones, which leaves {min(lost):.2%} to "
                f"{max(lost):.2%} of their {what}' square undone before calibration"
            ]
            if lost
            else []
        ),
        *([f"low rank: {branches} layers have a branch beside them that corrects them"] if branches else []),
    ]


def _watch(traced: TracedModel, layers: list[str], inputs: tuple[Tensor, ...], scratch: Path) -> dict[str, SeenRows]:
    """The rows of each of ``layers``."""
    calls = {name: nodes[0] for name, nodes in layer_calls(traced).items() if name in layers}
    found = {name: SeenRows(rows_read_by(call, traced.tensor(f"{name}.weight"))) for name, call in calls.items()}
    frontier = Frontier(traced, inputs, scratch / "float")
    try:
        for name, call in calls.items():
            frontier.show(call.args[0].name, found[name].update)
    finally:
        frontier.close()
    return found
