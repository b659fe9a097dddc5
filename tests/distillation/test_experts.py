"""Experts: the smooth recipe, what a file is refused for, and killed runs that go on to the same bytes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.distillation.convnet import convnet
from compress.distillation.episode import Episode, checkpoints
from compress.distillation.experts import Experts, ExpertSettings, clipping_factor, train_expert
from compress.distillation.network import FlatNetwork
from compress.distillation.penalty import gradient_penalty
from compress.distillation.student import Student
from compress.errors import InputError

SETTINGS = ExpertSettings(count=2, epochs=4, batch=16, rate=0.02, augmentations=("crop",))


def small(width: int = 4) -> FlatNetwork:
    return FlatNetwork(lambda: convnet(1, 2, (4, 4), width=width, depth=1))


def bright_or_dark(count: int = 64) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % 2
    x = torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x[:, :, :2] += (2 * labels - 1).view(-1, 1, 1, 1)
    return x, labels


def experts(folder: Path, settings: ExpertSettings = SETTINGS, data: str = "d", width: int = 4) -> Experts:
    return Experts(folder, small(width), *bright_or_dark(), 2, settings, data)


def test_ramp_of_the_clipping_loss() -> None:
    assert [clipping_factor(epoch) for epoch in (0, 1, 9, 10, 40)] == pytest.approx([0.5, 0.55, 0.95, 1.0, 1.0])


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_penalty_of_a_linear_map(scale: float) -> None:
    # Both outputs together have a gradient of norm `scale` over the channels of every pixel.
    weight = torch.tensor([0.6, 0.8]) * scale / 2
    penalty = gradient_penalty(
        lambda x: torch.einsum("nchw,c->n", x, weight).unsqueeze(1).repeat(1, 2), torch.randn(3, 2, 4, 4)
    )
    assert float(penalty) == pytest.approx((scale - 1) ** 2, abs=1e-6)


def test_a_student_fed_the_experts_batches_arrives_where_it_did() -> None:
    plain = replace(SETTINGS, clipping=False, penalty=0.0, drop=False, augmentations=(), epochs=1, momentum=0.9)
    network, (x, labels) = small(), bright_or_dark()
    trajectory = train_expert(network, x, labels, plain)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    episode = Episode(trajectory[0], checkpoints(trajectory[0], [trajectory[1]], 4, "aggregate"), order.split(16))
    student = Student(network, plain.momentum, plain.decay)
    assert student.outcome(x, labels, plain.rate, episode, "recomputed").matching < 1e-6


def test_clipping_makes_a_gentler_start() -> None:
    network, (x, labels) = small(), bright_or_dark()
    moves = {}
    for clipping in (True, False):
        trajectory = train_expert(network, x, labels, replace(SETTINGS, clipping=clipping, penalty=0.0, epochs=6))
        moves[clipping] = float((trajectory[1:] - trajectory[:-1]).square().sum(1).max())
    assert moves[True] < moves[False]


def test_killed_in_an_epoch_and_continued_to_the_same_bytes(tmp_path: Path) -> None:
    accuracies = experts(tmp_path / "whole").train()
    assert min(accuracies) > 0.65

    def kill(what: str, done: int, total: int) -> None:
        if done == 6:  # in the second expert
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experts(tmp_path / "killed").train(kill)
    assert sorted(each.name for each in (tmp_path / "killed").iterdir()) == [
        "expert-000.safetensors",
        "expert-001.partial",
    ]
    assert experts(tmp_path / "killed").train() == accuracies
    for name in ("expert-000.safetensors", "expert-001.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    more = experts(tmp_path / "killed", replace(SETTINGS, count=3))
    assert more.train()[:2] == accuracies
    assert torch.equal(more.rows(1, 1, 3), more.read(1)[0][1:3])


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    experts(tmp_path, replace(SETTINGS, count=1)).train()
    gone = (".expert-000.partial.999999999.partial", ".expert-001.safetensors.999999999.partial", "expert-000.partial")
    kept = (
        f".expert-002.partial.{os.getpid()}.partial",
        ".mine.partial",
    )  # a process that is alive, and somebody else's
    for name in (*gone, *kept):
        (tmp_path / name).write_bytes(b"half")
    experts(tmp_path).train()
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(
        (*kept, "expert-000.safetensors", "expert-001.safetensors")
    )


def test_files_of_another_run_are_refused(tmp_path: Path) -> None:
    experts(tmp_path).train()
    for other, what in (
        (experts(tmp_path, width=5), "another network"),
        (experts(tmp_path, data="e"), "other data"),
        (
            experts(tmp_path, replace(SETTINGS, rate=0.01)),
            r"other expert settings \(different: --expert-lr \(0.02 then, 0.01 now\)\)",
        ),
    ):
        with pytest.raises(InputError, match=rf"expert-000\.safetensors is a trajectory of {what}.*--expert-folder"):
            other.train()
    # The same parameters in a network that computes something else.
    edited = FlatNetwork(lambda: nn.Sequential(*convnet(1, 2, (4, 4), width=4, depth=1).children()))
    plain = Experts(tmp_path / "own", edited, *bright_or_dark(), 2, SETTINGS, "d")
    plain.train()
    edited._module.register_forward_pre_hook(lambda module, inputs: (-inputs[0],))
    with pytest.raises(InputError, match=r"another network: it says that .* % of the images were right, and this one"):
        plain.train()
    (tmp_path / "expert-000.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match=r"expert-000\.safetensors is truncated"):
        experts(tmp_path).train()


def test_an_expert_that_does_not_learn_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"expert 1 did not learn: .* after 1 epochs of 4 steps \(4 in all\), guessing or its random start gives "
        r".* % are needed .* --expert-batch",
    ):
        experts(tmp_path, replace(SETTINGS, rate=1e-9, epochs=1)).train()
    assert not (tmp_path / "expert-000.safetensors").exists()
    with pytest.raises(InputError, match=r"expert 1: its parameters are not finite after epoch 1; .*--expert-lr"):
        experts(tmp_path / "far", replace(SETTINGS, rate=1e30)).train()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), r"1 \(BatchNorm2d\) keeps running statistics"),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)),
            "images of a batch see each other",
        ),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 2), nn.RReLU()), "gave two results for the same images"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 2)), r"1 \(Dropout\) is random"),
        (nn.ReLU, "no parameters"),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3)),
            r"output has shape \[2, 3\] .* 2 classes need \[2, 2\]",
        ),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 2)), r"does not take images of shape \[1, 4, 4\]"),
    ],
)
def test_networks_that_cannot_be_experts(build: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FlatNetwork(build).check(bright_or_dark()[0], 2)  # type: ignore[arg-type]


def test_images_too_small_for_the_depth() -> None:
    with pytest.raises(InputError, match=r"--depth 3: 4 x 4 pixels are 1 x 1 after 2 blocks.*--depth 2"):
        convnet(1, 2, (4, 4), depth=3)
