"""Every operator of namespace ``compress::``, by the module that holds its reference, shape function and kernels."""

from __future__ import annotations

from compress.registry import resolve

__all__ = ["OPERATORS", "register_operators"]

OPERATORS = {
    "fake_quantize": "compress.kernels.fake_quantize:fake_quantize",
    "fake_quantize_dynamic": "compress.kernels.dynamic:fake_quantize_dynamic",
    "dequantize_weight": "compress.kernels.dequantize:dequantize_weight",
    "dequantize_bias": "compress.kernels.dequantize:dequantize_bias",
}


def register_operators() -> None:
    """Make ``torch.ops.compress.*`` callable: importing an operator's module registers it."""
    for name in OPERATORS:
        resolve(OPERATORS, name, "operator")
