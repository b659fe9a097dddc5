"""What users would pick in the place of our packed linear: 4-bit linears of torchao, gemlite and bitsandbytes.

A peer is a function (PEERS) from codes [O, I] in uint8, scales and zero points [O, I / group] to a function of rows
[N, I] in bfloat16. gemlite multiplies with these very codes; torchao and bitsandbytes take the float weight that they
stand for and round it their own way, bitsandbytes to NF4. They are not in ``constraints.txt``: those installed are
measured, in the same rounds as our kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.device_timing import copies_for, record_graph

__all__ = ["PEERS", "PEER_GROUP", "installed_peers", "peer_graph"]

PEER_BITS, PEER_GROUP = 4, 128
# NF4 of uniform weights is a tenth off; anything far above computes something else.
MAX_PEER_ERROR = 0.2

Multiply = Callable[[Tensor], Tensor]
Peer = Callable[[Tensor, Tensor, Tensor, int], Multiply]


def gemlite(codes: Tensor, scale: Tensor, zero_point: Tensor, group: int) -> Multiply:
    """gemlite 0.6: Triton kernels, tiles timed at the first call."""
    from gemlite.helper import A16Wn

    layers = A16Wn(device=str(codes.device), dtype=torch.bfloat16)
    layer: Multiply = layers.from_weights(codes, scale.bfloat16(), zero_point.bfloat16(), 4, group)
    return layer


def torchao(codes: Tensor, scale: Tensor, zero_point: Tensor, group: int) -> Multiply:
    """torchao 0.18 with torch's own int4 kernel (tinygemm)."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    linear = nn.Linear(codes.shape[1], codes.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(_float_weight(codes, scale, zero_point, group), requires_grad=False)
    quantize_(linear, Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d"))
    return linear


def bitsandbytes(codes: Tensor, scale: Tensor, zero_point: Tensor, group: int) -> Multiply:
    """bitsandbytes 0.50, NF4."""
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import quantize_4bit

    units, state = quantize_4bit(_float_weight(codes, scale, zero_point, group), blocksize=group, quant_type="nf4")

    def multiply(x: Tensor) -> Tensor:
        product: Any = matmul_4bit(x, units, quant_state=state)
        return product

    return multiply


PEERS: dict[str, Peer] = {"gemlite": gemlite, "torchao": torchao, "bitsandbytes": bitsandbytes}


def installed_peers() -> dict[str, Peer]:
    """Those that can be imported here."""
    return {name: peer for name, peer in PEERS.items() if find_spec(name) is not None}


def peer_graph(
    peer: Peer, rows: int, shape: tuple[int, int]
) -> tuple[tuple[torch.cuda.CUDAGraph, int], Any, dict[str, Any]]:
    """Calls over cold weights of ``shape`` [O, I] in a graph, what must be kept for it, and the products' error.

    Raises:
        AssertionError: the products are not those of the codes, by more than 4 bits can explain.
    """
    outputs, inputs = shape
    grid = (outputs, inputs // PEER_GROUP)
    copies = copies_for(outputs * inputs * PEER_BITS // 8)
    calls = []
    for _ in range(copies):
        codes = torch.randint(0, 1 << PEER_BITS, shape, dtype=torch.uint8, device="cuda")
        scale = torch.rand(grid, device="cuda") * 1e-3 + 1e-3
        zero_point = torch.randint(0, 1 << PEER_BITS, grid, dtype=torch.uint8, device="cuda")
        x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
        calls.append(partial(peer(codes, scale, zero_point, PEER_GROUP), x))
    graph, results = record_graph(calls)
    graph.replay()
    truth = x.float() @ _float_weight(codes, scale, zero_point, PEER_GROUP).float().T
    error = float((results[-1] - truth).norm() / truth.norm())
    if not error <= MAX_PEER_ERROR:
        raise AssertionError(f"relative error {error:.2e}")
    return (graph, copies), (calls, results), {"relative_error": float(f"{error:.2e}")}


def _float_weight(codes: Tensor, scale: Tensor, zero_point: Tensor, group: int) -> Tensor:
    """The weight [O, I] that codes stand for, in bfloat16."""
    grouped = codes.view(codes.shape[0], -1, group).float() - zero_point.float()[..., None]
    return (grouped * scale.float()[..., None]).view(codes.shape).bfloat16()
