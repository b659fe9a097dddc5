"""Padded samples: only real tokens are seen; and positions, the same for every sample, take no room."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from compress.calib.frontier import Frontier
from compress.calib.spill import SpilledSamples
from compress.calib.tokens import RealTokens, real_tokens, select_real
from compress.graph.layers import layer_calls
from compress.graph.simplify import simplify
from compress.graph.traced import TracedModel, trace
from tests.networks import Encoder

SAMPLES, LENGTH, WIDTH = 70, 9, 8  # more than one batch, the last one shorter


class Ids(nn.Module):
    """Token ids alone."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.second = nn.Embedding(30, WIDTH), nn.Linear(WIDTH, 8), nn.Linear(8, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(self.words(input_ids))))


def samples(padded: bool = True) -> tuple[Tensor, Tensor]:
    """Token ids and their mask; padded behind, one sample before, one in the middle."""
    ids = torch.randint(30, (SAMPLES, LENGTH))
    kept = torch.randint(1, LENGTH + 1, (SAMPLES, 1)) if padded else torch.full((SAMPLES, 1), LENGTH)
    mask = (torch.arange(LENGTH) < kept).long()
    if padded:
        mask[1], mask[65] = torch.arange(LENGTH) > 3, torch.arange(LENGTH) % 3 == 0
    return ids, mask


@functools.cache
def prepared(kind: str) -> tuple[nn.Module, TracedModel]:
    """``tokens``, ``pooled`` or ``ids``, and its graph; nothing here changes either."""
    module = (Ids() if kind == "ids" else Encoder(pooled=kind == "pooled")).eval()
    traced = trace(module, tuple(x[:2] for x in samples()[: 1 if kind == "ids" else 2]))
    assert traced.dynamic_length
    simplify(traced)
    return module, traced


