"""A plan's uncalibrated file: the operators and bytes of the calibrated one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.calib.resume import ResumeStore
from compress.data.samples import Samples, load_samples
from compress.exporters.build import build_onnx, write_onnx
from compress.exporters.fusion import fused_operators
from compress.exporters.session import open_session, run_session
from compress.exporters.skeleton import write_skeleton
from compress.intake.model import Intake, take_in
from compress.options import Options
from compress.pipeline.apply_plan import apply_plan
from compress.plans.eligibility import find_format_for
from compress.plans.frame import begin_plan
from compress.quant.targets import find_target
from compress.records.layers import QuantOption
from compress.records.plan import Choice, Plan

CPU = "CPUExecutionProvider"
Widths = dict[str, tuple[int, int | None]]


class Mixed(nn.Module):
    """Convolutions joined by an add and a concatenation, ReLU6, a shared layer, linears."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.left = nn.Conv2d(16, 16, 3, padding=1)
        self.right = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.deep = nn.Conv2d(32, 24, 1)
        self.twice = nn.Linear(24, 24)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.cat([F.relu6(self.left(x)) + x, torch.sigmoid(self.right(x))], 1)
        x = F.relu6(self.deep(x)).mean((2, 3))
        return self.fc(torch.relu(self.twice(torch.relu(self.twice(x)))))


LAYERS = ("stem", "left", "right", "deep", "twice", "fc")
PLANS: dict[str, Widths] = {
    "all at eight": dict.fromkeys(LAYERS, (8, 8)),
    "all narrow": dict.fromkeys(LAYERS, (3, 8)),
    "mixed": {"stem": (8, 8), "left": (2, 4), "right": (5, 8), "deep": (3, 6), "twice": (4, 8), "fc": (6, 8)},
    "three widths of one value": {"stem": (8, 8), "left": (2, 4), "right": (5, 6), "deep": (3, 8)},
    "float islands": {"stem": (8, 8), "right": (4, 8), "twice": (2, 8)},
    "some on floats": {"stem": (8, None), "left": (4, None), "right": (5, 8), "deep": (3, 8), "fc": (2, None)},
    "weights only": {"stem": (8, None), "left": (2, None), "right": (5, None), "deep": (3, None), "fc": (6, None)},
    "one layer": {"deep": (4, None)},
}


@pytest.fixture(scope="module")
def samples() -> Samples:
    return load_samples(torch.randn(48, 2, 8, 8))


@pytest.fixture(scope="module")
def intake(samples: Samples) -> Intake:
    torch.manual_seed(3)
    module = Mixed().train()
    with torch.no_grad():
        module(torch.randn(64, 2, 8, 8))
    return take_in(module.eval(), samples=samples)


def choices_for(intake: Intake, widths: Widths, target: str) -> list[Choice]:
    found = []
    for layer in intake.layers:
        if layer.name in widths:
            bits, act_bits = widths[layer.name]
            option = QuantOption(bits=bits, act_bits=act_bits, symmetric=act_bits is not None)
            name, reason = find_format_for(layer, option, find_target(target))
            assert reason is None
            found.append(Choice(layer=layer.name, method="mse", option=option, format=name))
    assert len(found) == len(widths)
    return found


def tensors(file: Path) -> dict[str, onnx.TensorProto]:
    return {each.name: each for each in onnx.load(file).graph.initializer}


def assert_as_large(skeleton: Path, calibrated: Path) -> None:
    """Within 1 %. Equal tensors are stored once: grids that happen to be equal save some 100 bytes of this small file.

    A skeleton knows of no such chance, so its file is the larger one, and a budget that it keeps is kept by the other.
    """
    happened = set(tensors(skeleton)) - set(tensors(calibrated))
    assert {name.split(".")[0] for name in happened} <= {"quantizers"}, happened
    low, size = calibrated.stat().st_size, skeleton.stat().st_size
    assert 0.999 * low <= size <= 1.01 * low + 110 * len(happened)


def both_files(
    intake: Intake, samples: Samples, widths: Widths, folder: Path, target: str = "onnx-cpu"
) -> tuple[Path, Path, int]:
    """The plan's calibrated file, its skeleton's, and the size that the skeleton's writer says."""
    with_data = any(act_bits is not None for _, act_bits in widths.values())
    given = samples if with_data else None
    options = Options(method="mse", observer="minmax", target=target)
    frame = begin_plan(intake, options, given)
    plan: Plan = frame.model_copy(update={"choices": tuple(choices_for(intake, widths, target))})
    store = ResumeStore(folder / "store", "test")
    inputs = given.inputs if given is not None else None
    model = apply_plan(intake.traced.copy(), plan, inputs, store, lambda layer: None).model
    calibrated, skeleton = folder / "calibrated.onnx", folder / "skeleton.onnx"
    write_onnx(build_onnx(model), calibrated, {})
    size = write_skeleton(intake.traced, plan.choices, find_target(target), skeleton)
    return calibrated, skeleton, size


