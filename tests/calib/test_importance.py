"""Fisher weights: of a linear rest of the network they are known in closed form."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from compress.calib.frontier import Frontier
from compress.calib.importance import Importance
from compress.graph.layers import layer_calls
from compress.graph.traced import trace

SAMPLES = 70  # more than one batch, the last one shorter


def test_behind_a_linear_rest_they_are_its_squared_columns_with_a_mean_of_one(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 300)).eval()
    x = torch.randn(SAMPLES, 4)
    traced = trace(model, (x[:2],))
    frontier = Frontier(traced, (x,), tmp_path / "frontier")
    (first,), (last,) = layer_calls(traced)["0"], layer_calls(traced)["2"]
    value = last.args[0].name
    frontier.advance(value, keep=(value,))
    batches = torch.arange(SAMPLES).split(32)
    weights = Importance(frontier, value, [last.name], batches, 0, tmp_path / "weights")
    found = weights.take(torch.arange(SAMPLES))
    assert found.shape == (SAMPLES, 6)
    assert abs(float(found.mean()) - 1) < 1e-5
    # E[(W^T v)^2] is the column's squared norm, the same for every sample.
    columns = model[2].weight.square().sum(0)
    assert torch.allclose(found.mean(0), columns / columns.mean(), rtol=0.25)
    again = Importance(frontier, value, [last.name], batches, 0, tmp_path / "again")
    assert torch.equal(found, again.take(torch.arange(SAMPLES)))
    weights.close()
    again.close()
    assert first.name != last.name


def test_what_a_relu_blocks_counts_nothing(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    torch.manual_seed(4)
    model = Net().eval()
    x = torch.randn(SAMPLES, 4)
    traced = trace(model, (x[:2],))
    frontier = Frontier(traced, (x,), tmp_path / "frontier")
    (call,), (last,) = layer_calls(traced)["a"], layer_calls(traced)["b"]
    frontier.advance(call.name, keep=(call.name,))
    weights = Importance(frontier, call.name, [last.name], torch.arange(SAMPLES).split(32), 0, tmp_path / "weights")
    found = weights.take(torch.arange(SAMPLES))
    with torch.no_grad():
        alive = model.a(x) > 0
    assert bool((found[~alive] == 0).all())
    assert bool((found[alive] > 0).all())
    weights.close()
