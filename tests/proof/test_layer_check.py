"""One fault in one layer of a file: the gate finds it, and that layer alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from compress.exporters.build import build_onnx, write_onnx
from compress.exporters.session import open_session
from compress.graph.traced import TracedModel
from compress.proof.gate import verify
from compress.proof.layer_check import guilty_layers, innocent_layers
from compress.quant.packing import pack, unpack
from compress.records.report import ExportCheck, LayerCheck

# No kernel saturates on codes of 7 bits, whatever the processor.
SOUND = {"bits": 7, "first_last_bits": 7}


class Pictures(nn.Module):
    """Convolutions with a residual, a depthwise one among them, a pool and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1)
        self.wide, self.head = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(self.wide(torch.relu(self.deep(x))) + x).mean((2, 3)))


class Signals(nn.Module):
    """One-dimensional convolutions, and linears on what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(8, 16, 3), nn.Conv1d(16, 16, 3)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x)))).transpose(1, 2)
        return self.down(nn.functional.gelu(self.up(x)))


class Tokens(nn.Module):
    """Attention and a feed-forward part: three linears share an input, the others have their own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        x = x + self.out(scores.softmax(-1) @ self.v(x))
        return x + self.down(nn.functional.gelu(self.up(x)))


SHAPES = {Pictures: (3, 10, 10), Signals: (8, 20), Tokens: (5, 32)}
KINDS = {
    "static-conv2d": (Pictures, True, SOUND, ("stem", "deep", "wide", "head")),
    "static-conv1d": (Signals, True, SOUND, ("a", "b", "up", "down")),
    "dynamic-linear": (Tokens, False, SOUND | {"dynamic": True}, ("q", "v", "out", "down")),
    "float-conv2d": (Pictures, False, {"bits": 5}, ("stem", "deep", "wide", "head")),
    "float-linear": (Tokens, False, {"bits": 5}, ("q", "v", "out", "down")),
    "blocks": (Tokens, False, {"bits": 4, "group_size": 32}, ("q", "v", "out", "down")),
}


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, compress_quickly: Callable[..., TracedModel]
) -> Callable[[str], tuple[TracedModel, Path, Tensor]]:
    made: dict[str, tuple[TracedModel, Path, Tensor]] = {}

    def give(kind: str) -> tuple[TracedModel, Path, Tensor]:
        if kind not in made:
            torch.manual_seed(0)
            module, calibrated, options, _ = KINDS[kind]
            net, x = module(), torch.rand(32, *SHAPES[module]) * 2
            for name, parameter in net.named_parameters():
                if name.endswith("bias"):  # no channel is to be dead behind its ReLU: nothing would show there
                    torch.nn.init.uniform_(parameter, 0.5, 1.5)
            traced = compress_quickly(net, x if calibrated else None, SHAPES[module], **options)
            path = tmp_path_factory.mktemp(kind) / "model.onnx"
            write_onnx(build_onnx(traced), path, {})
            made[kind] = traced, path, x
        return made[kind]

    return give


def plant(path: Path, out: Path, name: str, change: Callable[[np.ndarray], None]) -> Path:
    """A copy of the file with one number of the initialiser ``name`` changed."""
    model = onnx.load(path)
    (tensor,) = (each for each in model.graph.initializer if each.name == name)
    array = numpy_helper.to_array(tensor).copy()
    change(array)
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, out)
    return out


def at_fault(check: ExportCheck) -> list[str]:
    return [row.name for row in check.layers if not row.steps <= row.allowed_steps]


def flip_code(stored: np.ndarray) -> None:
    """The first code to the other end of its range; in a block the first byte, of one code or two."""
    if stored.dtype == np.int8:
        stored.reshape(-1)[0] = -127 if stored.reshape(-1)[0] >= 0 else 127
    elif stored.ndim == 3:
        stored[0, 0, 0] = 0 if stored[0, 0, 0] >= 128 else 255
    else:
        bits, bytes_a_bit = stored.shape
        codes = unpack(torch.from_numpy(stored.copy()), bits, 8 * bytes_a_bit)
        codes[0] = 0 if codes[0] >= 1 << (bits - 1) else (1 << bits) - 1
        stored[:] = pack(codes, bits).numpy().reshape(stored.shape)


