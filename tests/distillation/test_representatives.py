"""D2: representative initialization chooses real images, distinct, class by class, near the middle of what there is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.distillation.representatives import random_images, representatives, require_enough
from compress.errors import InputError
from tests.every import every


def logits() -> tuple[Tensor, Tensor]:
    """Three classes of 40 images, each in four clumps."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    clumps = torch.randn(12, 3, generator=generator) * 5
    return clumps[torch.arange(120) % 12] + 0.1 * torch.randn(120, 3, generator=generator), labels


def inertia(points: Tensor, labels: Tensor, chosen: Tensor) -> float:
    """Squared distance of every image to the nearest chosen one of its class."""
    return sum(
        float(torch.cdist(points[labels == each], points[chosen[labels[chosen] == each]]).min(1).values.square().sum())
        for each in range(3)
    )


@pytest.mark.parametrize("each", [1, 4, 10, 40])
def test_as_many_distinct_images_of_each_class_as_asked_for(each: int) -> None:
    points, labels = logits()
    chosen = representatives(points, labels, 3, each)
    assert len(set(chosen.tolist())) == 3 * each
    assert labels[chosen].tolist() == [number for number in range(3) for _ in range(each)]
    assert torch.equal(chosen, representatives(points, labels, 3, each))


def test_nearer_to_all_images_than_random_ones() -> None:
    points, labels = logits()
    own = inertia(points, labels, representatives(points, labels, 3, 4))
    assert every(own <= inertia(points, labels, random_images(labels, 3, 4, seed)) for seed in range(10))
    assert own < 0.1 * inertia(points, labels, representatives(points, labels, 3, 1))


def test_images_that_the_expert_cannot_tell_apart() -> None:
    chosen = representatives(torch.zeros(30, 3), torch.arange(30) % 3, 3, 5)
    assert len(set(chosen.tolist())) == 15


def test_random_images_are_distinct_and_seeded() -> None:
    labels = torch.arange(30) % 3
    chosen = random_images(labels, 3, 5, 1)
    assert len(set(chosen.tolist())) == 15
    assert labels[chosen].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert torch.equal(chosen, random_images(labels, 3, 5, 1))
    assert not torch.equal(chosen, random_images(labels, 3, 5, 2))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2, 3], r"digits\.npz: labels go from 0 to 3; with --classes 3 they are 0 to 2; check --classes"),
        ([1, 2, 3], "labels go from 1 to 3; .* they seem to count from 1: subtract 1 from them in the file"),
        ([-1, 0, 1], "labels go from -1 to 1"),
        ([0, 0, 1, 1, 2], "--ipc 2 images a class are asked for, and class 2 has 1; give --ipc 1 or less"),
        ([0, 0, 2, 2], "class 1 has 0; every class needs images: check --classes"),
        ([0.5, 1.0], "classes, whole numbers from 0"),
    ],
)
def test_labels_that_cannot_be_distilled(labels: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        require_enough(torch.tensor(labels), 3, 2, "digits.npz")
