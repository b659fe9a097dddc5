from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from compress.errors import GateError
from compress.exporters.build import build_onnx, write_onnx
from compress.graph.simplify import simplify
from compress.graph.traced import TracedModel, trace
from compress.kernels.table import register_operators
from compress.proof.distance import cosine, relative_l2, worst_sample
from compress.proof.gate import fewest_alike, verify, verify_or_raise
from compress.proof.rounding_noise import moved_outputs
from compress.records.report import ExportCheck

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


def guilty(check: ExportCheck) -> list[str]:
    """Layers that are further off than rounding explains; the first is in the failures, too."""
    found = [row.name for row in check.layers if not row.steps <= row.allowed_steps]
    named = [failure for failure in check.failures if "kernel is off at layer" in failure]
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
    check = verify(*whole, images(), "noise")
    assert check.failures == ()
    assert check.samples == 64
    assert check.source == "noise"
    assert check.integer_layers == 4
    assert check.float_layers == 0
    assert check.relative_l2_unoptimized < 0.01
    verify_or_raise(check, whole[1])


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["first", "second", "third", "head"])
def test_a_corrupted_weight_is_caught_and_its_layer_named(
    layer: str, whole: tuple[TracedModel, Path], tmp_path: Path
) -> None:
    traced, path = whole
    bad = damaged(path, tmp_path, f"{layer}.weight_codes")
    check = verify(traced, bad, images(), "noise")
    assert any("ONNX Runtime without optimisation" in failure for failure in check.failures)
    assert any("with all optimisations" in failure for failure in check.failures)
    assert any(f"kernel is off at layer {layer} (" in failure for failure in check.failures), check.failures
    with pytest.raises(GateError, match=f"did not pass the gate: .*off at layer {layer} \\("):
        verify_or_raise(check, bad)


def test_a_corrupted_scale_is_caught(whole: tuple[TracedModel, Path], tmp_path: Path) -> None:
    traced, path = whole
    check = verify(traced, damaged(path, tmp_path, "second.weight_scale"), images(), "noise")
    assert any("kernel is off at layer second (" in failure for failure in check.failures), check.failures


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
    check = verify(traced, tmp_path / "misplaced.onnx", images(), "noise")
    assert check.failures == ("layer second is planned integer, but ONNX Runtime runs it as Conv",)


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
    check = verify(traced, path, x, "noise")
    assert not check.failures
    assert [row.name for row in check.layers] == ["q", "k", "v", "head"]
    assert max(row.relative_l2 for row in check.layers) < 1e-5
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
    check = verify(traced, tmp_path / "planted.onnx", images(), "noise")
    (failure,) = (each for each in check.failures if "layer second (QLinearConv) has codes that are too large" in each)
    assert "127 and 127 at " in failure
    assert "of channel 3 add up to 254, allowed 128" in failure
    assert "AVX2, AVX-512 without VNNI" in failure
    assert check.proof is not None
    assert not check.proof.instruction_sets["AVX2"]
    assert check.proof.instruction_sets["AVX512-VNNI"]


@pytest.mark.slow
def test_seven_bits_are_proven(tmp_path: Path, compress_quickly: Callable[..., TracedModel]) -> None:
    traced = compress_quickly(Net(), *images(32), bits=7, first_last_bits=7)
    write_onnx(build_onnx(traced), tmp_path / "model.onnx", {})
    check = verify(traced, tmp_path / "model.onnx", images(), "noise")
    assert check.failures == ()
    assert check.proof is not None
    assert [row.name for row in check.proof.layers] == ["first", "second", "third", "head"]
    assert all(row.limit == 128 and row.worst is not None and row.worst <= 128 for row in check.proof.layers)
    assert all(check.proof.instruction_sets.values())


@pytest.mark.slow
def test_rounding_noise_moves_activations_of_integers_and_of_floats(
    whole: tuple[TracedModel, Path], compress_quickly: Callable[..., TracedModel]
) -> None:
    def noise(traced: TracedModel, x: tuple[Tensor]) -> float:
        with torch.no_grad():
            return relative_l2(moved_outputs(traced, [x])[0], traced.module(*x))

    x = images()
    assert 1e-7 < noise(whole[0], x) < 0.01, "weights are codes there: activations alone move"
    assert 1e-7 < noise(compress_quickly(Net(), None, SHAPE, bits=8), x) < 1e-5


