"""Samples that cannot show what real ones would: which sets are doubted, and which of the zoo's are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.zoo import CIFAR_MEAN, CIFAR_STD, ZOO
from compress.data.samples import Samples, load_samples
from compress.intake.doubts import sample_doubts
from compress.intake.model import Intake, take_in
from tests.networks import Encoder, Language


def doubts(intake: Intake, x: Tensor) -> tuple[str, ...]:
    return sample_doubts(load_samples(x), intake)


def linear() -> Intake:
    return take_in(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), input_shape=(6,))


@pytest.mark.slow
def test_constant_samples() -> None:
    intake = linear()
    x = torch.randn(40, 6)
    assert doubts(intake, x) == ()
    x[:20] = 0
    assert doubts(intake, x) == ()  # some blank ones are nothing to speak of
    x[:21] = torch.arange(21.0)[:, None]
    assert doubts(intake, x)[0].startswith("WARNING: 21 of 40 samples are constant, the same value at every place")
    assert doubts(intake, torch.randn(1, 6).repeat(40, 1)) == (
        "WARNING: all 40 samples are the same: check what made them",
    )
    assert sample_doubts(load_samples(torch.zeros(40, 6)), intake, "evaluation data: ")[0].startswith(
        "WARNING: evaluation data: 40 of 40"
    )


@pytest.mark.slow
def test_few_samples_are_few_unless_they_are_long() -> None:
    (few,) = doubts(linear(), torch.randn(31, 6))
    assert few.startswith("WARNING: 31 samples, 31 rows in the layer in the middle, are few: give 32 samples or more")
    assert doubts(linear(), torch.randn(32, 6)) == ()
    ids = torch.randint(0, 30, (31, 135))
    for some, rows in ((ids[:5, :20], "WARNING: 5 samples, 100 rows in the layer in the middle"), (ids, None)):
        found = doubts(take_in(Language(30, 8).eval(), samples=load_samples(some)), some)
        assert found == () if rows is None else found[0].startswith(rows)  # the others are 4,185 tokens


@pytest.mark.slow
def test_a_mask_may_be_constant() -> None:
    ids, mask = torch.randint(0, 30, (40, 16)), torch.ones(40, 16, dtype=torch.int64)
    samples = Samples((ids, mask), None, "ids")
    intake = take_in(Encoder().eval(), samples=samples)
    assert sample_doubts(samples, intake) == ()
    same = Samples((ids[:1].repeat(40, 1), mask), None, "ids")
    assert sample_doubts(same, intake) == ("WARNING: all 40 samples are the same: check what made them",)


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3),
    )  # fmt: skip
    with torch.no_grad():
        net.train()(pictures(400))
    return net.eval()


def pictures(count: int) -> Tensor:
    """Smooth ones, of mean 0 and deviation 1."""
    x = torch.randn(count, 1, 8, 8).cumsum(2).cumsum(3)
    return (x - x.mean()) / x.std()


@pytest.mark.slow
def test_inputs_far_from_batch_norm() -> None:
    intake = take_in(normed(), input_shape=(1, 8, 8))
    real = pictures(64)
    assert doubts(intake, real) == ()
    for far in (127 + 60 * real, 0.5 + 0.25 * real, torch.randn(64, 1, 8, 8)):
        (said,) = doubts(intake, far)
        assert said.startswith("WARNING: samples are unlike what the model was trained on: what its BatchNorm layers")


@pytest.mark.slow
def test_layers_that_saw_nothing_keep_nothing() -> None:
    untrained = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))
    assert doubts(take_in(untrained.eval(), input_shape=(1, 8, 8)), 100 * pictures(64)) == ()


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("resnet20"), pytest.param("mobilenet_v1", marks=pytest.mark.matrix)])
def test_sets_of_the_zoo_are_not_doubted_and_others_are(name: str, shared_data: Path) -> None:
    case = ZOO[name]()
    x = case.calibration
    intake = take_in(case.module, input_shape=tuple(x.shape[1:]))
    for some in (x[:64], x[100:132], case.test[:64]):
        assert doubts(intake, some) == ()
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD))
    pixels = x[:64] * std + mean if name == "resnet20" else (x[:64] + 1) / 2
    for far in (pixels, 255 * pixels, torch.randn_like(pixels), torch.rand_like(pixels)):
        (said,) = doubts(intake, far)
        assert said.startswith("WARNING: samples are unlike")
