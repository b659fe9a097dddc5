"""The layout packed weights have on a GPU: one owner, specified here, tested against golden bytes.

Storage (compress/quant/packing.py) is made for the file; this one is made once, when a model is loaded, so that a
kernel can load 16 bytes a thread, unpack with one mask a code, and meet its inputs in runs of 16 neighbours.

A row of ``I`` unsigned codes of ``b`` bits becomes a row of *units*, integers of 16 bits:

- Codes are cut into planes of 8, 4, 2 or 1 bits as in compress/quant/packing.py (3 = 2 + 1), widest first. The planes
  of a row stand one behind the other.
- A plane of width ``w`` keeps ``16 / w`` codes in a unit, *position* 0 in the lowest bits.
- There are 16 *lanes*: column ``c`` belongs to lane ``c % 16``, and a lane's codes follow each other in it, columns
  ``lane``, ``lane + 16``, ``lane + 32`` ..., position by position, then unit by unit.
- Units are stored lane after lane: unit ``u`` of lane ``l`` is the plane's unit ``16 u + l``.

So for 4 bits the 64 columns of a *block* are 16 units (32 bytes), and position ``j`` of unit ``l`` is column
``16 j + l``. A block spans the columns of one unit a lane in the narrowest plane: 32 columns for 8 bits, 64 for 4, 128
for 2 and 6, 256 where there is a plane of 1 bit. Rows are padded with zero codes to whole blocks. Groups start at
multiples of 16 columns, so that all lanes of a position are in one group.

Rows are interleaved: a *stripe* is 8 rows, a *chunk* 32 units (64 bytes) of a row, and the chunks of a stripe's rows
follow each other, row by row, chunk by chunk: ``[stripes, chunks, 8, 32]``, padded with zeros at both ends. A kernel
that takes a few columns of several rows then reads half a kilobyte in one piece; memory that is read 64 bytes here and
there gives a third of its speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.quant.packing import planes
from compress.quant.weights import QuantizedWeight

__all__ = ["CHUNK", "LANES", "STRIPE", "LaneWeight", "block_columns", "pack_lanes", "unit_shape", "unpack_lanes"]

LANES = 16
STRIPE = 8
CHUNK = 32
_UNIT_BITS = 16


def block_columns(bits: int) -> int:
    """Columns of a block: those that a unit of every lane covers in the narrowest plane."""
    return LANES * _UNIT_BITS // min(width for width, _ in planes(bits))


def unit_shape(outputs: int, inputs: int, bits: int) -> tuple[int, int, int, int]:
    """Shape of the units of a weight of ``outputs`` rows: stripes, chunks, rows of a stripe, units of a chunk."""
    columns = block_columns(bits)
    units = -(-inputs // columns) * columns * bits // _UNIT_BITS
    return -(-outputs // STRIPE), -(-units // CHUNK), STRIPE, CHUNK


def pack_lanes(codes: Tensor, bits: int) -> Tensor:
    """Unsigned ``codes`` [O, I] (any integer dtype, values below ``2**bits``) as int16 units of :func:`unit_shape`."""
    outputs, inputs = codes.shape
    padded = torch.nn.functional.pad(codes.int(), (0, -inputs % block_columns(bits)))
    rows = []
    for width, offset in planes(bits):
        part = (padded >> offset) & ((1 << width) - 1)
        part = part.reshape(outputs, -1, _UNIT_BITS // width, LANES)  # [O, units of a lane, positions, lanes]
        shifts = torch.arange(0, _UNIT_BITS, width, dtype=torch.int32, device=codes.device)
        rows.append((part << shifts[:, None]).sum(2, dtype=torch.int32).reshape(outputs, -1))
    stripes, chunks, _, _ = unit_shape(outputs, inputs, bits)
    flat = torch.cat(rows, 1).to(torch.int16)
    flat = torch.nn.functional.pad(flat, (0, chunks * CHUNK - flat.shape[1], 0, stripes * STRIPE - outputs))
    return flat.reshape(stripes, STRIPE, chunks, CHUNK).transpose(1, 2).contiguous()


def unpack_lanes(units: Tensor, bits: int, outputs: int, inputs: int) -> Tensor:
    """The uint8 codes [``outputs``, ``inputs``] that ``units`` hold.

    Raises:
        ValueError: ``units`` has another shape than ``bits``, ``outputs`` and ``inputs`` ask for.
    """
    wanted = unit_shape(outputs, inputs, bits)
    if tuple(units.shape) != wanted:
        raise ValueError(f"units of shape {tuple(units.shape)}; {bits} bits x {outputs} x {inputs} need {wanted}")
    units = units.transpose(1, 2).flatten(2).flatten(0, 1)[:outputs]
    blocks = -(-inputs // block_columns(bits))
    columns = blocks * block_columns(bits)
    codes = torch.zeros(outputs, columns, dtype=torch.int32, device=units.device)
    start = 0
    for width, offset in planes(bits):
        count = columns * width // _UNIT_BITS
        part = units[:, start : start + count].int().reshape(outputs, -1, 1, LANES)
        shifts = torch.arange(0, _UNIT_BITS, width, dtype=torch.int32, device=units.device)
        codes |= ((part >> shifts[:, None]) & ((1 << width) - 1)).reshape(outputs, columns) << offset
        start += count
    return codes[:, :inputs].to(torch.uint8)


@dataclass(frozen=True)
class LaneWeight:
    """A linear's quantized weight as the kernels read it; ``weight = (codes - zero_point) * scale``.

    Attributes:
        units: int16 [stripes, chunks, 8, 32], this module's layout.
        scale: float16, bfloat16 or float32 [O, G], a column for every ``group_size`` inputs, the last maybe for fewer.
        zero_point: uint8 [O, G].
        bits: width of a code, 2..8.
        inputs: I, codes in a row.
        group_size: inputs that share a grid; ``inputs`` itself where a row has one.
    """

    units: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    inputs: int
    group_size: int

    @property
    def outputs(self) -> int:
        """O."""
        return self.scale.shape[0]

    @property
    def weight_bytes(self) -> int:
        """Bytes of codes, scales and zero points: what one pass over the weight has to read."""
        return sum(part.numel() * part.element_size() for part in (self.units, self.scale, self.zero_point))

    def to(self, device: str | torch.device) -> LaneWeight:
        """The same weight on ``device``."""
        units, scale, zero_point = (part.to(device) for part in (self.units, self.scale, self.zero_point))
        return LaneWeight(units, scale, zero_point, self.bits, self.inputs, self.group_size)

    @staticmethod
    def from_quantized(weight: QuantizedWeight, scale_dtype: torch.dtype = torch.float32) -> LaneWeight:
        """Re-lay a linear's ``weight`` [O, I] on its own device; scales are stored as ``scale_dtype``.

        Raises:
            ValueError: the weight is not a matrix, or a scale is not a normal number in ``scale_dtype``.
        """
        if weight.codes.dim() != 2:
            raise ValueError(f"a weight of shape {tuple(weight.codes.shape)}; kernels of linears take [O, I]")
        outputs, inputs = weight.codes.shape
        scale = weight.scale.reshape(outputs, -1).to(scale_dtype)
        limits = torch.finfo(scale_dtype)
        if not bool(((scale >= limits.smallest_normal) & (scale <= limits.max)).all()):
            raise ValueError(f"scales reach beyond {scale_dtype}; keep them as torch.float32")
        return LaneWeight(
            pack_lanes(weight.codes, weight.bits),
            scale.contiguous(),
            weight.zero_point.reshape(outputs, -1).contiguous(),
            weight.bits,
            inputs,
            weight.group_size or inputs,
        )
