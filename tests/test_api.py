"""The verbs as functions: every width and option, the folder and what is in it, the same bytes twice."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import compress
from compress import api
from compress.errors import GateError, InputError
from compress.options import Options
from compress.pipeline.run import Result
from compress.records.report import ExportCheck, Report
from tests.every import every
from tests.forgery import forge_report
from tests.sweep import sweep

pytestmark = pytest.mark.slow  # each compresses a network from end to end

FILES = {"model.onnx", "model.safetensors", "base.safetensors", "graph.json", "plan.json", "report.json"}


def net() -> nn.Sequential:
    """Layers with weight counts that are no multiple of eight, a BatchNorm, a depthwise convolution."""
    torch.manual_seed(1)
    module = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.ReLU(),
        nn.Conv2d(16, 7, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(7, 9),
        nn.ReLU(),
        nn.Linear(9, 3),
    )
    with torch.no_grad():
        module.train()(torch.randn(64, 1, 8, 8))
    return module.eval()


def data(count: int = 80) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def quantize(out: Path | None = None, calib: object = None, **settings: object) -> Result:
    shape = {"input_shape": (1, 8, 8)} if calib is None else {}
    settings = {"iterations": 8, **shape, **settings}
    return api.quantize(net(), calib=calib, out=out, **settings)  # type: ignore[arg-type]


def packed_bits(file: Path, layer: str) -> tuple[int, int]:
    """Bytes of the packed codes of ``layer`` in the ONNX file, and the width of the function that unpacks them."""
    model = onnx.load(file)
    sizes = {each.name: numpy_helper.to_array(each).nbytes for each in model.graph.initializer}
    (name,) = [name for name in sizes if name in (f"{layer}.weight_packed", f"{layer}.weight_codes")]
    readers = [node.op_type for node in model.graph.node if name in node.input]
    assert len(readers) == 1
    # Eight bits need no unpacking.
    return sizes[name], int(readers[0].removeprefix("Unpack")) if name.endswith("packed") else 8


def onnx_outputs(file: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.matrix
@sweep(
    ("bits", "with_data"),
    [*((bits, True) for bits in range(2, 9)), (2, False), (3, False), (8, False)],
    sample=[(3, True), (8, False)],
)
def test_every_width(bits: int, with_data: bool, tmp_path: Path) -> None:
    act_bits = {2: 8, 3: 7, 4: 6, 5: 5, 6: 4, 7: None, 8: 8}[bits] if with_data else None
    x = data()
    result = quantize(tmp_path / "out", x if with_data else None, bits=bits, act_bits=act_bits)
    folder = result.folder
    assert folder is not None
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left beside the folder"

    report = Report.model_validate_json((folder / "report.json").read_text())
    assert report == result.report
    assert report.export_check.failures == ()
    widths = {choice.layer: choice.option.bits for choice in report.plan.choices}
    assert widths == {"0": 8, "3": bits, "5": bits, "9": bits, "11": 8}
    for row in report.layers:
        stored, width = packed_bits(folder / "model.onnx", row.name)
        assert width == widths[row.name]
        exact = width * -(-row.parameters // 8)
        assert stored == (row.parameters if width == 8 else exact), "so many bits a weight, padded to eight weights"
        channels = {"0": 16, "3": 16, "5": 7, "9": 9, "11": 3}[row.name]
        assert row.weight_bytes == exact + 4 * channels

    loaded = compress.load(folder)
    with torch.no_grad():
        assert torch.equal(loaded(x), result.module(x)), "the same bit for bit"
        assert torch.equal(loaded(x[:1]), result.module(x[:1]))
        distance = (onnx_outputs(folder / "model.onnx", x) - loaded(x)).norm() / loaded(x).norm()
        assert float(distance) < (0.05 if with_data else 1e-4)
        if bits >= 6 and (act_bits or 8) > 4:
            assert float((loaded(x) - net()(x)).norm() / net()(x).norm()) < 0.1
    assert api.verify(folder, data=x).failures == ()


def test_metadata_says_how_the_file_came_about(tmp_path: Path) -> None:
    result = quantize(tmp_path / "out", data(), bits=4)
    model = onnx.load(tmp_path / "out" / "model.onnx")
    found = {each.key: each.value for each in model.metadata_props if each.key.startswith("compress.")}
    assert found["compress.target"] == "onnx-cpu"
    assert found["compress.torch_version"] == torch.__version__
    assert found["compress.onnxruntime_version"] == onnxruntime.__version__
    assert float(found["compress.export_check_relative_l2"]) == pytest.approx(
        result.report.export_check.relative_l2_optimized, rel=0.01, abs=1e-12
    )
    assert len(found["compress.plan_sha256"]) == 64
    assert model.producer_name == "compress"
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param, "the batch stays free"


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("with_data", [False, True], ids=["weights only", "with data"])
def test_two_runs_give_the_same_bytes(with_data: bool, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)  # what the caller did before must not matter
        quantize(tmp_path / name, data() if with_data else None, bits=3)
    for file in FILES - {"report.json"}:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.matrix
def test_another_seed_is_another_result(tmp_path: Path) -> None:
    for seed in (0, 1):
        quantize(tmp_path / str(seed), data(), bits=2, seed=seed)
    first, second = ((tmp_path / str(seed) / "model.safetensors").read_bytes() for seed in (0, 1))
    assert first != second


@pytest.mark.slow(cases=2)
@pytest.mark.parametrize(
    ("settings", "check"),
    [
        ({"method": "minmax"}, lambda report: report.layers[2].method == "minmax"),
        ({"method": "adaquant-parallel"}, lambda report: report.layers[2].method == "adaquant-parallel"),
        ({"samples": 16}, lambda report: report.plan.samples == 16 and any("16 of 80" in n for n in report.notes)),
        ({"first_last_bits": 5, "bits": 4}, lambda report: report.plan.choices[-1].option.bits == 5),
        ({"observer": "percentile"}, lambda report: report.plan.observer == "percentile"),
        ({"target": "onnx-arm"}, lambda report: report.plan.target == "onnx-arm"),
        ({"ignore": ("re:^5$",)}, lambda report: report.plan.skipped[0].reason == "named by --ignore"),
        (
            {"equalize": True, "bias_correction": True, "statistics_tuning": True, "bias_tuning": True},
            lambda report: (
                {name for name, asked in report.plan.steps if asked}
                == {"equalize", "bias_correction", "statistics_tuning", "bias_tuning"}
                and any("statistics tuning" in note for note in report.notes)
                and any("bias tuning" in note for note in report.notes)
            ),
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_every_option(settings: dict[str, object], check: object, tmp_path: Path) -> None:
    result = quantize(tmp_path / "out", data(), **settings)
    assert check(result.report)  # type: ignore[operator]
    with torch.no_grad():
        assert torch.equal(compress.load(tmp_path / "out")(data()), result.module(data()))


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize(
    "layer",
    ["9", "11"],
)
def test_an_ignored_linear_among_integer_layers_stays_float(layer: str) -> None:
    assert quantize(None, data(), method="mse", ignore=(layer,)).report.export_check.float_layers == 1


@pytest.mark.matrix
def test_signed_activations_for_arm(tmp_path: Path) -> None:
    quantize(tmp_path / "out", data(), target="onnx-arm")
    model = onnx.load(tmp_path / "out" / "model.onnx")
    arrays = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    zero_points = [arrays[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert zero_points
    assert every(zero_point.dtype == np.int8 for zero_point in zero_points)


def test_labelled_data_adds_the_metric() -> None:
    labels = net()(data()).argmax(1)
    metric = quantize(None, data(), eval_data=(data(), labels), bits=8).report.metric
    assert metric is not None
    assert (metric.name, metric.samples, metric.float_model) == ("accuracy", 80, 1.0)
    assert metric.agreement == pytest.approx(metric.compressed_onnx)
    assert metric.lost == round((1 - metric.compressed_onnx) * 80)
    assert metric.won == 0


def test_a_number_a_sample_is_measured_by_its_squared_error() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)).eval()
    x = torch.randn(40, 4)
    with torch.no_grad():
        labels = module(x).flatten() + 0.5
    metric = api.quantize(module, calib=x, eval_data=(x, labels), bits=8, iterations=0).report.metric
    assert metric is not None
    assert metric.name == "mse"
    assert metric.float_model == pytest.approx(0.25, rel=1e-4)
    assert metric.compressed_onnx == pytest.approx(0.25, rel=0.1)
    assert metric.agreement is None


@pytest.mark.matrix
def test_without_out_nothing_stays_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    result = quantize(None, data())
    assert result.folder is None
    assert list(tmp_path.rglob("*")) == []
    with torch.no_grad():
        assert result.module(data(3)).shape == (3, 3)


def test_the_callers_module_stays_as_it_was() -> None:
    module = net().train()
    before = copy.deepcopy(module.state_dict())
    result = api.quantize(module, calib=data(), iterations=4, equalize=True, ignore=("0",))
    assert module.training
    assert every(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    with torch.no_grad():
        wanted = result.module(data())
        for parameter in module.parameters():
            parameter.zero_()
        assert torch.equal(result.module(data()), wanted), "the result shares nothing with it"


def test_progress_names_every_layer_and_ends_full() -> None:
    seen: list[tuple[str, int, int]] = []
    quantize(None, data(), method="mse", progress=lambda *step: seen.append(step))
    assert [label for label, _, _ in seen] == ["0", "3", "5", "9", "11", "exporting", "measuring"]
    assert [done for _, done, _ in seen] == [1, 2, 3, 4, 5, 5, 5]
    assert {total for _, _, total in seen} == {5}


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A net as torch.export saves it."""
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    program = torch.export.export(module, (torch.randn(2, 6),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, tmp_path / "net.pt2")
    return tmp_path / "net.pt2"


def test_an_exported_program_brings_its_shape(exported: Path) -> None:
    result = api.quantize(exported, bits=8)
    assert "input shape 6, from the .pt2 file" in result.report.notes
    with torch.no_grad():
        wanted = torch.export.load(exported).module()(torch.ones(2, 6))
        assert float((result.module(torch.ones(2, 6)) - wanted).abs().max()) < 0.05
    with pytest.raises(InputError, match="holds samples of shape 7; the model takes 6"):
        api.quantize(exported, calib=torch.randn(8, 7))


def test_a_failed_gate_writes_no_folder_and_keeps_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(*_: object, **__: object) -> ExportCheck:
        return ExportCheck(
            samples=1, source="x", relative_l2_unoptimized=1, relative_l2_optimized=1, agreement_unoptimized=None,
            agreement_optimized=None, integer_layers=1, float_layers=0, failures=("layer 3 is off",),
        )  # fmt: skip

    monkeypatch.setattr("compress.pipeline.run.verify", failed)
    with pytest.raises(GateError, match="did not pass the gate: layer 3 is off"):
        quantize(tmp_path / "out", data(), method="mse")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    result = quantize(tmp_path / "out", data(), method="mse")
    assert "continued: 5 layers were finished by an earlier run" in result.report.notes
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.matrix
def test_what_another_model_with_the_same_weights_left_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    first = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    second = nn.Sequential(first[0], nn.Tanh(), first[2])
    monkeypatch.setattr("compress.pipeline.run.build_onnx", stop)
    with pytest.raises(KeyboardInterrupt):
        api.quantize(first, calib=data(20).flatten(1)[:, :6], out=tmp_path / "out", iterations=2)
    monkeypatch.undo()
    with pytest.raises(InputError, match="finished layers of another run; different: the model"):
        api.quantize(second, calib=data(20).flatten(1)[:, :6], out=tmp_path / "out", iterations=2)
    result = api.quantize(second, calib=data(20).flatten(1)[:, :6], out=tmp_path / "out", iterations=2, overwrite=True)
    assert not any("continued" in note for note in result.report.notes)


def test_preview_writes_nothing_and_names_what_will_be_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen = api.preview(net(), calib=data(), options=Options(bits=3))
    assert [choice.layer for choice in seen.plan.choices] == ["0", "3", "5", "9", "11"]
    assert len(seen.layers) == 5
    assert seen.estimate.seconds > 0
    assert list(tmp_path.iterdir()) == []


def test_export_and_verify(tmp_path: Path) -> None:
    path = api.export(net(), tmp_path / "sub" / "float.onnx", input_shape=(1, 8, 8))
    with torch.no_grad():
        torch.testing.assert_close(onnx_outputs(path, data()), net()(data()), atol=1e-5, rtol=1e-4)
    assert [each.name for each in path.parent.iterdir()] == ["float.onnx"]
    with pytest.raises(InputError, match="exists already"):
        api.export(net(), path, input_shape=(1, 8, 8))
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"no Conv2d|does not run"):
        api.export(nn.Identity(), path, overwrite=True)
    assert path.read_bytes() == before, "a file is replaced by a finished one only"

    quantize(tmp_path / "out", data(), method="mse")
    again = api.export(tmp_path / "out", tmp_path / "again.onnx")
    assert torch.equal(onnx_outputs(again, data()), onnx_outputs(tmp_path / "out" / "model.onnx", data()))
    with pytest.raises(InputError, match="holds samples of shape 1x9x9"):
        api.verify(tmp_path / "out", data=torch.randn(4, 1, 9, 9))
    # Another file under its name is found out.
    (tmp_path / "out" / "model.onnx").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"model\.onnx is damaged, or was replaced"):
        api.verify(tmp_path / "out", data=data())
    forge_report(tmp_path / "out")
    assert api.verify(tmp_path / "out", data=data()).failures != ()


def test_inspect_lists_layers() -> None:
    found = api.inspect(net(), input_shape=(1, 8, 8))
    assert [(layer.name, layer.kind, layer.groups) for layer in found.layers] == [
        ("0", "conv2d", 1), ("3", "conv2d", 16), ("5", "conv2d", 1), ("9", "linear", 1), ("11", "linear", 1),
    ]  # fmt: skip
    assert [layer.macs for layer in found.layers] == [144 * 64, 144 * 64, 112 * 64, 63, 27]
