"""D1: what is matched, and the exact gradient of it in both ways."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.distillation.convnet import convnet
from compress.distillation.episode import Episode, balanced_factor, checkpoints, inner_batches, perturb
from compress.distillation.network import FlatNetwork
from compress.distillation.student import GRADIENTS, Student

AUGMENTED = ("color", "crop", "cutout", "flip", "scale", "rotate")


@pytest.fixture(scope="module")
def network() -> FlatNetwork:
    # A smooth activation: at a kink central differences measure something else.
    return FlatNetwork(lambda: smooth(convnet(1, 3, (8, 8), width=4, depth=2))).double()


def smooth(module: nn.Sequential) -> nn.Sequential:
    for name, part in module.named_children():
        if isinstance(part, nn.ReLU):
            setattr(module, name, nn.Softplus(beta=5))
    return module


def task(network: FlatNetwork, steps: int, beta: str = "aggregate", targets: int = 2) -> tuple[Tensor, Tensor, Episode]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 1, 8, 8, generator=generator).double()
    start = network.start(3)
    moved = [start + 0.05 * torch.randn(network.size, generator=generator).double() for _ in range(targets)]
    batches = inner_batches(6, 4, steps, generator)
    return images, torch.arange(6) % 3, Episode(start, checkpoints(start, moved, steps, beta), batches, 1.3, 5)


@pytest.mark.parametrize("gradients", GRADIENTS)
@pytest.mark.parametrize(("steps", "rate"), [(0, 0.1), (6, 0.0)])
@pytest.mark.parametrize(("beta", "expected"), [("aggregate", 3.0), ("adaptive", 2.0), ("none", 1.0)])
def test_student_that_stands_still(
    network: FlatNetwork, gradients: str, steps: int, rate: float, beta: str, expected: float
) -> None:
    images, labels, episode = task(network, steps, beta, targets=3)
    outcome = Student(network).outcome(images, labels, rate, episode, gradients)
    assert outcome.matching == pytest.approx(1.0, abs=1e-12)
    assert outcome.loss == pytest.approx(expected, abs=1e-12)
    assert not outcome.images.any()


@pytest.mark.parametrize("augmentations", [(), AUGMENTED], ids=["clean", "augmented"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("gradients", GRADIENTS)
def test_hyper_gradient_against_central_differences(
    network: FlatNetwork, gradients: str, momentum: float, augmentations: tuple[str, ...]
) -> None:
    images, labels, episode = task(network, 5)
    student = Student(network, momentum, decay=1e-3, augmentations=augmentations)
    rate, small = 0.05, 1e-5

    def loss(images: Tensor, rate: float) -> float:
        return student.outcome(images, labels, rate, episode, gradients).loss

    outcome = student.outcome(images, labels, rate, episode, gradients)
    assert student.losses(images, labels, rate, episode) == pytest.approx((outcome.loss, outcome.matching), rel=1e-12)
    for place in ((0, 0, 3, 3), (4, 0, 5, 2)):
        up, down = images.clone(), images.clone()
        up[place] += small
        down[place] -= small
        assert float(outcome.images[place]) == pytest.approx(
            (loss(up, rate) - loss(down, rate)) / (2 * small), rel=1e-4
        )
    change = (loss(images, rate + small) - loss(images, rate - small)) / (2 * small)
    assert outcome.rate == pytest.approx(change, rel=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 7, 16])
def test_recomputed_is_unrolled(network: FlatNetwork, steps: int) -> None:
    images, labels, episode = task(network, steps)
    student = Student(network, 0.9, augmentations=AUGMENTED)
    a, b = (student.outcome(images, labels, 0.05, episode, way) for way in GRADIENTS)
    assert (a.loss, a.matching, a.rate) == pytest.approx((b.loss, b.matching, b.rate), rel=1e-9)
    torch.testing.assert_close(a.images, b.images, rtol=1e-8, atol=1e-12)


class Held:
    """A tensor that autograd keeps, counted while it is kept."""

    now = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.bytes = tensor, tensor.numel() * tensor.element_size()
        Held.now += self.bytes
        Held.most = max(Held.most, Held.now)

    def __del__(self) -> None:
        Held.now -= self.bytes


def peak(network: FlatNetwork, gradients: str, steps: int) -> int:
    """Most bytes that graphs keep at a time."""
    images, labels, episode = task(network, steps)
    Held.most = Held.now
    before = Held.now
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        Student(network).outcome(images, labels, 0.01, episode, gradients)
    return Held.most - before


@pytest.mark.matrix
def test_recomputed_keeps_one_steps_graph(network: FlatNetwork) -> None:
    assert peak(network, "recomputed", 40) < 1.2 * peak(network, "recomputed", 8)
    assert peak(network, "unrolled", 40) > 4 * peak(network, "unrolled", 8)
    assert peak(network, "recomputed", 40) < peak(network, "unrolled", 8) / 4


def test_balanced_factor_has_the_published_values() -> None:
    wanted = {0: 1 / 1.796, 9: 1 / 1.365, 10: 1.292, 19: 1.760}
    assert {epoch: balanced_factor(epoch, 20) for epoch in wanted} == pytest.approx(wanted, abs=1e-3)


def test_perturbation_is_small_and_of_kernels_alone() -> None:
    kernel, bias = torch.ones(128, 3, 3, 3), torch.ones(128)
    moved, same = perturb([kernel, bias], 1.0, torch.Generator().manual_seed(0))
    assert float((moved - kernel).norm() / kernel.norm()) == pytest.approx(1 / kernel.numel() ** 0.5, rel=1e-3)
    assert same is bias


def test_batches_take_every_image_once_an_order() -> None:
    batches = inner_batches(10, 4, 6, torch.Generator().manual_seed(0))
    assert [len(each) for each in batches] == [4, 4, 2, 4, 4, 2]
    assert torch.cat(batches[:3]).sort().values.tolist() == list(range(10))
