"""Both unrollings of a convolution: what is lost, what it costs, and that the better one is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.calib.gram import Gram, rows_of
from compress.errors import InputError
from compress.lowrank.decompose import decompose, decomposed_layers, extract
from compress.lowrank.layers import LowRankConv2d, LowRankLayer, Positions, SpatialConv2d
from compress.lowrank.maestro import Maestro
from compress.lowrank.truncate import count_positions, cut_to, model_macs, ranks_by_rule, truncation_path
from compress.lowrank.unroll import output_error, spatial_factors, spatial_matrix, spatial_weight
from compress.training.lowrank.choice import choose_member, family_budgets
from compress.training.lowrank.family import cut, read_family
from compress.training.lowrank.job import LowRankOptions, truncate
from compress.training.lowrank.ordering import order_layers
from tests.every import every


def smooth(count: int, channels: int, size: int) -> Tensor:
    """Pictures whose neighbouring pixels are alike, and whose channels differ in size."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(count, channels, size + 4, size + 4, generator=generator)
    return nn.functional.avg_pool2d(noise, 5, stride=1) * torch.logspace(-0.5, 1, channels)[:, None, None]


def gram_of(x: Tensor, layer: nn.Conv2d) -> Tensor:
    gram = Gram()
    settings = (layer.stride, layer.padding, layer.dilation)
    gram.update(rows_of(x, layer.kernel_size, 1, *settings))  # type: ignore[arg-type]
    return gram.matrix()[0]


def test_a_weight_is_unrolled_and_back() -> None:
    weight = torch.randn(5, 3, 2, 4)
    matrix = spatial_matrix(weight)
    assert matrix.shape == (20, 6)
    assert matrix[2 * 4 + 1, 1 * 2 + 1] == weight[2, 1, 1, 1]
    assert torch.equal(spatial_weight(matrix, weight.shape), weight)


def test_spatial_factors_by_data_lose_less_than_singular_ones_and_the_error_is_the_outputs() -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(6, 8, 3, padding=1, bias=False)
    x = smooth(16, 6, 12)
    gram = gram_of(x, dense)
    weight = dense.weight.detach()
    wanted = dense(x).detach()
    plain, aware = (SpatialConv2d.of(dense, spatial_factors(weight, each)) for each in (None, gram))
    for layer in (plain, aware):
        torch.testing.assert_close(layer.weight(), dense.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
    for rank in range(1, 14):
        errors = []
        for layer in (plain, aware):
            layer.active = rank
            errors.append(float((layer(x) - wanted).square().sum().detach()))
            predicted = output_error(weight - layer.weight(rank).detach(), gram)
            assert errors[-1] == pytest.approx(predicted, rel=1e-2, abs=1e-4)
        assert errors[1] < 0.8 * errors[0], rank
    torch.testing.assert_close(aware.up.norm(dim=0), aware.down.flatten(1).norm(dim=1))


def test_spatial_factors_are_the_optimum_where_the_moments_are_a_product() -> None:
    """Energies then are the errors, at every rank."""
    torch.manual_seed(1)
    weight = torch.randn(4, 3, 3, 3)
    columns, along = (each @ each.T for each in (torch.randn(9, 9), torch.randn(3, 3)))
    gram = torch.einsum("ij,bd->ibjd", columns, along).reshape(27, 27)
    found = spatial_factors(weight, gram)
    tails = found.relative_errors()
    for rank in range(10):
        change = weight - spatial_weight(found.truncated(rank).product(), weight.shape)
        assert output_error(change, gram) / output_error(weight, gram) == pytest.approx(float(tails[rank]), abs=1e-4)


STRIDES = {
    "plain": nn.Conv2d(6, 8, 3, padding=1),
    "stride": nn.Conv2d(6, 8, 3, stride=2, padding=1),
    "no padding": nn.Conv2d(6, 8, (3, 5), stride=(1, 2)),
}


@pytest.mark.parametrize("name", STRIDES)
@pytest.mark.parametrize("unrolling", ["channel", "spatial"])
def test_macs_are_those_of_the_extracted_convolutions(name: str, unrolling: str) -> None:
    module = nn.Sequential(STRIDES[name])
    x = torch.randn(2, 6, 12, 14)
    positions = count_positions(module, (x,))
    dense = model_macs(module, positions)
    high, wide = module(x).shape[2:]
    assert positions == {"0": Positions(high * wide, high * 14)}
    for rank in range(9):
        cut_module = nn.Sequential(STRIDES[name])
        layer = next(iter(decompose(cut_module, unrolling=unrolling).layers.values()))
        if rank > layer.rank:
            continue
        promised = model_macs(cut_module, positions, {"0": rank})
        assert layer.cost(rank) <= layer.inputs * layer.outputs
        extract(cut_module, lambda name, layer, rank=rank: rank)  # type: ignore[misc]
        assert model_macs(cut_module, count_positions(cut_module, (x,))) == promised
        assert (rank < layer.saving_rank(positions["0"])) == (promised < dense) or not layer.pays(rank)


def test_a_stride_makes_the_spatial_pair_dearer() -> None:
    layer = SpatialConv2d.of(nn.Conv2d(8, 8, 3, stride=2, padding=1))
    assert layer.widening == 2
    assert layer.macs(4, Positions(16, 32)) == 4 * (24 * 32 + 24 * 16)
    assert LowRankConv2d.of(nn.Conv2d(8, 8, 3, stride=2, padding=1)).macs(4, Positions(16, 32)) == 4 * 16 * (72 + 8)
    assert [layer.pays(rank) for rank in (8, 9)] == [True, False], "24 * 24 / (24 * 2 + 24) is 8"


def separable(kind: str) -> nn.Conv2d:
    """A convolution that one of the unrollings gives with two components."""
    torch.manual_seed(4)
    layer = nn.Conv2d(8, 8, 3, padding=1)
    own: type[LowRankLayer] = SpatialConv2d if kind == "spatial" else LowRankConv2d
    with torch.no_grad():
        layer.weight.copy_(own.of(layer).weight(2))  # type: ignore[attr-defined]
    return layer


@pytest.mark.parametrize("kind", ["spatial", "channel"])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_unrolling_that_loses_less_is_kept(kind: str, weighted: bool) -> None:
    x = torch.randn(8, 8, 6, 6)
    for asked in ("best", "channel", "spatial"):
        module = nn.Sequential(separable(kind)).eval()
        wanted = module(x)
        positions = count_positions(module, (x,))
        layers = decompose(module).layers
        energies = order_layers(
            layers, module, (x,), positions, lambda *done: None, weighted=weighted, unrolling=asked
        )  # fmt: skip
        assert decomposed_layers(module) == layers
        layer = layers["0"]
        assert isinstance(layer, LowRankConv2d)
        assert layer.unrolling == (kind if asked == "best" else asked)
        assert len(energies["0"]) == layer.rank
        torch.testing.assert_close(module(x), wanted, rtol=1e-3, atol=1e-4)
        if asked == "best":
            layer.active = 2
            torch.testing.assert_close(module(x), wanted, rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="--unrolling both: known are best, channel, spatial"):
        order_layers(layers, module, (x,), positions, lambda *done: None, unrolling="both")


def test_maestro_trains_spatial_layers_and_they_shrink() -> None:
    torch.manual_seed(5)
    module = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    module.append(nn.Linear(6, 2))
    maestro = Maestro(module, penalty=0.02, unrolling="spatial")
    assert isinstance(maestro.layers["0"], SpatialConv2d)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, 0.9)
    x = torch.randn(64, 2, 6, 6)
    y = (x[:, 0].square().mean((1, 2)) > 1).long()
    start = maestro.ranks["0"]
    for _ in range(30):
        with maestro.step():
            optimizer.zero_grad()
            (nn.functional.cross_entropy(module(x), y) + maestro.penalty()).backward()
            optimizer.step()
        maestro.end_epoch(optimizer)
    assert maestro.ranks["0"] < start
    wanted = module.eval()(x)
    maestro.extract()
    torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="unknown unrolling 'magic'; known: channel, spatial"):
        decompose(nn.Sequential(nn.Conv2d(2, 2, 3)), unrolling="magic")


