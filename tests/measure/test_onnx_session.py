"""Which shapes and values a model is given; opening and memory are in test_bench.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compress.errors import InputError
from compress.measure.onnx_session import InputSpec, make_inputs, resolve_shapes
from tests.every import every


def test_inputs_are_seeded_and_of_the_declared_types() -> None:
    kinds = ["float", "float16", "double", "int8", "uint8", "int32", "int64", "bool"]
    specs = [InputSpec(kind, f"tensor({kind})", ()) for kind in kinds] + [InputSpec("x", "tensor(float)", ("n", 64))]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(kinds, ()) | {"x": (2, 64)}
    first, again, other = (make_inputs(Path("m"), specs, shapes, seed=seed) for seed in (1, 1, 2))
    names = ["float32", "float16", "float64", "int8", "uint8", "int32", "int64", "bool", "float32"]
    assert [array.dtype.name for array in first.values()] == names
    assert every(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["x"], other["x"])
    assert first["x"].shape == (2, 64)
    assert first["int64"].item() in (0, 1)


def spec(name: str, *shape: int | str | None) -> InputSpec:
    return InputSpec(name, "tensor(float)", shape)


@pytest.mark.parametrize(
    ("inputs", "dims", "shapes"),
    [
        ([spec("x", "n", 3)], {}, {"x": (2, 3)}),
        ([spec("x", None, None)], {"x:1": 5}, {"x": (2, 5)}),
        ([spec("x", "n", "t"), spec("mask", "n", "n", "t")], {"t": 5}, {"x": (2, 5), "mask": (2, 2, 5)}),
        ([spec("at", "t"), spec("x", "n", "t")], {"t": 5}, {"at": (5,), "x": (2, 5)}),
        (
            [spec("x", "n", 4), spec("z", "m", 4), spec("s"), spec("w", 7)],
            {},
            {"x": (2, 4), "z": (2, 4), "s": (), "w": (7,)},
        ),
        ([spec("x", "n", "t"), spec("z", "n", "t")], {"t": 5, "z:1": 9}, {"x": (2, 5), "z": (2, 9)}),
        ([spec("x", "n", 4)], {"n": 2}, {"x": (2, 4)}),
        ([spec("x", 2, 4)], {}, {"x": (2, 4)}),
        ([], {}, {}),
    ],
    ids=["batch", "unnamed", "batch again", "length first", "others", "one input", "agrees", "fixed", "none"],
)
def test_shapes_at_batch_2(inputs: list[InputSpec], dims: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
    assert resolve_shapes(Path("m.onnx"), inputs, batch=2, dims=dims) == shapes


@pytest.mark.parametrize(
    ("inputs", "dims", "message"),
    [
        ([spec("x", "n", "t")], {}, r"m\.onnx: dimension 1 of input 'x' is dynamic \(t\) .*: give --dim t=VALUE"),
        ([spec("x", "n", None)], {}, r"give --dim x:1=VALUE"),
        ([spec("at", "t"), spec("x", "n", "t")], {}, r"dimension 0 of input 'at' .* give --dim t=VALUE"),
        ([spec("x", 4, 3)], {}, r"m\.onnx: input 'x' has a fixed batch of 4, 2 was asked for; give --batch 4"),
        ([spec("x", "n", 3)], {"n": 8}, r"first dimension of input 'x' is the batch: .*; give --batch 8 instead"),
    ],
    ids=["named", "unnamed", "length first", "fixed batch", "batch as dim"],
)
def test_shapes_that_cannot_be_told(inputs: list[InputSpec], dims: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_shapes(Path("m.onnx"), inputs, batch=2, dims=dims)
