"""An artifact's graph rewritten for a GPU: what becomes of each layer, and that it computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress import api
from compress.errors import InputError
from compress.graph.rewrite import set_weight
from compress.graph.split import split_layer
from compress.graph.traced import TracedModel, trace
from compress.kernels.table import register_operators
from compress.quant.grid import min_max_grid, quantize
from compress.records.layers import Split
from compress.runtime.artifact import load_artifact
from compress.runtime.device import check_device, move_graph
from compress.runtime.explain import explain
from compress.runtime.pack import packed_for_gpu

HOPPER = (9, 0)

register_operators()


class Net(nn.Module):
    """A table, a linear called twice, a convolution, a sequence linear, a mask made as it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 32)
        self.twice = nn.Linear(32, 32)
        self.wide = nn.Linear(32, 48, bias=False)
        self.conv = nn.Conv1d(48, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        x = x + torch.arange(x.shape[1], device=x.device)[:, None] * 0.1
        x = self.conv(self.wide(x).transpose(1, 2)).mean(2)
        return self.head(x)


def calls(traced: TracedModel) -> list[str]:
    return [str(node.target).split(".")[1] for node in traced.graph.nodes if node.op == "call_function"]


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights only, 4 bits in groups of 32."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runtime") / "out"
    ids = torch.randint(0, 40, (8, 6))
    api.quantize(Net().eval(), calib=ids, bits=4, group_size=32, method="mse", out=folder)
    return folder


@pytest.mark.matrix
def test_on_the_cpu_the_artifacts_own_graph_runs(artifact: Path) -> None:
    ids = torch.randint(0, 40, (3, 9))
    with torch.no_grad():
        assert torch.equal(compress.load(artifact, device="cpu")(ids), load_artifact(artifact).module(ids))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_packed_graph_computes_the_same(artifact: Path, dtype: torch.dtype | None) -> None:
    traced = load_artifact(artifact)
    packed = packed_for_gpu(traced, HOPPER, dtype)
    ids = torch.randint(0, 40, (3, 9))
    found = calls(packed)
    assert found.count("packed_linear") == 4, "the linear of 8 inputs, too: its row has one grid"
    assert not any(name.startswith("dequantize") for name in found)
    with torch.no_grad():
        got, wanted = packed.module(ids), traced.module(ids)
    assert got.dtype is torch.float32
    assert relative(got, wanted) <= (1e-5 if dtype is None else 1e-2)
    names = [name for name, _ in packed.module.named_buffers()]
    assert sum(name.startswith("twice.weight_units") for name in names) == 1, "called twice, packed once"
    assert not any(name.endswith("weight_packed") for name in names)


def test_no_tensor_stays_behind(artifact: Path) -> None:
    module = move_graph(packed_for_gpu(load_artifact(artifact), HOPPER), torch.device("meta"))
    out = module(torch.zeros(3, 9, dtype=torch.int64, device="meta"))
    assert out.shape == (3, 5)
    assert out.is_meta
    assert {each.device.type for each in [*module.parameters(), *module.buffers()]} == {"meta"}


def test_without_a_kernel_weights_are_floats(artifact: Path) -> None:
    traced = load_artifact(artifact)
    packed = packed_for_gpu(traced, (7, 5))
    assert "packed_linear" not in calls(packed)
    ids = torch.randint(0, 40, (2, 4))
    with torch.no_grad():
        assert torch.equal(packed.module(ids), traced.module(ids))


@pytest.mark.slow
def test_integer_layers_keep_their_grids(compress_quickly: Callable[..., Any]) -> None:
    module = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 3))
    traced = compress_quickly(module.eval(), torch.randn(16, 2, 4, 4), bits=4)
    packed = packed_for_gpu(traced, HOPPER)
    assert not any(name.startswith("dequantize") for name in calls(packed))
    assert calls(packed).count("int8_linear") == 2
    assert calls(packed).count("fake_quantize") == calls(traced).count("fake_quantize") - 2, "rounded in the kernels"
    x = torch.randn(5, 2, 4, 4)
    with torch.no_grad():
        assert relative(packed.module(x), traced.module(x)) <= 1e-5


