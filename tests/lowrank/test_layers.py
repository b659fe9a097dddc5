"""Decomposed layers compute what the dense ones do, are cut to whole ranks, and become ordinary layers again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compress.lowrank.decompose import decompose, decomposed_layers, extract
from compress.lowrank.factors import Factors, break_even, plain_factors, rank_by_energy, rank_by_threshold
from compress.lowrank.layers import LowRankConv2d, LowRankLinear, SpatialConv2d

CONVOLUTIONS = {
    "plain": nn.Conv2d(3, 8, 3, padding=1),
    "stride, padding, dilation": nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2),
    "one by one": nn.Conv2d(8, 5, 1, bias=False),
    "uneven kernel": nn.Conv2d(2, 7, (1, 5), padding=(0, 2)),
    "same": nn.Conv2d(3, 4, 3, padding="same"),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("kind", [LowRankConv2d, SpatialConv2d])
def test_convolutions_are_decomposed_exactly(kind: type[LowRankConv2d], name: str) -> None:
    dense = CONVOLUTIONS[name]
    x = torch.randn(2, dense.in_channels, 13, 11)
    layer = kind.of(dense)
    assert layer.kernel == dense.kernel_size
    assert layer.channels == dense.out_channels
    assert layer.rank == layer.full_rank == min(kind.matrix(dense.weight).shape)
    torch.testing.assert_close(layer.weight(), dense.weight, rtol=1e-5, atol=1e-6)
    for same in (layer, layer.thin(), layer.dense()):
        torch.testing.assert_close(same(x), dense(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("kind", [LowRankConv2d, SpatialConv2d])
def test_a_cut_convolution_computes_its_first_components(kind: type[LowRankConv2d], name: str) -> None:
    dense = CONVOLUTIONS[name]
    x = torch.randn(2, dense.in_channels, 13, 11)
    layer = kind.of(dense)
    for rank in range(layer.rank + 1):
        layer.active = rank
        for same in (layer.thin(rank), layer.dense(rank)):
            torch.testing.assert_close(layer(x), same(x), rtol=1e-5, atol=1e-5)
        both = zip(layer.up.T[:rank], layer.down.flatten(1)[:rank], strict=True)
        pieces = sum((up[:, None] * down for up, down in both), torch.zeros_like(kind.matrix(dense.weight)))
        torch.testing.assert_close(kind.matrix(layer.weight(rank)), pieces, rtol=1e-4, atol=1e-5)


def test_a_spatial_pair_is_one_wide_then_one_high_and_splits_the_settings() -> None:
    dense = nn.Conv2d(4, 6, (3, 5), stride=(2, 3), padding=(1, 2), dilation=(2, 1))
    first, second = SpatialConv2d.of(dense).thin(7)
    assert isinstance(first, nn.Conv2d)
    assert isinstance(second, nn.Conv2d)
    assert (first.weight.shape, second.weight.shape) == ((7, 4, 3, 1), (6, 7, 1, 5))
    assert (first.stride, first.padding, first.dilation) == ((2, 1), (1, 0), (2, 1))
    assert (second.stride, second.padding, second.dilation) == ((1, 3), (0, 2), (1, 1))
    assert first.bias is None
    assert second.bias is not None


@pytest.mark.parametrize("rows", [1, 8, 64, 512])
def test_the_product_is_taken_where_it_is_cheaper_and_changes_nothing(rows: int) -> None:
    layer = LowRankLinear.of(nn.Linear(24, 24))
    x = torch.randn(rows, 24)
    for rank in (8, 13, 24):
        layer.active = rank
        cheaper = rank * 24 * 24 + rows * 24 * 24 < rows * rank * 48
        assert layer._merges(rank, rows) == cheaper
        torch.testing.assert_close(layer(x), layer.thin(rank)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (5, 5), (1, 9)], ids=str)
def test_linears_are_decomposed_exactly(shape: tuple[int, int]) -> None:
    dense = nn.Linear(shape[1], shape[0])
    x = torch.randn(2, 4, shape[1])
    layer = LowRankLinear.of(dense)
    assert layer.rank == min(shape)
    for same in (layer, layer.thin(), layer.dense()):
        torch.testing.assert_close(same(x), dense(x), rtol=1e-5, atol=1e-5)


class Encoder(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=batch_first)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
        return self.layer(x, src_key_padding_mask=hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_attention_is_opened_and_decomposed_exactly(batch_first: bool, training: bool) -> None:
    module = Encoder(batch_first).train(training)
    x = torch.randn(3, 5, 16) if batch_first else torch.randn(5, 3, 16)
    hidden = torch.zeros(3, 5, dtype=torch.bool)
    hidden[1, 3:] = True
    wanted = module(x), module(x, hidden)
    done = decompose(module)
    assert set(done.layers) == {f"layer.self_attn.{name}" for name in ("q", "k", "v", "out")} | {
        "layer.linear1", "layer.linear2",
    }  # fmt: skip
    seen = ~hidden if batch_first else ~hidden.T
    torch.testing.assert_close(module(x), wanted[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module(x, hidden)[seen], wanted[1][seen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", ["none", "added", "bool", "per head"])
def test_attentions_masks_and_weights(mask: str) -> None:
    from compress.lowrank.attention import open_attention

    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x, y = torch.randn(3, 4, 8), torch.randn(3, 6, 8)
    masks = {
        "none": None,
        "added": torch.randn(4, 6),
        "bool": torch.rand(4, 6) > 0.7,
        "per head": torch.randn(6, 4, 6),
    }
    for average in (True, False):
        wanted = attention(x, y, y, attn_mask=masks[mask], average_attn_weights=average)
        got = open_attention(attention)(x, y, y, attn_mask=masks[mask], average_attn_weights=average)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [LowRankConv2d, SpatialConv2d])
def test_rank_0_keeps_the_true_shape(kind: type[LowRankConv2d]) -> None:
    dense = nn.Conv2d(3, 8, 3, stride=2)
    layer = kind.of(dense)
    layer.active = 0
    x = torch.randn(2, 3, 9, 9)
    wanted = dense.bias[:, None, None].expand(2, 8, 4, 4)  # type: ignore[index]
    assert torch.equal(layer(x), wanted)
    torch.testing.assert_close(layer.thin(0)(x), wanted)
    linear = LowRankLinear.of(nn.Linear(5, 3, bias=False))
    linear.active = 0
    assert torch.equal(linear(torch.randn(2, 4, 5)), torch.zeros(2, 4, 3))


def test_a_cut_layer_computes_its_first_components() -> None:
    layer = LowRankLinear.of(nn.Linear(9, 6))
    x = torch.randn(4, 9)
    for rank in range(7):
        layer.active = rank
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight(rank), layer.bias))
        torch.testing.assert_close(layer.thin(rank)(x), layer(x))


@pytest.mark.parametrize("rank", [-1, 7, 2.0, 0.5])
def test_only_whole_ranks_that_exist(rank: int) -> None:
    layer = LowRankLinear.of(nn.Linear(9, 6))
    layer.active = rank
    with pytest.raises(ValueError, match="this layer has 0 to 6, as whole numbers"):
        layer(torch.randn(1, 9))


@pytest.mark.parametrize(
    ("outputs", "inputs", "rank"), [(512, 512 * 9, 460.8), (64, 64 * 9, 57.6), (2048, 512, 409.6), (10, 512, 9.81)]
)
def test_break_even(outputs: int, inputs: int, rank: float) -> None:
    assert break_even(outputs, inputs) == pytest.approx(rank, abs=0.005)


def test_what_would_cost_more_becomes_dense_again() -> None:
    module = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20))
    decompose(module)
    x = torch.randn(3, 20)
    wanted = module(x)
    done = extract(module, lambda name, layer: layer.rank if name == "0" else 10)
    assert type(module[0]) is nn.Linear
    assert [type(each) for each in module[2]] == [nn.Linear, nn.Linear]  # a tie stays thin
    assert done == {"0": "dense: rank 20 would cost more", "2": "rank 10 of 20"}
    assert decomposed_layers(module) == {}
    torch.testing.assert_close(module[0](x), nn.Linear.forward(module[0], x))
    assert module(x).shape == wanted.shape


def test_what_is_left_dense_says_why() -> None:
    first = nn.Linear(6, 6)
    module = nn.ModuleDict(
        {
            "first": nn.Conv2d(4, 4, 3, groups=2),
            "wrap": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
            "tied": nn.Linear(6, 6),
            "too": nn.Linear(6, 6),
            "kept": first,
            "cut": nn.Linear(6, 6),
        }
    )
    module["tied"].weight = module["too"].weight
    done = decompose(module, ignore=("kept",))
    assert set(done.layers) == {"cut"}
    assert done.dense == {
        "first": "a convolution of 2 groups has no matrix that would be cut",
        "wrap": "its padding is circular, not zeros",
        "tied": "its weight is another module's, too",
        "too": "its weight is another module's, too",
        "kept": "named to be left dense",
    }
    with pytest.raises(ValueError, match="'nothing\\*' matches no layer; there are 0, 1"):
        decompose(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), ignore=("nothing*",))
    with pytest.raises(ValueError, match="nothing to decompose: 0: first or last"):
        decompose(nn.Sequential(nn.Linear(3, 3)), keep_first=1)


def test_rules_for_ranks() -> None:
    energy = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert [rank_by_energy(energy, share) for share in (0.0, 0.3, 0.4, 0.41, 0.9, 1.0)] == [0, 1, 1, 2, 3, 4]
    assert [rank_by_threshold(energy, each) for each in (0.0, 0.5, 0.51, 0.71, 1.1)] == [4, 4, 3, 2, 0]
    factors = plain_factors(torch.randn(5, 8))
    assert float(factors.relative_errors()[0]) == 1.0
    assert float(factors.relative_errors()[-1]) == 0.0
    weight = factors.product()
    for rank in range(6):
        error = (weight - factors.truncated(rank).product()).square().sum() / weight.square().sum()
        torch.testing.assert_close(error.double(), factors.relative_errors()[rank], rtol=1e-4, atol=1e-9)
    with pytest.raises(ValueError, match="rank 6: allowed are 0 to 5"):
        factors.truncated(6)


def test_factors_are_balanced() -> None:
    factors = plain_factors(torch.randn(6, 9))
    assert isinstance(factors, Factors)
    torch.testing.assert_close(factors.up.norm(dim=0), factors.down.norm(dim=1))


def test_a_copy_is_independent() -> None:
    module = nn.Sequential(nn.Linear(6, 6))
    decompose(module)
    other = copy.deepcopy(module)
    decomposed_layers(other)["0"].active = 2
    assert decomposed_layers(module)["0"].active is None
