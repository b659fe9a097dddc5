"""Several tasks' ONNX files on one file of the base's tensors, in real sessions."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import compress
from compress.errors import InputError
from compress.sparse.application import apply_deltas
from compress.sparse.base import base_hash, base_tensors, tensor_hashes
from compress.sparse.delta import SparseDelta, SparseTensor
from compress.sparse.deltafile import read_delta, write_delta


def net() -> nn.Sequential:
    """A convolution with its norm folded, linears in two and in three dimensions, and a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(2), nn.Linear(64, 96), nn.ReLU(),
        nn.Linear(96, 64), nn.Flatten(), nn.Linear(2048, 5),
    ).eval()  # fmt: skip


def delta_to(base: nn.Module, seed: int, path: Path, share: float = 0.05, head: bool = False) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in ("0.weight", "4.weight", "6.weight", "6.bias", *(() if head else ("8.weight",))):
        each = base.get_parameter(name)
        index = (torch.rand(each.numel(), generator=generator) < share).nonzero()[:, 0]
        tensors[name] = SparseTensor(tuple(each.shape), "float32", index, torch.randn(len(index), generator=generator))
    dense = {"8.weight": torch.randn(5, 2048), "8.bias": torch.randn(5)} if head else {}
    digest = base_hash(tensor_hashes(base_tensors(base)), dense)
    return write_delta(SparseDelta(digest, tensors, dense, {}, tuple(dense)), path, "fp32")


def run(path: Path, x: Tensor, optimized: Path | None = None) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return np.asarray(ort.InferenceSession(str(path), options).run(None, {"input_1": x.numpy()})[0])


@pytest.mark.slow
def test_tasks_share_the_bases_tensors(tmp_path: Path) -> None:
    base, x = net(), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    given = {"input_shape": (3, 8, 8)}
    compress.export(base, tmp_path / "base.onnx", share="base.data", **given)  # type: ignore[arg-type]
    assert {each.name for each in tmp_path.iterdir()} == {"base.onnx", "base.data"}
    shared = (tmp_path / "base.data").read_bytes()
    assert run(tmp_path / "base.onnx", x).shape == (4, 5)
    for name, head in (("one", False), ("two", True)):
        file = delta_to(base, len(name) + head, tmp_path / f"{name}.safetensors", head=head)
        compress.export(base, tmp_path / f"{name}.onnx", share="base.data", deltas=(str(file),), **given)  # type: ignore[arg-type]
        merged = copy.deepcopy(base)
        apply_deltas(merged, {name: read_delta(file)})
        compress.export(merged, tmp_path / "whole.onnx", overwrite=True, **given)  # type: ignore[arg-type]
        got = run(tmp_path / f"{name}.onnx", x, tmp_path / "optimized.onnx")
        assert np.array_equal(got, run(tmp_path / "whole.onnx", x))
        # What changes the tensors has run as the session was made.
        operators = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
        assert not operators & {"ScatterElements", "CumSum", "Cast"}
        (tmp_path / "optimized.onnx").unlink()
    assert (tmp_path / "base.data").read_bytes() == shared
    whole = (tmp_path / "whole.onnx").stat().st_size
    own = [(tmp_path / f"one.onnx{suffix}").stat().st_size for suffix in ("", ".data")]
    assert own[1] < whole * 0.05 * 5 * 1.3, "a gap of one byte and four of value an entry"
    assert own[0] < 12_000
    # Two sessions at once on the one file; a model checked as ONNX says.
    onnx.checker.check_model(str(tmp_path / "two.onnx"))
    assert not np.array_equal(run(tmp_path / "one.onnx", x), run(tmp_path / "base.onnx", x))
    # Nothing else is written over the shared file, or taken for it.
    other = copy.deepcopy(base)
    with torch.no_grad():
        other[8].weight[4, 2047] += 1
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"base\.data: a file of that name is there already and holds something else"):
        compress.export(other, tmp_path / "other.onnx", share="base.data", **given)  # type: ignore[arg-type]
    for name in ("../base.data", "other.onnx.data"):
        with pytest.raises(InputError, match=r"the name of a file beside other\.onnx is needed"):
            compress.export(base, tmp_path / "other.onnx", share=name, **given)  # type: ignore[arg-type]
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before
