from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from compress.errors import GateError
from compress.exporters.onnx import build_onnx, write_onnx
from compress.gate import verify, verify_or_raise
from compress.graph.simplify import simplify
from compress.graph.traced import TracedModel, trace
from compress.kernels.table import register_operators
from compress.report.schema import Parity

WIDTH = 16
SHAPE = (3, 10, 10)
LAYERS = ("first", "second", "third", "head")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, WIDTH, 3)
        self.second = nn.Conv2d(WIDTH, WIDTH, 3)
        self.third = nn.Conv2d(WIDTH, WIDTH, 3)
        self.head = nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.third(torch.relu(self.second(torch.relu(self.first(x))))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, compress_quickly: Callable[..., TracedModel]
) -> tuple[TracedModel, Path]:
    """A file with 8-bit codes, plain to read and to damage."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("gate") / "model.onnx"
    traced = compress_quickly(Net(), *images(32), bits=8)
    write_onnx(build_onnx(traced), path, {})
    return traced, path


def damaged(path: Path, folder: Path, name: str) -> Path:
    """A copy of the file with the sign of every value in the initialiser ``name`` turned."""
    model = onnx.load(path)
    (tensor,) = (each for each in model.graph.initializer if each.name == name)
    array = numpy_helper.to_array(tensor)
    flipped = (-array.astype(np.int64)).clip(-127, 127).astype(array.dtype) if array.dtype == np.int8 else -array
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(flipped), name))
    target = folder / "damaged.onnx"
    onnx.save(model, target)
    return target


def guilty(parity: Parity) -> list[str]:
    """Layers that are further off than rounding explains; the first is in the failures, too."""
    found = [row.name for row in parity.layers if not row.steps <= row.allowed_steps]
    named = [failure for failure in parity.failures if "kernel is off at layer" in failure]
    assert len(named) == bool(found)
    return found


def without_numbers(path: Path, folder: Path, name: str) -> Path:
    """A copy of the file with NaN for every value in the initialiser ``name``."""
    model = onnx.load(path)
    (tensor,) = (each for each in model.graph.initializer if each.name == name)
    array = np.full_like(numpy_helper.to_array(tensor), np.nan)
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, folder / "nan.onnx")
    return folder / "nan.onnx"


def images(count: int = 64) -> tuple[Tensor]:
    # Not around zero: turning the sign of a layer's weights would leave the mean behind its ReLU as it was.
    return (2 * torch.rand(count, *SHAPE),)


@pytest.mark.slow
def test_a_good_file_passes(whole: tuple[TracedModel, Path]) -> None:
    parity = verify(*whole, images(), "noise")
    assert parity.failures == ()
    assert parity.samples == 64
    assert parity.source == "noise"
    assert parity.integer_layers == 4
    assert parity.float_layers == 0
    assert parity.relative_l2_unoptimized < 0.01
    verify_or_raise(parity, whole[1])


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["first", "second", "third", "head"])
def test_a_corrupted_weight_is_caught_and_its_layer_named(
    layer: str, whole: tuple[TracedModel, Path], tmp_path: Path
) -> None:
    traced, path = whole
    bad = damaged(path, tmp_path, f"{layer}.weight_codes")
    parity = verify(traced, bad, images(), "noise")
    assert any("ONNX Runtime without optimisation" in failure for failure in parity.failures)
    assert any("with all optimisations" in failure for failure in parity.failures)
    assert any(f"kernel is off at layer {layer} (" in failure for failure in parity.failures), parity.failures
    with pytest.raises(GateError, match=f"did not pass the gate: .*off at layer {layer} \\("):
        verify_or_raise(parity, bad)


def test_a_corrupted_scale_is_caught(whole: tuple[TracedModel, Path], tmp_path: Path) -> None:
    traced, path = whole
    parity = verify(traced, damaged(path, tmp_path, "second.weight_scale"), images(), "noise")
    assert any("kernel is off at layer second (" in failure for failure in parity.failures), parity.failures


def test_a_file_that_gives_no_numbers_is_caught(whole: tuple[TracedModel, Path], tmp_path: Path) -> None:
    traced, path = whole
    assert verify(traced, without_numbers(path, tmp_path, "head.weight_scale"), images(), "noise").failures


def test_a_layer_that_runs_as_another_kind_is_named(whole: tuple[TracedModel, Path], tmp_path: Path) -> None:
    """The numbers agree, but one layer's weights are float in the file: slow, and not what the plan says."""
    traced, path = whole
    model = onnx.load(path)
    tensors = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    (layer,) = (node for node in model.graph.node if node.name == "second")
    (dequantize,) = (node for node in model.graph.node if node.output[0] == layer.input[1])
    weight = tensors["second.weight_codes"] * tensors["second.weight_scale"].reshape(-1, 1, 1, 1)
    model.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), "plain"))
    layer.input[1] = "plain"
    model.graph.node.remove(dequantize)
    # Without a per-channel grid before it, ONNX Runtime would quantize the weights again.
    (before,) = (node for node in model.graph.node if node.output[0] == layer.input[0])
    for position in (1, 2):
        repeated = np.repeat(tensors[before.input[position]].reshape(-1), WIDTH)
        model.graph.initializer.append(numpy_helper.from_array(repeated, f"repeated{position}"))
        before.input[position] = f"repeated{position}"
    del before.attribute[:]
    before.attribute.append(onnx.helper.make_attribute("axis", 1))
    onnx.save(model, tmp_path / "misplaced.onnx")
    parity = verify(traced, tmp_path / "misplaced.onnx", images(), "noise")
    assert parity.failures == ("layer second is planned integer, but ONNX Runtime runs it as Conv",)


