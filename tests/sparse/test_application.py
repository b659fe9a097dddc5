"""Deltas added and taken out: order makes no difference, the base comes back to the bit, and strangers are refused."""

from __future__ import annotations

import copy
import itertools
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress.errors import InputError
from compress.sparse.application import apply_deltas, revert
from compress.sparse.base import base_hash, base_tensors, tensor_hashes
from compress.sparse.delta import SparseDelta, SparseTensor, put, sum_deltas
from compress.sparse.deltafile import read_undo, write_undo
from compress.sparse.reference import read_reference, write_reference


def net() -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    return nn.Sequential(conv, nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5))


def random_delta(module: nn.Module, seed: int, density: float = 0.3, head: bool = False) -> SparseDelta:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, each in module.named_parameters():
        index = (torch.rand(each.numel(), generator=generator) < density).nonzero()[:, 0]
        values = torch.randn(len(index), generator=generator) * 10.0 ** torch.randint(-6, 3, (len(index),))
        tensors[name] = SparseTensor(tuple(each.shape), "float32", index, values)
    dense = {"3.bias": torch.full((5,), float(seed))} if head else {}
    if head:
        del tensors["3.bias"]
    return SparseDelta(base_hash(tensor_hashes(base_tensors(module)), dense), tensors, dense, {}, tuple(dense))