def double(numbers: np.ndarray) -> None:
    numbers.reshape(-1)[0] *= 2


def move(numbers: np.ndarray) -> None:
    numbers.reshape(-1)[0] += numbers.dtype.type(3 + 3 * np.abs(numbers).max())


@pytest.mark.slow(cases=2)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_file_has_no_layer_off(kind: str, exported: Callable[[str], tuple[TracedModel, Path, Tensor]]) -> None:
    traced, path, x = exported(kind)
    check = verify(traced, path, (x,), "noise")
    assert check.failures == ()
    assert len(check.layers) == check.integer_layers + check.float_layers + check.block_layers
    assert all(row.values > 0 for row in check.layers)
    if kind != "blocks":  # whose kernel rounds its inputs, which the graph does not
        assert max(row.steps for row in check.layers) <= 1.001


FAULTS = {
    "codes": (flip_code, ("weight_packed", "weight_codes")),
    "scale": (double, ("weight_scale",)),
    "bias": (move, ("bias_codes", "bias")),
}
PLANTED = [
    (kind, layer, fault)
    for kind, row in KINDS.items()
    for layer in row[3]
    for fault in FAULTS
    if not (kind.startswith("float") and fault == "scale")  # which has no name of its own there
]


@pytest.mark.slow(cases=16)
@pytest.mark.parametrize(("kind", "layer", "fault"), PLANTED)
def test_the_layer_with_one_wrong_number_is_named(
    kind: str,
    layer: str,
    fault: str,
    exported: Callable[[str], tuple[TracedModel, Path, Tensor]],
    tmp_path: Path,
) -> None:
    traced, path, x = exported(kind)
    names = {each.name for each in onnx.load(path).graph.initializer}
    change, parts = FAULTS[fault]
    (name,) = (f"{layer}.{part}" for part in parts if f"{layer}.{part}" in names)
    check = verify(traced, plant(path, tmp_path / "planted.onnx", name, change), (x,), "noise")
    assert at_fault(check) == [layer]
    (sentence,) = (failure for failure in check.failures if "kernel is off at layer" in failure)
    (row,) = (row for row in check.layers if row.name == layer)
    assert f"off at layer {layer} ({row.operator}): {row.steps:.3g} steps" in sentence
    assert f"{row.beyond_one_step:,} of {row.values:,} values off by more than one" in sentence


