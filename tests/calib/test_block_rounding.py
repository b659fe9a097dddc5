"""What block kernels do to inputs: simulated as they compute it, measured for each layer, avoided where it hurts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import compress
from compress.calib.block_rounding import round_blocks
from compress.exporters.session import open_session


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


@pytest.mark.parametrize("outlier", [0.0, 3000.0], ids=["calm", "outliers"])
def test_a_layer_that_suffers_computes_in_floats(outlier: float, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(64, 48)).eval()
    x = torch.randn(64, 9, 64)
    with torch.no_grad():
        # Where the weights are zero a large input changes nothing but the scale of its block.
        module[0].weight[:, 7] = 0.0
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
    assert report.parity.relative_l2_optimized < 0.05
