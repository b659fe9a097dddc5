"""The bit layout of packed weight codes: one owner, specified here, tested against golden bytes.

A tensor of ``n`` unsigned codes of ``b`` bits (1 <= b <= 8), flattened in row-major order and padded with zero codes to
a multiple of eight, is stored as a uint8 array of shape ``[b, ceil(n / 8)]``: exactly ``b`` bits a code.

- The code is cut into *planes* of 8, 4, 2 or 1 bits, the widest first, the first plane holding the lowest bits:
  3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1; 1, 2, 4 and 8 bits are one plane.
- A plane of width ``w`` fills the next ``w`` rows. Read as one run of bytes, each byte holds ``8 / w`` consecutive
  codes' bits, the first code in the lowest bits (low nibble first for 4 bits).

The planes make every width unpackable with shifts and masks alone, which ONNX Runtime folds at load time
(exporters/functions.py), and a row per bit makes the offsets independent of the tensor's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MAX_BITS", "pack", "packed_bytes", "planes", "unpack"]

MAX_BITS = 8


def planes(bits: int) -> tuple[tuple[int, int], ...]:
    """The planes of a ``bits``-wide code as ``(width, lowest bit)``, in storage order.

    Raises:
        ValueError: ``bits`` is not in 1..8.
    """
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"{bits} bits; a packed code has 1 to {MAX_BITS}")
    found, offset = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            found.append((width, offset))
            offset += width
    return tuple(found)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take."""
    return bits * -(-count // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned ``codes`` (any shape, any integer dtype) into uint8 ``[bits, ceil(n / 8)]``.

    Raises:
        ValueError: a code lies outside 0..2**bits - 1.
    """
    flat = codes.reshape(-1)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= 1 << bits):
        raise ValueError(f"codes span {int(flat.min())}..{int(flat.max())}; {bits} bits hold 0..{(1 << bits) - 1}")
    columns = -(-flat.numel() // 8)
    padded = torch.zeros(columns * 8, dtype=torch.uint8, device=codes.device)
    padded[: flat.numel()] = flat.to(torch.uint8)
    rows = []
    for width, offset in planes(bits):
        per_byte = 8 // width
        part = ((padded >> offset) & ((1 << width) - 1)).reshape(width * columns, per_byte)
        run = torch.zeros(part.shape[0], dtype=torch.uint8, device=codes.device)
        for position in range(per_byte):
            run |= part[:, position] << (position * width)
        rows.append(run.reshape(width, columns))
    return torch.cat(rows)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes of ``packed`` (uint8 ``[bits, ceil(count / 8)]``) as uint8 ``[count]``.

    Raises:
        ValueError: ``packed`` has another shape than ``bits`` and ``count`` ask for.
    """
    columns = -(-count // 8)
    if tuple(packed.shape) != (bits, columns):
        raise ValueError(
            f"packed codes of shape {tuple(packed.shape)}; {count} codes of {bits} bits need {(bits, columns)}"
        )
    codes = torch.zeros(columns * 8, dtype=torch.uint8, device=packed.device)
    row = 0
    for width, offset in planes(bits):
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        run = packed[row : row + width].reshape(-1, 1)
        codes |= ((run >> shifts) & ((1 << width) - 1)).reshape(-1) << offset
        row += width
    return codes[:count]
