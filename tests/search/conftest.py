"""A small network whose every way is priced, with errors made up, so that all its plans can be counted through."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress.data.samples import Samples, load_samples
from compress.graph.traced import TracedModel
from compress.intake.model import Intake, take_in
from compress.kernels.table import register_operators
from compress.options import Options, Search
from compress.plans.frame import begin_plan
from compress.quant.targets import Target, find_target
from compress.search.allocator import Allocator
from compress.search.costs import Costs, measure_costs
from compress.search.prepare import Prepared
from compress.search.space import Space, Way, list_space

register_operators()

CPU = find_target("onnx-cpu")


class Net(nn.Module):
    """A leading convolution too narrow for integers, two that are not, and two linears that read one value."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 32, 3, padding=1)
        self.deep = nn.Conv2d(32, 48, 3, padding=1)
        self.left, self.right = nn.Linear(48, 5), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.body(torch.relu(self.stem(x))))
        x = torch.relu(self.deep(x)).mean((2, 3))
        return torch.cat([self.left(x), self.right(x)], 1)


def silent(label: str, done: int, total: int) -> None:
    """Nobody watches."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def samples() -> Samples:
    return load_samples(torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="session")
def intake(samples: Samples) -> Intake:
    torch.manual_seed(0)
    return take_in(Net().eval(), samples=samples)


def space_of(intake: Intake, *, with_data: bool = True, timed: bool = False, **changes: object) -> Space:
    """The space of ``intake`` with options of :class:`Search` and :class:`Options` mixed."""
    names = Search.__dataclass_fields__
    search = Search(**{name: value for name, value in changes.items() if name in names})  # type: ignore[arg-type]
    rest = {name: value for name, value in changes.items() if name not in names}
    options = Options(search=search, **rest)  # type: ignore[arg-type]
    return list_space(intake.traced, intake.layers, options, ("mse",), CPU, with_data=with_data, timed=timed)


def made_up_errors(space: Space, seed: int) -> dict[str, dict[Way, float]]:
    """Errors that fall with the bits, four times a bit, each layer on a scale of its own."""
    rng = np.random.default_rng(seed)
    return {
        layer: {
            way: 0.0 if way.option is None else float(rng.uniform(0.5, 1) * rng.uniform(1, 50) * 4.0 ** -way.widths[0])
            for way in ways
        }
        for layer, ways in space.ways.items()
    }


@pytest.fixture(scope="session")
def priced(intake: Intake) -> tuple[Space, Costs]:
    """4 x 4 x 4 x 4 x 4 plans, with real sizes."""
    space = space_of(intake, weight_widths=(2, 3, 4, 8))
    return space, measure_costs(intake, space, CPU, Search(), timed=False, progress=silent)


@pytest.fixture
def allocator(intake: Intake, priced: tuple[Space, Costs]) -> Allocator:
    """Of all plans, with errors made up."""
    space, costs = priced
    made = Allocator(intake.traced, space, costs, CPU, Search(), silent)
    made.errors = made_up_errors(space, 0)
    return made


def predicted_size(costs: Costs, ways: Mapping[str, Way]) -> float:
    """Bytes that the prices say."""
    widths = {way.widths[0] for way in ways.values()} & set(costs.shared)
    layers = sum(costs.layers[layer][way].size_bytes for layer, way in ways.items())
    return costs.fixed["size"] + layers + sum(costs.shared[width] for width in widths)


@pytest.fixture
def prepared(allocator: Allocator, intake: Intake, samples: Samples, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    """Ready for budgets; a plan's file is as large as predicted, and empty: real ones take a second each."""

    def export(traced: TracedModel, ways: Mapping[str, Way], target: Target, path: Path) -> Path:
        with path.open("wb") as file:
            file.truncate(round(predicted_size(allocator.costs, ways)))
        return path

    monkeypatch.setattr("compress.search.allocator.export_ways", export)
    return Prepared(allocator, begin_plan(intake, Options(), samples), (), "kl", "error", ())
