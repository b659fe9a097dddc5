"""The frontier: the same values as the whole graph, edits in time, and nothing kept that is no longer needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.calib.frontier import Frontier
from compress.graph.layers import layer_calls
from compress.graph.traced import TracedModel, trace
from tests.every import every
from tests.networks import FixedBatch, Masked, SequenceFirst

SAMPLES = 70  # more than one batch, the last one shorter


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        return self.c(torch.relu(self.b(y)) + y)


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        windows = torch.relu(self.a(x.reshape(-1, 2, 4)))
        return self.b(windows).reshape(x.shape[0], 6, 4).sum(1)


class Split(nn.Module):
    """An operator that gives several values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, dim=1)
        return self.b(left) + self.c(right)


NETS = {
    "residual": (Residual, (2, 5, 5)),
    "masked": (Masked, (5, 6)),
    "sequence first": (SequenceFirst, (5, 6)),
    "windows": (Windows, (6, 4)),
    "fixed batch": (FixedBatch, (6,)),
    "split": (Split, (4,)),
}


@pytest.fixture(params=NETS, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, TracedModel, Tensor]:
    make, shape = NETS[request.param]
    module = make().eval()
    x = torch.randn(SAMPLES, *shape)
    return module, trace(module, (x[:2],)), x


def whole(module: nn.Module, traced: TracedModel, x: Tensor) -> Tensor:
    size = 64 if traced.dynamic_batch else 1
    with torch.no_grad():
        return torch.cat([module(part) for part in x.split(size)])


def last(traced: TracedModel) -> str:
    return traced.outputs()[0].name


@pytest.mark.slow
def test_node_by_node_gives_what_the_whole_graph_gives(
    case: tuple[nn.Module, TracedModel, Tensor], tmp_path: Path
) -> None:
    module, traced, x = case
    frontier = Frontier(traced, (x,), tmp_path)
    seen: list[Tensor] = []
    for node in list(traced.graph.nodes):
        if node.op == "call_function":
            watch = {node.name: seen.append} if node.name == last(traced) else None
            frontier.advance(node.name, watch=watch)
    assert torch.equal(torch.cat(seen), whole(module, traced, x))
    frontier.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_value_is_shown_before_and_after_it_is_passed(
    case: tuple[nn.Module, TracedModel, Tensor], tmp_path: Path
) -> None:
    _, traced, x = case
    frontier = Frontier(traced, (x,), tmp_path)
    first = next(iter(layer_calls(traced).values()))[0].name
    ahead: list[Tensor] = []
    behind: list[Tensor] = []
    frontier.show(first, ahead.append)
    frontier.show(first, behind.append)
    assert len(ahead) > 1
    assert every(torch.equal(one, other) for one, other in zip(ahead, behind, strict=True))
    frontier.close()


@pytest.mark.slow
def test_layer_inputs_have_as_many_rows_as_layer_outputs(
    case: tuple[nn.Module, TracedModel, Tensor], tmp_path: Path
) -> None:
    _, traced, x = case
    frontier = Frontier(traced, (x,), tmp_path)
    for layer, (call,) in layer_calls(traced).items():
        source = call.args[0]
        if source.op != "placeholder":
            frontier.advance(source.name)
        frontier.advance(call.name, keep=(source.name, call.name))
        if source.op == "placeholder":
            continue
        inputs, outputs = frontier.samples(source.name), frontier.samples(call.name)
        index = torch.tensor([len(inputs) - 1, 0, 1])
        weight, bias = (traced.tensor(str(node.target)) for node in call.args[1:3])
        wanted = call.target(inputs.take(index), weight, bias, *call.args[3:])
        torch.testing.assert_close(outputs.take(index), wanted, msg=lambda text, layer=layer: f"{layer}: {text}")
    frontier.close()


