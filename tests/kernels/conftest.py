"""Where kernels are tested: in triton's interpreter on the CPU, or, with TRITON_INTERPRET=0, on the GPU at hand."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.kernels.lanes import LaneWeight
from compress.quant.weights import QuantizedWeight

# Read once, before the first product on a GPU: without it torch warns of each one where fresh memory is to hold NaN.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True, scope="session")
def numbers_before_nan() -> None:
    """The smaller and the larger of a number and NaN is the number, as on GPUs: triton 3.7's interpreter gives NaN."""
    if os.environ["TRITON_INTERPRET"] != "1":
        return
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    InterpreterBuilder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)


@pytest.fixture
def device() -> str:
    """``cpu`` for the interpreter, ``cuda`` for the real thing."""
    if os.environ["TRITON_INTERPRET"] == "1":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0 asks for a GPU, and there is none")
    return "cuda"


@pytest.fixture
def outputs_of_nan() -> Iterator[None]:
    """Fresh tensors hold NaN: an output that a kernel forgets to write shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def lane_weight() -> Callable[..., tuple[LaneWeight, Tensor]]:
    """``(outputs, inputs, bits, group_size, device) -> weight and its exact float64 matrix``, random."""

    def make(outputs: int, inputs: int, bits: int, group_size: int | None, device: str) -> tuple[LaneWeight, Tensor]:
        grid = (outputs,) if group_size is None else (outputs, -(-inputs // group_size))
        codes = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8)
        zero_point = torch.randint(0, 1 << bits, grid, dtype=torch.uint8)
        weight = QuantizedWeight(codes, torch.rand(grid) * 0.01 + 0.001, zero_point, bits, group_size)
        return LaneWeight.from_quantized(weight).to(device), weight.dequantize().double().to(device)

    return make


@pytest.fixture
def assert_near() -> Callable[[Tensor, Tensor], None]:
    """Relative error against float64: at most 1e-3 in float32, 2e-3 in float16, 1e-2 in bfloat16; NaN never passes."""
    limits = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}

    def check(got: Tensor, wanted: Tensor) -> None:
        assert got.shape == wanted.shape
        error = float((got.double() - wanted).norm() / wanted.norm())
        assert error <= limits[got.dtype], f"relative error {error:.2e} in {got.dtype}"

    return check
