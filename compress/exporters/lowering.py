"""ONNX forms of the ``compress::`` operators, as translations for PyTorch's exporter.

The exporter hands over values that become graph inputs or initialisers; what is built here are ordinary nodes. Codes
are unpacked by a model-local function (compress/exporters/functions.py), and a float weight is finished with Sub and
Mul, not DequantizeLinear, so that ONNX Runtime folds it into a plain float initialiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from onnxscript.values import Op, Opset

from compress.exporters.blocks import block_weight_name, declare_block_weight
from compress.exporters.functions import DOMAIN, SPREAD, declare_schema, declare_spread, unpack_name

__all__ = ["translations"]


def translations() -> dict[Any, Callable[..., Any]]:
    """Operator overload → translation, for ``torch.onnx.export(custom_translation_table=...)``."""
    return {
        torch.ops.compress.fake_quantize.default: _fake_quantize,
        torch.ops.compress.fake_quantize_dynamic.default: _fake_quantize_dynamic,
        torch.ops.compress.dequantize_weight.default: _dequantize_weight,
        torch.ops.compress.dequantize_bias.default: _dequantize_bias,
        torch.ops.aten.gelu.default: _gelu,
    }


def _fake_quantize(x: Any, scale: Any, zero_point: Any, bits: int) -> Any:
    codes = op.QuantizeLinear(x, scale, zero_point)
    if bits < 8:
        # The codes start at the type's smallest value, which saturates by itself; only the top is clipped, in integers.
        dtype = np.uint8 if zero_point.dtype == ir.DataType.UINT8 else np.int8
        low = np.iinfo(dtype).min
        codes = op.Clip(codes, _constant(dtype(low)), _constant(dtype(low + (1 << bits) - 1)))
    return op.DequantizeLinear(codes, scale, zero_point)


def _fake_quantize_dynamic(x: Any) -> Any:
    return op.DequantizeLinear(*op.DynamicQuantizeLinear(x))


def _dequantize_weight(
    packed: Any,
    scale: Any,
    zero_point: Any,
    bits: int,
    shape: Sequence[int],
    compute: str,
    group_size: int | None = None,
) -> Any:
    if compute.startswith("blocks"):
        # A marker: compress/exporters/blocks.py makes it and the product that reads it one MatMulNBits.
        name = block_weight_name(bits, group_size, shape[1], compute)
        declare_block_weight(name)
        return Op(Opset(DOMAIN, 1), name)(packed, scale, zero_point)
    codes = _unpack(packed, bits, shape)
    if compute in ("integer", "dynamic"):
        return op.DequantizeLinear(codes, scale, _constant(np.zeros(shape[0], dtype=np.int8)), axis=0)
    # The function returns codes less 2**(bits - 1); a grid's zero point is moved by as much.
    spread = op.Cast(_spread(zero_point, shape, group_size), to=int(ir.DataType.FLOAT))
    centre = op.Sub(spread, _constant(np.float32(1 << (bits - 1))))
    centred = op.Sub(op.Cast(codes, to=int(ir.DataType.FLOAT)), centre)
    return op.Mul(centred, _spread(scale, shape, group_size))


def _spread(grid: Any, shape: Sequence[int], group_size: int | None) -> Any:
    """compress.quant.weights.spread in ONNX."""
    if group_size is None:
        return op.Reshape(grid, _ints(-1, *[1] * (len(shape) - 1)))
    row = math.prod(shape[1:])
    groups = -(-row // group_size)
    declare_spread()
    return Op(Opset(DOMAIN, 1), SPREAD)(grid, _ints(shape[0], groups, group_size), _ints(row), _ints(*shape))


def _dequantize_bias(codes: Any, input_scale: Any, weight_scale: Any) -> Any:
    return op.DequantizeLinear(codes, op.Mul(input_scale, weight_scale), axis=0)


def _gelu(x: Any, approximate: str = "none") -> Any:
    """In the one order of factors that ONNX Runtime makes a single operator of."""
    if approximate == "none":
        erf = op.Erf(op.Div(x, _constant(np.float32(math.sqrt(2.0)))))
        return op.Mul(op.Mul(x, op.Add(erf, _constant(np.float32(1.0)))), _constant(np.float32(0.5)))
    inner = op.Add(x, op.Mul(_constant(np.float32(0.044715)), op.Pow(x, _constant(np.float32(3.0)))))
    tanh = op.Tanh(op.Mul(_constant(np.float32(math.sqrt(2.0 / math.pi))), inner))
    return op.Mul(op.Mul(_constant(np.float32(0.5)), x), op.Add(_constant(np.float32(1.0)), tanh))


def _unpack(packed: Any, bits: int, shape: Sequence[int]) -> Any:
    declare_schema(bits)
    return Op(Opset(DOMAIN, 1), unpack_name(bits))(packed, _constant(np.array(shape, dtype=np.int64)))


def _constant(array: np.ndarray | np.generic) -> Any:
    return op.Constant(value=ir.tensor(np.asarray(array)))


def _ints(*values: int) -> Any:
    return _constant(np.array(values, dtype=np.int64))
