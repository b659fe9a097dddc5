"""What no integer operator reads is what the float model computes: outputs, masks, indices; on the exported file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.exporters.build import build_onnx, write_onnx
from compress.exporters.session import open_session, run_session
from compress.graph.layers import layer_computes
from compress.graph.quantizers import fake_quantize_op
from compress.graph.shared_grids import coarse_parts
from compress.graph.traced import TracedModel
from compress.proof.gate import verify

CHANNELS = 16


class Net(nn.Module):
    """Three convolutions of one width; ``body(net, x)`` says how they are joined."""

    def __init__(self, body: Callable[[Net, Tensor], Any], channels: int = 4) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, 4, 3, padding=1)
        self.large, self.c = nn.Conv2d(CHANNELS, 4, 1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.large.weight *= 500
            self.large.bias.fill_(320.0)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def with_mask(count: int = 32) -> Tensor:
    """Images [N, 4, 8, 8] whose last channel is 0 or 1."""
    x = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    x[:, 3] = (x[:, 3] > 0).float()
    return x


class File:
    """A network, its compressed graph, and its file's outputs on the samples that it was calibrated on."""

    def __init__(self, net: Net, x: Tensor, folder: Path, compress_quickly: Callable[..., TracedModel]) -> None:
        self.net, self.x = net.eval(), x
        self.traced = compress_quickly(net, x, bits=8, first_last_bits=7)
        path = folder / "model.onnx"
        write_onnx(build_onnx(self.traced), path, {})
        self.check = verify(self.traced, path, (x,), "samples")
        self.got = run_session(open_session(path, "ORT_ENABLE_ALL"), [(x,)])

    def wanted(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            result = self.net(self.x)
        return result if isinstance(result, tuple) else (result,)

    def grids(self) -> list[str]:
        nodes = self.traced.graph.find_nodes(op="call_function", target=fake_quantize_op())
        return sorted({str(node.args[1].target).removesuffix(".scale") for node in nodes})


Make = Callable[[Callable[[Net, Tensor], Any]], File]


@pytest.fixture
def made(tmp_path: Path, compress_quickly: Callable[..., TracedModel]) -> Make:
    def make(body: Callable[[Net, Tensor], Any]) -> File:
        torch.manual_seed(0)
        return File(Net(body), with_mask(), tmp_path, compress_quickly)

    return make


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.slow
def test_boxes_beside_scores(made: Make) -> None:
    def detector(net: Net, x: Tensor) -> Tensor:
        h = torch.relu(net.a(x))
        return torch.cat([net.large(h), net.b(h).sigmoid()], 1)

    file = made(detector)
    (got,), (wanted,) = file.got, file.wanted()
    for part in (slice(0, 4), slice(4, 8)):
        assert distance(got[:, part], wanted[:, part]) < 0.02
    assert len(got[:, 4:].unique()) > 100
    assert not file.check.failures
    assert set(layer_computes(file.traced).values()) == {"integer"}
    assert not any("cat" in name for name in file.grids())


ENDS = {
    "sum": lambda net, h: net.large(h) + net.b(h),
    "sum, moved": lambda net, h: (net.large(h) + net.b(h))[:, :, 1:].flatten(1),
    "pool": lambda net, h: torch.nn.functional.avg_pool2d(net.large(h), 2),
    "product": lambda net, h: net.large(h) * net.b(h),
    "sum of sums": lambda net, h: (net.large(h) + net.b(h)) + net.b(h),
}


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("end", list(ENDS))
def test_what_only_floats_read_has_no_grid(end: str, made: Make) -> None:
    file = made(lambda net, x: ENDS[end](net, torch.relu(net.a(x))))
    assert "quantizers.conv2d_1" in file.grids()
    assert not any(kind in name for name in file.grids() for kind in ("add", "mul", "pool"))
    assert distance(file.got[0], file.wanted()[0]) < 0.03
    assert not file.check.failures


@pytest.mark.slow
def test_a_part_that_a_shared_grid_swallows_is_noted(made: Make) -> None:
    def joined(net: Net, x: Tensor) -> Tensor:
        h = torch.relu(net.a(x))
        return net.c(torch.cat([net.large(h), net.b(h).sigmoid()], 1))

    file = made(joined)
    (note,) = coarse_parts(file.traced)
    assert note.startswith("concatenation cat: what comes from sigmoid spans ")
    assert note.endswith("to keep it, leave float what reads it: --ignore c")
    assert coarse_parts(made(lambda net, x: net.c(torch.cat([net.b(h := net.a(x)), net.b(h)], 1))).traced) == []


MASKS = {
    "comparison": lambda net, x: torch.where(x[:, 3:4] == 1, x[:, :3], net.b(torch.relu(net.a(x)))[:, :3]),
    "select": lambda net, x: torch.where((x.select(1, 3) == 1)[:, None], x, net.b(torch.relu(net.a(x)))),
    "permute": lambda net, x: (net.b(torch.relu(net.a(x))), x.permute(0, 2, 3, 1)),
    "view of a slice": lambda net, x: (net.b(torch.relu(net.a(x))), x[:, :3].flatten(2)),
    "read by both": lambda net, x: (
        net.c(torch.cat([x[:, :, 1:], x[:, :, 1:]], 1)) + net.b(net.a(y := x[:, :, 1:])),
        y,
    ),
}


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("mask", list(MASKS))
def test_what_is_not_calculated_in_integers_reads_the_input_as_it_is(mask: str, made: Make) -> None:
    file = made(lambda net, x: MASKS[mask](net, x))
    wanted = file.wanted()
    assert not file.check.failures
    if len(wanted) == 2:
        assert torch.equal(file.got[1], wanted[1])
    else:
        known = torch.isin(wanted[0], file.x)
        assert 0.3 < known.float().mean() < 0.7
        assert torch.equal(file.got[0][known], wanted[0][known])
    assert 0 < distance(file.got[0], wanted[0]) < 0.03
    assert "quantizers.x" in file.grids() or mask == "read by both"


@pytest.mark.slow
def test_an_index_is_computed_from_the_input_as_it_is(made: Make) -> None:
    def looked_up(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        place = (x[:, 0].flatten(1) * 1000).long()
        return net.b(torch.relu(net.a(x))), place

    file = made(looked_up)
    assert torch.equal(file.got[1], file.wanted()[1])
