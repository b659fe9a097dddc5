"""``compress verify`` of files that somebody else has written: onnxruntime's own quantizers, in their forms."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

import compress
from compress.errors import InputError
from compress.exporters.saturation import INSTRUCTION_SETS
from compress.records.report import Proof
from tests.cli.conftest import Forks  # type: ignore[import-not-found]
from tests.emulation import graph_model

PAIRS = {each.name for each in INSTRUCTION_SETS if each.pairs}


class Samples(CalibrationDataReader):
    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.batches: Iterator[dict[str, Any]] = iter([{"x": rng.normal(size=(8, 3, 8, 8)).astype(np.float32)}])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolution, a depthwise one, a pool and a linear; weights as large as their grids."""
    rng = np.random.default_rng(0)
    weights = {
        "first.weight": rng.choice([-1.0, 1.0], (16, 3, 3, 3)),
        "second.weight": rng.choice([-1.0, 1.0], (16, 1, 3, 3)),
        "last.weight": rng.choice([-1.0, 1.0], (16, 5)),
    }
    nodes = [
        helper.make_node("Conv", ["x", "first.weight"], ["a"], name="first"),
        helper.make_node("Conv", ["a", "second.weight"], ["b"], name="second", group=16),
        helper.make_node("GlobalAveragePool", ["b"], ["c"], name="pool"),
        helper.make_node("Flatten", ["c"], ["d"], name="flat"),
        helper.make_node("MatMul", ["d", "last.weight"], ["y"], name="last"),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(each.astype(np.float32), name) for name, each in weights.items()],
    )
    path = tmp_path_factory.mktemp("foreign") / "float.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator], ids=lambda form: form.name)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("reduce_range", [False, True])
def test_static_files_are_judged(
    form: QuantFormat, per_channel: bool, reduce_range: bool, float_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "static.onnx"
    quantize_static(
        float_file, path, Samples(), quant_format=form, per_channel=per_channel, reduce_range=reduce_range,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    proof = compress.verify(path)
    assert isinstance(proof, Proof)
    rows = {row.name.removesuffix("_quant"): row for row in proof.layers}
    assert {"first", "second", "last"} == set(rows)
    assert all(row.weights == "int8" for row in rows.values())
    assert rows["second"].unproven == ()  # depthwise
    assert len(rows["second"].pair) == 1
    for name in ("first", "last"):
        assert set(rows[name].unproven) == (set() if reduce_range else PAIRS)
        assert rows[name].limit == 128
        assert rows[name].worst == (128 if reduce_range else 254) or per_channel
    assert bool(proof.failures) != reduce_range
    assert ("AVX2" in proof.proven) == reduce_range


@pytest.mark.parametrize("kind", [QuantType.QInt8, QuantType.QUInt8], ids=lambda kind: kind.name)
def test_dynamic_files_are_judged(kind: QuantType, float_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "dynamic.onnx"
    quantize_dynamic(float_file, path, weight_type=kind)
    proof = compress.verify(path)
    assert isinstance(proof, Proof)
    rows = {row.operator: row for row in proof.layers}
    assert set(rows) == {"ConvInteger", "DynamicQuantizeMatMul"}
    assert (
        rows["ConvInteger"].unproven == ()
    )  # weights stand left there: signed times unsigned, which has no fast kernel
    assert set(rows["DynamicQuantizeMatMul"].unproven) == (PAIRS if kind is QuantType.QInt8 else set())


@pytest.mark.slow
def test_the_command_says_which_layer_where_and_how_to_mend_it(forks: Forks, float_file: Path, tmp_path: Path) -> None:
    for name, reduce_range in (("wide", False), ("narrow", True)):
        quantize_static(
            float_file, tmp_path / f"{name}.onnx", Samples(), reduce_range=reduce_range, per_channel=True,
            activation_type=QuantType.QUInt8,
        )  # fmt: skip
    run = forks.run(tmp_path, "verify", "wide.onnx")
    assert run.returncode == 4
    assert "first" in run.stdout
    assert "254 of 128" in run.stdout
    assert run.stderr.startswith(
        "error: wide.onnx is not proven: layer first (QLinearConv) has codes that are too large"
    )
    assert "AVX-512 without VNNI" in run.stderr
    assert (
        "and 1 more. To mend it: export again with `compress quantize`, or quantize with reduce_range=True"
        in run.stderr
    )
    assert run.stderr.count("\n") == 1
    run = forks.run(tmp_path, "verify", "narrow.onnx")
    assert (run.returncode, run.stderr) == (0, "")
    assert "the sums of 3 integer layers are exact in ONNX Runtime on SSE2" in run.stdout
    assert "128 of 128" in run.stdout
    run = forks.run(tmp_path, "verify", "wide.onnx", "--json")
    assert run.returncode == 4
    assert Proof.model_validate(json.loads(run.stdout)).instruction_sets["AVX2"] is False


def test_a_file_without_integers_says_so(forks: Forks, float_file: Path) -> None:
    run = forks.run(float_file.parent, "verify", "float.onnx")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == "float.onnx: no layer computes on integers, so there is nothing to prove\n"


def test_codes_that_are_computed_are_told(forks: Forks, tmp_path: Path) -> None:
    feeds = {"x": np.zeros((2, 4), np.uint8), "w": np.zeros((4, 2), np.int8)}
    onnx.save(
        graph_model([helper.make_node("MatMulInteger", ["x", "w"], ["y"], name="both")], feeds, {}),
        tmp_path / "attention.onnx",
    )
    run = forks.run(tmp_path, "verify", "attention.onnx")
    assert run.returncode == 4
    assert "layer both (MatMulInteger) is not judged on" in run.stderr
    assert "its weights are computed as the model runs. Codes that are computed" in run.stderr


@pytest.mark.slow
def test_what_is_no_onnx_file_is_refused(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a model")
    (tmp_path / "cut.onnx").write_bytes(b"\x08\x08\x12")
    for name in ("notes.txt", "cut.onnx"):
        run = forks.run(tmp_path, "verify", name)
        assert (run.returncode, run.stdout) == (2, "")
        assert run.stderr.startswith(f"error: ONNX Runtime cannot load {name}: ")
        assert "takes an ONNX file, or a folder that `compress quantize` has written" in run.stderr
        assert run.stderr.count("\n") == 1
    run = forks.run(tmp_path, "verify", "nothere.onnx")
    assert (run.returncode, run.stderr) == (2, "error: There is no file nothere.onnx; check the path.\n")


def test_a_file_is_compared_with_nothing(float_file: Path) -> None:
    with pytest.raises(InputError, match="no PyTorch graph beside it to compare it with on data; leave --data out"):
        compress.verify(float_file, data=np.zeros((4, 3, 8, 8), np.float32))
