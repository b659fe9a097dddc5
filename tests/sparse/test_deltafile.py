"""delta.safetensors: round trips, sizes, golden bytes, places beyond 2^31, and files that are refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from compress.errors import InputError
from compress.sparse.delta import SparseDelta, SparseTensor
from compress.sparse.deltafile import content_digest, read_delta, read_undo, write_delta
from compress.sparse.gaps import decode, encode


def entries(shape: tuple[int, ...], density: float, seed: int = 0) -> SparseTensor:
    chosen = np.flatnonzero(np.random.default_rng(seed).random(math.prod(shape)) < density)
    values = torch.randn(len(chosen), generator=torch.Generator().manual_seed(seed)) * 1e-3
    return SparseTensor(shape, "float32", torch.from_numpy(chosen), values)


def delta(**tensors: SparseTensor) -> SparseDelta:
    return SparseDelta("0" * 64, tensors, {"head.bias": torch.tensor([1.0, -2.0])}, {"criterion": "change"})


SHAPES: dict[str, tuple[tuple[int, ...], float]] = {
    "one": ((1,), 1.0), "none of one": ((1,), 0.0), "matrix": ((7, 5), 0.4), "cube": ((3, 4, 5), 0.1),
    "empty": ((0, 4), 1.0), "all": ((9, 9), 1.0), "sparse": ((300, 1000), 0.0005), "half": ((100, 100), 0.5),
    "number": ((), 1.0),
}  # fmt: skip


@pytest.mark.parametrize("form", ["fp64", "fp32", "fp16", "bf16", "int8"])
def test_round_trip(form: str, tmp_path: Path) -> None:
    given = delta(**{name: entries(*each) for name, each in SHAPES.items()})
    found = read_delta(write_delta(given, tmp_path / "deep" / "delta.safetensors", form))
    assert [each.name for each in (tmp_path / "deep").iterdir()] == ["delta.safetensors"]
    assert (found.base, found.k, found.notes) == (given.base, given.k, given.notes)
    assert torch.equal(found.dense["head.bias"], given.dense["head.bias"])
    for name, each in given.tensors.items():
        again = found.tensors[name]
        assert (again.shape, again.dtype) == (each.shape, each.dtype)
        assert torch.equal(again.index, each.index)
        most = float(each.values.abs().max()) if len(each.values) else 0.0
        allowed = {"fp64": 0, "fp32": 0, "fp16": 2**-11, "bf16": 2**-8, "int8": 0}[form] * each.values.abs()
        assert ((again.values - each.values).abs() <= allowed + (most / 253 if form == "int8" else 0)).all(), name


def test_half_precision_has_room_for_large_and_small_numbers(tmp_path: Path) -> None:
    for size in (1e-9, 1e6):
        values = torch.tensor([1.0, 1e-3, 0.0, -3.0]) * size
        given = delta(a=SparseTensor((9,), "float32", torch.tensor([0, 3, 4, 8]), values))
        found = read_delta(write_delta(given, tmp_path / "d.safetensors")).tensors["a"].values
        torch.testing.assert_close(found, values, rtol=2**-11, atol=0)


def test_bytes_an_entry(tmp_path: Path) -> None:
    for density, most in ((0.05, 3.05), (0.005, 3.6)):
        given = SparseDelta("0" * 64, {"a": entries((4000, 1000), density)})
        for form, less in (("fp16", 0), ("int8", 1)):
            path = write_delta(given, tmp_path / "d.safetensors", form)
            assert path.stat().st_size / given.k <= most - less + 600 / given.k, (density, form)  # 600: the header


@pytest.mark.parametrize("density", [0.0, 1e-5, 1e-3, 0.004, 0.05, 0.2, 0.9, 1.0])
def test_the_smallest_coding(density: float) -> None:
    size = 100_003
    index = np.flatnonzero(np.random.default_rng(1).random(size) < density)
    coding, data = encode(index, size)
    assert np.array_equal(decode(coding, data, len(index), size), index)
    wanted = {0.0: "gap8", 1e-3: "gap16", 0.004: "gap8", 0.05: "gap8", 0.2: "bitmap", 0.9: "bitmap", 1.0: "all"}
    assert coding == wanted.get(density, coding)
    assert len(data) <= -(-size // 8)


def test_golden_bytes() -> None:
    """The format is a promise: other programs read it."""
    for index, size, coding, data in (
        ([0, 1, 256, 512, 1023], 2000, "gap8", [0, 0, 254, 255, 0, 255, 255, 0]),
        ([65535, 140000], 10**6, "gap16", [255, 255, 0, 0, 255, 255, 225, 34]),
        ([0, 2, 3, 9], 10, "bitmap", [0b1101, 0b10]),
        ([0, 1, 2], 3, "all", []),
    ):
        found = encode(np.array(index), size)
        assert (found[0], found[1].tolist()) == (coding, data)
        assert decode(coding, np.array(data, np.uint8), len(index), size).tolist() == index


def test_places_beyond_31_bits(tmp_path: Path) -> None:
    """Of tensors too large to be here: 70,000 x 70,000."""
    index = torch.tensor([0, 2**31 - 1, 2**31, 2**32 + 7, 70_000**2 - 1])
    given = delta(a=SparseTensor((70_000, 70_000), "float32", index, torch.arange(5.0)))
    path = write_delta(given, tmp_path / "d.safetensors")
    assert path.stat().st_size < 200_000
    assert torch.equal(read_delta(path).tensors["a"].index, index)


Change = Callable[[dict[str, torch.Tensor], dict[str, object]], None]


def rewritten(path: Path, change: Change) -> None:
    """What a wrong writer would make: the file changed, its hash right."""
    tensors = load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["compress.delta"].partition(" ")[2])
    change(tensors, header)
    text = json.dumps(header)
    save_file(tensors, path, {"compress.delta": f"{content_digest(text, tensors)} {text}"})


def _set(key: str, value: object) -> Change:
    return lambda tensors, header: header.__setitem__(key, value)


def _table(key: str, value: object) -> Change:
    return lambda tensors, header: header["tensors"]["a"].__setitem__(key, value)  # type: ignore[index]


def _without(key: str) -> Change:
    return lambda tensors, header: tensors.__delitem__(key)


def _tensor(key: str, value: torch.Tensor) -> Change:
    return lambda tensors, header: tensors.__setitem__(key, value)


WRONG: dict[str, tuple[Change, str]] = {
    "version": (_set("version", 2), "has version 2; this program reads 1"),
    "kind": (_set("kind", "undo"), "takes deltas out of a model again, with `compress sparse revert`; give a delta"),
    "k": (_set("k", 7), "has 4 entries and says 7"),
    "header": (_set("tensors", 3), "its header cannot be read"),
    "count": (_table("count", 3), "a: 4 numbers for 3 entries"),
    "coding": (_table("coding", "zip"), "a: coding 'zip': known are all, gap8"),
    "size": (_table("shape", [3, 3]), "a: its indices are damaged: an index is beyond the tensor's 9 entries"),
    "shape": (_table("shape", [-3, -4]), "a: shape .* cannot be"),
    "scale": (_table("scale", 0.0), "a: shape .* and scale 0 cannot be"),
    "cut": (_tensor("index/a", torch.tensor([1, 255], dtype=torch.uint8)), "damaged: not 4 gaps"),
    "open": (_tensor("index/a", torch.tensor([1, 1, 1, 1, 255], dtype=torch.uint8)), "the last gap is cut off"),
    "dtype": (_tensor("index/a", torch.zeros(4)), "a: bytes and numbers in fp16 are needed"),
    "infinite": (_tensor("values/a", torch.tensor([1, 2, math.inf, 3], dtype=torch.float16)), "a number is not finite"),
    "head": (_tensor("dense/head.bias", torch.tensor([math.nan])), "dense/head.bias holds numbers that are not finite"),
    "stray": (_tensor("more/a", torch.zeros(1)), "more/a is in no table"),
    "missing": (_without("values/a"), "a: 'values/a'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_of_a_wrong_writer(case: str, tmp_path: Path) -> None:
    change, sentence = WRONG[case]
    path = write_delta(delta(a=SparseTensor((6, 20), "float32", torch.tensor([1, 3, 60, 99]), torch.ones(4))),
                       tmp_path / "d.safetensors")  # fmt: skip
    rewritten(path, change)
    with pytest.raises(InputError, match=sentence):
        read_delta(path)


def test_every_changed_byte_and_every_cut_is_found(tmp_path: Path) -> None:
    path = write_delta(delta(a=entries((20, 20), 0.1)), tmp_path / "d.safetensors")
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(InputError, match=r"d\.safetensors"):
            read_delta(path)
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"d\.safetensors is truncated"):
            read_delta(path)


def test_what_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    good = entries((20, 20), 0.1)
    for value, form, sentence in (
        (math.nan, "fp16", "a has a difference that is not finite"),
        (1e300, "bf16", r"a has a difference of 1e\+300, too large for bf16; use fp64"),
        (1.0, "int4", "values 'int4': known are fp64, fp32, fp16, bf16, int8"),
    ):
        values = good.values.double()
        values[3] = value
        with pytest.raises(InputError, match=sentence):
            write_delta(delta(a=SparseTensor(good.shape, "float32", good.index, values)), path, form)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="There is no file"):
        read_delta(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(
        InputError, match=r"is a safetensors file but no delta.*layers are listed by `compress inspect`"
    ):
        read_delta(path)
    write_delta(delta(a=good), path)
    with pytest.raises(InputError, match=r"is a delta; give the \.undo\.safetensors that"):
        read_undo(path)
