"""What block kernels do to inputs: simulated as they compute it, measured for each layer, avoided where it hurts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

import compress
from compress.calib.block_rounding import round_blocks
from compress.exporters.session import open_session, run_session
from compress.quant.grid import mse_grid, quantize


@pytest.mark.parametrize("width", [32, 64, 50])
def test_against_the_plain_formula(width: int) -> None:
    x = torch.randn(5, width) * torch.logspace(-2, 2, 5)[:, None]
    got = round_blocks(x, 32).numpy()
    for row, rounded in zip(x.numpy(), got, strict=True):
        for start in range(0, width, 32):
            block = row[start : start + 32]
            step = np.abs(block).max() / 127
            assert np.allclose(rounded[start : start + 32], np.round(block / step) * step, rtol=1e-5, atol=1e-7 * step)


def test_nothing_comes_of_nothing() -> None:
    assert torch.equal(round_blocks(torch.zeros(2, 40), 16), torch.zeros(2, 40))


def test_it_is_what_the_kernel_does() -> None:
    """A weight of one-hot rows shows the kernel's inputs, level 1 as they are, level 4 rounded."""
    width = 64
    codes = (8 + 7 * np.eye(width)).astype(np.uint8)  # 0 or 7 about the middle
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).reshape(width, 2, 16)
    scale = np.full((width, 2), 1 / 7, dtype=np.float32)
    x = torch.randn(3, width)
    x[:, 5] = 40.0
    outputs = {}
    for level in (1, 4):
        node = helper.make_node(
            "MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft",
            K=width, N=width, bits=4, block_size=32, accuracy_level=level,
        )  # fmt: skip
        graph = helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, width])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, width])],
            [numpy_helper.from_array(packed, "b"), numpy_helper.from_array(scale, "s")],
        )
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        file = Path(f"level{level}.onnx")
        outputs[level] = _run(model, file, x.numpy())
    assert np.allclose(outputs[1], x.numpy(), atol=1e-5)
    rounded = round_blocks(x, 32).numpy()
    assert np.abs(rounded - x.numpy()).max() > 0.05, "the case is one where it matters"
    assert np.allclose(outputs[4], rounded, atol=1e-4)


def _run(model: onnx.ModelProto, file: Path, x: np.ndarray) -> np.ndarray:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, Path(folder) / file)
        result: np.ndarray = open_session(Path(folder) / file, "ORT_ENABLE_ALL").run(None, {"x": x})[0]
        return result


@pytest.mark.matrix
@pytest.mark.parametrize("outlier", [0.0, 3000.0], ids=["calm", "outliers"])
def test_a_layer_that_suffers_computes_in_floats(outlier: float, tmp_path: Path) -> None:
    linear = nn.Linear(64, 48)
    module = nn.Sequential(linear).eval()
    x = torch.randn(64, 9, 64)
    with torch.no_grad():
        # Where the weights are zero a large input changes nothing but the scale of its block.
        linear.weight[:, 7] = 0.0
        x[..., 7] += outlier
    report = compress.quantize(
        module, calib=x, bits=4, group_size=32, first_last_bits=4, bias_correction=False, out=tmp_path / "out"
    ).report
    (node,) = onnx.load(tmp_path / "out" / "model.onnx").graph.node
    level = next(each.i for each in node.attribute if each.name == "accuracy_level")
    (row,) = report.layers
    assert row.input_error is not None
    assert row.output_error is not None
    assert level == (1 if outlier else 4)
    assert (row.input_error > 0.5 * row.output_error) == bool(outlier)
    assert ("computes in floats" in str(row.note)) == bool(outlier)
    assert report.export_check.relative_l2_optimized < 0.05


