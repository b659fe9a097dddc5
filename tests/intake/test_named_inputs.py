"""Arrays called like the parameters of ``forward`` are its inputs, whatever their order in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import compress
from compress.data.samples import load_samples
from compress.exporters.session import open_session, run_session
from compress.graph.traced import trace
from compress.intake.model import read_model
from tests.networks import FeaturesAndWords

COUNT = 64


class Leading(FeaturesAndWords):
    def forward(self, features: Tensor, token_ids: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.scores(features, token_ids) if scale is None else self.scores(features, token_ids) * scale


class Between(FeaturesAndWords):
    def forward(self, features: Tensor, scale: Tensor | None = None, token_ids: Tensor | None = None) -> Tensor:
        assert token_ids is not None
        return self.scores(features, token_ids) if scale is None else self.scores(features, token_ids) * scale


def arrays() -> dict[str, np.ndarray]:
    """In another order than any ``forward`` has them."""
    generator = np.random.default_rng(0)
    return {
        "token_ids": generator.integers(20, size=(COUNT, 6)),
        "official_index": np.arange(COUNT),
        "labels": generator.integers(4, size=COUNT),
        "features": generator.standard_normal((COUNT, 8)).astype(np.float32),
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    np.savez(tmp_path / "calib.npz", **arrays())
    return tmp_path / "calib.npz"


@pytest.mark.slow
def test_two_inputs_by_position(file: Path, tmp_path: Path) -> None:
    module = Leading().eval()
    result = compress.quantize(module, calib=file, out=tmp_path / "out", bits=8, method="mse")
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    found = {
        value.name: ([size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim],
                     value.type.tensor_type.elem_type)
        for value in graph.input
    }  # fmt: skip
    assert found == {
        "features": (["batch", 8], onnx.TensorProto.FLOAT),
        "token_ids": (["batch", "sequence"], onnx.TensorProto.INT64),
    }
    assert list(found) == ["features", "token_ids"]
    assert any("not used: official_index" in note for note in result.report.notes)
    features, ids = torch.randn(5, 8), torch.randint(20, (5, 11))
    with torch.no_grad():
        wanted, original = result.module(features, ids), module(features, ids)
    assert (wanted - original).norm() <= 0.05 * original.norm()
    (got,) = run_session(open_session(tmp_path / "out" / "model.onnx", "ORT_ENABLE_ALL"), [(features, ids)])
    assert (got - wanted).norm() <= 0.02 * wanted.norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "names"), [(Leading(), ()), (Between(), ("features", "token_ids"))], ids=["leading", "between"]
)
def test_names_are_kept_where_position_is_not_enough(module: nn.Module, names: tuple[str, ...], file: Path) -> None:
    samples = load_samples(file, parameters=read_model(module).parameters, labelled=True)
    assert samples.names == names
    content = arrays()
    for found, key in zip(samples.inputs, ("features", "token_ids"), strict=True):
        np.testing.assert_array_equal(found.numpy(), content[key])
    assert [x.dtype for x in samples.inputs] == [torch.float32, torch.int64]
    assert samples.labels is not None
    assert samples.labels.tolist() == content["labels"].tolist()
    assert samples.take(9).names == names
    # The graph takes them by their names' order, and has their names.
    traced = trace(module.eval(), tuple(x[:2] for x in samples.inputs), names=samples.names)
    assert traced.input_names == ("features", "token_ids")
    assert traced.dynamic_batch
    assert traced.dynamic_length
    assert traced.length == 6


def test_names_are_part_of_what_samples_are(file: Path) -> None:
    by_position, by_name = (
        load_samples(file, parameters=read_model(module).parameters) for module in (Leading(), Between())
    )
    assert by_position.fingerprint != by_name.fingerprint


def test_a_mapping_and_batches_of_mappings() -> None:
    content = {key: torch.from_numpy(value) for key, value in arrays().items()}
    parameters = read_model(Between()).parameters
    whole = load_samples(content, parameters=parameters)
    parts = [{key: value[start : start + 10] for key, value in content.items()} for start in range(0, COUNT, 10)]
    batched = load_samples(parts, parameters=parameters)
    assert whole.names == batched.names == ("features", "token_ids")
    for one, other in zip(whole.inputs, batched.inputs, strict=True):
        assert torch.equal(one, other)


def test_without_known_names_one_array_is_the_input(file: Path) -> None:
    samples = load_samples(file, parameters=("pixels",))
    assert samples.names == ()
    assert len(samples.inputs) == 1
    assert "the array token_ids was taken as the input; not used: official_index, features" in samples.notes
