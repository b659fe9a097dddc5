"""What may be done to which layer: formats that take it, layers a user keeps float, layers faster on floats."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from compress.errors import InputError
from compress.quant.formats import FORMATS
from compress.quant.instruction_sets import Place, kind_of, slowest
from compress.quant.targets import Target
from compress.records.layers import LayerSpec, QuantOption

__all__ = ["ends", "find_format_for", "ignored", "slow_on_integers", "table_option"]

# Of a smaller table nothing is gained.
_LEAST_ROWS = 16
# Integers as fast as floats to within what timings differ by: they are taken.
_PAYS = 0.9


def ignored(layers: Sequence[LayerSpec], patterns: Sequence[str]) -> set[str]:
    """Names of the layers that ``patterns`` match: shell patterns, or regular expressions after ``re:``.

    Raises:
        InputError: a pattern matches no layer, or is no regular expression.
    """
    found: set[str] = set()
    for pattern in patterns:
        matching = {layer.name for layer in layers if _matches(layer.name, pattern)}
        if not matching:
            raise InputError(f"--ignore {pattern!r} matches no layer; `compress inspect` lists them")
        found |= matching
    return found


def ends(layers: Sequence[LayerSpec]) -> set[str]:
    """Names of the first and the last layer that can be compressed."""
    usable = [layer.name for layer in layers if not layer.refusal]
    return {usable[0], usable[-1]} if usable else set()


def slow_on_integers(layers: Sequence[LayerSpec], sets: Sequence[str], *, dynamic: bool = False) -> dict[str, str]:
    """Layers that run faster on floats on one of the instruction ``sets``, each with a sentence that says by how much.

    The first convolution as floats moves the cast behind itself; behind convolutions that are float the kernels alone
    count. Further on a float one would be an island: it has to pay for two casts and two changes of the memory layout.
    A linear that no convolution feeds quantizes floats.
    """
    usable = [layer for layer in layers if not layer.refusal and layer.kind != "embedding"]
    slow: dict[str, str] = {}
    leading = True
    for before, layer in zip([None, *usable], usable, strict=False):
        leading = leading and layer.kind != "linear"
        behind_convolution = layer.kind == "linear" and before is not None and before.kind != "linear"
        place: Place = "elsewhere"
        if leading:
            place = "first" if before is None else "behind floats"
        elif behind_convolution and layer.rows == layer.calls:
            place = "behind floats"  # casts are the same either way
        found = slowest(layer, sets, place, dynamic=dynamic)
        if found is not None and found[0] < _PAYS:
            share, name = found
            slow[layer.name] = (
                f"runs on floats: {kind_of(layer, dynamic=dynamic)}, {layer.weight_shape[0]} outputs: integers have "
                f"{share:.2f} of their speed on {name}"
            )
        else:
            leading = False
    return slow


def find_format_for(layer: LayerSpec, option: QuantOption, target: Target) -> tuple[str, str | None]:
    """The target's first format that takes the layer and does with its input what the option asks.

    Returns:
        The format's name and None, or an empty name and the reason why there is none.
    """
    reason = None
    for name in target.formats:
        if FORMATS[name].inputs == option.inputs:
            reason = FORMATS[name].refusal(layer, option)
            if reason is None:
                return name, None
    return "", reason or f"target {target.name} has no format for {option}"


def table_option(layer: LayerSpec, bits: int) -> QuantOption | str:
    """How an embedding's table is stored at ``bits``, in groups along its rows; or why it stays float."""
    rows, width = layer.weight_shape
    if rows < _LEAST_ROWS:
        return f"left float: a table of {rows} rows"
    group = next((group for group in (32, 16) if width % group == 0), None)
    if group is None:
        return f"left float: rows of {width} are no multiple of 16"
    return QuantOption(bits=bits, symmetric=False, group_size=group)


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise InputError(f"--ignore {pattern!r} is not a regular expression: {error}") from error
    return fnmatch.fnmatchcase(name, pattern)
