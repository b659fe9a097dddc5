"""Equalisation leaves the function alone, makes the ranges equal, and keeps its hands off what it cannot scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.errors import CompressError, InputError
from compress.graph.fold import fold_batch_norm
from compress.graph.layers import layer_calls
from compress.graph.simplify import simplify
from compress.graph.traced import TracedModel, trace
from compress.records.layers import QuantOption
from compress.transform import equalize as equalize_module
from compress.transform.channels import Channels, arguments, pass_through
from compress.transform.equalize import equalize, prepare
from compress.transform.table import PREPARATIONS, TRANSFORMS, apply_transform
from tests.every import every


class _Twice(nn.Module):
    """A residual block: the first convolution's result is read by the second and by the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(6, 6, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.third(self.second(x).relu()) + x


class _Moves(nn.Module):
    """Channels that change their axis on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner, self.last = nn.Conv2d(3, 6, 3), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.conv(x).relu().permute(0, 2, 3, 1))
        return self.last(nn.functional.leaky_relu(x.flatten(1, 2).transpose(1, 2), 0.1).mean(2))


def _conv(inputs: int, outputs: int, kernel: int = 3, groups: int = 1, bias: bool = True) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=bias), nn.ReLU()]


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.weight, 0.2, 2.0)
    nn.init.normal_(norm.bias)
    nn.init.uniform_(norm.running_var, 0.1, 3.0)
    return norm


def _chains() -> dict[str, tuple[nn.Module, tuple[int, ...], int]]:
    """Model, input shape of one sample, number of pairs."""
    flat = [nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(8 * 16, 7), nn.ReLU(), nn.Linear(7, 5)]
    pools = [nn.MaxPool2d(2), nn.ZeroPad2d((0, 1, 0, 1)), *_conv(8, 6), nn.AvgPool2d(2), *_conv(6, 4)]
    mean = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)]
    normed = [nn.Conv2d(3, 8, 3, bias=False), _batch_norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), _batch_norm(8)]
    conv1d = [nn.Conv1d(3, 6, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(6, 4, 3), nn.Flatten(), nn.Linear(4 * 4, 3)]
    image = (3, 8, 8)
    return {
        "plain": (nn.Sequential(*_conv(3, 8), *_conv(8, 6), *_conv(6, 4)), image, 2),
        "no activation, no bias": (nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 4, 3)), image, 1),
        "depthwise": (nn.Sequential(*_conv(3, 8), *_conv(8, 8, groups=8), *_conv(8, 6, 1), *_conv(6, 4)), image, 3),
        "multiplier": (nn.Sequential(*_conv(3, 4), *_conv(4, 12, groups=4), *_conv(12, 4)), image, 2),
        "grouped": (nn.Sequential(*_conv(3, 8), *_conv(8, 12, groups=4), *_conv(12, 6, groups=2)), image, 2),
        "pools and padding": (nn.Sequential(*_conv(3, 8), *pools), image, 2),
        "flatten": (nn.Sequential(*_conv(3, 8), *flat), image, 2),
        "global pool": (nn.Sequential(*_conv(3, 6), *mean), image, 1),
        "batch norm": (nn.Sequential(*normed, nn.ReLU(), nn.Conv2d(8, 4, 1)), image, 2),
        "conv1d": (nn.Sequential(*conv1d), (3, 14), 2),
        "moves": (_Moves(), image, 2),
        "residual": (_Twice(), (6, 8, 8), 1),
    }


def _traced(model: nn.Module, shape: tuple[int, ...]) -> TracedModel:
    """Folded graph of ``model``, its weights made uneven from channel to channel."""
    for parameter in [
        p for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear) for p in [m.weight]
    ]:
        uneven = torch.exp(1.5 * torch.randn(parameter.shape[:2]))
        parameter.data *= uneven.reshape(*uneven.shape, *[1] * (parameter.dim() - 2))
    traced = trace(model, (torch.randn(2, *shape),))
    simplify(traced)
    fold_batch_norm(traced)
    return traced


def _ranges(traced: TracedModel) -> list[tuple[Tensor, Tensor]]:
    """Per pair, the largest magnitudes of each channel on both sides, by plain loops."""
    pairs, _ = equalize_module._pairs(traced, through_relu6=False)
    found = []
    for pair in pairs:
        first, second = traced.tensor(f"{pair.first}.weight"), traced.tensor(f"{pair.second}.weight")
        channels, outputs = len(first), len(second)
        inputs = second.shape[1] // pair.repeat
        read = torch.zeros(channels)
        for channel in range(channels):
            group, local = divmod(channel, inputs)
            rows = second[group * outputs // pair.groups : (group + 1) * outputs // pair.groups]
            read[channel] = rows[:, local * pair.repeat : (local + 1) * pair.repeat].abs().max()
        found.append((first.abs().flatten(1).amax(1), read))
    return found


def _relative(x: Tensor, y: Tensor) -> float:
    return float(((y - x).norm() / x.norm()).detach())


@pytest.mark.slow
@pytest.mark.parametrize("name", _chains())
def test_function_stays_and_ranges_meet(name: str) -> None:
    model, shape, pairs = _chains()[name]
    traced = _traced(model, shape)
    fresh = torch.randn(5, *shape)
    before, uneven = traced.module(fresh), _ranges(traced)
    sentences = equalize(traced)
    assert sum("are equalised" in sentence for sentence in sentences) == pairs == len(uneven)
    assert any(not torch.allclose(r1, r2, rtol=0.5) for r1, r2 in uneven)
    for r1, r2 in _ranges(traced):
        torch.testing.assert_close(r1, r2, rtol=1e-2, atol=0)
    assert _relative(before, traced.module(fresh)) < 1e-5


def test_first_factor_is_the_papers() -> None:
    traced = _traced(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), (3, 8, 8))
    ((r1, r2),) = _ranges(traced)
    first, second, bias = (traced.tensor(name) for name in ("0.weight", "2.weight", "0.bias"))
    equalize(traced, iterations=1)
    factor = torch.sqrt(r1 * r2) / r2
    torch.testing.assert_close(traced.tensor("0.weight"), first / factor.reshape(-1, 1, 1, 1))
    torch.testing.assert_close(traced.tensor("2.weight"), second * factor.reshape(1, -1, 1, 1))
    torch.testing.assert_close(traced.tensor("0.bias"), bias / factor)


@pytest.mark.slow
def test_statistics_follow_their_channels() -> None:
    model, shape, _ = _chains()["batch norm"]
    traced = _traced(model, shape)
    old, bias = dict(traced.statistics), traced.tensor("0.bias")
    other = traced.copy()
    equalize(traced)
    factor = bias / traced.tensor("0.bias")
    assert not torch.allclose(factor, torch.ones(8))
    torch.testing.assert_close(traced.statistics["0"].mean, old["0"].mean / factor)
    torch.testing.assert_close(traced.statistics["0"].deviation, old["0"].deviation / factor)
    # The copy shares no tensors: what it was copied from may change.
    torch.testing.assert_close(other.statistics["0"].mean, old["0"].mean, rtol=0, atol=0)
    torch.testing.assert_close(other.tensor("0.bias"), bias, rtol=0, atol=0)


def test_value_read_twice_stays() -> None:
    traced = _traced(_Twice(), (6, 8, 8))
    kept = {name: traced.tensor(name) for name in ("first.weight", "first.bias", "third.bias")}
    sentences = equalize(traced)
    assert any("first" in sentence and "is read 2 times" in sentence for sentence in sentences)
    for name, tensor in kept.items():
        torch.testing.assert_close(traced.tensor(name), tensor, rtol=0, atol=0)


def _shared() -> nn.Module:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    return nn.Sequential(conv, nn.ReLU(), conv, nn.ReLU(), nn.Conv2d(4, 4, 3))


class _Shuffle(nn.Module):
    """Two operators that a factor on each channel does not pass, and an output before the end."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.one, self.other = kind, nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.one(x)
        if self.kind == "roll":
            return self.other(x.reshape(-1, 2, 2, 6, 6).transpose(1, 2).reshape(-1, 4, 6, 6))
        if self.kind == "swap":
            return self.other(x[:, :, :4].transpose(1, 2))
        return self.other(x.sigmoid()) if self.kind == "sigmoid" else (self.other(x), x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (_shared(), "called 2 times"),
        (_Shuffle("roll"), "mixes its channels"),
        (_Shuffle("swap"), "mixes its channels"),
        (_Shuffle("sigmoid"), "sigmoid.default follows"),
        (_Shuffle("output"), "is read 2 times"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.ConstantPad2d(1, 0.5), nn.Conv2d(4, 4, 3)), "mixes its channels"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 3)), "a ReLU6 follows"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(6, 4)), "mixes its channels"),
    ],
    ids=["shared", "roll", "swap", "sigmoid", "output", "constant pad", "relu6", "last axis"],
)
def test_refusals_change_nothing_and_say_why(model: nn.Module, reason: str) -> None:
    traced = _traced(model, (4, 8, 8))
    before = {name: tensor.clone() for name, tensor in traced.module.state_dict().items()}
    sentences = equalize(traced)
    assert any(reason in sentence for sentence in sentences), sentences
    assert not any("are equalised" in sentence for sentence in sentences)
    for name, tensor in traced.module.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_dead_and_constant_channels() -> None:
    traced = _traced(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)), (3, 8, 8))
    first, second, bias = traced.tensor("0.weight"), traced.tensor("2.weight"), traced.tensor("0.bias")
    first[0], second[:, 1] = 0, 0  # nothing written, nothing read
    first[2], bias[2] = 1e-12 * first[2], 0.5  # constant: no range of weights is worth blowing this up
    fresh = torch.randn(5, 3, 8, 8)
    before = traced.module(fresh)
    sentences = equalize(traced)
    assert "constant channels are held back" in sentences[0]
    assert every(torch.isfinite(tensor).all() for tensor in traced.module.state_dict().values())
    torch.testing.assert_close(traced.tensor("0.bias")[:2], bias[:2])
    assert traced.tensor("0.bias")[2] <= bias.abs().max() * (1 + 1e-6)
    assert _relative(before, traced.module(fresh)) < 1e-5