class Residual(nn.Module):
    """Two convolutions in a row, a sum, a strided one, a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.down = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.second(torch.relu(self.first(x))))
        x = torch.relu(self.depthwise(torch.relu(self.down(x))))
        return self.head(x.mean((2, 3)))


@pytest.mark.matrix
def test_convolutions_pass_bytes_on(compress_quickly: Callable[..., Any]) -> None:
    torch.manual_seed(1)
    traced = compress_quickly(Residual().eval(), torch.randn(16, 3, 8, 8), bits=4)
    packed = packed_for_gpu(traced, HOPPER)
    found = calls(packed)
    assert found.count("int8_conv2d") == 4
    assert found.count("conv2d") == 1, "the depthwise one stays on floats"
    outputs = {
        str(node.args[3].target).split(".")[0]: len(node.args) > 13
        for node in packed.graph.nodes
        if str(node.target) == "compress.int8_conv2d.default"
    }
    assert outputs == {"stem": True, "first": True, "second": False, "down": False}
    assert found.count("dequantize_codes") == 1, "the sum reads the stem's result, too"
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        # Sums of floats and of integers differ in their last bits, and now and then in a code.
        assert relative(packed.module(x), traced.module(x)) <= 2e-2
        compiled = torch.compile(packed.module, backend="aot_eager", fullgraph=True, dynamic=False)
        assert torch.equal(compiled(x), packed.module(x)), "shape functions tell memory orders, too"
    rows = {row.layer: row for row in explain(packed, (x,), HOPPER)}
    assert (rows["first"].kernel, rows["first"].rows, rows["first"].inputs) == ("int8_conv", 5 * 64, 144)
    assert rows["depthwise"].refused == (
        "int8_conv: only groups of 16 outputs and more, which fill tensor cores, not of 1",
    )
    assert shape_on_meta(packed) == (5, 5)


def shape_on_meta(packed: TracedModel) -> tuple[int, ...]:
    """The output's shape where no tensor holds anything: nothing of the graph stays on another device."""
    module = move_graph(packed, torch.device("meta"))
    return tuple(module(torch.zeros(5, 3, 8, 8, device="meta")).shape)


def test_dynamic_layers_multiply_bytes(compress_quickly: Callable[..., Any]) -> None:
    module = nn.Sequential(nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    traced = compress_quickly(module, None, (32,), bits=8, dynamic=True)
    packed = packed_for_gpu(traced, HOPPER)
    assert calls(packed) == ["int8_dynamic_linear", "relu", "int8_dynamic_linear"]
    x = torch.randn(5, 32)
    with torch.no_grad():
        assert relative(packed.module(x), traced.module(x)) <= 1e-5
    rows = explain(packed, (x,), HOPPER)
    assert [(row.layer, row.kernel, row.bits) for row in rows] == [("0", "int8_fused", 8), ("2", "int8_fused", 8)]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["factors", "branch"])
@pytest.mark.parametrize("bits", [None, 8], ids=["float", "8 bits"])
def test_thin_layers_are_fused(form: Any, bits: int | None) -> None:
    traced = trace(nn.Sequential(nn.Linear(64, 48), nn.ReLU()), (torch.randn(2, 64),))
    down, up = torch.randn(4, 64) / 8, torch.randn(48, 4) / 2
    split_layer(traced, Split(layer="0", rank=4, form=form), down, up)
    widths = {} if bits is None else dict.fromkeys(("0.down", "0.up"), bits)
    for layer, width in (widths | ({"0": 4} if form == "branch" else {})).items():
        weight = traced.tensor(f"{layer}.weight")
        scale, zero_point = min_max_grid(weight, width, False, None)
        set_weight(traced, layer, quantize(weight, scale, zero_point, width, None), "float")
    packed = packed_for_gpu(traced, HOPPER)
    wanted = {"factors": "lowrank_linear" if bits is None else "packed_linear", "branch": "packed_lowrank_linear"}
    assert set(calls(packed)) == {wanted[form], "relu"}
    x = torch.randn(7, 64)
    with torch.no_grad():
        assert relative(packed.module(x), traced.module(x)) <= 1e-5


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "finds no GPU here; load the model on the CPU"),
        ("nothing", "is none that torch knows; give cpu, cuda or cuda:1"),
        ("meta", "models are loaded onto cpu, cuda or cuda:1"),
    ],
)
def test_devices_that_are_none(device: str, message: str, artifact: Path) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match=message):
        compress.load(artifact, device=device)
    assert check_device("cpu") == torch.device("cpu")


def test_a_damaged_folder_is_refused_before_the_device_is_asked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no graph\.json"):
        compress.load(tmp_path, device="cuda")


def test_dtypes_that_are_none(artifact: Path) -> None:
    with pytest.raises(InputError, match=r"dtype torch\.int8: packed linears multiply in"):
        packed_for_gpu(load_artifact(artifact), HOPPER, torch.int8)
    with pytest.raises(InputError, match="on the CPU an artifact runs as it was written"):
        compress.load(artifact, dtype=torch.bfloat16)


@pytest.mark.slow
def test_it_compiles_whole(artifact: Path) -> None:
    module = packed_for_gpu(load_artifact(artifact), HOPPER).module
    ids = torch.randint(0, 40, (3, 9))
    with torch.no_grad():
        got = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)(ids)
        assert torch.equal(got, module(ids))
