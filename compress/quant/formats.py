"""Formats: how a weight is stored and, separately, how it is run.

Storage is the same for all: packed codes, exactly ``bits`` bits a weight. Compute is integer (the codes become an int8
weight when the file is loaded, and the layer an integer kernel), float (they become an ordinary float weight), or
blocks (they stay packed in memory, and the kernel unpacks them block by block: ONNX Runtime's MatMulNBits). Dynamic is
integer too, but for the input, whose grid is measured as the model runs: it takes no calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.errors import InputError
from compress.records.layers import LayerSpec, QuantOption

__all__ = ["FORMATS", "Format", "find_format"]


@dataclass(frozen=True)
class Format:
    """One pair of storage and compute.

    Attributes:
        compute: "integer", "dynamic", "float" or "blocks".
        kinds: layer kinds it runs.
        asymmetric: whether weights may have a zero point of their own.
        inputs: what the layer reads: "float", "static" (integers on a calibrated grid) or "dynamic" (integers on the
            grid of their own range, measured as the model runs).
        widths: bits a weight may have.
        group_sizes: weights that may share a grid; empty: any number, or the whole row.
    """

    name: str
    compute: str
    kinds: tuple[str, ...]
    asymmetric: bool
    inputs: str
    widths: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    group_sizes: tuple[int | None, ...] = ()

    def refusal(self, layer: LayerSpec, option: QuantOption) -> str | None:
        """Why this format cannot hold ``layer`` at ``option``; None when it can."""
        if layer.refusal:
            return layer.refusal
        if layer.kind not in self.kinds:
            return f"format {self.name} runs {', '.join(self.kinds)}, not {layer.kind}"
        if option.bits not in self.widths:
            return f"format {self.name} runs {_listed(self.widths)} bits, not {option.bits}"
        if self.group_sizes and option.group_size not in self.group_sizes:
            sizes = _listed([size or "none" for size in self.group_sizes])
            return f"format {self.name} takes groups of {sizes}, not {option.group_size or 'none'}"
        if not option.symmetric and not self.asymmetric:
            return f"format {self.name} needs symmetric weights: integer kernels take one zero point a tensor"
        if self.inputs != option.inputs:
            return f"format {self.name} takes {self.inputs} inputs, not {option.inputs} ones"
        return None


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


FORMATS = {
    "integer": Format(
        "integer", "integer", ("conv1d", "conv2d", "linear"), asymmetric=False, inputs="static", group_sizes=(None,)
    ),
    "dynamic": Format("dynamic", "dynamic", ("linear",), asymmetric=False, inputs="dynamic", group_sizes=(None,)),
    # Block sizes above 256 gave wrong results before ONNX Runtime 1.32; other widths are refused by it.
    "matmul-nbits": Format(
        "matmul-nbits", "blocks", ("linear",), asymmetric=True, inputs="float",
        widths=(2, 4, 8), group_sizes=(16, 32, 64, 128, 256),
    ),
    # The table stays packed in memory; a row is unpacked when it is looked up (GatherBlockQuantized).
    "gather-blocks": Format(
        "gather-blocks", "blocks", ("embedding",), asymmetric=True, inputs="float",
        widths=(4, 8), group_sizes=(16, 32, 64, 128, 256),
    ),
    "float-weights": Format(
        "float-weights", "float", ("conv1d", "conv2d", "linear"), asymmetric=True, inputs="float"
    ),
}  # fmt: skip


def find_format(name: str) -> Format:
    """The format called ``name``.

    Raises:
        InputError: there is none; the message lists them.
    """
    if name not in FORMATS:
        raise InputError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name]
