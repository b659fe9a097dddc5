"""The uniform plan: the same widths for every layer but the first and the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compress.allocation.eligibility import ends, find_format_for, ignored, slow_on_integers, table_option
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
    dynamic: bool = False,
    group_size: int | None = None,
    first_last_bits: int,
    method: str,
    target: Target,
    ignore: Sequence[str] = (),
    fastest: Mapping[str, Choice] | None = None,
) -> tuple[list[Choice], list[Skip]]:
    """Choose for every layer; what stays float is listed with its reason.

    Args:
        act_bits: None for weights only.
        dynamic: measure the ranges of inputs as the model runs; other layers than linears get their weights quantized
            only.
        group_size: weights of a linear's row that share a grid; None, and elsewhere: the whole row.
        first_last_bits: width of weights and inputs of the first and the last layer, where that is more than ``bits``.
        ignore: names to leave float, as shell patterns, or regular expressions after ``re:``.
        fastest: what is known to run these layers fastest, instead of what the widths alone would give.

    Raises:
        InputError: nothing is left to compress, or a pattern matches no layer.
    """
    kept = ignored(layers, ignore)
    outer = ends(layers)
    choices, skipped = [], []
    leading = slow_on_integers(layers, target) if act_bits is not None else set()
    for layer in layers:
        wide = first_last_bits if layer.name in outer else 0
        if layer.kind == "embedding" and not layer.refusal:
            choice = _embedding_choice(layer, max(bits, first_last_bits), target)
            if layer.name in kept:
                choice = Skip(layer=layer.name, reason="named by --ignore")
            if isinstance(choice, Skip):
                skipped.append(choice)
            else:
                choices.append(choice)
            continue
        slow = layer.name in leading or (dynamic and layer.kind != "linear")
        integer = act_bits is not None and not slow
        option = QuantOption(
            bits=max(bits, wide),
            act_bits=max(act_bits, wide) if act_bits is not None and not slow else None,
            dynamic=dynamic and integer,
            # Integer kernels take one zero point a tensor; a float weight may have one a channel, which fits better.
            symmetric=integer,
            group_size=group_size if layer.kind == "linear" and act_bits is None else None,
        )
        format_name, reason = find_format_for(layer, option, target)
        measured = (fastest or {}).get(layer.name)
        if measured is not None:
            option, format_name, reason = measured.option, measured.format, None
        if layer.name in kept:
            reason = "named by --ignore"
        if reason:
            skipped.append(Skip(layer=layer.name, reason=reason))
        else:
            if measured is not None:
                why = measured.reason or ""
            elif option.group_size is not None and format_name == "float-weights":
                kernel = FORMATS["matmul-nbits"].refusal(layer, option)
                why = f"unpacked to floats when the file is loaded: {kernel}" if kernel else ""
            elif layer.name in leading:
                why = f"runs on floats: faster with fewer than {target.integer_channels} output channels"
            else:
                why = "runs on floats: only linears measure ranges as they run; give --calib" if slow else ""
            choices.append(
                Choice(layer=layer.name, method=method, option=option, format=format_name, reason=why or None)
            )
    if not choices:
        reasons = (
            "; ".join(f"{skip.layer}: {skip.reason}" for skip in skipped[:3]) or "the model has no layer with weights"
        )
        raise InputError(f"nothing to compress: {reasons}")
    return choices, skipped


def _embedding_choice(layer: LayerSpec, bits: int, target: Target) -> Choice | Skip:
    """A table is rounded to nearest: no product follows that could make up for an error."""
    option = table_option(layer, 4 if bits <= 4 else 8)
    if isinstance(option, str):
        return Skip(layer=layer.name, reason=option)
    name, reason = find_format_for(layer, option, target)
    if reason:
        return Skip(layer=layer.name, reason=reason)
    return Choice(layer=layer.name, method="mse", option=option, format=name)
