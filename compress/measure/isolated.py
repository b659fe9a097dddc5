"""What one model takes in a process of its own: its load time and its peak of memory.

``python -m compress.measure.isolated REQUEST`` is the child process in which :func:`measure_alone` measures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import InputError
from compress.measure.onnx_session import Opened, make_inputs, open_model, resolve_shapes, start_runtime

__all__ = ["Alone", "How", "measure_alone", "open_either", "peak_bytes"]

_LONG_LOAD_MS = 3_000


@dataclass(frozen=True)
class How:
    """How models are opened.

    Attributes:
        provider: ONNX Runtime's, for files.
        level: graph optimisation, for files: all, extended, basic, disabled.
        threads: inside an operator.
        device: for folders: cpu, cuda or cuda:1.
        dtype: for folders on a GPU: what packed linears multiply in, as in bfloat16; None: as the artifact does.
    """

    provider: str
    level: str
    threads: int
    device: str = "cpu"
    dtype: str | None = None


@dataclass(frozen=True)
class Alone:
    """What a model takes in a process of its own; :func:`measure_alone` says what is measured."""

    load_ms: float
    peak_memory_bytes: int
    device_memory_bytes: int | None


def open_either(path: str | Path, how: How) -> Opened:
    """An ONNX file in ONNX Runtime, a folder of ``compress quantize`` in PyTorch.

    Raises:
        InputError: see :func:`~compress.measure.onnx_session.open_model` and
            :func:`~compress.measure.artifact_session.open_folder`.
    """
    if Path(path).is_dir():
        from compress.measure.artifact_session import open_folder

        return open_folder(Path(path), how.device, how.dtype, how.threads)
    return open_model(path, provider=how.provider, level=how.level, threads=how.threads)


def measure_alone(path: str | Path, how: How, *, batch: int, dims: Mapping[str, int], seed: int) -> Alone:
    """Open ``path`` and run it three times in a new process; return its load time and its peak of main memory.

    Load: from the file to a session that can run, the best of three openings one after the other; of one, where that
    took over three seconds. A first one pays for memory that the system has yet to find, and for a file not yet in the
    disk cache: of two identical files in two processes the first took 242 ms, the second 67 ms.

    Memory: the largest resident size from before the model is opened until after the third run, less the resident size
    before, ONNX Runtime or torch being started already. It holds weights, the optimiser's copies, activations, inputs
    and outputs; not the interpreter and the libraries. A GPU's memory is the most that torch had allocated there at
    once; None for files, and on the CPU.

    Raises:
        InputError: the model cannot be opened or run, or the process died (out of memory, as a rule).
    """
    request = {"path": str(path), "how": asdict(how), "batch": batch, "dims": dict(dims), "seed": seed}
    # -P: the user's folder may hold a random.py; the package is found even where it runs from a checkout.
    command = [sys.executable, "-P", "-m", "compress.measure.isolated", json.dumps(request)]
    root = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, *([inherited] if inherited else [])])}
    child = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = child.stdout.splitlines()
    if child.returncode != 0 or not lines:
        last = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(
            f"{path}: the process that measures it alone ended with code {child.returncode} ({last}); "
            "--no-memory goes without that measurement"
        )
    answer = json.loads(lines[-1])
    if "error" in answer:
        raise InputError(answer["error"])
    return Alone(**answer)


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss: on Linux it starts from the size of the process that started this one.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _forget_peak() -> None:
    """Set the largest resident size back to the present one, where Linux lets us; else imports would hide a part."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _main(request: dict[str, Any]) -> dict[str, Any]:
    path, how = Path(request["path"]), How(**request["how"])
    try:
        if path.is_dir():
            from compress.measure.artifact_session import start_torch

            start_torch(how.device)
        else:
            start_runtime()
        # numpy loads it on first use, and it is not the model's.
        np.random.default_rng(0)
        _forget_peak()
        before = peak_bytes()
        model = open_either(path, how)
        shapes = resolve_shapes(model.path, model.inputs, batch=request["batch"], dims=request["dims"])
        feeds = make_inputs(model.path, model.inputs, shapes, seed=request["seed"])
        # The second run follows the memory pattern planned from the first; the third is the steady state.
        for _ in range(3):
            model.try_run(feeds)
    except InputError as error:
        return {"error": str(error)}
    found = Alone(model.load_ms, peak_bytes() - before, model.device_peak_bytes())
    del model
    if found.load_ms < _LONG_LOAD_MS:
        found = replace(found, load_ms=min(found.load_ms, *(open_either(path, how).load_ms for _ in range(2))))
    return asdict(found)


if __name__ == "__main__":
    print(json.dumps(_main(json.loads(sys.argv[1]))))
