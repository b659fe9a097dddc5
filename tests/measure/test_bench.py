from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from compress.errors import InputError
from compress.measure.bench import BenchReport, bench, choose_rounds, ratio_of_medians, time_models
from compress.measure.isolated import How, measure_alone
from compress.measure.onnx_session import open_model

CPU = "CPUExecutionProvider"
Shape = Sequence[int | str | None]


def save_model(
    path: Path, nodes: list[onnx.NodeProto], inputs: dict[str, tuple[int, Shape]], **constants: object
) -> Path:
    """An ONNX file whose graph ends in the value "y"; inputs map a name to (element type, shape)."""
    values = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    output = helper.make_empty_tensor_value_info("y")
    tensors = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "tiny", values, [output], tensors)
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def relu(path: Path, shape: Shape = ("batch", 4), kind: int = TensorProto.FLOAT) -> Path:
    return save_model(path, [helper.make_node("Relu", ["x"], ["y"])], {"x": (kind, shape)})


def quick(paths: Sequence[Path], **options: object) -> BenchReport:
    """Three runs, no process for memory."""
    defaults: dict[str, object] = {"runs": 3, "warmup": 0, "memory": False}
    return bench(paths, **(defaults | options))  # type: ignore[arg-type]


class Clock:
    """Stands still but for what the calls add; remembers who was called."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.called = ""

    def __call__(self) -> float:
        return self.seconds

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.called += name
            self.seconds += seconds

        return run


# Timing


def test_models_take_turns_after_the_warm_up() -> None:
    clock = Clock()
    times = time_models([clock.call("A", 0.002), clock.call("B", 0.005)], rounds=3, warmup=1, clock=clock)
    assert clock.called == "AB" * 4
    assert times.shape == (3, 2)
    np.testing.assert_allclose(times, [[2, 5]] * 3)


def test_no_warm_up_means_none() -> None:
    clock = Clock()
    time_models([clock.call("A", 0.002)], rounds=2, warmup=0, clock=clock)
    assert clock.called == "AA"


def test_rounds_follow_from_the_warm_up() -> None:
    clock = Clock()
    assert time_models([clock.call("A", 0.02)], warmup=0, clock=clock).shape == (50, 1)
    assert clock.called == "A" * 51


def test_progress_comes_between_rounds_and_the_first_model_is_warmed_again() -> None:
    clock, seen = Clock(), []
    calls = [clock.call("A", 0.4), clock.call("B", 0.2)]
    times = time_models(
        calls, rounds=4, warmup=0, clock=clock, progress=lambda *at: seen.append((*at, len(clock.called)))
    )
    assert clock.called == "ABAB" + "A" + "ABAB"
    assert seen == [(2, 4, 4), (4, 4, 9)]
    np.testing.assert_allclose(times, [[400, 200]] * 4)


def test_garbage_collection_is_off_meanwhile_and_on_again_after_an_error() -> None:
    def fail() -> None:
        assert not gc.isenabled()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        time_models([fail], rounds=1, warmup=0)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("run_ms", "rounds"),
    [([0.01], 2000), ([1, 2], 1000), ([5, 200], 48), ([100], 30), ([4000, 1], 30), ([0.0], 2000)],
    ids=["tiny", "a second of the fastest", "ten seconds of all", "slow", "very slow", "below the clock"],
)
def test_number_of_rounds(run_ms: list[float], rounds: int) -> None:
    assert choose_rounds(run_ms) == rounds


# The ratio


@pytest.mark.slow
def test_interval_covers_the_true_ratio() -> None:
    covered = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        # What disturbs a round disturbs both.
        shared = rng.lognormal(0, 0.3, 200)
        baseline = 2.0 * shared * rng.lognormal(0, 0.1, 200)
        model = 1.0 * shared * rng.lognormal(0, 0.1, 200)
        ratio = ratio_of_medians(baseline, model, seed=seed)
        assert ratio.low <= ratio.value <= ratio.high
        covered += ratio.low <= 0.5 <= ratio.high
    assert covered >= 35


def test_pairing_narrows_the_interval() -> None:
    rng = np.random.default_rng(0)
    baseline = rng.lognormal(0, 0.3, 300)
    paired = ratio_of_medians(baseline, baseline * 0.5)
    unpaired = ratio_of_medians(baseline, rng.permutation(baseline) * 0.5)
    assert paired.low == pytest.approx(0.5)
    assert paired.high == pytest.approx(0.5)
    assert unpaired.high - unpaired.low > 0.02


@pytest.mark.slow
def test_ratio_is_reproducible_in_pieces() -> None:
    # More rounds than are drawn at once.
    baseline, model = np.random.default_rng(0).normal(10, 1, (2, 3000))
    assert ratio_of_medians(baseline, model, seed=3) == ratio_of_medians(baseline, model, seed=3)


# The report


def test_report_of_two_models_at_two_batches(tmp_path: Path) -> None:
    a, b = relu(tmp_path / "a.onnx"), relu(tmp_path / "b.onnx", ["n", 3, "side"])
    report = quick([a, b], batch_sizes=[1, 2], dims={"side": 5}, runs=40, threads=2, level="basic")
    assert [(row.model, row.batch) for row in report.rows] == [(str(p), n) for n in (1, 2) for p in (a, b)]
    assert report.rows[3].shapes == {"x": (2, 3, 5)}
    assert (report.threads, report.level, report.provider, report.dims) == (2, "basic", CPU, {"side": 5})
    for row in report.rows:
        assert row.runs == 40
        assert row.load_ms > 0
        assert 0 < row.min_ms <= row.p50_ms <= row.p90_ms <= row.p95_ms <= row.p99_ms <= row.p99_9_ms <= row.max_ms
        assert row.min_ms <= row.mean_ms <= row.max_ms
        assert (row.ratio is None) == (row.model == str(a))
    assert report.environment.onnxruntime
    assert BenchReport.model_validate_json(report.model_dump_json()) == report


def test_one_file_may_be_compared_with_itself(tmp_path: Path) -> None:
    path = relu(tmp_path / "a.onnx")
    assert [row.ratio is None for row in quick([path, path]).rows] == [True, False]


def test_models_may_have_different_inputs(tmp_path: Path) -> None:
    tokens = save_model(
        tmp_path / "tokens.onnx",
        [helper.make_node("Gather", ["table", "ids"], ["e"]), helper.make_node("Where", ["mask", "e", "e"], ["y"])],
        {"ids": (TensorProto.INT64, ["batch", "seq"]), "mask": (TensorProto.BOOL, ["batch", "seq", 1])},
        table=np.zeros((2, 3), np.float32),
    )
    report = quick([relu(tmp_path / "a.onnx"), tokens], dims={"seq": 7})
    assert report.rows[1].shapes == {"ids": (1, 7), "mask": (1, 7, 1)}


def test_progress_names_each_stage(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    quick([relu(tmp_path / "a.onnx")], progress=lambda *at: seen.append(at))
    assert seen[:2] == [("opening models", 0, 1), ("opening models", 1, 1)]
    assert ("timing, batch 1", 3, 3) in seen


@pytest.mark.slow
def test_imports_no_torch() -> None:
    code = "import sys, compress.measure.bench, compress.cli.bench; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Memory


@pytest.mark.matrix
def test_peak_memory_holds_the_weights_and_not_what_this_process_holds(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)
    big = save_model(
        tmp_path / "big.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"x": (TensorProto.FLOAT, ["batch", 1024])},
        w=weight,
    )
    held = np.ones(1 << 25)  # 256 MiB here must not be seen there
    rows = bench([relu(tmp_path / "a.onnx"), big], runs=1).rows
    small_bytes, big_bytes = (row.peak_memory_bytes for row in rows)
    assert small_bytes is not None
    assert big_bytes is not None
    assert 0 <= small_bytes < big_bytes
    assert weight.nbytes <= big_bytes < held.nbytes


def test_error_in_the_measuring_process_is_ours(tmp_path: Path) -> None:
    path = relu(tmp_path / "a.onnx", ["batch", "seq"])
    with pytest.raises(InputError, match=r"a\.onnx: dimension 1 of input 'x' .* --dim seq=VALUE"):
        measure_alone(path, How(CPU, "all", 1), batch=1, dims={}, seed=0)


def test_death_of_the_measuring_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(
        InputError, match=r"a\.onnx: the process that measures it alone ended with code 1 .*--no-memory"
    ):
        bench([relu(tmp_path / "a.onnx")], runs=1)


# Refusals


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.onnx: no such file"):
        quick([tmp_path / "nowhere.onnx"])
    with pytest.raises(InputError, match=r"holds no graph\.json; give a folder that `compress quantize` has written"):
        quick([tmp_path])
    with pytest.raises(InputError, match="a folder, not an ONNX file"):
        open_model(tmp_path, provider=CPU, level="all", threads=1)


@pytest.mark.parametrize("content", [b"", b"not a model at all"], ids=["empty", "text"])
def test_file_that_is_no_model(tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"text\.onnx: not an ONNX file, or a damaged one"):
        quick([path])
    path = path.rename(tmp_path / "model.pt")
    with pytest.raises(
        InputError, match=r"model\.pt is not an ONNX file; give one \(`compress export MODEL` writes it\)"
    ):
        quick([path])
    assert capfd.readouterr().err == ""


def test_model_that_onnxruntime_refuses(tmp_path: Path) -> None:
    path = save_model(
        tmp_path / "odd.onnx", [helper.make_node("NoSuchOp", ["x"], ["y"])], {"x": (TensorProto.FLOAT, [1])}
    )
    with pytest.raises(InputError, match=r"odd\.onnx: onnxruntime cannot load the model: .*NoSuchOp"):
        quick([path])


def test_model_that_cannot_run_at_this_batch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    path = save_model(
        tmp_path / "baked.onnx", nodes, {"x": (TensorProto.FLOAT, ["batch", 4])}, shape=np.array([1, 4], np.int64)
    )
    assert quick([path]).rows
    with pytest.raises(InputError, match=r"baked\.onnx: onnxruntime cannot run it on x \[2, 4\]: "):
        quick([path], batch_sizes=[2])
    assert capfd.readouterr().err == ""


def test_input_of_a_type_that_is_not_made(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    path = save_model(tmp_path / "text.onnx", nodes, {"x": (TensorProto.STRING, ["batch"])})
    with pytest.raises(InputError, match=r"text\.onnx: input 'x' is a tensor\(string\), .*; made: float, "):
        quick([path])


def test_provider_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"provider 'Nope' is not available here; available: .*CPUExecutionProvider"):
        quick([relu(tmp_path / "a.onnx")], provider="Nope")


def test_provider_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FellBack:
        def __init__(self, *_: object, **__: object) -> None: ...

        def get_providers(self) -> list[str]:
            return ["OtherExecutionProvider"]

    monkeypatch.setattr("onnxruntime.InferenceSession", FellBack)
    with pytest.raises(InputError, match="is listed but did not start; OtherExecutionProvider did"):
        open_model(relu(tmp_path / "a.onnx"), provider=CPU, level="all", threads=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "most"}, "unknown optimisation level 'most'; known: all, extended, basic, disabled"),
        ({"threads": 0}, "threads: 0 was given, it must be at least 1"),
        ({"runs": 0}, "runs: 0 was given"),
        ({"warmup": -1}, "warmup: -1 was given, it must be at least 0"),
        ({"batch_sizes": [1, 0]}, "batch 0: 0 was given"),
        ({"batch_sizes": []}, "no batch size was given"),
        ({"batch_sizes": [2, 2]}, "one was given twice"),
        ({"dims": {"batch": -1}}, "dim batch: -1 was given"),
        ({"dims": {"seq": 4}}, "--dim seq: no model has a dynamic dimension of that name; they have: batch, x:0"),
    ],
    ids=str,
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        quick([relu(tmp_path / "a.onnx")], **options)


def test_no_file_at_all() -> None:
    with pytest.raises(InputError, match="name at least one"):
        quick([])