@pytest.mark.slow
def test_replaced_relu6_is_said_and_measured() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 3), nn.ReLU6())
    traced = _traced(model, (3, 8, 8))
    loud = (20 * torch.randn(4, 3, 8, 8),)
    original = traced.copy()
    sentences = apply_transform("equalize", traced, loud, relu6="replace")
    reference = original.copy()
    # The last ReLU6 stands between no layers and stays.
    assert prepare(reference, relu6="replace")[0].startswith("1 ReLU6 became ReLU")
    assert any(node.target is torch.ops.aten.hardtanh.default for node in traced.graph.nodes)
    change = _relative(original.module(*loud), reference.module(*loud))
    assert change > 0.01
    assert sentences[0].startswith("1 ReLU6 became ReLU")
    assert f"{change:.2g}" in sentences[1]
    assert _relative(reference.module(*loud), traced.module(*loud)) < 1e-5


def test_options_are_checked() -> None:
    traced = _traced(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), (3, 8, 8))
    with pytest.raises(InputError, match="keep, replace"):
        equalize(traced, relu6="drop")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one iteration"):
        equalize(traced, iterations=0)
    with pytest.raises(InputError, match="unknown transform 'equalise'"):
        apply_transform("equalise", traced)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [1.01, float("nan")])
@pytest.mark.parametrize("data", [True, False])
def test_broken_contract_is_caught_and_undone(monkeypatch: pytest.MonkeyPatch, data: bool, damage: float) -> None:
    def bad(traced: TracedModel) -> list[str]:
        traced.set_tensor("2.weight", traced.tensor("2.weight") * damage)
        traced.notes.append("changed")
        return ["harmless"]

    monkeypatch.setattr(equalize_module, "equalize", bad)
    traced = _traced(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), (3, 8, 8))
    weight = traced.tensor("2.weight").clone()
    inputs = (torch.randn(4, 3, 8, 8),) if data else None
    with pytest.raises(CompressError, match=r"transform 'equalize' changed the model's outputs by (0\.0|nan)"):
        apply_transform("equalize", traced, inputs)
    torch.testing.assert_close(traced.tensor("2.weight"), weight, rtol=0, atol=0)
    assert traced.notes == []


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_keeps_its_contract(name: str) -> None:
    model, shape, _ = _chains()["depthwise"]
    traced = _traced(model, shape)
    samples = (torch.randn(8, *shape),)
    layers = dict.fromkeys(layer_calls(traced), QuantOption(bits=8, act_bits=8))
    options = {} if name == "equalize" else {"samples": samples, "options": layers}
    sentences = apply_transform(name, traced, samples, **options)
    assert sentences[-1].startswith(f"{name} changed the outputs by")
    assert set(PREPARATIONS) <= set(TRANSFORMS)


@pytest.mark.slow
def test_reshape_repeats_channels() -> None:
    traced = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)), (torch.randn(2, 3, 8, 8),))
    (move,) = [node for node in traced.graph.nodes if node.name in ("view", "flatten")]
    assert pass_through(move, arguments(move)[0], Channels(1)) == Channels(1, 36)
