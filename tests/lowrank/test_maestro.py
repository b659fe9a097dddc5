"""Sampler, penalty and shrinking: what must hold at every step of a training with ordered factors."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from compress.lowrank.decompose import decompose, decomposed_layers
from compress.lowrank.layers import LowRankLinear
from compress.lowrank.maestro import Maestro
from compress.lowrank.norms import norm_statistics, recalibrate
from compress.lowrank.sampler import RankSampler
from compress.lowrank.shrink import hierarchical_lasso, kept_rank, shrink
from tests.every import every


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))


def test_every_pair_comes_once_before_any_comes_again() -> None:
    layers = {"a": LowRankLinear.of(nn.Linear(6, 4)), "b": LowRankLinear.of(nn.Linear(3, 7))}
    sampler = RankSampler(layers)
    pairs = [("a", rank) for rank in range(1, 5)] + [("b", rank) for rank in range(1, 4)]
    orders = []
    for _ in range(3):
        drawn = [next(iter(sampler.draw().items())) for _ in pairs]
        assert sorted(drawn) == sorted(pairs)
        orders.append(drawn)
    assert orders[0] != orders[1], "shuffled anew"


def test_no_rank_that_is_gone_is_drawn() -> None:
    layers = {"a": LowRankLinear.of(nn.Linear(6, 6)), "b": LowRankLinear.of(nn.Linear(6, 6))}
    sampler = RankSampler(layers)
    sampler.draw()
    shrink(layers["a"], 2)
    shrink(layers["b"], 0)
    counts = Counter(next(iter(sampler.draw().items())) for _ in range(10))
    assert counts == {("a", 1): 5, ("a", 2): 5}


def test_layers_are_cut_during_the_step_only_whatever_happens_in_it() -> None:
    layer = LowRankLinear.of(nn.Linear(6, 6))
    sampler = RankSampler({"a": layer}, "independent")
    with sampler.step() as drawn:
        assert layer.active == drawn["a"]
    assert layer.active is None
    with pytest.raises(RuntimeError), sampler.step():
        raise RuntimeError
    assert layer.active is None
    with pytest.raises(ValueError, match="unknown sampler 'magic'; known: pair, independent, shared, full"):
        RankSampler({}, "magic")


def test_one_rank_for_all_layers() -> None:
    layers = {"a": LowRankLinear.of(nn.Linear(9, 9)), "b": LowRankLinear.of(nn.Linear(3, 7))}
    drawn = [RankSampler(layers, "shared", seed).draw() for seed in range(40)]
    assert every(each["b"] == min(each["a"], 3) for each in drawn)
    assert {each["a"] for each in drawn} == set(range(1, 10))


def test_low_ranks_are_shared_more_often() -> None:
    sampler = RankSampler({"a": LowRankLinear.of(nn.Linear(16, 16))}, "shared")
    counts = Counter(sampler.draw()["a"] for _ in range(8000))
    total = sum(rank**-0.5 for rank in range(1, 17))
    for rank in (1, 4, 16):
        assert counts[rank] / 8000 == pytest.approx(rank**-0.5 / total, rel=0.2)
    shrink(sampler.layers["a"], 3)
    assert {sampler.draw()["a"] for _ in range(100)} == {1, 2, 3}


def test_a_sampler_goes_on_where_it_was() -> None:
    layers = {"a": LowRankLinear.of(nn.Linear(9, 9))}
    first = RankSampler(layers, seed=3)
    for _ in range(4):
        first.draw()
    second = RankSampler(layers, seed=8)
    second.load_state_dict(first.state_dict())
    assert [first.draw() for _ in range(20)] == [second.draw() for _ in range(20)]


def test_the_penalty_is_the_sum_of_all_tails() -> None:
    layer = LowRankLinear.of(nn.Linear(7, 5))
    plain = sum(float((layer.up[:, j:].norm() + layer.down[j:].norm()).detach()) for j in range(5))
    assert float(hierarchical_lasso({"a": layer}).detach()) == pytest.approx(plain, rel=1e-5)


def test_a_tail_of_zeros_has_a_gradient_of_zeros() -> None:
    layer = LowRankLinear.of(nn.Linear(7, 5))
    with torch.no_grad():
        layer.up[:, 3:] = 0
        layer.down[3:] = 0
    hierarchical_lasso({"a": layer}).backward()
    for gradient in (layer.up.grad, layer.down.grad):
        assert gradient is not None
        assert torch.isfinite(gradient).all()
    assert torch.equal(layer.up.grad[:, 3:], torch.zeros(5, 2))  # type: ignore[index]
    assert float(hierarchical_lasso({}).item()) == 0.0


def test_importance_never_rises_and_what_is_kept_is_a_prefix() -> None:
    layer = LowRankLinear.of(nn.Linear(12, 9))
    with torch.no_grad():
        layer.up *= torch.rand(9) * 3
        layer.down *= torch.rand(9)[:, None] * 3
    importance = layer.importance()
    assert bool((importance[1:] <= importance[:-1]).all())
    for threshold in (0.0, 0.1, 1.0, 100.0):
        rank = kept_rank(layer, threshold)
        assert bool((importance[:rank] >= threshold).all())
        assert not bool((importance[rank:] >= threshold).any())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_shrinking_cuts_parameters_and_optimizer_alike(kind: type) -> None:
    """A component of zeros that stays and one that is gone: the others go on alike."""
    layer = LowRankLinear.of(nn.Linear(7, 5))
    with torch.no_grad():
        layer.up[:, 3:] = 0
        layer.down[3:] = 0
    settings = {"lr": 0.05} | ({"momentum": 0.9} if kind is torch.optim.SGD else {})
    x, y = torch.randn(16, 7), torch.randn(16, 5)

    def steps(layer: LowRankLinear, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            (layer(x) - y).square().mean().backward()
            optimizer.step()

    other = copy.deepcopy(layer)
    optimizers = [kind(each.parameters(), **settings) for each in (layer, other)]
    for each, optimizer in zip((layer, other), optimizers, strict=True):
        steps(each, optimizer, 3)
    shrink(other, 3, optimizers[1])
    assert (other.up.shape, other.down.shape) == ((5, 3), (3, 7))
    for state in optimizers[1].state.values():
        for value in state.values():
            assert not isinstance(value, Tensor) or value.dim() == 0 or 5 not in value.shape[1:2]
    for each, optimizer in zip((layer, other), optimizers, strict=True):
        steps(each, optimizer, 3)
    torch.testing.assert_close(other.up, layer.up[:, :3])
    torch.testing.assert_close(other.down, layer.down[:3])
    torch.testing.assert_close(other.bias, layer.bias)
    with pytest.raises(ValueError, match="ranks never grow"):
        shrink(other, 4)


def test_state_of_another_shape_starts_anew() -> None:
    layer = LowRankLinear.of(nn.Linear(7, 5))
    optimizer = torch.optim.Adafactor(layer.parameters(), lr=0.01)
    x = torch.randn(16, 7)
    for rank in (4, 2):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
        shrink(layer, rank, optimizer)
    assert layer.rank == 2


def test_full_sampling_without_penalty_is_ordinary_training_bit_for_bit() -> None:
    torch.manual_seed(5)
    plain = net()
    decompose(plain)
    ours = copy.deepcopy(plain)
    maestro = Maestro(ours, penalty=0.0, threshold=0.0, sampler="full")
    x, y = torch.randn(64, 6), torch.randint(0, 5, (64,))
    losses: list[list[float]] = [[], []]
    optimizers = [torch.optim.SGD(each.parameters(), 0.1, 0.9) for each in (plain, ours)]
    for _ in range(10):
        loss = nn.functional.cross_entropy(plain(x), y)
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        losses[0].append(float(loss.detach()))
        with maestro.step():
            loss = nn.functional.cross_entropy(ours(x), y)
            optimizers[1].zero_grad()
            (loss + maestro.penalty()).backward()
            optimizers[1].step()
        maestro.end_epoch(optimizers[1])
        losses[1].append(float(loss.detach()))
    assert losses[0] == losses[1]


def test_ranks_fall_under_the_penalty_and_never_grow() -> None:
    torch.manual_seed(6)
    module = net()
    maestro = Maestro(module, penalty=0.02)
    optimizer = torch.optim.SGD(module.parameters(), 0.05, 0.9)
    x = torch.randn(128, 6)
    y = (x[:, 0] > 0).long()  # one direction is enough
    seen = [maestro.ranks]
    for _ in range(30):
        for batch in torch.arange(128).split(32):
            with maestro.step() as drawn:
                assert every(rank <= maestro.ranks[name] for name, rank in drawn.items())
                optimizer.zero_grad()
                (nn.functional.cross_entropy(module(x[batch]), y[batch]) + maestro.penalty()).backward()
                optimizer.step()
        maestro.end_epoch(optimizer)
        assert every(maestro.ranks[name] <= rank for name, rank in seen[-1].items())
        seen.append(maestro.ranks)
    assert sum(seen[-1].values()) < 0.7 * sum(seen[0].values()), seen[-1]
    assert float((module(x).argmax(1) == y).double().mean()) > 0.9


def test_a_checkpoint_of_another_architecture_is_refused() -> None:
    first, second = Maestro(net()), Maestro(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 5)))
    with pytest.raises(ValueError, match="of another architecture: layer 0 is 8 x 6 there, 4 x 6 here"):
        second.load_state_dict(first.state_dict())
    cut = Maestro(net())
    shrink(cut.layers["0"], 3)
    with pytest.raises(ValueError, match="of another architecture: layer 0 has rank 6 there, at most 3 here"):
        cut.load_state_dict(first.state_dict())
    third = Maestro(nn.Sequential(nn.Linear(6, 4)))
    with pytest.raises(ValueError, match="another architecture: 2 only in one of them"):
        third.load_state_dict(first.state_dict())


def test_statistics_are_means_over_all_batches_and_the_mode_is_left_alone() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.9))
    module.train()
    x = torch.randn(96, 3) * 5 + 2
    with torch.no_grad():
        y = module[0](x)
        assert recalibrate(module, (each for each in x.split(32))) == 1
    means = torch.stack([each.mean(0) for each in y.split(32)]).mean(0)
    torch.testing.assert_close(norm_statistics(module)["1.running_mean"], means)
    assert module.training
    assert module[1].momentum == 0.1
    assert recalibrate(nn.Sequential(nn.Linear(3, 3)), []) == 0


def test_decomposed_layers_are_found_by_name() -> None:
    module = net()
    maestro = Maestro(module)
    assert decomposed_layers(module) == maestro.layers
    assert maestro.extract().keys() == {"0", "2"}