def test_an_edit_ahead_takes_effect_and_one_behind_does_not(tmp_path: Path) -> None:
    module, x = Residual().eval(), torch.randn(SAMPLES, 2, 5, 5)
    traced = trace(module, (x[:2],))
    a, b = (layer_calls(traced)[name][0] for name in "ab")
    frontier = Frontier(traced, (x,), tmp_path)
    frontier.advance(a.name, keep=(a.name,))
    assert frontier.passed(a.name)
    assert not frontier.passed(b.name)
    before = frontier.samples(a.name).take(torch.arange(SAMPLES))
    traced.set_tensor("a.bias", torch.full((4,), 100.0))
    traced.set_tensor("b.bias", torch.full((4,), 7.0))
    frontier.advance(b.name, keep=(a.name, b.name))
    with torch.no_grad():
        assert torch.equal(before, torch.cat([module.a(part) for part in x.split(64)]))
        wanted = torch.cat([nn.functional.conv2d(torch.relu(y), module.b.weight) + 7 for y in before.split(64)])
    torch.testing.assert_close(frontier.samples(b.name).take(torch.arange(SAMPLES)), wanted)


def test_peek_looks_and_runs_again(tmp_path: Path) -> None:
    module, x = Residual().eval(), torch.randn(SAMPLES, 2, 5, 5)
    traced = trace(module, (x[:2],))
    (b,) = layer_calls(traced)["b"]
    frontier = Frontier(traced, (x,), tmp_path)
    first: list[Tensor] = []
    frontier.peek(b.name, first.append)
    traced.set_tensor("b.bias", traced.tensor("b.bias") + 1)
    second: list[Tensor] = []
    frontier.peek(b.name, second.append)
    torch.testing.assert_close(torch.cat(second), torch.cat(first) + 1)
    frontier.advance(b.name, keep=(b.name,))
    assert torch.equal(frontier.samples(b.name).take(torch.arange(SAMPLES)), torch.cat(second))


def test_only_what_is_still_read_stays_on_disk(tmp_path: Path) -> None:
    x = torch.randn(SAMPLES, 2, 5, 5)
    traced = trace(Residual().eval(), (x[:2],))
    frontier = Frontier(traced, (x,), tmp_path)
    most = 0
    for node in list(traced.graph.nodes):
        if node.op == "call_function":
            frontier.advance(node.name)
            files = sorted(path.name for path in tmp_path.iterdir())
            most = max(most, len(files))
    assert most == 2, "the shortcut and the branch beside it, no more"
    assert files == [f"{last(traced)}.samples"], "the graph's result, which its output node reads"
    frontier.close()


def test_what_was_kept_goes_with_the_next_step(tmp_path: Path) -> None:
    x = torch.randn(SAMPLES, 2, 5, 5)
    traced = trace(Residual().eval(), (x[:2],))
    a, c = (layer_calls(traced)[name][0] for name in "ac")
    frontier = Frontier(traced, (x,), tmp_path)
    frontier.advance(a.name, keep=(a.name,))
    frontier.advance(c.name, keep=())
    with pytest.raises(KeyError):
        frontier.samples(a.name)
    assert not (tmp_path / f"{a.name}.samples").exists()
    frontier.close()


def test_files_are_as_large_as_the_samples_and_no_larger(tmp_path: Path) -> None:
    x = torch.randn(SAMPLES, 2, 5, 5)
    traced = trace(Residual().eval(), (x[:2],))
    a = layer_calls(traced)["a"][0]
    frontier = Frontier(traced, (x,), tmp_path)
    frontier.advance(a.name, keep=(a.name,))
    assert (tmp_path / f"{a.name}.samples").stat().st_size == SAMPLES * 4 * 25 * 4
    frontier.close()


def test_an_unknown_node_is_named(tmp_path: Path) -> None:
    traced = trace(nn.Linear(2, 2).eval(), (torch.zeros(1, 2),))
    with pytest.raises(KeyError, match="nowhere"):
        Frontier(traced, (torch.zeros(3, 2),), tmp_path).advance("nowhere")
