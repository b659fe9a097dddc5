"""Ranks by integer program: the best plan where losses add up, and never worse than greedy search where they do not."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from compress.errors import InputError
from compress.lowrank.decompose import decompose, decomposed_layers
from compress.lowrank.truncate import Member, count_positions, model_macs
from compress.training.lowrank.family import Family
from compress.training.lowrank.job import LowRankOptions, truncate
from compress.training.lowrank.rank_program import program_path, rank_ladder, undominated
from tests.every import every


def test_a_ladder_goes_where_greedy_search_goes() -> None:
    assert rank_ladder(10, 5.0, 0.5) == [10, 2, 1]
    assert rank_ladder(4, 8.0, 0.85) == [4, 3, 2, 1]
    assert rank_ladder(0, 8.0, 0.85) == [0]


def test_where_losses_add_up_every_plan_is_the_best_there_is() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 8)).eval()
    layers = decompose(module).layers
    prices = dict(zip(layers, (1.0, 3.0, 0.2), strict=True))

    def loss() -> float:
        return sum(
            prices[name] * (layer.full_rank - (layer.rank if layer.active is None else layer.active)) ** 1.5
            for name, layer in layers.items()
        )

    positions = count_positions(module, (torch.randn(2, 8),))
    whole = model_macs(module, positions)
    path = program_path(module, loss, positions, smallest=whole // 3)
    assert path[0] == Member({name: layer.rank for name, layer in layers.items()}, whole, 0.0)
    assert path[-1].macs <= whole // 3
    ladders = [rank_ladder(layer.rank, layer.saving_rank(positions[name]), 0.85) for name, layer in layers.items()]
    every = []
    for ranks in itertools.product(*ladders):
        plan = dict(zip(layers, ranks, strict=True))
        for name, rank in plan.items():
            layers[name].active = rank
        every.append((model_macs(module, positions, plan), loss()))
    for member in path[1:]:
        assert member.loss <= 1.002 * min(lost for macs, lost in every if macs <= member.macs)


def test_what_is_dominated_goes_and_the_whole_model_stays() -> None:
    whole = Member({"a": 9}, 100, 0.5)
    first = [whole, Member({"a": 6}, 80, 0.4), Member({"a": 3}, 40, 0.9)]
    second = [whole, Member({"a": 5}, 60, 0.4), Member({"a": 4}, 40, 0.7), Member({"a": 2}, 30, 0.7)]
    assert undominated(first, second) == [whole, second[1], second[3]]
    assert undominated([whole], [whole]) == [whole]


def _family(tmp_path: Path, search: str) -> Family:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    x = torch.randn(200, 24) * torch.logspace(-1, 0.5, 24)
    return truncate(module, x, tmp_path / search, options=LowRankOptions(smallest=0.15, search=search)).family


@pytest.mark.matrix
def test_the_program_never_loses_to_greedy_search(tmp_path: Path) -> None:
    greedy, both = (_family(tmp_path, search).members for search in ("greedy", "program"))
    better = 0
    for member in greedy:
        best = min(each.loss for each in both if each.macs <= member.macs)
        assert best <= member.loss + 1e-12
        better += best < member.loss - 1e-9
    assert better > 0
    assert [each.macs for each in both] == sorted((each.macs for each in both), reverse=True)


def test_an_unknown_search_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--search magic: known are greedy, program"):
        _family(tmp_path, "magic")
    assert not list(tmp_path.iterdir())


def test_the_module_is_left_whole() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    decompose(module)
    x = torch.randn(4, 8)
    positions = count_positions(module, (x,))
    program_path(module, lambda: float("nan"), positions, smallest=1)  # every cut's loss is unusable: none is made
    assert every(layer.active is None for layer in decomposed_layers(module).values())