def saturates() -> bool:
    """Whether ONNX Runtime's kernel for uint8 by int8 adds two products in 16 bits on this processor."""
    nodes = [helper.make_node("MatMulInteger", ["x", "w"], ["y"])]
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 64])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, [1, 32])
    weight = numpy_helper.from_array(np.full((64, 32), 127, np.int8), "w")
    graph = helper.make_graph(nodes, "sum", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    session = open_session(model.SerializeToString(), "ORT_DISABLE_ALL")
    (result,) = session.run(None, {"x": np.full((1, 64), 255, np.uint8)})
    return bool((result != 64 * 127 * 255).any())


def plant_full_codes(traced: TracedModel, layer: str, value: float) -> None:
    """Every weight of the first channel, all ``value``, as code 127."""
    packed, scale = (traced.tensor(f"{layer}.weight_{part}").clone() for part in ("packed", "scale"))
    codes = unpack(packed, 8, packed.numel()).reshape(len(scale), -1)
    codes[0], scale[0] = 255, value / 127
    traced.set_tensor(f"{layer}.weight_packed", pack(codes, 8))
    traced.set_tensor(f"{layer}.weight_scale", scale)
    bias = traced.tensor(f"{layer}.bias_codes").clone()
    bias[0] = 0
    traced.set_tensor(f"{layer}.bias_codes", bias)


@pytest.mark.slow
def test_layers_that_saturate_are_named(tmp_path: Path, compress_quickly: Callable[..., TracedModel]) -> None:
    if not saturates():
        pytest.skip("this processor's integer kernels do not saturate (VNNI, Arm or SSE2)")
    torch.manual_seed(0)
    module, x = Pictures(), torch.rand(32, 3, 10, 10) + 1
    with torch.no_grad():
        for layer in (module.stem, module.head):
            layer.weight[0], layer.bias[0] = 0.1, 0
        module.wide.bias += 1
    traced = compress_quickly(module, x, bits=4, first_last_bits=8)
    plant_full_codes(traced, "stem", 0.1)
    plant_full_codes(traced, "head", 0.1)
    path = tmp_path / "model.onnx"
    write_onnx(build_onnx(traced), path, {})
    check = verify(traced, path, (x,), "noise")
    assert at_fault(check) == ["stem", "head"]
    # Without optimisation there is no integer kernel.
    assert check.relative_l2_unoptimized < 0.05


class Odd(nn.Module):
    """Layers whose nodes are not what they were: bias zero, bias added behind, padding and BatchNorm joined to them."""

    def __init__(self) -> None:
        super().__init__()
        self.zero, self.padded = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.joined, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.bare, self.after = nn.Linear(8, 8, bias=False), nn.Parameter(torch.randn(8))
        self.plain = nn.Linear(8, 4, bias=False)
        nn.init.zeros_(self.zero.bias)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.pad(self.zero(x), (0, 1, 0, 1))
        joined = self.joined(self.padded(x))
        x = (self.norm(joined) + joined).flatten(2).transpose(1, 2)
        return self.plain((self.bare(x) + self.after).transpose(1, 2).transpose(1, 2)) * 0.125


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize(
    "options",
    [{"bits": 5}, SOUND | {"dynamic": True}, {"bits": 4, "group_size": 32}],
    ids=["float", "dynamic", "blocks"],
)
def test_layers_that_are_joined_to_others_are_not_blamed(
    options: dict[str, Any], tmp_path: Path, compress_quickly: Callable[..., TracedModel]
) -> None:
    torch.manual_seed(0)
    traced = compress_quickly(Odd(), None, (3, 10, 10), **options)
    path = tmp_path / "model.onnx"
    write_onnx(build_onnx(traced), path, {})
    check = verify(traced, path, (torch.randn(20, 3, 10, 10),), "noise")
    assert check.failures == ()
    assert [row.name for row in check.layers] == ["zero", "padded", "joined", "bare", "plain"]


def test_a_layer_that_cannot_be_looked_at_alone_is_told_of(
    tmp_path: Path, exported: Callable[[str], tuple[TracedModel, Path, Tensor]]
) -> None:
    traced, path, x = exported("float-linear")
    model = onnx.load(path)
    next(node for node in model.graph.node if node.name == "out").name = "another"
    onnx.save(model, tmp_path / "renamed.onnx")
    check = verify(traced, tmp_path / "renamed.onnx", (x,), "noise")
    assert check.notes == ("of out ONNX Runtime has no node that can be looked at alone",)
    assert [row.name for row in check.layers] == ["q", "k", "v", "up", "down"]


def test_a_difference_between_layers_is_said_to_be_there(
    tmp_path: Path, exported: Callable[[str], tuple[TracedModel, Path, Tensor]]
) -> None:
    traced, path, x = exported("float-linear")
    model = onnx.load(path)
    (softmax,) = (node for node in model.graph.node if node.op_type == "Softmax")
    softmax.attribute[0].i = 1
    onnx.save(model, tmp_path / "turned.onnx")
    check = verify(traced, tmp_path / "turned.onnx", (x,), "noise")
    assert at_fault(check) == []
    assert check.failures[-1] == innocent_layers(check.layers)
    assert "no layer is at fault by itself" in check.failures[-1]


def test_many_layers_at_fault_are_counted_and_the_worst_come_first() -> None:
    def row(name: str, steps: float) -> LayerCheck:
        return LayerCheck(
            name=name, operator="QGemm", relative_l2=0.1, steps=steps, allowed_steps=1.5, beyond_one_step=7, values=1000
        )

    assert guilty_layers([row("a", 1.0)]) is None
    sentence = guilty_layers([row("a", 1.0), *(row(f"l{steps}", steps) for steps in (9, 40, 3, 12))])
    assert sentence is not None
    assert [sentence.index(name) for name in ("l40", "l12", "l9")] == sorted(
        sentence.index(name) for name in ("l40", "l12", "l9")
    )
    assert "l3" not in sentence
    assert "7 of 1,000 values" in sentence
    assert sentence.endswith("and 1 more layers")