def test_masks_stay_masks_where_floats_move() -> None:
    class Masks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0, x, -torch.inf)

    x = torch.tensor([[1.0, -1.0], [-2.0, 2.0]])
    (moved,) = moved_outputs(trace(Masks().eval(), (x,)), [(x,)])
    assert torch.equal(moved.isinf(), x < 0)
    assert relative_l2(moved, torch.where(x > 0, x, -torch.inf)) < 1e-5


@pytest.mark.parametrize(
    ("count", "share", "needed"),
    # One less would come about by chance in less than one case of a hundred.
    [(1, 0.95, 0), (3, 0.95, 2), (16, 0.95, 13), (16, 0.99, 14), (256, 0.95, 234), (256, 0.99, 249)],
)
def test_how_many_must_be_alike(count: int, share: float, needed: int) -> None:
    assert fewest_alike(count, share) == needed
    below = sum(math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(needed))
    assert below < 0.01 <= below + math.comb(count, needed) * share**needed * (1 - share) ** (count - needed)


class Near(nn.Module):
    """Two scores a sample that are nearly the same: rounding decides which is the larger."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 2, bias=False)
        with torch.no_grad():
            self.a.weight[1] = self.a.weight[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


def test_agreement_is_judged_where_the_output_is_a_class(tmp_path: Path) -> None:
    traced = float_file(Near(), tmp_path / "model.onnx", 4)
    model = onnx.load(tmp_path / "model.onnx")
    (tensor,) = (each for each in model.graph.initializer if each.name.endswith("weight"))
    weight = numpy_helper.to_array(tensor).copy()
    weight[1] *= 1 + 2e-6
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    onnx.save(model, tmp_path / "near.onnx")
    x = (torch.rand(64, 4) * traced.tensor("a.weight")[0].sign(),)  # scores above zero: the second is larger now
    bins = verify(traced, tmp_path / "near.onnx", x, "noise")
    assert bins.failures == ()
    assert bins.agreement_optimized is None
    classes = verify(traced, tmp_path / "near.onnx", x, "noise", classes=True)
    assert classes.agreement_optimized == 0
    assert any("the same class on 0 of 64 samples; needed 61, where 99% are to be alike" in f for f in classes.failures)


class Forbidden(nn.Module):
    """Scores of actions, those that are not allowed at minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).masked_fill(x[:, :4] > 0, -torch.inf)


@pytest.mark.slow
def test_equal_infinities_are_no_difference(tmp_path: Path) -> None:
    traced = float_file(Forbidden(), tmp_path / "model.onnx", 6)
    x = (torch.randn(40, 6),)
    check = verify(traced, tmp_path / "model.onnx", x, "noise")
    assert check.failures == ()
    assert check.relative_l2_optimized < 1e-6
    assert check.worst_relative_l2 is not None
    assert check.worst_relative_l2 < 1e-5
    bad = damaged(tmp_path / "model.onnx", tmp_path, "a.weight")
    assert 0.1 < verify(traced, bad, x, "noise").relative_l2_optimized < 10


def test_distances_with_infinities() -> None:
    wanted = torch.tensor([[3.0, -torch.inf], [torch.inf, 4.0]])
    assert relative_l2(wanted, wanted) == 0
    got = torch.tensor([[3.0, -torch.inf], [torch.inf, 3.0]])
    assert relative_l2(got, wanted) == pytest.approx(1 / 5)
    assert worst_sample([got], [wanted]) == (1, pytest.approx(1 / 4))
    assert relative_l2(torch.zeros(2, 2), wanted) == torch.inf
    assert worst_sample([torch.where(wanted < 0, 0.0, wanted)], [wanted]) == (0, torch.inf)
    assert math.isnan(relative_l2(torch.tensor([torch.nan]), torch.tensor([torch.nan])))
    assert cosine(wanted, wanted) == pytest.approx(1)
    assert cosine(-wanted, wanted) == pytest.approx(-1)
