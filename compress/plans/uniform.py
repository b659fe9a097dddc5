"""The uniform plan: the same widths for every layer but the first and the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compress.errors import InputError
from compress.plans.eligibility import ends, find_format_for, ignored, slow_on_integers, table_option
from compress.quant.formats import FORMATS
from compress.quant.targets import Target
from compress.records.layers import LayerSpec, QuantOption
from compress.records.plan import Choice, Skip

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
    sets: Sequence[str] = (),
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
        sets: instruction sets on none of which a layer is to be slower than on floats.
        ignore: names to leave float, as shell patterns, or regular expressions after ``re:``.
        fastest: what is known to run these layers fastest, instead of what the widths alone would give.

    Raises:
        InputError: nothing is left to compress, or a pattern matches no layer.
    """
    kept, outer = ignored(layers, ignore), ends(layers)
    slow = slow_on_integers(layers, sets, dynamic=dynamic) if act_bits is not None else {}
    widths = _Widths(bits, act_bits, dynamic, group_size, method, target, slow)
    choices, skipped = [], []
    for layer in layers:
        measured = (fastest or {}).get(layer.name)
        found: Choice | Skip
        if layer.name in kept:
            found = Skip(layer=layer.name, reason="named by --ignore")
        elif layer.kind == "embedding" and not layer.refusal:
            found = _embedding_choice(layer, max(bits, first_last_bits), target)
        elif measured is not None:
            found = Choice(
                layer=layer.name, method=method, option=measured.option, format=measured.format,
                reason=measured.reason or None,
            )  # fmt: skip
        else:
            found = widths.choice(layer, first_last_bits if layer.name in outer else 0)
        if isinstance(found, Skip):
            skipped.append(found)
        else:
            choices.append(found)
    if not choices:
        reasons = (
            "; ".join(f"{skip.layer}: {skip.reason}" for skip in skipped[:3]) or "the model has no layer with weights"
        )
        raise InputError(f"nothing to compress: {reasons}")
    return choices, skipped


@dataclass(frozen=True)
class _Widths:
    """What layers get where it fits them; ``slow`` are those that run faster on floats, with the reason."""

    bits: int
    act_bits: int | None
    dynamic: bool
    group_size: int | None
    method: str
    target: Target
    slow: Mapping[str, str]

    def choice(self, layer: LayerSpec, least: int) -> Choice | Skip:
        """What is done to ``layer``, on ``least`` bits or more."""
        option = self._option(layer, least)
        name, reason = find_format_for(layer, option, self.target)
        if reason:
            return Skip(layer=layer.name, reason=reason)
        return Choice(
            layer=layer.name, method=self.method, option=option, format=name, reason=self._why(layer, option, name)
        )

    def _option(self, layer: LayerSpec, least: int) -> QuantOption:
        integer = self.act_bits is not None and not self._on_floats(layer)
        return QuantOption(
            bits=max(self.bits, least),
            act_bits=max(self.act_bits, least) if self.act_bits is not None and integer else None,
            dynamic=self.dynamic and integer,
            # Integer kernels take one zero point a tensor; a float weight may have one a channel, which fits better.
            symmetric=integer,
            group_size=self.group_size if layer.kind == "linear" and self.act_bits is None else None,
        )

    def _on_floats(self, layer: LayerSpec) -> bool:
        return layer.name in self.slow or (self.dynamic and layer.kind != "linear")

    def _why(self, layer: LayerSpec, option: QuantOption, format_name: str) -> str | None:
        """Why it runs on floats, where that was not asked for."""
        if option.group_size is not None and format_name == "float-weights":
            kernel = FORMATS["matmul-nbits"].refusal(layer, option)
            return f"unpacked to floats when the file is loaded: {kernel}" if kernel else None
        if self.dynamic and layer.kind != "linear":
            return "runs on floats: only linears measure ranges as they run; give --calib"
        return self.slow.get(layer.name)


def _embedding_choice(layer: LayerSpec, bits: int, target: Target) -> Choice | Skip:
    """A table is rounded to nearest: no product follows that could make up for an error."""
    option = table_option(layer, 4 if bits <= 4 else 8)
    if isinstance(option, str):
        return Skip(layer=layer.name, reason=option)
    name, reason = find_format_for(layer, option, target)
    if reason:
        return Skip(layer=layer.name, reason=reason)
    return Choice(layer=layer.name, method="mse", option=option, format=name)
