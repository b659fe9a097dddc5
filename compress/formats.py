"""Formats: how a weight is stored and, separately, how it is run.

Storage is the same for all: packed codes, exactly ``bits`` bits a weight. Compute is integer (the codes become an int8
weight when the file is loaded, and the layer an integer kernel) or float (they become an ordinary float weight).
"""

from __future__ import annotations

from dataclasses import dataclass

from compress.errors import InputError
from compress.records import LayerSpec, QuantOption

__all__ = ["FORMATS", "Format", "find_format"]


@dataclass(frozen=True)
class Format:
    """One pair of storage and compute.

    Attributes:
        compute: "integer" or "float".
        kinds: layer kinds it runs.
        asymmetric: whether weights may have a zero point of their own.
        activations: whether the layer's input is quantized.
    """

    name: str
    compute: str
    kinds: tuple[str, ...]
    asymmetric: bool
    activations: bool

    def refusal(self, layer: LayerSpec, option: QuantOption) -> str | None:
        """Why this format cannot hold ``layer`` at ``option``; None when it can."""
        if layer.refusal:
            return layer.refusal
        if layer.kind not in self.kinds:
            return f"format {self.name} runs {', '.join(self.kinds)}, not {layer.kind}"
        if not option.symmetric and not self.asymmetric:
            return f"format {self.name} needs symmetric weights: integer kernels take one zero point a tensor"
        if self.activations and option.act_bits is None:
            return f"format {self.name} needs quantized activations; give calibration data"
        return None


FORMATS = {
    "integer": Format("integer", "integer", ("conv1d", "conv2d", "linear"), asymmetric=False, activations=True),
    "float-weights": Format(
        "float-weights", "float", ("conv1d", "conv2d", "linear"), asymmetric=True, activations=False
    ),
}


def find_format(name: str) -> Format:
    """The format called ``name``.

    Raises:
        InputError: there is none; the message lists them.
    """
    if name not in FORMATS:
        raise InputError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name]