def test_a_renamed_layer_is_missed(whole: tuple[TracedModel, Path], tmp_path: Path) -> None:
    traced, path = whole
    model = onnx.load(path)
    next(node for node in model.graph.node if node.name == "third").name = "other"
    onnx.save(model, tmp_path / "renamed.onnx")
    (failure,) = verify(traced, tmp_path / "renamed.onnx", images(), "noise").failures
    assert "layer third is planned integer, but the optimised graph has no node of that name" in failure


@pytest.mark.slow
def test_a_float_file_has_to_agree_to_rounding(tmp_path: Path, compress_quickly: Callable[..., TracedModel]) -> None:
    path = tmp_path / "model.onnx"
    traced = compress_quickly(Net(), None, SHAPE, bits=8)
    write_onnx(build_onnx(traced), path, {})
    assert not verify(traced, path, images(), "noise").failures
    model = onnx.load(path)
    (tensor,) = (each for each in model.graph.initializer if each.name == "third.weight_codes")
    codes = numpy_helper.to_array(tensor).copy()
    codes[:, :2] = (codes[:, :2].astype(np.int64) + 1).clip(-128, 127)
    tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
    onnx.save(model, path)
    # An integer file may be as far off as that; a float one may not.
    assert any("allowed 0.10%" in failure for failure in verify(traced, path, images(), "noise").failures)


class Heads(nn.Module):
    """Two outputs; only the second is damaged."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"first": self.a(x), "second": self.b(x)}


def float_file(module: nn.Module, path: Path, *shape: int) -> TracedModel:
    register_operators()
    traced = trace(module.eval(), (torch.randn(2, *shape),))
    simplify(traced)
    write_onnx(build_onnx(traced), path, {})
    return traced


@pytest.mark.slow
def test_every_output_is_compared(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    traced = float_file(Heads(), path, 6)
    x = (torch.randn(40, 6),)
    assert not verify(traced, path, x, "noise").failures
    bad = damaged(path, tmp_path, "b.weight")
    failures = verify(traced, bad, x, "noise").failures
    assert any("off at layer b (Gemm)" in failure for failure in failures), failures
    assert verify(traced, without_numbers(path, tmp_path, "b.weight"), x, "noise").failures


class Attention(nn.Module):
    """Products of activations, and linears that ONNX writes as a product and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        return self.head(scores.softmax(-1) @ self.v(x))


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("layer", ["q", "k", "v", "head"])
def test_layers_are_named_beside_products_of_activations(layer: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    traced = float_file(Attention(), path, 5, 8)
    x = (torch.randn(40, 5, 8),)
    parity = verify(traced, path, x, "noise")
    assert not parity.failures
    assert [row.name for row in parity.layers] == ["q", "k", "v", "head"]
    assert max(row.relative_l2 for row in parity.layers) < 1e-5
    model = onnx.load(path)
    (node,) = (each for each in model.graph.node if each.name == layer)
    bad = damaged(path, tmp_path, node.input[1])
    assert guilty(verify(traced, bad, x, "noise")) == [layer]


def test_a_planted_pair_fails_on_any_machine(whole: tuple[TracedModel, Path], tmp_path: Path) -> None:
    """Sums that are cut off at 16 bits elsewhere are seen in the codes, whatever the machine at hand computes."""
    traced, path = whole
    model = onnx.load(path)
    (tensor,) = (each for each in model.graph.initializer if each.name == "second.weight_codes")
    codes = numpy_helper.to_array(tensor).copy()
    codes[3, 4:6, 1, 2] = 127  # neighbours: channels are inside
    tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
    onnx.save(model, tmp_path / "planted.onnx")
    parity = verify(traced, tmp_path / "planted.onnx", images(), "noise")
    (failure,) = (each for each in parity.failures if "layer second (QLinearConv) has codes that are too large" in each)
    assert "127 and 127 at " in failure
    assert "of channel 3 add up to 254, allowed 128" in failure
    assert "AVX2, AVX-512 without VNNI" in failure
    assert parity.proof is not None
    assert not parity.proof.instruction_sets["AVX2"]
    assert parity.proof.instruction_sets["AVX512-VNNI"]


@pytest.mark.slow
def test_seven_bits_are_proven(tmp_path: Path, compress_quickly: Callable[..., TracedModel]) -> None:
    traced = compress_quickly(Net(), *images(32), bits=7, first_last_bits=7)
    write_onnx(build_onnx(traced), tmp_path / "model.onnx", {})
    parity = verify(traced, tmp_path / "model.onnx", images(), "noise")
    assert parity.failures == ()
    assert parity.proof is not None
    assert [row.name for row in parity.proof.layers] == ["first", "second", "third", "head"]
    assert all(row.limit == 128 and row.worst is not None and row.worst <= 128 for row in parity.proof.layers)
    assert all(parity.proof.instruction_sets.values())
