"""Proof, from its codes alone, that an integer ONNX file computes the same on every processor; or where it does not.

Processors without VNNI have no instruction that multiplies unsigned with signed bytes and adds in 32 bits. ONNX
Runtime's kernels (MLAS) use ``vpmaddubsw`` there, which adds two products in 16 bits and cuts the sum off at 32,767,
silently. Arm's kernels without dot product, and its depthwise ones, add two products of signed bytes in 16 bits, which
wrap round for -128 times -128, twice. A layer with codes ``[O, K]`` in the order of its kernel, behind inputs up to
``reach``, is exact if

    x86:  max over neighbours (2j, 2j + 1) of max(sum of positives, -sum of negatives) * reach <= 32,767
    Arm:  no code is -128

The proof is for the order in which ONNX Runtime's CPU kernels add; another runtime may add other neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np

from compress.exporters.integer_layers import IntegerLayer, has_signed_inputs, read_integer_layers
from compress.records.report import LayerProof, Proof

__all__ = ["INSTRUCTION_SETS", "InstructionSet", "largest_sum", "prove"]

_INT16 = 32767
_CHUNK = 1 << 24  # codes looked at in one go


@dataclass(frozen=True)
class InstructionSet:
    """What ONNX Runtime's kernels for it add in 16 bits.

    Attributes:
        name: as it stands in reports.
        family: whose default rewriting of the graph it runs behind.
        pairs: neighbouring products of unsigned with signed codes, saturating.
        wraps: which layers add two products of signed codes, wrapping: "none", "depthwise" or "all".
    """

    name: str
    family: Literal["x86", "Arm"]
    pairs: bool = False
    wraps: Literal["none", "depthwise", "all"] = "none"


# MLAS chooses kernels in core/mlas/lib/platform.cpp. AVX2, AVX-512 and SSE2 were measured, Arm by emulation; SSE4.1
# (only in builds by Microsoft's compiler) and AMX were read in the source.
INSTRUCTION_SETS = (
    InstructionSet("SSE2", "x86"),
    InstructionSet("SSE4.1 on Windows", "x86", pairs=True),
    InstructionSet("AVX2", "x86", pairs=True),
    InstructionSet("AVX-512 without VNNI", "x86", pairs=True),
    InstructionSet("AVX-VNNI", "x86"),
    InstructionSet("AVX512-VNNI", "x86"),
    InstructionSet("AMX", "x86"),
    InstructionSet("Arm without dot product", "Arm", wraps="all"),
    InstructionSet("Arm dot product", "Arm", wraps="depthwise"),
    InstructionSet("Arm i8mm", "Arm", wraps="depthwise"),
)


def prove(path: Path, provider: str = "CPUExecutionProvider") -> Proof:
    """Judge every layer of the ONNX file ``path`` that ONNX Runtime computes on integers.

    Raises:
        InputError: ONNX Runtime cannot load the file.
    """
    arm = {layer.name: layer for layer in read_integer_layers(path, signed=True, provider=provider)}
    x86 = arm
    if has_signed_inputs(path):
        x86 = {layer.name: layer for layer in read_integer_layers(path, signed=False, provider=provider)}
    rows = tuple(_judge(x86.get(name), arm.get(name)) for name in x86 | arm)
    return Proof(
        onnxruntime=version("onnxruntime"),
        layers=rows,
        instruction_sets={each.name: all(each.name not in row.unproven for row in rows) for each in INSTRUCTION_SETS},
        failures=tuple(_sentence(row) for row in rows if row.unproven),
    )


def largest_sum(codes: np.ndarray, width: int) -> tuple[int, int, int]:
    """The largest magnitude that codes of one sign among ``width`` neighbours add up to; its row and its first column.

    Args:
        codes: [O, K], uint8 or int8; zeros stand behind the last column where K is no multiple of ``width``.
    """
    best = (-1, 0, 0)
    rows, columns = codes.shape
    step = max(1, _CHUNK // max(1, columns))
    for start in range(0, rows, step):
        part = np.pad(codes[start : start + step].astype(np.int16), ((0, 0), (0, -columns % width)))
        groups = part.reshape(len(part), -1, width)
        sums = np.maximum(np.maximum(groups, 0).sum(-1), -np.minimum(groups, 0).sum(-1))
        row, group = np.unravel_index(int(sums.argmax()), sums.shape)
        if sums[row, group] > best[0]:
            best = (int(sums[row, group]), start + int(row), int(group) * width)
    return best


def _judge(x86: IntegerLayer | None, arm: IntegerLayer | None) -> LayerProof:
    """One row from what a layer is on either family; None where it is not on integers there."""
    layer = x86 or arm
    assert layer is not None
    row = LayerProof(
        name=layer.name, operator=layer.operator, inputs=layer.left, weights=layer.right, reason=layer.refusal
    )
    if layer.stands == "left":
        row = row.model_copy(update={"inputs": layer.right, "weights": layer.left})
    if layer.codes is not None and layer.codes.size:
        width = 1 if layer.alone else 2
        worst, channel, first = largest_sum(layer.codes, width)
        columns = range(first, min(first + width, layer.codes.shape[1]))
        found = {
            "worst": worst,
            "limit": _limit(layer) if layer.adds_pairs or (layer.alone and layer.right == "int8") else None,
            "channel": channel,
            "pair": tuple(columns),
            "codes": tuple(int(layer.codes[channel, column]) for column in columns),
            "lowest": int(layer.codes.min()),
        }
        row = row.model_copy(update=found)
    unproven = (
        each.name for each in INSTRUCTION_SETS if not _is_exact(each, x86 if each.family == "x86" else arm, row.worst)
    )
    return row.model_copy(update={"unproven": tuple(unproven)})


def _limit(layer: IntegerLayer) -> int:
    # A signed code reaches -128, and a negative sum one further down.
    return (_INT16 + (layer.stands == "left")) // max(1, layer.reach)


def _is_exact(where: InstructionSet, layer: IntegerLayer | None, worst: int | None) -> bool:
    """Whether ``layer``, whose largest sum is ``worst``, cannot go wrong on ``where``."""
    if layer is None:
        return True
    types = (layer.left, layer.right)
    if layer.refusal is not None and not all(types):
        return False
    if where.pairs and layer.adds_pairs:
        return worst is not None and worst <= _limit(layer)
    if "int8" in types and (where.wraps == "all" or (where.wraps == "depthwise" and layer.alone)):
        return layer.codes is not None and layer.codes.dtype == np.int8 and int(layer.codes.min()) >= -127
    return True


def _sentence(row: LayerProof) -> str:
    where = f"on {', '.join(row.unproven)}"
    what = f"layer {row.name} ({row.operator})"
    if row.reason is not None:
        return f"{what} is not judged {where}: {row.reason}"
    causes = []
    if row.worst is not None and row.limit is not None and row.worst > row.limit:
        codes, places = (" and ".join(map(str, each)) for each in (row.codes, row.pair))
        causes.append(f"{codes} at {places} of channel {row.channel} add up to {row.worst}, allowed {row.limit}")
    if row.lowest is not None and row.lowest < -127:
        causes.append(f"the lowest is {row.lowest}, allowed -127")
    return f"{what} has codes that are too large for sums of 16 bits {where}: {'; '.join(causes)}"