@pytest.fixture(scope="module")
def mixed(intake: Intake, samples: Samples, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Calibrated file and skeleton of the mixed plan."""
    return both_files(intake, samples, PLANS["mixed"], tmp_path_factory.mktemp("mixed"))[:2]


QUICK = ("mixed", "three widths of one value")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.matrix) for name in PLANS]
)
def test_operators_and_size_are_those_of_the_calibrated_file(
    name: str, intake: Intake, samples: Samples, tmp_path: Path
) -> None:
    calibrated, skeleton, size = both_files(intake, samples, PLANS[name], tmp_path)
    wanted = fused_operators(calibrated, CPU)
    assert fused_operators(skeleton, CPU) == wanted
    # The check has something to look at: what is planned on integers is.
    for layer, (_, act_bits) in PLANS[name].items():
        assert (wanted[layer][0] in ("QLinearConv", "QGemm")) == (act_bits is not None), layer
    assert size == skeleton.stat().st_size
    assert_as_large(skeleton, calibrated)


@pytest.mark.slow
def test_the_same_on_arm(intake: Intake, samples: Samples, tmp_path: Path) -> None:
    calibrated, skeleton, _ = both_files(intake, samples, PLANS["mixed"], tmp_path, "onnx-arm")
    assert_as_large(skeleton, calibrated)
    assert fused_operators(skeleton, CPU) == fused_operators(calibrated, CPU)
    kinds = {str(onnx.TensorProto.DataType.Name(each.data_type)) for each in onnx.load(skeleton).graph.initializer}
    assert "INT8" in kinds


@pytest.mark.slow
def test_initialisers_agree_one_by_one(mixed: tuple[Path, Path]) -> None:
    calibrated, skeleton = mixed
    shapes = [
        {
            name: (each.data_type, tuple(each.dims))
            for name, each in tensors(file).items()
            if not name.startswith("quantizers.")
        }
        for file in (calibrated, skeleton)
    ]
    assert shapes[0] == shapes[1]
    assert set(tensors(calibrated)) <= set(tensors(skeleton)), "no grid is missing"
    operators = [[node.op_type for node in onnx.load(file).graph.node] for file in (calibrated, skeleton)]
    assert operators[0] == operators[1]


@pytest.mark.slow
def test_the_skeleton_runs(mixed: tuple[Path, Path]) -> None:
    _, skeleton = mixed
    (output,) = run_session(open_session(skeleton, "ORT_ENABLE_ALL", threads=1), [(torch.randn(5, 2, 8, 8),)])
    assert output.shape == (5, 5)
    assert torch.isfinite(output).all()


@pytest.mark.slow
def test_the_float_model_is_left_alone(intake: Intake, tmp_path: Path) -> None:
    x = torch.randn(7, 2, 8, 8)
    graph = str(intake.traced.graph)
    weights = {layer.name: intake.traced.tensor(f"{layer.name}.weight").clone() for layer in intake.layers}
    with torch.no_grad():
        before = intake.traced.module(x)
        write_skeleton(
            intake.traced, choices_for(intake, PLANS["mixed"], "onnx-cpu"), find_target("onnx-cpu"), tmp_path / "s.onnx"
        )
        assert torch.equal(intake.traced.module(x), before)
        assert torch.allclose(before, intake.original(x), atol=1e-5)
    assert str(intake.traced.graph) == graph
    for name, weight in weights.items():
        assert torch.equal(intake.traced.tensor(f"{name}.weight"), weight)


def test_no_choice_costs_no_byte_more_than_the_float_file(intake: Intake, tmp_path: Path) -> None:
    plain = tmp_path / "float.onnx"
    write_onnx(build_onnx(intake.traced), plain, {})
    size = write_skeleton(intake.traced, [], find_target("onnx-cpu"), tmp_path / "skeleton.onnx")
    assert size == plain.stat().st_size
    x = np.random.default_rng(0).standard_normal((3, 2, 8, 8), np.float32)
    first, second = (
        open_session(path, "ORT_ENABLE_ALL", threads=1).run(None, {"x": x})[0]
        for path in (plain, tmp_path / "skeleton.onnx")
    )
    assert np.array_equal(first, second)
