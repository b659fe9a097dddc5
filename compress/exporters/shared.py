"""ONNX files of several tasks on one base: the base's tensors in one file, what a task changes in another.

A task's file is the base's graph, and its tensors lie outside it (ONNX's external data), in two files of its folder:

- the shared one has the base's tensors, in the order of the base's graph, each at a multiple of 64 bytes, of 4,096
  where it has a megabyte and more, so that it can be mapped;
- ``<task>.onnx.data`` has what the task changes: tensors whole, or the places and values of entries.

A tensor W of which few entries differ is the base's, changed as a session is made, by operators that ONNX Runtime
folds (opset 18): ``Reshape(ScatterElements(Reshape(W, [-1]), CumSum(Cast(gaps)) - 1, values), shape)``. Gaps are the
distances between places, the first from -1, in the narrowest of uint8, uint16 and uint32; values are the tensor's own,
not differences, so that the numbers are those of a merged file to the bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from compress.errors import InputError
from compress.files.outputs import new_file

__all__ = ["Shares", "check_name", "write_shared"]

_LEAST = 1024  # smaller tensors stay in the graph
_PAGE, _ALIGNED = 4096, 64
_MAPPED = 1 << 20
_INT64, _AXIS, _ONE, _FLAT = "compress.int64", "compress.axis", "compress.one", "compress.flat"


@dataclass(frozen=True)
class Shares:
    """Bytes of a file that :func:`write_shared` has written: shared with others, and its own, graph included."""

    shared_bytes: int
    own_bytes: int


@dataclass(frozen=True)
class _Slot:
    tensor: ir.TensorProtocol
    offset: int


def check_name(shared: str, path: Path) -> None:
    """Refuse what cannot be the name of a file beside ``path``.

    Raises:
        InputError: it is no name, or that of a file of ``path``'s own.
    """
    if not shared or Path(shared).name != shared or shared in (path.name, f"{path.name}.data"):
        raise InputError(f"--share {shared}: the name of a file beside {path.name} is needed, other than its own")


def write_shared(model: ir.Model, base: ir.Model, path: Path, shared: str) -> Shares:
    """Write ``model`` to ``path`` with tensors that it has in common with ``base`` in the file ``shared`` beside it.

    Args:
        model: edited.
        shared: a file's name; written if it is not there.

    Raises:
        InputError: see :func:`check_name`; or a file of that name holds something else than the base's tensors.
    """
    check_name(shared, path)
    slots = _lay_out(base)
    _write_base(slots, path.with_name(shared))
    data = path.with_name(f"{path.name}.data")
    used, first = 0, next(iter(model.graph))
    with open(data, "wb") as own:
        for name, value in list(model.graph.initializers.items()):
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes < _LEAST:
                continue
            slot = _twin(name, tensor, slots)
            places = _differences(tensor, slot.tensor) if slot is not None else None
            if slot is None or places is None:
                value.const_value = _outside(own, tensor, data.name)
                continue
            used += tensor.nbytes
            entries = tensor.numpy().reshape(-1)[places]
            value.const_value = ir.ExternalTensor(
                shared, slot.offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name,
                base_dir=path.parent,
            )  # fmt: skip
            if len(places):
                _change(model.graph, value, places, entries, own, data.name, first)
        own.flush()
        os.fsync(own.fileno())
    ir.save(model, path)
    if not data.stat().st_size:
        data.unlink()
    return Shares(used, path.stat().st_size + (data.stat().st_size if data.exists() else 0))


def _lay_out(base: ir.Model) -> dict[str, _Slot]:
    slots, end = dict[str, _Slot](), 0
    for name, value in base.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes >= _LEAST:
            step = _PAGE if tensor.nbytes >= _MAPPED else _ALIGNED
            offset = -(-end // step) * step
            slots[name] = _Slot(tensor, offset)
            end = offset + tensor.nbytes
    return slots


def _write_base(slots: Mapping[str, _Slot], path: Path) -> None:
    """Write the shared file, or see that it is the one that would be written."""
    if path.exists():
        with open(path, "rb") as file:
            same = all(file.read(len(part)) == part for part in _parts(slots)) and not file.read(1)
        if not same:
            raise InputError(
                f"--share {path.name}: a file of that name is there already and holds something else than this base's "
                "tensors; choose another name, or another folder"
            )
        return
    with new_file(path) as temporary, open(temporary, "wb") as file:
        for part in _parts(slots):
            file.write(part)


def _parts(slots: Mapping[str, _Slot]) -> Iterator[bytes]:
    """The shared file's bytes, a tensor or a gap at a time."""
    end = 0
    for slot in slots.values():
        yield bytes(slot.offset - end)
        yield slot.tensor.tobytes()
        end = slot.offset + slot.tensor.nbytes