@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (4, 128), (8, 32), (8, 256)])
def test_the_kernel_rounds_blocks_of_any_size_and_the_last_one_too(bits: int, block: int) -> None:
    """Rows of 300: their last block is never whole."""
    outputs, width = 24, 300
    weight = torch.randn(outputs, width)
    stored = quantize(weight, *mse_grid(weight, bits, False, block), bits, block)
    groups, per_byte = stored.scale.shape[1], 8 // bits
    codes = functional.pad(stored.codes, (0, groups * block - width)).numpy()
    zero = functional.pad(stored.zero_point, (0, -groups % per_byte)).numpy()
    packed, points = (
        np.stack([each[:, place::per_byte] << bits * place for place in range(per_byte)]).sum(0, dtype=np.uint8)
        for each in (codes, zero)
    )
    tensors = {"b": packed.reshape(outputs, groups, -1), "s": stored.scale.numpy(), "z": points}
    x = torch.randn(7, width)
    x[:, ::37] *= 100
    node = helper.make_node(
        "MatMulNBits", ["x", "b", "s", "z"], ["y"], domain="com.microsoft",
        K=width, N=outputs, bits=bits, block_size=block, accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [7, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [7, outputs])],
        [numpy_helper.from_array(each, name) for name, each in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    (got,) = open_session(model.SerializeToString(), "ORT_ENABLE_ALL").run(None, {"x": x.numpy()})
    exact, simulated = (
        (each.double() @ stored.dequantize().double().T).numpy() for each in (x, round_blocks(x, block))
    )
    rounding = np.linalg.norm(simulated - exact)
    assert rounding > 0.003 * np.linalg.norm(exact), "the case is one where it matters"
    assert np.linalg.norm(got - simulated) < 0.01 * rounding


class Pair(nn.Module):
    """Two linears; two channels of what the second reads are 3000 times the rest, and its weights there are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.calm, self.wild, self.last = nn.Linear(64, 64), nn.Linear(64, 48), nn.Linear(48, 5)
        self.gain: Tensor
        self.register_buffer("gain", torch.ones(64).index_fill(0, torch.tensor([7, 40]), 3000.0))
        with torch.no_grad():
            self.wild.weight[:, [7, 40]] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.wild(torch.tanh(self.calm(x)) * self.gain)))


def _levels(file: Path) -> dict[str, int]:
    """Accuracy level of every MatMulNBits, by layer."""
    return {
        node.name: next(each.i for each in node.attribute if each.name == "accuracy_level")
        for node in onnx.load(file).graph.node
        if node.op_type == "MatMulNBits"
    }


def _distance(file: Path, module: nn.Module, x: Tensor) -> float:
    """Relative L2 of what ``file`` and ``module`` give for ``x``."""
    (got,) = run_session(open_session(file, "ORT_ENABLE_ALL"), [(x,)])
    with torch.no_grad():
        wanted = module(x)
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.slow
def test_each_layer_decides_for_itself(tmp_path: Path) -> None:
    report = compress.quantize(
        Pair().eval(), calib=torch.randn(64, 9, 64), bits=4, group_size=32, first_last_bits=4, out=tmp_path / "out"
    ).report
    file = tmp_path / "out" / "model.onnx"
    assert _levels(file) == {"calm": 4, "wild": 1, "last": 4}
    assert report.export_check.block_layers == 3
    assert report.export_check.failures == ()
    rows = {row.name: row for row in report.layers}
    assert "computes in floats" in str(rows["wild"].note)
    assert not any("computes in floats" in str(rows[name].note) for name in ("calm", "last"))
    assert rows["wild"].input_error is not None
    assert f"int8 inputs would add {rows['wild'].input_error:.2g}" in str(rows["wild"].note)
    for name in ("calm", "last"):
        error = rows[name].input_error
        assert error is not None
        assert error < 0.1 * rows["wild"].input_error
    # The graph that is loaded reads exact inputs.
    loaded, x = compress.load(tmp_path / "out"), torch.randn(16, 9, 64)
    decided = _distance(file, loaded, x)
    assert decided < 0.02
    model = onnx.load(file)
    (node,) = [each for each in model.graph.node if each.name == "wild"]
    next(each for each in node.attribute if each.name == "accuracy_level").i = 4
    onnx.save(model, tmp_path / "rounded.onnx")
    assert _distance(tmp_path / "rounded.onnx", loaded, x) > 10 * decided, "level 4 would have hurt"


@pytest.mark.slow
def test_the_input_error_of_a_row_is_the_plain_one_and_8_bits_keep_their_level(tmp_path: Path) -> None:
    """Kernels for 8 bits are many times slower on floats."""
    module, x = nn.Sequential(nn.Linear(50, 40)).eval(), torch.randn(32, 50)
    x[:, 3] *= 30.0
    result = compress.quantize(
        module, calib=x, bits=8, group_size=32, first_last_bits=8, method="mse", out=tmp_path / "out"
    )
    with torch.no_grad():
        # The module itself gives its dequantized weight away, transposed.
        weight = (result.module(torch.eye(50)) - result.module(torch.zeros(50, 50))).double().numpy()
        wanted = module(x).double().numpy()
    rounded = np.empty((32, 50))
    for row, values in zip(rounded, x.double().numpy(), strict=True):
        for start in (0, 32):
            block = values[start : start + 32]
            step = np.abs(block).max() / 127
            row[start : start + 32] = np.round(block / step) * step
    plain = np.square((rounded - x.double().numpy()) @ weight).sum() / np.square(wanted).sum()
    (row,) = result.report.layers
    assert row.input_error == pytest.approx(plain, rel=0.02)
    assert row.output_error is not None
    assert plain > 0.5 * row.output_error, "a layer of 4 bits would compute in floats"
    assert "computes in floats" not in str(row.note)
    assert _levels(tmp_path / "out" / "model.onnx") == {"0": 4}


@pytest.mark.slow
def test_only_block_kernels_round_inputs() -> None:
    module, x = nn.Sequential(nn.Linear(64, 48)).eval(), torch.randn(32, 64)
    x[:, 7] += 3000.0
    report = compress.quantize(module, calib=x, bits=4, act_bits=8, first_last_bits=4, method="mse").report
    assert [(row.option, row.input_error) for row in report.layers] == [("W4A8", None)]


class WildEnd(nn.Module):
    """Two inputs of its last layer are thousands of times the rest, and of no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 5)
        self.register_buffer("gain", torch.ones(64).index_fill(0, torch.tensor([7, 40]), 3000.0))
        with torch.no_grad():
            self.last.weight[:, [7, 40]] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)) * self.gain)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_layer_of_8_bits_that_suffers_badly_computes_in_floats_too() -> None:
    report = compress.quantize(WildEnd().eval(), calib=torch.randn(64, 9, 64), bits=4, group_size=32).report
    assert [choice.option.bits for choice in report.plan.choices] == [8, 8]
    assert ["computes in floats" in str(row.note) for row in report.layers] == [False, True]
