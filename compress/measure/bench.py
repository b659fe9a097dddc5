"""Latency, load time and memory of models, side by side: ONNX files in ONNX Runtime, finished folders in PyTorch.

All models are open in one process and run in turn, A B A B ..., so that whatever else the machine does meets them
alike; each is compared with the first one, the baseline. Inputs are numpy arrays and outputs are fetched: on a GPU
provider the copies to and from it are part of the time.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from compress.errors import InputError
from compress.measure.isolated import Alone, How, measure_alone, open_either
from compress.measure.machine import describe_environment
from compress.measure.onnx_session import LEVELS, Opened, dim_names, make_inputs, resolve_shapes, start_runtime
from compress.progress import Progress, silent
from compress.records.environment import Environment
from compress.records.layers import LayerRun, Record

__all__ = [
    "BenchReport",
    "BenchRow",
    "Explanation",
    "Progress",
    "Ratio",
    "bench",
    "choose_rounds",
    "ratio_of_medians",
    "time_models",
]

_MIN_ROUNDS = 30
# Enough for P99.9 to lie below the maximum.
_MAX_ROUNDS = 2000
_ENOUGH_MS = 1_000
_PATIENCE_MS = 10_000

_RESAMPLES = 2000
_REPORT_EVERY_S = 1.0


class Ratio(Record):
    """Median time over the baseline's median time, below 1 when faster, and its 95 % interval."""

    value: float
    low: float
    high: float


class BenchRow(Record):
    """One model at one batch size; times of a single run over the whole batch, percentiles interpolated."""

    model: str = Field(description="the path as it was given")
    batch: int
    shapes: dict[str, tuple[int, ...]] = Field(description="shape of each input")
    runs: int = Field(description="timed runs; with fewer than 1000 P99.9 is next to the maximum")
    load_ms: float = Field(description="from the file or folder to what can run")
    mean_ms: float
    min_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    p99_9_ms: float
    max_ms: float
    peak_memory_bytes: int | None = Field(description="main memory at its peak; None: not measured")
    device_memory_bytes: int | None = Field(default=None, description="a GPU's at its peak; None: not measured")
    ratio: Ratio | None = Field(description="against the first model at this batch size; None for that one")


class Explanation(Record):
    """What runs each layer of a folder at one batch size; see :class:`~compress.records.layers.LayerRun`."""

    model: str = Field(description="the path as it was given")
    batch: int
    capability: tuple[int, int] | None = Field(default=None, description="of the GPU asked about; None: what ran here")
    layers: tuple[LayerRun, ...]


class BenchReport(Record):
    """What :func:`bench` measured, and where and how; rows by batch size, then in the order of the paths."""

    schema_version: Literal[1] = 1
    environment: Environment
    provider: str
    level: str
    threads: int
    warmup: int
    seed: int
    dims: dict[str, int]
    device: str = Field(default="cpu", description="where folders ran")
    gpu: str | None = Field(default=None, description="that device's own name; None on the CPU")
    dtype: str | None = Field(default=None, description="what their packed linears multiplied in; None: as stored")
    rows: tuple[BenchRow, ...]
    explanations: tuple[Explanation, ...] = ()


