"""Quantized weights as others read them: the ``pack-quantized`` format of compressed-tensors.

A linear ``<name>`` becomes ``<name>.weight_packed`` (int32 [O, ceil(I * bits / 32)]: each row's codes end to end, the
lowest bits first), ``weight_scale`` [O, groups], ``weight_shape`` (int64 [2]) and, where the grid is not symmetric,
``weight_zero_point`` (packed the same way, along O). ``config.json`` says so in ``quantization_config``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.quant.weights import QuantizedWeight

__all__ = ["pack_rows", "packed_tensors", "quantization_config", "unpack_rows"]

_ROWS = 256


def packed_tensors(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """What ``weight`` [O, I] is stored as, by the end of its name; scales in ``dtype``."""
    groups = weight.scale.reshape(len(weight.scale), -1)
    found = {
        "weight_packed": pack_rows(weight.codes, weight.bits),
        "weight_scale": groups.to(dtype),
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if not weight.symmetric:
        zero = weight.zero_point.reshape(len(weight.zero_point), -1)
        found["weight_zero_point"] = pack_rows(zero.T, weight.bits).T.contiguous()
    return found


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """int32 [R, ceil(C * bits / 32)] from codes uint8 [R, C]."""
    parts = []
    for rows in codes.split(_ROWS):
        spread = (rows.numpy()[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
        run = spread.reshape(len(rows), -1)
        run = np.pad(run, ((0, 0), (0, -run.shape[1] % 32)))
        parts.append(np.packbits(run, axis=1, bitorder="little").view(np.int32))
    return torch.from_numpy(np.concatenate(parts))


def unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of :func:`pack_rows`."""
    run = np.unpackbits(packed.numpy().view(np.uint8), axis=1, bitorder="little")[:, : columns * bits]
    weights = (1 << np.arange(bits)).astype(np.uint8)
    return torch.from_numpy((run.reshape(len(run), columns, bits) * weights).sum(2, dtype=np.uint8))


def quantization_config(bits: int, group_size: int | None, symmetric: bool, ignored: Sequence[str]) -> dict[str, Any]:
    """The entry of ``config.json``; ``ignored`` are the linears that stay as they were."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group_size else "channel",
        "group_size": group_size,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": list(ignored),
        "quantization_status": "compressed",
    }