def strided() -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(
        separable("spatial"), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3),
    ).eval()  # fmt: skip


@pytest.mark.slow
def test_a_family_with_spatial_layers_is_cut_as_it_was_measured(tmp_path: Path) -> None:
    x = torch.randn(129, 8, 8, 8)
    truncate(strided(), x, tmp_path / "out", unrolling="spatial", options=LowRankOptions(smallest=0.2))
    for share in (0.7, 0.3):
        module, family = read_family(tmp_path / "out")
        assert every("spatial" in what for name, what in family.layers.items() if name != "7")
        member = choose_member(family, family_budgets([f"macs={share}x"], family))
        with cut_to(decomposed_layers(module), member.ranks):
            cut_output = module(x)
        cut(tmp_path / "out", module, family, member)
        assert decomposed_layers(module) == {}
        assert model_macs(module, count_positions(module, (x[:2],))) == member.macs
        assert sum(each.numel() for each in module.parameters()) == member.weights
        assert module(x).shape == cut_output.shape


@pytest.mark.slow
def test_ranks_by_energy_and_by_threshold(tmp_path: Path) -> None:
    energies = {"a": torch.tensor([9.0, 4.0, 1.0, 0.0]), "b": torch.tensor([1.0, 1.0])}
    assert ranks_by_rule(energies, energy=0.9) == {"a": 2, "b": 2}
    assert ranks_by_rule(energies, threshold=0.5) == {"a": 2, "b": 2}
    for wrong in ({}, {"energy": 0.5, "threshold": 0.5}):
        with pytest.raises(ValueError, match="one rule is needed"):
            ranks_by_rule(energies, **wrong)
    x = torch.randn(64, 8, 8, 8)
    rules = (({"energy": 0.95}, []), ({"energy": 0.999}, ["2", "7"]), ({"threshold": 0.3}, []))
    for number, (rule, dense) in enumerate(rules):
        family = truncate(strided(), x, tmp_path / str(number), **rule).family  # type: ignore[arg-type]
        assert len(family.members) == 2
        whole, member = family.members
        assert member.macs < whole.macs
        assert member.ranks["0"] == 2
        assert [note.partition(" stays dense")[0] for note in family.notes] == dense
        assert [name for name, rank in member.ranks.items() if rank == whole.ranks[name]] == dense
    for options, sentence in (
        ({"energy": 1.5}, "energy 1.5: above 0, up to 1"),
        ({"threshold": 0.0}, "threshold 0.0: above 0"),
        ({"energy": 0.9, "threshold": 0.1}, "one rule is needed"),
    ):
        with pytest.raises(InputError, match=sentence):
            truncate(strided(), x, tmp_path / "never", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "never").exists()


def test_the_path_goes_through_spatial_layers_with_a_stride() -> None:
    module = strided()
    x = torch.randn(16, 8, 8, 8)
    positions = count_positions(module, (x,))
    wanted = module(x).detach()
    decompose(module, unrolling="spatial")

    def loss() -> float:
        with torch.no_grad():
            return float((module(x) - wanted).square().mean())

    whole = model_macs(module, positions)
    path = truncation_path(module, loss, positions, smallest=whole // 5)
    assert [each.macs for each in path] == sorted({each.macs for each in path}, reverse=True)
    assert path[-1].macs <= whole // 5