def bench(
    paths: Sequence[str | Path],
    *,
    batch_sizes: Sequence[int] = (1,),
    threads: int = 1,
    runs: int | None = None,
    warmup: int = 5,
    provider: str = "CPUExecutionProvider",
    level: str = "all",
    dims: Mapping[str, int] | None = None,
    seed: int = 0,
    memory: bool = True,
    device: str = "cpu",
    dtype: str | None = None,
    explain: bool = False,
    capability: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure ``paths``, ONNX files and folders of ``quantize``, at each batch size, interleaved; the first one is the
    baseline. A folder is timed as :func:`compress.load` gives it, on ``device`` and with ``dtype``.

    ``runs`` None lets :func:`choose_rounds` decide; ``warmup`` runs of each model come first and do not count.
    ``level`` is the graph optimisation: all, extended, basic or disabled. ``dims`` gives dynamic dimensions other than
    the batch, by name or "input:axis". Load time and memory are measured in a process for each row
    (:func:`compress.measure.isolated.measure_alone`); ``memory`` False saves it, and the load time is then that of this
    process, where the first model pays more than the others. Operators that ``provider`` lacks run on the CPU.
    ``explain`` says of each folder's layers which kernel ran them; with ``capability``, which would on such a GPU, in
    ``dtype``.

    Raises:
        InputError: a model cannot be opened, or not run at a batch size; an option is out of range or unknown.
    """
    dims = dict(dims or {})
    _check_options(paths, batch_sizes, threads, runs, warmup, level, dims)
    _check_folders(paths, device, dtype, explain, capability)
    report = progress or silent
    # For a GPU that is not here ``dtype`` is a question, not what runs.
    runs_in = None if capability is not None and device == "cpu" else dtype
    how = How(provider=provider, level=level, threads=threads, device=device, dtype=runs_in)
    start_runtime()
    models = []
    for done, path in enumerate(paths):
        report("opening models", done, len(paths))
        models.append(open_either(path, how))
    report("opening models", len(paths), len(paths))
    _check_dims_are_used(models, dims)
    # Everything that can be refused is refused before the first measurement.
    shapes = {
        (index, batch): resolve_shapes(model.path, model.inputs, batch=batch, dims=dims)
        for batch in batch_sizes
        for index, model in enumerate(models)
    }

    rows, explanations = [], []
    for batch in batch_sizes:
        calls = [_call(model, shapes[index, batch], seed) for index, model in enumerate(models)]
        times_ms = time_models(
            calls, rounds=runs, warmup=warmup, progress=progress and _named(progress, f"timing, batch {batch}")
        )
        for index, model in enumerate(models):
            report(f"load and memory, batch {batch}", index, len(models))
            alone = measure_alone(model.path, how, batch=batch, dims=dims, seed=seed) if memory else None
            ratio = ratio_of_medians(times_ms[:, 0], times_ms[:, index], seed=seed) if index else None
            rows.append(_row(model, str(paths[index]), batch, shapes[index, batch], times_ms[:, index], alone, ratio))
            if explain and model.path.is_dir():
                layers = _explained(model, shapes[index, batch], seed, capability, dtype)
                explained = Explanation(model=str(paths[index]), batch=batch, capability=capability, layers=layers)
                explanations.append(explained)
        report(f"load and memory, batch {batch}", len(models), len(models))
    return BenchReport(
        environment=describe_environment(),
        provider=provider,
        level=level,
        threads=threads,
        warmup=warmup,
        seed=seed,
        dims=dims,
        device=device,
        gpu=_gpu_name(device),
        dtype=runs_in,
        rows=tuple(rows),
        explanations=tuple(explanations),
    )


def time_models(
    calls: Sequence[Callable[[], object]],
    *,
    rounds: int | None = None,
    warmup: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float64]:
    """Call each of ``calls`` once per round, in order, and return the milliseconds of each, [rounds, calls].

    ``warmup`` rounds come first, and one at least where ``rounds`` is left to :func:`choose_rounds`. ``clock`` counts
    in seconds. Python's garbage collector is off meanwhile. ``progress`` is called between rounds, at most once a
    second; the first call is then made once more, untimed, as it would pay for the caches that ``progress`` took.
    """

    def one_round() -> list[float]:
        milliseconds = []
        for call in calls:
            start = clock()
            call()
            milliseconds.append((clock() - start) * 1e3)
        return milliseconds

    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        warm = [one_round() for _ in range(max(warmup, 1 if rounds is None else 0))]
        rounds = rounds or choose_rounds(np.median(warm, axis=0).tolist())
        times, reported = [], clock()
        for done in range(rounds):
            if progress and clock() - reported >= _REPORT_EVERY_S:
                progress(done, rounds)
                calls[0]()
                reported = clock()
            times.append(one_round())
    finally:
        if collecting:
            gc.enable()
    if progress:
        progress(rounds, rounds)
    return np.array(times, dtype=np.float64)


def choose_rounds(run_ms: Sequence[float]) -> int:
    """Return how many rounds to time, from the milliseconds that one run of each model takes.

    Enough for the fastest to run for a second, at most 2000 and at most ten seconds for all; but never under 30.
    """
    fastest, together = max(min(run_ms), 1e-6), max(sum(run_ms), 1e-6)
    wanted = min(math.ceil(_ENOUGH_MS / fastest), _MAX_ROUNDS, int(_PATIENCE_MS / together))
    return max(wanted, _MIN_ROUNDS)


def ratio_of_medians(baseline_ms: NDArray[np.float64], model_ms: NDArray[np.float64], *, seed: int = 0) -> Ratio:
    """Return median(model) / median(baseline) with a 95 % interval from a paired bootstrap; both are [rounds].

    2000 times, rounds are drawn with replacement, the same ones for both models, as both met the same disturbances;
    the interval is the 2.5th to 97.5th percentile of the ratios of medians.

    It says how well these runs fix the ratio of these two sessions, and no more: where a session's memory lies is the
    same for all of its runs. One file opened twice and compared with itself came out at 0.97 to 1.02 (with two threads
    once at 0.72), outside its interval in more than half of 28 comparisons (8 layers of 1024x1024, 500 rounds, 2-core
    EPYC VM shared with other work, onnxruntime 1.32).
    """
    rounds = len(baseline_ms)
    rng = np.random.default_rng(seed)
    # Some megabytes at a time, however many rounds there are.
    at_once = max(1, min(_RESAMPLES, 1_000_000 // rounds))
    ratios: list[NDArray[np.float64]] = []
    for start in range(0, _RESAMPLES, at_once):
        drawn = rng.integers(0, rounds, (min(at_once, _RESAMPLES - start), rounds))
        ratios.append(np.median(model_ms[drawn], axis=1) / np.median(baseline_ms[drawn], axis=1))
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    return Ratio(value=float(np.median(model_ms) / np.median(baseline_ms)), low=float(low), high=float(high))


def _check_options(
    paths: Sequence[str | Path],
    batch_sizes: Sequence[int],
    threads: int,
    runs: int | None,
    warmup: int,
    level: str,
    dims: Mapping[str, int],
) -> None:
    if not paths:
        raise InputError("no model was given; name at least one ONNX file or folder")
    if not batch_sizes:
        raise InputError("no batch size was given; give at least one")
    smallest = {"threads": (threads, 1), "runs": (_MIN_ROUNDS if runs is None else runs, 1), "warmup": (warmup, 0)}
    smallest |= {f"batch {batch}": (batch, 1) for batch in batch_sizes}
    smallest |= {f"dim {name}": (size, 0) for name, size in dims.items()}
    for name, (value, least) in smallest.items():
        if value < least:
            raise InputError(f"{name}: {value} was given, it must be at least {least}")
    if len(set(batch_sizes)) < len(batch_sizes):
        raise InputError(f"batch sizes {', '.join(map(str, batch_sizes))}: one was given twice")
    if level not in LEVELS:
        raise InputError(f"unknown optimisation level {level!r}; known: {', '.join(LEVELS)}")


def _check_folders(
    paths: Sequence[str | Path], device: str, dtype: str | None, explain: bool, capability: tuple[int, int] | None
) -> None:
    """Options for folders are refused where there is none, before anything is opened."""
    if capability is not None and not explain:
        raise InputError("--capability says what would run on another GPU: it goes with --explain")
    if any(Path(path).is_dir() for path in paths):
        return
    asked = {"--device": device != "cpu", "--dtype": dtype is not None, "--explain": explain}
    if wrong := [name for name, given in asked.items() if given]:
        raise InputError(
            f"{' and '.join(wrong)}: for folders that `compress quantize` has written, which run in PyTorch, and none "
            "is given; an ONNX file runs where --provider says"
        )


def _gpu_name(device: str) -> str | None:
    if device == "cpu":
        return None
    import torch

    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None


def _explained(
    model: Opened,
    shapes: Mapping[str, tuple[int, ...]],
    seed: int,
    capability: tuple[int, int] | None,
    dtype: str | None,
) -> tuple[LayerRun, ...]:
    from compress.measure.artifact_session import OpenFolder, explain_run

    assert isinstance(model, OpenFolder)
    feeds = make_inputs(model.path, model.inputs, shapes, seed=seed)
    return tuple(explain_run(model, feeds, capability, dtype))


def _check_dims_are_used(models: Sequence[Opened], dims: Mapping[str, int]) -> None:
    known = set().union(*(dim_names(model.inputs) for model in models))
    for name in dims:
        if name not in known:
            listing = ", ".join(sorted(known)) or "none"
            raise InputError(f"--dim {name}: no model has a dynamic dimension of that name; they have: {listing}")


def _call(model: Opened, shapes: Mapping[str, tuple[int, ...]], seed: int) -> Callable[[], None]:
    feeds = make_inputs(model.path, model.inputs, shapes, seed=seed)
    # Where a model cannot run at this batch it says so here, with its name; the timed calls need no such care.
    model.try_run(feeds)
    return lambda: model.run(feeds)


def _row(
    model: Opened,
    name: str,
    batch: int,
    shapes: dict[str, tuple[int, ...]],
    times_ms: NDArray[np.float64],
    alone: Alone | None,
    ratio: Ratio | None,
) -> BenchRow:
    p50, p90, p95, p99, p99_9 = np.percentile(times_ms, [50, 90, 95, 99, 99.9]).tolist()
    figures: dict[str, Any] = {"mean_ms": times_ms.mean(), "min_ms": times_ms.min(), "max_ms": times_ms.max()}
    return BenchRow(
        model=name,
        batch=batch,
        shapes=shapes,
        runs=len(times_ms),
        load_ms=alone.load_ms if alone else model.load_ms,
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        p99_9_ms=p99_9,
        peak_memory_bytes=alone.peak_memory_bytes if alone else None,
        device_memory_bytes=alone.device_memory_bytes if alone else None,
        ratio=ratio,
        **{key: float(value) for key, value in figures.items()},
    )


def _named(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)
