"""How much of a model stayed on floats: the first note of every report, and a warning where it is more than half."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compress.records.layers import LayerSpec
from compress.records.plan import Choice, Plan
from compress.records.report import WARNING

__all__ = ["float_note"]

_MUCH = 0.5
_ON_FLOATS = "runs on floats"  # what a choice's reason begins with where integers were asked for


def float_note(plan: Plan, layers: Sequence[LayerSpec], others: Mapping[str, int]) -> str:
    """The share of weights that are stored as floats and, where integers were asked for, of MACs that run on them.

    Args:
        layers: all of the model's, compressible or not, as the plan splits them.
        others: floats by tensor that are in no layer.
    """
    choices = {choice.layer: choice for choice in plan.choices}
    reasons = {skip.layer: skip.reason for skip in plan.skipped}
    stored = [layer for layer in layers if layer.name not in choices]
    rest = sum(others.values())
    weights = sum(layer.parameters for layer in layers) + rest
    share = (sum(layer.parameters for layer in stored) + rest) / max(weights, 1)
    text = (
        f"{share:.1%} of the weights are stored as floats: {len(stored)} of {len(layers)} layers, and {rest:,} other "
        f"numbers (biases, norms and the like{_largest(others, weights)})"
    )
    most, what = max(stored, key=lambda layer: layer.parameters, default=None), "weights"
    much = share > _MUCH
    if _integers_asked(plan.choices):
        running = [layer for layer in layers if not _on_integers(choices.get(layer.name))]
        macs = sum(layer.macs for layer in running) / max(sum(layer.macs for layer in layers), 1)
        text += f"; {macs:.1%} of the layers' multiply-accumulates run on floats"
        if macs > _MUCH and not much:
            most, what, much = max(running, key=lambda layer: layer.macs), "multiply-accumulates", True
    if not much:
        return text
    if most is not None and (what != "weights" or most.parameters > rest):
        choice = choices.get(most.name)
        why = reasons.get(most.name) or (choice.reason if choice else None) or "the plan leaves it so"
        text += f"; most {what} are those of {most.name} ({most.kind}: {why})"
    return WARNING + text


def _integers_asked(choices: Sequence[Choice]) -> bool:
    return any(choice.option.act_bits is not None or (choice.reason or "").startswith(_ON_FLOATS) for choice in choices)


def _on_integers(choice: Choice | None) -> bool:
    return choice is not None and choice.option.act_bits is not None


def _largest(others: Mapping[str, int], weights: int) -> str:
    """The largest of them where it is worth a name."""
    name, count = next(iter(others.items()), ("", 0))
    return f"; {name}: {count:,}" if 20 * count > weights else ""
