"""Time small ONNX files node by node; alone it needs no more than Python, numpy and onnxruntime.

``compress bench MODEL --kit KIT`` copies this file beside the operators of a model. ``python measure.py`` in that
folder times them on whatever machine it is, and writes ``latency.json``, which ``--latency-table`` reads on the first.

All operators of one kind of numbers are branches of one file, each with an input of its own. The profile gives the
time of each kernel; what stands before and after a layer in its branch is what a change of the kind of numbers costs
there. A runtime's own work for a node is not in its profile: the same files are also run without it, and the difference
is shared by the nodes. Files run in turn, so that disturbances meet them alike.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

__all__ = ["KIT_FILE", "TABLE_FILE", "main", "sha256", "time_operators", "time_whole"]

KIT_FILE, TABLE_FILE = "kit.json", "latency.json"
ROUNDS = 150
_WARM_UP = 5
_KEPT = 0.8  # the slowest fifth of a kernel's runs are other programs'
_TRUNCATED_US = 0.5  # the profiler counts whole microseconds, rounding down
_SAY_EVERY_S = 1.0

Say = Callable[[str, int, int], None]
# Microseconds of a layer, of what stands before it in its branch, and of what stands behind it.
Times = tuple[float, float, float]


def time_operators(
    files: Sequence[Path],
    layer_operators: Sequence[str],
    *,
    threads: int,
    provider: str,
    rounds: int = ROUNDS,
    say: Say = lambda label, done, total: None,
) -> list[list[Times | None]]:
    """For every file the times of each of its branches; None where no node of a branch is a layer.

    Args:
        layer_operators: what a layer may have become.
    """
    plain = [_open(file, threads, provider) for file in files]
    with tempfile.TemporaryDirectory(prefix="compress-") as name:
        folder = Path(name)
        profiled, nodes = [], []
        for number, file in enumerate(files):
            optimized = folder / f"optimized{number}.onnx"
            prefix = folder / f"profile{number}"
            profiled.append(_open(file, threads, provider, optimized=optimized, profile=prefix))
            nodes.append(_read_graph(optimized))
            optimized.unlink()
        sessions = [*plain, *profiled]
        totals_us = _time([_call(session) for session in sessions], threads, rounds, "timing operators", say)
        found = []
        for session, total_us, (inputs, graph) in zip(profiled, totals_us, nodes, strict=False):
            kernels_us = _kernels(Path(session.end_profiling()))
            idle_us = max(total_us - sum(kernels_us.values()), 0.0) / max(len(kernels_us), 1)
            branches = [_parts(graph, name, layer_operators) for name in inputs]
            found.append([_times(parts, kernels_us, idle_us) for parts in branches])
    return found


def time_whole(
    files: Sequence[Path],
    dims: Mapping[str, int],
    *,
    threads: int,
    provider: str,
    rounds: int = ROUNDS,
    say: Say = lambda label, done, total: None,
) -> list[float]:
    """Median microseconds of each file, in turn; ``dims`` are the sizes of dynamic dimensions by name."""
    calls = [_call(_open(file, threads, provider), dims) for file in files]
    return _time(calls, threads, rounds, "timing whole models", say)


def main(folder: Path) -> int:
    """Time the kit in ``folder`` and write its ``latency.json``; the exit code."""
    try:
        kit = json.loads((folder / KIT_FILE).read_text())
    except (OSError, ValueError) as error:
        return _refuse(f"{folder / KIT_FILE} cannot be read ({error}); copy the whole folder that compress has written")
    if ort.__version__ != kit["onnxruntime"]:
        return _refuse(
            f"the kit is for onnxruntime {kit['onnxruntime']}, and this is {ort.__version__}: other versions have "
            f"other kernels. Install that one (pip install onnxruntime=={kit['onnxruntime']})"
        )
    if kit["provider"] not in ort.get_available_providers():
        return _refuse(f"this onnxruntime has no {kit['provider']}; it has {', '.join(ort.get_available_providers())}")
    for each in (*kit["operators"], *kit["models"]):
        file = folder / each["file"]
        if not file.is_file() or sha256(file) != each["sha256"]:
            return _refuse(f"{file} is missing or damaged; copy the whole folder that compress has written")
    say = _Progress()
    given = {"threads": kit["threads"], "provider": kit["provider"], "rounds": kit["rounds"], "say": say}
    branches = time_operators([folder / each["file"] for each in kit["operators"]], kit["layer_operators"], **given)
    rows = []
    for each, times in zip(kit["operators"], branches, strict=True):
        for signature, measured in zip(each["signatures"], times, strict=True):
            if measured is None:
                return _refuse(f"onnxruntime leaves no node for {signature}, {each['compute']}; it cannot be timed")
            names = ("layer_us", "enter_us", "leave_us")
            rows.append({"signature": signature, "compute": each["compute"], **dict(zip(names, measured, strict=True))})
    whole_us = time_whole([folder / each["file"] for each in kit["models"]], kit["dims"], **given)
    models = [
        {"layers": kit["layers"], "kind": each["kind"], "us": us}
        for each, us in zip(kit["models"], whole_us, strict=True)
    ]
    table = {
        "schema_version": 1,
        "measured_by": "kit",
        "environment": _environment(kit["telling_flags"]),
        "provider": kit["provider"],
        "threads": kit["threads"],
        "operators": rows,
        "models": models,
    }
    temporary = folder / f".{TABLE_FILE}.partial"
    temporary.write_text(json.dumps(table, indent=1) + "\n")
    os.replace(temporary, folder / TABLE_FILE)
    flags = ", ".join(table["environment"]["cpu_flags"]) or table["environment"]["architecture"]
    print(f"{table['environment']['cpu']} ({flags}), onnxruntime {ort.__version__}, {kit['threads']} thread(s)")
    print(f"{len(rows)} operators timed; {folder / TABLE_FILE} is for --latency-table")
    return 0


def _open(
    file: Path, threads: int, provider: str, *, optimized: Path | None = None, profile: Path | None = None
) -> ort.InferenceSession:
    """As compress/exporters/session.py opens a file at its best."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return ort.InferenceSession(str(file), options, providers=[provider])


