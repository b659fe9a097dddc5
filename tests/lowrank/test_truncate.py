"""Families: every size on the path costs what it says, loses what it says, and is cut out as it was measured."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from compress.errors import InputError
from compress.lowrank.decompose import decompose, decomposed_layers
from compress.lowrank.truncate import count_positions, model_macs, truncation_path
from compress.models.checkpoint import load_model
from compress.training.data import TrainingData
from compress.training.loop import evaluate
from compress.training.lowrank.choice import choose_member, family_budgets
from compress.training.lowrank.family import cut, read_family
from compress.training.lowrank.job import LowRankOptions, truncate
from tests.every import every
from tests.networks import FeaturesAndWords, let_fall


def net() -> nn.Module:
    """Its weights fall off, so that there is something to cut."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 40), nn.ReLU(), nn.Linear(40, 3),
    ).eval()  # fmt: skip
    let_fall(module[3], module[7])
    return module


def test_positions_and_macs_are_counted_by_hand() -> None:
    positions = count_positions(net(), (torch.randn(2, 2, 8, 8),))
    assert {name: each.output for name, each in positions.items()} == {"0": 64, "3": 9, "7": 1, "9": 1}
    assert {name: each.between for name, each in positions.items()} == {"0": 64, "3": 3 * 8, "7": 1, "9": 1}
    dense = 64 * 16 * 18 + 9 * 24 * 144 + 96 * 40 + 40 * 3
    module = net()
    assert model_macs(module, positions) == dense
    decompose(module)
    assert model_macs(module, positions) == dense, "at full rank the dense form is cheaper"
    ranks = {"0": 16, "3": 5, "7": 4, "9": 3}
    assert model_macs(module, positions, ranks) == 64 * 16 * 18 + 9 * 5 * (144 + 24) + 4 * (96 + 40) + 40 * 3


def test_every_step_of_the_path_is_cheaper_and_its_loss_is_that_of_its_ranks() -> None:
    module = net()
    decompose(module)
    x = torch.randn(32, 2, 8, 8)
    wanted = module(x).detach()
    positions = count_positions(module, (x[:2],))

    def loss() -> float:
        with torch.no_grad():
            return float((module(x) - wanted).square().mean())

    whole = model_macs(module, positions)
    path = truncation_path(module, loss, positions, smallest=whole // 5)
    assert path[0].macs == whole
    assert path[-1].macs <= whole // 5
    layers = decomposed_layers(module)
    assert every(layer.active is None for layer in layers.values())
    for before, after in itertools.pairwise(path):
        assert after.macs < before.macs
        assert sum(after.ranks[name] != rank for name, rank in before.ranks.items()) == 1
    for member in path[:: len(path) // 4]:
        for name, rank in member.ranks.items():
            layers[name].active = rank
        assert loss() == pytest.approx(member.loss)
        for layer in layers.values():
            layer.active = None


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family") / "out"
    x = torch.randn(160, 2, 8, 8)
    module = net()
    with torch.no_grad():
        labels = module(x).argmax(1)
    truncate(module, (x, labels), folder, test=(x, labels), options=LowRankOptions(smallest=0.2))
    return folder


@pytest.mark.matrix
def test_a_member_is_cut_out_as_it_was_measured(family: Path) -> None:
    x = torch.randn(160, 2, 8, 8, generator=torch.Generator().manual_seed(7))
    for share in (1.0, 0.6, 0.3):
        module, found = read_family(family)
        member = choose_member(found, family_budgets([f"macs={share}x"], found))
        layers = decomposed_layers(module)
        for name, rank in member.ranks.items():
            layers[name].active = rank
        done = cut(family, module, found, member)
        assert set(done) == set(member.ranks)
        assert decomposed_layers(module) == {}
        assert {type(each).__module__.split(".")[0] for each in module.modules()} == {"torch"}
        positions = count_positions(module, (x[:2],))
        assert model_macs(module, positions) == member.macs
        assert sum(each.numel() for each in module.parameters()) == member.weights


@pytest.mark.matrix
def test_what_is_reported_of_a_member_is_what_it_does(tmp_path: Path) -> None:
    x = torch.randn(160, 2, 8, 8)
    module = net()
    with torch.no_grad():
        labels = module(x).argmax(1)
    truncate(module, (x, labels), tmp_path / "out", test=(x, labels), options=LowRankOptions(smallest=0.3))
    for number in (0, -1):
        found, members = read_family(tmp_path / "out")
        member = members.members[number]
        cut(tmp_path / "out", found, members, member)
        assert evaluate(found, TrainingData((x,), labels)) == pytest.approx(member.metric)
    plain = load_model(tmp_path / "out" / "model.pt").module  # ordinary classes: nothing to allow
    assert evaluate(plain, TrainingData((x,), labels)) == pytest.approx(members.members[0].metric)


@pytest.mark.slow
def test_refusals(family: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no family\.pt"):
        read_family(tmp_path)
    x = torch.randn(8, 2, 8, 8)
    with pytest.raises(InputError, match="exists already"):
        truncate(net(), x, family)
    with pytest.raises(InputError, match="--smallest 2: a share"):
        truncate(net(), x, tmp_path / "out", options=LowRankOptions(smallest=2))
    with pytest.raises(InputError, match="the samples do not run through the model"):
        truncate(net(), torch.randn(8, 5, 8, 8), tmp_path / "out")
    with pytest.raises(InputError, match="'x\\*' matches no layer"):
        truncate(net(), x, tmp_path / "out", options=LowRankOptions(ignore=("x*",)))
    assert list(tmp_path.iterdir()) == []


class Both(FeaturesAndWords):
    """Two inputs, and one more that may be left out."""

    def forward(self, features: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        y = self.scores(features, ids).mean(1)
        return y if scale is None else y * scale


class Between(Both):
    def forward(  # type: ignore[override]
        self, features: torch.Tensor, scale: torch.Tensor | None = None, ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert ids is not None
        return super().forward(features, ids, scale)


def test_arrays_called_like_parameters_are_the_inputs(tmp_path: Path) -> None:
    samples = {"ids": torch.randint(20, (64, 6)), "labels": torch.randint(4, (64,)), "features": torch.randn(64, 8)}
    found = truncate(Both(), samples, tmp_path / "out", test=samples).family
    assert [(each.shape, each.dtype) for each in found.inputs] == [((8,), "float32"), ((6,), "int64")]
    assert (found.loss_name, found.metric_name) == ("loss", "accuracy")
    sentence = "features, ids are not the first parameters of the model's forward, which are features, scale, ids, and"
    with pytest.raises(InputError, match=sentence):
        truncate(Between(), samples, tmp_path / "named")
    with pytest.raises(InputError, match=r"has classes 0 to 7, the model has outputs for 0 to 3"):
        truncate(Both(), samples | {"labels": torch.arange(64) % 8}, tmp_path / "labels")


@pytest.mark.slow
def test_ordering_by_data_beats_ordering_by_weights(tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 6)).eval()
    x = torch.randn(400, 40) * torch.logspace(-1.5, 0.5, 40)
    losses = []
    for weighted in (True, False):
        out = tmp_path / str(weighted)
        found = truncate(module, x, out, weighted=weighted, options=LowRankOptions(smallest=0.3)).family
        losses.append(choose_member(found, family_budgets(["macs=0.5x"], found)).loss)
    assert losses[0] < 0.5 * losses[1], losses
