"""One ONNX model opened in ONNX Runtime, and inputs made for it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from compress.errors import InputError

__all__ = [
    "LEVELS",
    "InputSpec",
    "OpenModel",
    "Opened",
    "dim_names",
    "make_inputs",
    "open_model",
    "resolve_shapes",
    "start_runtime",
]

LEVELS = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "disabled": "ORT_DISABLE_ALL",
}

_FLOATS = {"float": np.float32, "float16": np.float16, "double": np.float64}
_INTEGERS = {f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}

# ONNX Runtime's exceptions have no base of their own.
_ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    ort_state.EPFail,
    ort_state.EngineError,
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NoModel,
    ort_state.NoSuchFile,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
)


@dataclass(frozen=True)
class InputSpec:
    """An input as the model declares it: ``type`` like "tensor(float)"; a dynamic dimension is a name or None."""

    name: str
    type: str
    shape: tuple[int | str | None, ...]


class Opened(Protocol):
    """A model that can be timed: a file in ONNX Runtime, or a folder in PyTorch
    (compress/measure/artifact_session.py)."""

    @property
    def path(self) -> Path: ...

    @property
    def inputs(self) -> tuple[InputSpec, ...]: ...

    @property
    def load_ms(self) -> float: ...

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> None: ...

    def try_run(self, feeds: Mapping[str, NDArray[Any]]) -> None: ...

    def device_peak_bytes(self) -> int | None: ...


@dataclass(frozen=True)
class OpenModel:
    """A loaded model; ``load_ms`` is the time from the file to a session that can run, disk included."""

    path: Path
    session: Any
    inputs: tuple[InputSpec, ...]
    load_ms: float

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> None:
        """Run once on ``feeds``, all outputs computed and dropped."""
        self.session.run(None, feeds)

    def try_run(self, feeds: Mapping[str, NDArray[Any]]) -> None:
        """Run once; raises InputError with the file's name where onnxruntime refuses the inputs or fails."""
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in feeds.items())
        with _blame(self.path, f"onnxruntime cannot run it on {shapes or 'no inputs'}"):
            self.run(feeds)

    def device_peak_bytes(self) -> int | None:
        """None: ONNX Runtime does not say."""
        return None


def start_runtime() -> None:
    """Open and drop a one-node model, so that no measured model pays for starting ONNX Runtime (3 ms, 10 MB)."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "start", [x], [y])
    # The oldest versions that will do: onnx may be newer than the onnxruntime beside it.
    model = helper.make_model(graph, ir_version=7, opset_imports=[helper.make_opsetid("", 13)])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.zeros(1, np.float32)})


def open_model(path: str | Path, *, provider: str, level: str, threads: int) -> OpenModel:
    """Load ``path`` into a session with ``threads`` threads inside an operator and one operator at a time.

    Raises:
        InputError: the file is missing or no ONNX file, onnxruntime refuses it, ``level`` is unknown, or ``provider``
            is not available or does not start.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'a folder, not an ONNX file' if path.is_dir() else 'no such file'}")
    if level not in LEVELS:
        raise InputError(f"unknown optimisation level {level!r}; known: {', '.join(LEVELS)}")
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise InputError(f"provider {provider!r} is not available here; available: {', '.join(available)}")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, LEVELS[level])
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that spin after one model's run would take the processor from the next model's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Errors reach the user as one sentence, not also as a log.
    options.log_severity_level = 4
    with _blame(path, "onnxruntime cannot load the model"):
        start = time.perf_counter()
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
        load_ms = (time.perf_counter() - start) * 1e3
    if session.get_providers()[0] != provider:
        # onnxruntime falls back to the CPU without an exception when a provider's libraries do not load.
        raise InputError(f"{path}: provider {provider!r} is listed but did not start; {session.get_providers()[0]} did")
    inputs = tuple(InputSpec(i.name, i.type, tuple(i.shape)) for i in session.get_inputs())
    return OpenModel(path, session, inputs, load_ms)


