"""What cannot be is refused by name, and what does not pay is left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from compress.errors import InputError
from compress.lowrank.decompose import decompose
from compress.lowrank.maestro import Maestro
from compress.lowrank.shrink import kept_rank, shrink
from compress.lowrank.truncate import cut_to
from compress.training.lowrank.job import LowRankOptions, truncate


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 1)).eval()


@pytest.mark.slow
def test_a_layer_that_no_rank_makes_cheaper_is_kept_dense_and_named(tmp_path: Path) -> None:
    done = decompose(net())
    assert done.dense == {"2": "two layers of rank 1 would cost no less"}
    assert list(done.layers) == ["0"]
    with pytest.raises(ValueError, match="nothing to decompose: 0: two layers of rank 1 would cost no less"):
        decompose(nn.Sequential(nn.Linear(2, 2)))
    result = truncate(net(), torch.randn(32, 12), tmp_path / "out", options=LowRankOptions(smallest=0.5))
    assert result.family.dense == done.dense
    truncate(net(), torch.randn(32, 12), tmp_path / "out", options=LowRankOptions(smallest=0.5, overwrite=True))
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_families_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="mine is not a folder that `compress lowrank` has written, so --overwrite"):
        truncate(net(), torch.randn(32, 12), tmp_path / "mine", options=LowRankOptions(overwrite=True))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


def test_ranks_out_of_range_name_the_layer_and_cut_nothing() -> None:
    module = net()
    layers = decompose(module).layers
    for rank in (-1, 13):
        with pytest.raises(ValueError, match=f"layer 0: rank {rank}, allowed are 0 to 12"), cut_to(layers, {"0": rank}):
            pass
    with pytest.raises(ValueError, match="no decomposed layer '2'; there are 0"), cut_to(layers, {"0": 3, "2": 1}):
        pass
    assert layers["0"].active is None
    with pytest.raises(ValueError, match="this layer has 12, and ranks never grow"):
        shrink(layers["0"], 13)


def test_a_plain_call_cuts_until_the_next_and_a_block_puts_back_what_was() -> None:
    layers = decompose(net()).layers
    cut_to(layers, {"0": 5})
    assert layers["0"].active == 5
    with cut_to(layers, {"0": 3}):
        assert layers["0"].active == 3
    assert layers["0"].active == 5


def test_weights_that_are_not_finite_are_no_reason_to_shrink() -> None:
    maestro = Maestro(net())
    with torch.no_grad():
        maestro.layers["0"].up[0, 3] = float("nan")
    with pytest.raises(ValueError, match="the weights are not finite"):
        kept_rank(maestro.layers["0"], 0.1)
    with pytest.raises(ValueError, match="the weights are not finite"):
        maestro.end_epoch()
    assert maestro.ranks == {"0": 12}