def _twin(name: str, tensor: ir.TensorProtocol, slots: Mapping[str, _Slot]) -> _Slot | None:
    """The base's tensor of that name; a model that has gained a head calls it by a longer one (``bert.`` before it)."""
    names = [name, *(each for each in slots if name.endswith(f".{each}"))]
    found = [slots[each] for each in names if each in slots]
    fitting = [s for s in found if s.tensor.dtype == tensor.dtype and list(s.tensor.shape) == list(tensor.shape)]
    return fitting[0] if fitting else None


def _differences(tensor: ir.TensorProtocol, base: ir.TensorProtocol) -> NDArray[np.int64] | None:
    """Flat places whose bits differ; None where storing them takes more than half of the tensor."""
    now, before = (np.ascontiguousarray(each.numpy()).reshape(-1) for each in (tensor, base))
    bits = np.dtype(f"u{now.dtype.itemsize}")
    places = np.flatnonzero(now.view(bits) != before.view(bits))
    if not len(places):
        return places
    gaps = _gaps(places)
    small = len(places) * (gaps.itemsize + now.itemsize) <= tensor.nbytes // 2
    return places if small and tensor.dtype == ir.DataType.FLOAT else None


def _gaps(places: NDArray[np.int64]) -> NDArray[Any]:
    gaps = np.diff(places, prepend=np.int64(-1))
    return gaps.astype(np.min_scalar_type(int(gaps.max())))


def _change(
    graph: ir.Graph,
    value: ir.Value,
    places: NDArray[np.int64],
    entries: NDArray[Any],
    own: Any,
    location: str,
    first: ir.Node,
) -> None:
    """Have the readers of ``value`` read it with ``entries`` at ``places``."""
    assert value.shape is not None
    uses = list(value.uses())
    name, shape = str(value.name), np.array(value.shape.numpy(), np.int64)
    gaps, values = (
        _initializer(graph, _outside(own, ir.tensor(array, name=f"{name}.{part}"), location))
        for part, array in (("gaps", _gaps(places)), ("entries", entries))
    )
    axis, one, flat = (
        _constant(graph, label, number)
        for label, number in ((_AXIS, np.int64(0)), (_ONE, np.int64(1)), (_FLAT, np.array([-1], np.int64)))
    )
    whole = _initializer(graph, ir.tensor(shape, name=f"{name}.shape"))
    nodes = list[ir.Node]()

    def call(operator: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        node = ir.node(operator, inputs, attributes)
        node.outputs[0].name = f"{name}.{operator.lower()}{len(nodes)}"
        nodes.append(node)
        return node.outputs[0]

    wide = call("Cast", [gaps], to=ir.DataType.INT64)
    index = call("Sub", [call("CumSum", [wide, axis]), one])
    changed = call("ScatterElements", [call("Reshape", [value, flat]), index, values], axis=0)
    result = call("Reshape", [changed, whole])
    result.dtype, result.shape = value.dtype, value.shape
    graph.insert_before(first, nodes)
    for use in uses:
        use.node.replace_input_with(use.idx, result)


def _initializer(graph: ir.Graph, tensor: Any) -> ir.Value:
    value = ir.Value(
        name=tensor.name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _constant(graph: ir.Graph, name: str, number: Any) -> ir.Value:
    if name in graph.initializers:
        return graph.initializers[name]
    return _initializer(graph, ir.tensor(np.asarray(number), name=name))


def _outside(own: Any, tensor: ir.TensorProtocol, location: str) -> ir.ExternalTensor:
    """Append ``tensor``'s bytes to the task's file."""
    own.write(bytes(-own.tell() % (_PAGE if tensor.nbytes >= _MAPPED else _ALIGNED)))
    offset = own.tell()
    own.write(tensor.tobytes())
    return ir.ExternalTensor(
        location, offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=str(tensor.name),
        base_dir=Path(own.name).parent,
    )  # fmt: skip
