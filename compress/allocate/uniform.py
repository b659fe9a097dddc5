"""The uniform plan: the same widths for every layer but the first and the last."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Sequence

from compress.errors import InputError
from compress.formats import FORMATS
from compress.records import Choice, LayerSpec, QuantOption, Skip
from compress.targets import Target

__all__ = ["uniform_choices"]


def uniform_choices(
    layers: Sequence[LayerSpec],
    *,
    bits: int,
    act_bits: int | None,
    first_last_bits: int,
    method: str,
    target: Target,
    ignore: Sequence[str] = (),
) -> tuple[list[Choice], list[Skip]]:
    """Choose for every layer; what stays float is listed with its reason.

    Args:
        act_bits: None for weights only.
        first_last_bits: width of weights and inputs of the first and the last layer, where that is more than ``bits``.
        ignore: names to leave float, as shell patterns, or regular expressions after ``re:``.

    Raises:
        InputError: nothing is left to compress, or a pattern matches no layer.
    """
    for pattern in ignore:
        if not any(_matches(layer.name, pattern) for layer in layers):
            raise InputError(f"--ignore {pattern!r} matches no layer; `compress inspect` lists them")
    usable = [layer for layer in layers if not layer.refusal]
    ends = {usable[0].name, usable[-1].name} if usable else set()
    choices, skipped = [], []
    leading = _slow_on_integers(usable, target) if act_bits is not None else set()
    for layer in layers:
        wide = first_last_bits if layer.name in ends else 0
        option = QuantOption(
            bits=max(bits, wide),
            act_bits=None if act_bits is None or layer.name in leading else max(act_bits, wide),
            # Integer kernels take one zero point a tensor; a float weight may have one a channel, which fits better.
            symmetric=act_bits is not None and layer.name not in leading,
        )
        format_name, reason = _format_for(layer, option, target)
        if any(_matches(layer.name, pattern) for pattern in ignore):
            reason = "named by --ignore"
        if reason:
            skipped.append(Skip(layer=layer.name, reason=reason))
        else:
            slow = f"runs on floats: faster with fewer than {target.integer_channels} output channels"
            choices.append(
                Choice(
                    layer=layer.name,
                    method=method,
                    option=option,
                    format=format_name,
                    reason=slow if layer.name in leading else None,
                )
            )
    if not choices:
        reasons = (
            "; ".join(f"{skip.layer}: {skip.reason}" for skip in skipped[:3]) or "the model has no layer with weights"
        )
        raise InputError(f"nothing to compress: {reasons}")
    return choices, skipped


def _slow_on_integers(layers: Sequence[LayerSpec], target: Target) -> set[str]:
    """The leading convolutions that the target runs faster on floats; later ones would become islands between casts."""
    slow = itertools.takewhile(
        lambda layer: layer.kind.startswith("conv") and layer.weight_shape[0] < target.integer_channels, layers
    )
    return {layer.name for layer in slow}


def _format_for(layer: LayerSpec, option: QuantOption, target: Target) -> tuple[str, str | None]:
    """The target's first format that takes the layer and does with its input what the option asks."""
    reason = None
    for name in target.formats:
        if FORMATS[name].activations == (option.act_bits is not None):
            reason = FORMATS[name].refusal(layer, option)
            if reason is None:
                return name, None
    return "", reason or f"target {target.name} has no format for {option}"


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise InputError(f"--ignore {pattern!r} is not a regular expression: {error}") from error
    return fnmatch.fnmatchcase(name, pattern)