@contextmanager
def _blame(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except _ORT_ERRORS as error:
        text = " ".join(str(error).split())
        if "INVALID_PROTOBUF" in text or "No graph was found" in text:
            if path.suffix != ".onnx":
                raise InputError(
                    f"{path} is not an ONNX file; give one (`compress export MODEL` writes it), or a folder that "
                    "`compress quantize` has written"
                ) from error
            what = "not an ONNX file, or a damaged one"
        raise InputError(f"{path}: {what}: {text}") from error


def dim_names(inputs: Sequence[InputSpec]) -> set[str]:
    """Return every name that ``dims`` may give a value to: each dynamic dimension's own and its "input:axis"."""
    names = set()
    for spec in inputs:
        for axis, size in enumerate(spec.shape):
            if not isinstance(size, int):
                names |= {f"{spec.name}:{axis}", *([size] if size else [])}
    return names


def resolve_shapes(
    path: Path, inputs: Sequence[InputSpec], *, batch: int, dims: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Return each input's shape, every dynamic dimension filled in.

    ``dims`` maps a dimension's name, or "input:axis", to its size. A dynamic first dimension that ``dims`` does not
    give is the batch, unless its name is also that of a later dimension (a sequence length).

    Raises:
        InputError: a dimension has no value, or the model's batch is fixed and differs from ``batch``.
    """
    leading = [(spec, spec.shape[0]) for spec in inputs if spec.shape]
    inner = {size for spec in inputs for size in spec.shape[1:]}
    dynamic = [(spec, size) for spec, size in leading if not isinstance(size, int)]
    free = [size for spec, size in dynamic if _given(dims, spec, 0) is None]
    if dynamic and not free:
        spec, value = dynamic[0][0], _given(dims, dynamic[0][0], 0)
        if value != batch:
            raise InputError(
                f"{path}: the first dimension of input {spec.name!r} is the batch: --dim gives it {value}, the batch "
                f"asked for is {batch}; give --batch {value} instead"
            )
    if leading and not dynamic and leading[0][1] != batch:
        spec, size = leading[0]
        raise InputError(
            f"{path}: input {spec.name!r} has a fixed batch of {size}, {batch} was asked for; give --batch {size}, "
            "or export the model with a dynamic batch"
        )
    # The batch's name may come again further back (a mask, a cache); a name seen only there is no batch.
    batch_name = next((size for size in free if size not in inner), free[0] if free else None)

    def fill(spec: InputSpec, axis: int) -> int:
        size = spec.shape[axis]
        if isinstance(size, int):
            return size
        value = _given(dims, spec, axis)
        if value is not None:
            return value
        if (size and size == batch_name) or (axis == 0 and (not size or size not in inner)):
            return batch
        key = size or f"{spec.name}:{axis}"
        raise InputError(
            f"{path}: dimension {axis} of input {spec.name!r} is dynamic ({key}) and has no value: "
            f"give --dim {key}=VALUE"
        )

    return {spec.name: tuple(fill(spec, axis) for axis in range(len(spec.shape))) for spec in inputs}


def _given(dims: Mapping[str, int], spec: InputSpec, axis: int) -> int | None:
    """What ``dims`` says of one dimension; "input:axis" is nearer than a name that several may share."""
    size = spec.shape[axis]
    value = dims.get(f"{spec.name}:{axis}")
    return dims.get(size) if value is None and isinstance(size, str) else value


def make_inputs(
    path: Path, inputs: Sequence[InputSpec], shapes: Mapping[str, tuple[int, ...]], *, seed: int
) -> dict[str, NDArray[Any]]:
    """Return an array per input: floats from a standard normal, integers and booleans 0 or 1.

    0 and 1 are valid token ids, segment ids and masks in every model. Two models with the same inputs get the same
    values, as these depend only on ``seed``, the input's position, type and shape.

    Raises:
        InputError: an input is no tensor, or of a type that numpy does not have.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for position, spec in enumerate(inputs):
        rng = np.random.default_rng([seed, position])
        element = spec.type.removeprefix("tensor(").removesuffix(")")
        shape = shapes[spec.name]
        if element in _FLOATS:
            # asarray: for a shape of no dimensions numpy returns a bare number.
            arrays[spec.name] = np.asarray(rng.standard_normal(shape), dtype=_FLOATS[element])
        elif element in _INTEGERS or element == "bool":
            arrays[spec.name] = np.asarray(rng.integers(0, 2, shape), dtype=_INTEGERS.get(element, np.dtype(bool)))
        else:
            known = ", ".join([*_FLOATS, *_INTEGERS, "bool"])
            raise InputError(
                f"{path}: input {spec.name!r} is a {spec.type}, for which no values are made; made: {known}"
            )
    return arrays
