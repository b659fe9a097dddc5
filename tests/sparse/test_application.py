"""Deltas added and taken out: order makes no difference, the base comes back to the bit, and strangers are refused."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

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
    with pytest.raises(InputError, match="--head 5: no such delta is applied; there are 3, 4"):
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
    "dense": (lambda: SparseDelta(None, {}, {"3.bias": torch.ones(4)}), r"3\.bias has shape \[4\] there and \[5\]"),
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
    with pytest.raises(InputError, match="2 weights for 1 deltas"):
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