def bits(module: nn.Module) -> list[Tensor]:
    return [each.detach().contiguous().reshape(-1).view(torch.uint8).clone() for each in module.state_dict().values()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_order_makes_no_difference_and_the_base_comes_back(count: int) -> None:
    base = net()
    deltas = {str(seed): random_delta(base, seed) for seed in range(count)}
    weights = {str(seed): 0.7 - 0.6 * seed for seed in range(count)}
    results = []
    for order in itertools.permutations(deltas):
        module = copy.deepcopy(base)
        done = apply_deltas(module, {name: deltas[name] for name in order}, [weights[name] for name in order])
        results.append(bits(module))
        assert equal(results[0], results[-1])
        revert(module, done.before)
        assert equal(bits(base), bits(module))
    dense = {name: each.detach().double().clone() for name, each in base.named_parameters()}
    for name, delta in deltas.items():
        for key, each in delta.tensors.items():
            flat = torch.zeros(each.size, dtype=torch.float64)
            put(flat, each.index, each.values.double())
            dense[key] += weights[name] * flat.view(each.shape)
    module = copy.deepcopy(base)
    apply_deltas(module, deltas, list(weights.values()))
    for name, each in module.named_parameters():
        torch.testing.assert_close(each.detach(), dense[name].float(), rtol=2**-23, atol=1e-30)


def test_the_overlap_is_counted() -> None:
    a, b = (
        SparseDelta(None, {"3.weight": SparseTensor((5, 12), "float32", torch.tensor(index), torch.ones(len(index)))})
        for index in ([1, 5, 7, 30], [5, 30, 59])
    )
    done = apply_deltas(net(), {"a": a, "b": b})
    assert (done.overlap.entries, done.overlap.share) == (2, 2 / 3)
    assert sum_deltas([a, b], [1, 2])["3.weight"].values.tolist() == [1, 3, 1, 3, 2]
    assert done.overlap.warning()[0].startswith("2 entries are in more than one delta, 66.7 % of the smallest one's")
    assert done.overlap.warning(0.7) == ()
    assert apply_deltas(net(), {"a": a}).overlap.entries == 0


def test_the_head_is_replaced_and_chosen() -> None:
    base = net()
    deltas = {str(seed): random_delta(base, seed, head=True) for seed in (3, 4)}
    with pytest.raises(InputError, match=r"3 and 4 all replace a head; say whose .* --head 3, or .* --no-heads"):
        apply_deltas(base, deltas)
    module = copy.deepcopy(base)
    done = apply_deltas(module, deltas, head="4")
    assert module[3].bias.tolist() == [4.0] * 5
    revert(module, done.before)
    assert equal(bits(base), bits(module))
    apply_deltas(module, deltas, heads=False)
    assert torch.equal(module[3].bias, base[3].bias)
    module = copy.deepcopy(base)
    with torch.no_grad():
        module[3].bias.fill_(9)  # another head on the same base
    apply_deltas(module, {"3": deltas["3"]})
    with pytest.raises(InputError, match="--head 5: no such delta is given; there are 3, 4"):
        apply_deltas(base, deltas, head="5")


def _damaged(**changes: Any) -> SparseDelta:
    base = net()
    good = random_delta(base, 0)
    parts = vars(good.tensors["3.weight"]) | changes
    return SparseDelta(None, good.tensors | {"3.weight": SparseTensor(**parts)})


REFUSED = {
    "name": (lambda: SparseDelta(None, {"x": SparseTensor((1,), "float32", torch.tensor([0]), torch.ones(1))}),
             "d: the model has no x; the delta is for another architecture"),
    "shape": (lambda: _damaged(shape=(12, 5)), r"d: 3\.weight has shape \[12, 5\] there and \[5, 12\] in the model"),
    "index": (lambda: _damaged(index=torch.tensor([60]), values=torch.ones(1)), "indices beyond its 60 entries"),
    "infinite": (lambda: _damaged(index=torch.tensor([1]), values=torch.tensor([math.nan])), "is not finite"),
    "sum": (lambda: _damaged(index=torch.tensor([1]), values=torch.tensor([1e39], dtype=torch.float64)),
            r"3\.weight would not be finite with the deltas"),
    "head": (lambda: SparseDelta(None, {}, {"3.bias": torch.ones(4)}), "its head 3.bias has 4 outputs, the model's 5"),
    "dense": (lambda: SparseDelta(None, {}, {"3.weight": torch.ones(5, 9)}), r"has shape \[5, 9\] there and \[5, 12\]"),
    "whole numbers": (
        lambda: SparseDelta(
            None, {"1.num_batches_tracked": SparseTensor((), "int64", torch.tensor([0]), torch.ones(1))}
        ),
        "deltas are added to floats",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_the_base_untouched(case: str) -> None:
    make, sentence = REFUSED[case]
    base = net()
    before = bits(base)
    for any_base in (False, True):
        with pytest.raises(InputError, match=sentence):
            apply_deltas(base, {"good": random_delta(net(), 1), "d": make()}, any_base=any_base)
        assert equal(before, bits(base))


def test_another_base_is_refused_unless_told() -> None:
    base = net()
    delta = random_delta(base, 0)
    with torch.no_grad():
        base[1].running_mean[0] += 1e-3  # type: ignore[index]
    before = bits(base)
    with pytest.raises(
        InputError, match=r"d is for another base: its hash is \w{12}, the model's \w{12};.* --any-base"
    ):
        apply_deltas(base, {"d": delta})
    assert equal(before, bits(base))
    apply_deltas(base, {"d": delta}, any_base=True)
    assert not equal(before, bits(base))
    with pytest.raises(InputError, match="2 weights for 1 delta;"):
        apply_deltas(base, {"d": delta}, [1, 2], any_base=True)
    with pytest.raises(InputError, match="all must be finite"):
        apply_deltas(base, {"d": delta}, [math.inf], any_base=True)


def test_half_precision_holds_the_same_base_and_comes_back() -> None:
    half = net().to(torch.bfloat16)
    single = copy.deepcopy(half).float()
    assert base_hash(tensor_hashes(base_tensors(half))) == base_hash(tensor_hashes(base_tensors(single)))
    before = bits(half)
    done = apply_deltas(half, {"d": random_delta(single, 0)})
    assert not equal(before, bits(half))
    revert(half, done.before)
    assert equal(before, bits(half))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_undo_file_holds_every_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    base = net().to(dtype)
    module = copy.deepcopy(base)
    done = apply_deltas(module, {"d": random_delta(base, 3, head=True)})
    undo = read_undo(write_undo(done.undo(module), tmp_path / "m.undo.safetensors"))
    assert undo.model == base_hash(tensor_hashes(base_tensors(module)))
    assert undo.base == base_hash(tensor_hashes(base_tensors(base)))
    revert(module, undo.before)
    assert equal(bits(base), bits(module))


def test_the_published_form(tmp_path: Path) -> None:
    base = net()
    given = random_delta(base, 3, head=True)
    found = read_reference(write_reference(given, tmp_path / "pytorch_diff.bin").parent)
    assert found.base is None
    for name, each in given.tensors.items():
        assert torch.equal(found.tensors[name].index, each.index)
        assert torch.equal(found.tensors[name].values, each.values)
    assert torch.equal(found.dense["3.bias"], given.dense["3.bias"])
    # Written out: index 5 of a 2 x 3 matrix, the first dimension fastest, is row 1, column 2.
    torch.save({"diffs": {"w": {"size": [2, 3], "index_steps": [1, 1, 3], "values": torch.tensor([1.0, 2.0, 3.0])}}},
               tmp_path / "a.bin")  # fmt: skip
    w = read_reference(tmp_path / "a.bin").tensors["w"]
    assert (w.index.tolist(), w.values.tolist()) == ([1, 3, 5], [2.0, 1.0, 3.0])
    # The published reader adds up in 32 bits.
    large = {"size": [70_000, 70_000], "index_steps": [2**31 + 1, 2**32 - 2**31], "values": torch.ones(2)}
    torch.save({"diffs": {"w": large}}, tmp_path / "large.bin")
    w = read_reference(tmp_path / "large.bin").tensors["w"]
    assert w.index.tolist() == sorted(at % 70_000 * 70_000 + at // 70_000 for at in (2**31 + 1, 2**32 + 1))
    dense = torch.zeros(2, 3)
    dense[1, 0], dense[0, 2] = 4.0, 5.0
    torch.save({"body": {"w": dense.to_sparse()}, "head": {"b": torch.ones(2)}}, tmp_path / "b.bin")
    old = read_reference(tmp_path / "b.bin")
    assert (old.tensors["w"].index.tolist(), old.tensors["w"].values.tolist()) == ([2, 3], [5.0, 4.0])
    for content, sentence in (
        ({"x": {}}, "is no delta of the published code"),
        ({"diffs": {"w": {"size": [2], "index_steps": [3], "values": torch.ones(1)}}}, "w is damaged .* 0 to 1"),
        ({"diffs": {"w": {"size": [2], "index_steps": [0], "values": torch.ones(2)}}}, "2 values for 1 indices"),
        ({"diffs": {"w": {"size": [2], "index_steps": [0], "values": torch.tensor([math.inf])}}}, "not finite"),
        ({"diffs": {"w": {"size": [2]}}}, "w is damaged"),
    ):
        torch.save(content, tmp_path / "c.bin")
        with pytest.raises(InputError, match=sentence):
            read_reference(tmp_path / "c.bin")
    with pytest.raises(InputError, match="There is no file"):
        read_reference(tmp_path / "none.bin")


def published(folder: Path, name: str, content: dict[str, Any]) -> Path:
    torch.save(content, folder / name)
    return folder / name


def published_steps(index: list[int]) -> list[Any]:
    """As the published writer has them: numpy's integer first, then Python's."""
    steps = np.diff(np.array(index, np.int64), prepend=0)
    return [steps[0], *steps[1:].tolist()]


def published_coordinates(steps: list[Any], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """By hand: the first dimension fastest."""
    found, at = [], 0
    for step in steps:
        at += int(step)
        rest, place = at, []
        for size in shape:
            place.append(rest % size)
            rest //= size
        found.append(tuple(place))
    return found


@pytest.mark.parametrize("numpy_name", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_a_file_as_the_published_writer_leaves_it(numpy_name: bytes, tmp_path: Path) -> None:
    """Its first step is numpy's integer, pickled as a call under numpy's name before or since version 2."""
    shape, index = (3, 4, 5), [7, 8, 19, 58]
    values = torch.tensor([1.0, -2.0, 3.0, 4.0])
    diff = {"size": torch.Size(shape), "index_steps": published_steps(index), "values": values}
    empty = {"size": torch.Size([4]), "index_steps": [], "values": torch.empty(0)}
    content = {"diffs": {"w": diff, "e": empty}, "abs": {"b": nn.Parameter(torch.ones(2))}}
    path = published(tmp_path, "a.bin", content)
    other = tmp_path / "pytorch_diff.bin"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w") as new:
        for each in old.namelist():  # zip files of torch are not compressed, and their pickles name what they call
            new.writestr(each, re.sub(rb"numpy\._?core\.multiarray", numpy_name, old.read(each)))
    found = read_reference(tmp_path)
    dense = torch.zeros(shape)
    for place, value in zip(published_coordinates(diff["index_steps"], shape), values, strict=True):
        dense[place] = value
    flat = torch.zeros(60)
    put(flat, found.tensors["w"].index, found.tensors["w"].values)
    assert torch.equal(flat.view(shape), dense)
    assert len(found.tensors["e"].index) == 0
    assert type(found.dense["b"]) is Tensor
    # And ours is what its reader takes: plain lists, and coordinates by the same rule.
    write_reference(found, tmp_path / "ours.bin")
    ours = torch.load(tmp_path / "ours.bin", weights_only=True)
    assert list(ours) == ["diffs", "abs"]
    assert list(ours["diffs"]["w"]) == ["size", "index_steps", "values"]
    assert ours["diffs"]["w"]["size"] == torch.Size(shape)
    assert ours["diffs"]["w"]["index_steps"] == np.diff(index, prepend=0).tolist()
    assert {type(each) for each in ours["diffs"]["w"]["index_steps"]} == {int}
    assert torch.equal(ours["diffs"]["w"]["values"], values)
    assert ours["diffs"]["e"]["index_steps"] == []


def test_numbers_that_run_code_are_refused(tmp_path: Path) -> None:
    for steps in ([np.float64(1.0)], [np.datetime64(1, "s")], [np.array([1])], [np.array([{}], object)[0]]):
        diff = {"size": [2], "index_steps": steps, "values": torch.ones(1)}
        with pytest.raises(InputError):
            read_reference(published(tmp_path, "a.bin", {"diffs": {"w": diff}}))
    only_dense = read_reference(published(tmp_path, "b.bin", {"diffs": {}, "abs": {"b": torch.ones(2)}}))
    assert (only_dense.k, list(only_dense.dense)) == (0, ["b"])
    diff = {"size": [2], "index_steps": [0], "values": torch.ones(1)}
    with pytest.raises(InputError, match="w is both added to and replaced"):
        read_reference(published(tmp_path, "c.bin", {"diffs": {"w": diff}, "abs": {"w": torch.ones(2)}}))
    large = SparseTensor((1 << 16, 1 << 15), "float32", torch.tensor([5]), torch.ones(1))
    with pytest.raises(InputError, match=r"w has 2,147,483,648 entries; the published form holds 2,147,483,647 at"):
        write_reference(SparseDelta(None, {"w": large}), tmp_path / "d.bin")
    assert not list(tmp_path.glob("*d.bin*"))
