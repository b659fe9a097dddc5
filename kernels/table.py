"""Every operator of namespace ``compress::``, by the module that holds its reference and shape function, and the
kernels of each, in the order in which they are asked (kernels/dispatch.py)."""

from __future__ import annotations

from compress.records.registry import resolve

__all__ = ["KERNELS", "OPERATORS", "register_operators"]

OPERATORS = {
    "fake_quantize": "compress.kernels.fake_quantize:fake_quantize",
    "fake_quantize_dynamic": "compress.kernels.dynamic:fake_quantize_dynamic",
    "dequantize_weight": "compress.kernels.dequantize:dequantize_weight",
    "dequantize_bias": "compress.kernels.dequantize:dequantize_bias",
    "packed_linear": "compress.kernels.packed_linear:packed_linear",
    "packed_lowrank_linear": "compress.kernels.packed_linear:packed_lowrank_linear",
    "lowrank_linear": "compress.kernels.lowrank_linear:lowrank_linear",
    "int8_linear": "compress.kernels.int8_linear:int8_linear",
    "int8_dynamic_linear": "compress.kernels.int8_linear:int8_dynamic_linear",
    "int8_conv2d": "compress.kernels.int8_conv2d:int8_conv2d",
    "dequantize_codes": "compress.kernels.int8_conv2d:dequantize_codes",
    "delta_linear": "compress.kernels.delta_linear:delta_linear",
    "packed_delta_linear": "compress.kernels.delta_linear:packed_delta_linear",
    "add_delta_": "compress.kernels.delta_linear:add_delta_",
}

# The last row of each operator is its reference in plain PyTorch, which takes everything.
KERNELS = {
    "packed_linear": {
        "packed_gemv": "compress.kernels.packed_gemv:KERNEL",
        "packed_dot": "compress.kernels.packed_dot:KERNEL",
        "packed_unpack": "compress.kernels.packed_unpack:KERNEL",
        "reference": "compress.kernels.packed_reference:KERNEL",
    },
    "lowrank_linear": {
        "thin_gemv": "compress.kernels.thin_gemv:KERNEL",
        "thin_dot": "compress.kernels.thin_dot:KERNEL",
        "reference": "compress.kernels.lowrank_reference:KERNEL",
    },
    "int8_linear": {
        "int8_fused": "compress.kernels.int8_dot:FUSED",
        "int8_dot": "compress.kernels.int8_dot:KERNEL",
        "reference": "compress.kernels.int8_reference:KERNEL",
    },
    "int8_conv2d": {
        "int8_conv": "compress.kernels.int8_conv:KERNEL",
        "reference": "compress.kernels.conv_problem:KERNEL",
    },
    "delta_linear": {
        "delta_gemv": "compress.kernels.delta_product:GEMV",
        "delta_merge": "compress.kernels.delta_product:MERGE",
        "delta_rows": "compress.kernels.delta_product:ROWS",
        "reference": "compress.kernels.delta_reference:KERNEL",
    },
    "add_delta_": {
        "delta_add": "compress.kernels.delta_product:ADD",
        "reference": "compress.kernels.delta_reference:ADD",
    },
}


def register_operators() -> None:
    """Make ``torch.ops.compress.*`` callable: importing an operator's module registers it."""
    for name in OPERATORS:
        resolve(OPERATORS, name, "operator")
