"""Exactly K entries, the largest, ties in order, whatever the chunks; places beyond 2^31."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.sparse.selection import Chunk, top_k


def chunked(tensors: dict[str, Tensor], size: int) -> Callable[[], Iterator[Chunk]]:
    def chunks() -> Iterator[Chunk]:
        for name, each in tensors.items():
            for start in range(0, max(each.numel(), 1), size):
                yield name, start, each[start : start + size]

    return chunks


def by_sorting(tensors: dict[str, Tensor], k: int) -> dict[str, list[int]]:
    """Score falling, then tensor, then index."""
    places = [(-float(value), order, index) for order, each in enumerate(tensors.values())
              for index, value in enumerate(each)]  # fmt: skip
    chosen = sorted(places)[:k]
    return {name: sorted(index for _, order, index in chosen if order == at) for at, name in enumerate(tensors)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [7, 1000])
def test_the_k_largest_exactly(tied: bool, size: int) -> None:
    tensors = {name: torch.rand(n) * 10.0 ** torch.randint(-30, 5, (n,)) for name, n in (("b", 90), ("a", 61))}
    if tied:
        tensors = {name: each.mul(3).round().clamp(0, 2) for name, each in tensors.items()}
    tensors["empty"] = torch.empty(0)
    for k in (0, 1, 10, 75, 150, 151):
        found = top_k(chunked(tensors, size), k)
        assert {name: each.tolist() for name, each in found.items()} == by_sorting(tensors, k)
        assert sum(map(len, found.values())) == k


def test_neighbouring_floats_are_told_apart() -> None:
    one = np.float32(1)
    values = [one]
    for _ in range(40):
        values.append(np.nextafter(values[-1], np.float32(2), dtype=np.float32))
    scores = torch.tensor(np.array(values)[np.random.default_rng(0).permutation(41)])
    found = top_k(chunked({"a": scores}, 8), 5)["a"]
    assert sorted(scores[found].tolist()) == sorted(map(float, values[-5:]))


def test_places_beyond_31_bits() -> None:
    far = 2**31 + 5

    def chunks() -> Iterator[Chunk]:
        yield "large", 0, torch.tensor([1.0, 5.0])
        yield "large", far, torch.tensor([7.0, 5.0, 5.0])
        yield "large", 2**40, torch.tensor([0.5, 9.0])

    assert top_k(chunks, 4)["large"].tolist() == [1, far, far + 1, 2**40 + 1]


def test_refusals_name_the_tensor() -> None:
    with pytest.raises(ValueError, match=r"5 entries were to be selected out of 3; allowed are 0 to 3"):
        top_k(chunked({"a": torch.ones(3)}, 8), 5)
    for bad, what in ((float("nan"), "not finite"), (float("inf"), "not finite"), (-1.0, "below 0")):
        with pytest.raises(ValueError, match=f"^b: a score is {what}"):
            top_k(chunked({"a": torch.ones(3), "b": torch.tensor([1.0, bad])}, 8), 1)
