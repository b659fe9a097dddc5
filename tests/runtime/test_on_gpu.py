"""Artifacts on a real GPU: loaded, in a CUDA graph, compiled, timed. Skipped where there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compress
from compress import api

pytestmark = pytest.mark.skipif(
    os.environ["TRITON_INTERPRET"] == "1" or not torch.cuda.is_available(), reason="needs a GPU and TRITON_INTERPRET=0"
)


class Words(nn.Module):
    """A table and linears whose weights stay packed."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.head = nn.Embedding(40, 64), nn.Linear(64, 96), nn.Linear(96, 5)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.first(self.table(ids))).mean(1))
        return y


@pytest.fixture(scope="module", params=["weights", "integers"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A folder, and inputs that are on the GPU."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpu") / "out"
    if request.param == "weights":
        x = torch.randint(0, 40, (8, 6))
        api.quantize(Words().eval(), calib=x, bits=4, group_size=32, method="mse", out=folder)
    else:
        x = torch.randn(8, 3, 8, 8)
        convolutions = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU())
        net = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(32 * 9, 10))
        api.quantize(net.eval(), calib=x, bits=8, method="mse", out=folder)
    return folder, x.cuda()


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.cpu() - wanted.cpu()).norm() / wanted.cpu().norm())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_it_computes_what_the_cpu_does(artifact: tuple[Path, Tensor], dtype: torch.dtype | None) -> None:
    folder, x = artifact
    wanted, module = compress.load(folder)(x.cpu()), compress.load(folder, device="cuda", dtype=dtype)
    for rows in (1, 8):
        assert relative(module(x[:rows]), wanted[:rows]) <= 2e-2


@torch.no_grad()
def test_in_a_graph_and_compiled(artifact: tuple[Path, Tensor]) -> None:
    folder, x = artifact
    module = compress.load(folder, device="cuda")
    wanted, given = module(x), torch.zeros_like(x)
    module(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = module(given)
    given.copy_(x)
    graph.replay()
    assert relative(got, wanted) <= 1e-6
    assert relative(torch.compile(module, fullgraph=True)(x), wanted) <= 2e-2


def test_it_is_timed_and_explained(artifact: tuple[Path, Tensor]) -> None:
    folder, _ = artifact
    dims = {"sequence": 6} if (folder / "graph.json").read_text().count("embedding") else {}
    report = compress.bench([folder], device="cuda", explain=True, runs=5, dims=dims)
    assert report.rows[0].device_memory_bytes
    kernels = {layer.kernel for layer in report.explanations[0].layers}
    assert kernels & {"packed_gemv", "packed_dot", "int8_conv", "int8_fused"}