def _call(session: ort.InferenceSession, dims: Mapping[str, int] | None = None) -> Callable[[], object]:
    """One run on inputs that look like nothing in particular; token ids and masks are ones."""
    feeds = {}
    for position, each in enumerate(session.get_inputs()):
        shape = [size if isinstance(size, int) else (dims or {}).get(size, 1) for size in each.shape]
        if each.type == "tensor(float)":
            feeds[each.name] = np.random.default_rng(position).standard_normal(shape, dtype=np.float32)
        else:
            kinds = {"tensor(bool)": np.bool_, "tensor(int32)": np.int32}
            feeds[each.name] = np.ones(shape, kinds.get(each.type, np.int64))
    return lambda: session.run(None, feeds)


def _time(calls: Sequence[Callable[[], object]], threads: int, rounds: int, label: str, say: Say) -> list[float]:
    """Median microseconds of each call, one of each in turn.

    One thread's own time is counted where there is but one: it stops while another program has the processor.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    for call in [*calls] * _WARM_UP:
        call()
    seconds = np.empty((rounds, len(calls)))
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(rounds):
            say(label, done, rounds)
            for position, call in enumerate(calls):
                start = clock()
                call()
                seconds[done, position] = clock() - start
    finally:
        if collecting:
            gc.enable()
    say(label, rounds, rounds)
    return [float(each) for each in np.median(seconds, axis=0) * 1e6]


def _kernels(profile: Path) -> dict[str, float]:
    """Microseconds of each node by name."""
    runs: dict[str, list[float]] = defaultdict(list)
    for event in json.loads(profile.read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            runs[event["name"].removesuffix("_kernel_time")].append(event["dur"])
    found = {}
    for name, values in runs.items():
        kept = np.sort(np.array(values))[: max(int(len(values) * _KEPT), 1)]
        found[name] = float(kept.mean()) + _TRUNCATED_US
    return found


def _times(parts: tuple[list[str], ...] | None, kernels_us: Mapping[str, float], idle_us: float) -> Times | None:
    if parts is None:
        return None
    layer, before, behind = (sum(kernels_us.get(name, 0.0) + idle_us for name in names) for names in parts)
    return layer, before, behind


_Node = tuple[str, str, list[str], list[str]]  # name, operator, inputs, outputs


def _parts(graph: Sequence[_Node], source: str, layers: Sequence[str]) -> tuple[list[str], list[str], list[str]] | None:
    """Names of the branch's layer, of what stands before it and of what stands behind it; nodes are in order."""
    reached, behind_layer = {source}, set[str]()
    layer: list[str] = []
    before: list[str] = []
    behind: list[str] = []
    for name, operator, inputs, outputs in graph:
        if not reached.intersection(inputs):
            continue
        reached.update(outputs)
        if not layer and operator in layers:
            layer.append(name)
            behind_layer.update(outputs)
        elif behind_layer.intersection(inputs):
            behind.append(name)
            behind_layer.update(outputs)
        else:
            before.append(name)
    return (layer, before, behind) if layer else None


def _read_graph(file: Path) -> tuple[list[str], list[_Node]]:
    """Input names and nodes of an ONNX file, whose format (protobuf) needs no more than this to be read."""
    inputs, nodes = [], []
    graph = next(value for number, value in _fields(memoryview(file.read_bytes())) if number == 7)
    for number, value in _fields(graph):
        if number == 11:
            inputs.append(next(_text(part) for field, part in _fields(value) if field == 1))
        elif number == 1:
            texts: dict[int, list[str]] = defaultdict(list)
            for field, part in _fields(value):
                if field in (1, 2, 3, 4):
                    texts[field].append(_text(part))
            nodes.append(("".join(texts[3]), "".join(texts[4]), texts[1], texts[2]))
    return inputs, nodes


def _text(part: memoryview) -> str:
    return bytes(part).decode()


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each field that has a length; numbers among them are skipped."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire = key & 7
        if wire == 2:
            size, position = _varint(data, position)
            yield key >> 3, data[position : position + size]
            position += size
        elif wire == 0:
            _, position = _varint(data, position)
        else:
            position += {1: 8, 5: 4}[wire]


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _environment(telling: Sequence[str]) -> dict[str, Any]:
    """The machine, in the fields of compress/measure/machine.py."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    present = set((fields.get("flags") or fields.get("features") or "").split())
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine() or "unknown",
        "cpu_flags": [flag for flag in telling if flag in present],
        "architecture": platform.machine(),
        "cores": None,
        "usable_cpus": len(affinity(0)) if affinity else os.cpu_count() or 1,
        "memory_bytes": pages,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": None,
        "onnxruntime": ort.__version__,
        "onnx": None,
        "numpy": np.__version__,
    }


def sha256(file: Path) -> str:
    """Of the file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _refuse(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


class _Progress:
    """A line a second."""

    def __init__(self) -> None:
        self.said = 0.0

    def __call__(self, label: str, done: int, total: int) -> None:
        if time.monotonic() - self.said >= _SAY_EVERY_S or done == total:
            self.said = time.monotonic()
            print(f"{label}: {done} of {total} rounds", flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent))