def values_of(traced: TracedModel, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Every node's value over all samples, from the whole graph at once."""
    found: dict[str, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            found[n.name] = super().run_node(n)
            return found[n.name]

    with torch.no_grad():
        Recorder(traced.module).run(*inputs)
    return found


def call_of(traced: TracedModel, layer: str) -> fx.Node:
    return layer_calls(traced)[layer][0]


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("layer", ["qkv", "out", "inner", "last"])
def test_observers_see_real_tokens_in_order(layer: str, tmp_path: Path) -> None:
    ids, mask = samples()
    _, traced = prepared("tokens")
    call = call_of(traced, layer)
    wanted = values_of(traced, (ids, mask))[call.name][mask.bool()]
    frontier = Frontier(traced, (ids, mask), tmp_path)
    seen: dict[str, list[Tensor]] = {"peeked": [], "ahead": [], "behind": []}
    frontier.peek(call.name, seen["peeked"].append)
    frontier.show(call.name, seen["ahead"].append)
    frontier.show(call.name, seen["behind"].append)
    for how, parts in seen.items():
        assert len(parts) == 2, how
        torch.testing.assert_close(torch.cat(parts), wanted)
    frontier.close()


@pytest.mark.slow
def test_methods_get_real_tokens_in_order(tmp_path: Path) -> None:
    ids, mask = samples()
    _, traced = prepared("tokens")
    call = call_of(traced, "inner")
    values = values_of(traced, (ids, mask))
    frontier = Frontier(traced, (ids, mask), tmp_path)
    source = call.args[0].name  # type: ignore[union-attr]
    frontier.advance(source)
    frontier.advance(call.name, keep=(source, call.name))
    count = int(mask.sum()) // 16
    index = torch.tensor([count - 1, 0, 3, 3, 1])
    for name in (source, call.name):
        found = frontier.samples(name)
        assert isinstance(found, RealTokens)
        assert len(found) == count
        wanted = values[name][mask.bool()][: count * 16].reshape(count, 16, -1)
        torch.testing.assert_close(found.take(torch.arange(count)), wanted)
        torch.testing.assert_close(found.take(index), wanted[index])
    frontier.close()


@pytest.mark.matrix
def test_what_has_no_tokens_is_seen_whole(tmp_path: Path) -> None:
    """A sample's own value, and attention's scores [N, H, L, L]."""
    ids, mask = samples()
    _, traced = prepared("pooled")
    (softmax,) = traced.graph.find_nodes(op="call_function", target=torch.ops.aten.softmax.int)
    values = values_of(traced, (ids, mask))
    frontier = Frontier(traced, (ids, mask), tmp_path)
    for name in (softmax.name, call_of(traced, "last").name):
        seen: list[Tensor] = []
        frontier.advance(name, keep=(name,), watch={name: seen.append})
        torch.testing.assert_close(torch.cat(seen), values[name])
        found = frontier.samples(name)
        assert isinstance(found, SpilledSamples)
        torch.testing.assert_close(found.take(torch.arange(SAMPLES)), values[name])
    frontier.close()


@pytest.mark.parametrize("case", ["full mask", "no mask", "hardly any token"])
def test_without_padding_all_samples_are_there(case: str, tmp_path: Path) -> None:
    ids, mask = samples(padded=False)
    if case == "hardly any token":  # less than one sample of 16
        mask = torch.zeros_like(mask)
        mask[:15, 0] = 1
    inputs = (ids,) if case == "no mask" else (ids, mask)
    _, traced = prepared("ids" if case == "no mask" else "tokens")
    name = call_of(traced, "first" if case == "no mask" else "qkv").name
    wanted = values_of(traced, inputs)[name]
    frontier = Frontier(traced, inputs, tmp_path)
    seen: list[Tensor] = []
    frontier.advance(name, keep=(name,), watch={name: seen.append})
    torch.testing.assert_close(torch.cat(seen), wanted)
    found = frontier.samples(name)
    assert isinstance(found, SpilledSamples)
    assert len(found) == SAMPLES
    torch.testing.assert_close(found.take(torch.arange(SAMPLES)), wanted)
    frontier.close()


def test_real_tokens_of_inputs() -> None:
    ids, mask = samples()
    _, traced = prepared("tokens")
    assert traced.input_names == ("input_ids", "attention_mask")
    found = real_tokens(traced, (ids, mask))
    assert found is not None
    assert torch.equal(found, mask.bool())
    assert real_tokens(traced, None) is None
    assert real_tokens(traced, (ids, torch.ones_like(mask))) is None
    assert real_tokens(prepared("ids")[1], (ids,)) is None


def test_select_real_leaves_other_shapes() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    value = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(select_real(value, mask), value.reshape(6, 4)[[0, 1, 4, 5]])
    for other in (torch.randn(2, 3), torch.randn(2, 4), torch.randn(2, 5, 4), torch.randn(2, 2, 3, 3)):
        assert select_real(other, mask) is other


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokens", "pooled"])
def test_positions_take_no_room(kind: str, tmp_path: Path) -> None:
    inputs = samples()
    _, traced = prepared(kind)
    (places,) = (node for node in traced.graph.nodes if node.target is torch.ops.aten.tanh.default)
    frontier = Frontier(traced, inputs, tmp_path)
    files: set[str] = set()
    for node in list(traced.graph.nodes):
        if node.op == "call_function":
            frontier.advance(node.name)
            files |= {path.name for path in tmp_path.iterdir()}
    # The token ids' own values are stored, so something is; those along the sequence alone are not.
    assert f"{call_of(traced, 'inner').name}.samples" in files
    assert places.meta["val"].dim() == 2
    assert f"{places.name}.samples" not in files
    frontier.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["tokens", "pooled"])
def test_finish_gives_what_the_module_gives_from_everywhere(kind: str, tmp_path: Path) -> None:
    inputs = samples()
    module, traced = prepared(kind)
    with torch.no_grad():
        wanted = module(*inputs)
    frontier = Frontier(traced, inputs, tmp_path)
    parts = (torch.arange(SAMPLES), torch.arange(3), torch.arange(60, 67), torch.tensor([SAMPLES - 1]))
    for node in list(traced.graph.nodes):
        if node.op == "call_function":
            for index in parts:
                torch.testing.assert_close(frontier.finish({}, index), wanted[index], rtol=1e-5, atol=1e-6)
            frontier.advance(node.name)
    torch.testing.assert_close(frontier.finish({}, parts[2]), wanted[parts[2]], rtol=1e-5, atol=1e-6)
    frontier.close()


def test_finish_with_another_layer(tmp_path: Path) -> None:
    inputs = samples()
    module, traced = prepared("tokens")
    call = call_of(traced, "inner")
    frontier = Frontier(traced, inputs, tmp_path)
    frontier.advance(call.args[0].name)  # type: ignore[union-attr]
    index = torch.arange(20, 50)
    got = frontier.finish({call.name: lambda x: module.inner(x) * 2}, index)
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.inner.weight *= 2
        other.inner.bias *= 2
        wanted = other(*(x[index] for x in inputs))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    frontier.close()
