"""One module, any size a call: as the extracted member computes, with its statistics, on the same weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.errors import InputError
from compress.training.lowrank.elastic import ElasticModel
from compress.training.lowrank.family import cut, read_family
from compress.training.lowrank.job import LowRankOptions, truncate
from tests.every import every


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2),
        nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 20), nn.ReLU(),
        nn.Linear(20, 3),
    ).eval()  # fmt: skip
    out = tmp_path_factory.mktemp("elastic") / "out"
    truncate(module, torch.randn(96, 2, 8, 8), out, options=LowRankOptions(smallest=0.05))
    return out


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def wanted(folder: Path, x: Tensor) -> list[Tensor]:
    """Outputs of every member, cut out into ordinary layers."""
    found = []
    for number in range(len(read_family(folder)[1].members)):
        module, family = read_family(folder)
        cut(folder, module, family, family.members[number])
        with torch.no_grad():
            found.append(module.eval()(x))
    return found


def loaded(folder: Path) -> ElasticModel:
    model = compress.load(folder)
    assert isinstance(model, ElasticModel)
    return model


@pytest.mark.slow
@torch.no_grad()
def test_every_size_computes_what_the_extracted_member_does(folder: Path, x: Tensor, wanted: list[Tensor]) -> None:
    model = loaded(folder)
    assert not model.training
    torch.testing.assert_close(model(x), wanted[0])
    for number in (*range(len(wanted)), 3, 0):
        model.set_member(number)
        torch.testing.assert_close(model(x), wanted[number])
    with model.cut_to(model.family.members[-1]):
        torch.testing.assert_close(model(x), wanted[-1])
        with model.cut_to(2):
            torch.testing.assert_close(model(x), wanted[2])
        torch.testing.assert_close(model(x), wanted[-1])
    torch.testing.assert_close(model(x), wanted[0])
    model.cut_to(2)
    torch.testing.assert_close(model(x), wanted[2])
    assert not torch.allclose(wanted[0], wanted[-1])


@pytest.mark.slow
@torch.no_grad()
def test_views_share_the_weights_and_run_at_once(folder: Path, x: Tensor, wanted: list[Tensor]) -> None:
    model = loaded(folder)
    numbers = range(len(wanted))
    views = [model.view(number) for number in numbers]
    own = {each.data_ptr() for each in model.parameters()}
    assert every({each.data_ptr() for each in view.parameters()} == own for view in views)

    def run(number: int) -> list[Tensor]:
        with torch.no_grad():
            return [views[number](x) for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        for number, outputs in zip(numbers, pool.map(run, numbers), strict=True):
            for each in outputs:
                torch.testing.assert_close(each, wanted[number])
    torch.testing.assert_close(model(x), wanted[0])


@pytest.mark.slow
@torch.no_grad()
def test_all_members_move_together(folder: Path, x: Tensor, wanted: list[Tensor]) -> None:
    model = loaded(folder).double()
    for number in (0, len(wanted) - 1):
        model.set_member(number)
        output = model(x.double())
        assert output.dtype == torch.float64
        torch.testing.assert_close(output.float(), wanted[number])


def test_members_that_there_are_not(folder: Path) -> None:
    model = loaded(folder)
    last = len(model.family.members) - 1
    for number in (-1, last + 1):
        with pytest.raises(ValueError, match=rf"member {number}: this family has 0 \(the largest\) to {last}"):
            model.set_member(number)
    stranger = model.family.members[0].model_copy(update={"macs": 7})
    with pytest.raises(ValueError, match="a member of 7 MACs is not in this family"), model.cut_to(stranger):
        pass
    assert model.current == 0
    with pytest.raises(InputError):
        compress.load(folder / "nothing")
