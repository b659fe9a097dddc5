"""Opened attention against torch's own, and what masks need made once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from compress.graph.attention import open_attention
from compress.graph.simplify import simplify
from compress.graph.traced import TracedModel, trace

HEADS, WIDTH = 4, 6
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Heads(nn.Module):
    """Queries from ``x`` [N, L, C], keys and values from ``y`` [N, S, C], ``groups`` heads of them."""

    def __init__(self, attend: Attend, groups: int = HEADS) -> None:
        super().__init__()
        self.attend, self.groups = attend, groups
        self.query, self.both = nn.Linear(8, HEADS * WIDTH), nn.Linear(8, 2 * groups * WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        query = self.query(x).unflatten(2, (HEADS, WIDTH)).transpose(1, 2)
        key, value = self.both(y).unflatten(2, (2, self.groups, WIDTH)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.attend(query, key, value).transpose(1, 2).flatten(2)


def kinds(traced: TracedModel) -> Counter[str]:
    """Operators of the graph, by their short names."""
    return Counter(str(node.target).split(".")[1] for node in traced.graph.nodes if "aten." in str(node.target))


@torch.no_grad()
def opened(module: nn.Module, *inputs: Tensor) -> TracedModel:
    """Trace and open; views that read the result need ``simplify`` besides, since it lies in memory another way."""
    traced = trace(module.eval(), inputs)
    assert kinds(traced)["scaled_dot_product_attention"] > 0
    open_attention(traced)
    simplify(traced)
    assert kinds(traced)["scaled_dot_product_attention"] == 0
    torch.testing.assert_close(traced.module(*traced.example), module(*traced.example), rtol=1e-5, atol=1e-6)
    return traced


@torch.no_grad()
def same(traced: TracedModel, module: nn.Module, *inputs: Tensor) -> None:
    torch.testing.assert_close(traced.module(*inputs), module(*inputs), rtol=1e-5, atol=1e-6)


def _above_the_mean(scores: Tensor) -> Tensor:
    return scores >= scores.mean(-1, keepdim=True)


LOWER = torch.ones(5, 5, dtype=torch.bool).tril()
SLOPE = torch.linspace(-3, 2, 25).reshape(5, 5)
FORMS: dict[str, Attend] = {
    "no mask": lambda q, k, v: scaled_dot_product_attention(q, k, v),
    "bool mask": lambda q, k, v: scaled_dot_product_attention(q, k, v, LOWER),
    "float mask": lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=SLOPE),
    "computed mask": lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=_above_the_mean(q @ k.mT)),
    "infinite mask": lambda q, k, v: scaled_dot_product_attention(
        q, k, v, torch.zeros(5, 5).masked_fill(~LOWER, -torch.inf)
    ),
    "causal": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
    "scale": lambda q, k, v: scaled_dot_product_attention(q, k, v, scale=0.11),
    "causal with a scale": lambda q, k, v: scaled_dot_product_attention(q, k, v, None, 0.0, True, scale=0.7),
}


@pytest.mark.slow(cases=3)
@pytest.mark.parametrize("name", FORMS)
def test_against_torch_at_another_batch(name: str) -> None:
    module = Heads(FORMS[name])
    traced = opened(module, torch.randn(2, 5, 8), torch.randn(2, 5, 8))
    same(traced, module, 2 * torch.randn(7, 5, 8), torch.randn(7, 5, 8))
    same(traced, module, torch.randn(1, 5, 8), torch.randn(1, 5, 8))


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize(("lengths", "causal"), [((3, 6), True), ((6, 3), True), ((6, 3), False)], ids=str)
def test_queries_and_keys_of_different_number(lengths: tuple[int, int], causal: bool) -> None:
    module = Heads(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=causal))
    x, y = (torch.randn(4, length, 8) for length in lengths)
    same(opened(module, x, y), module, x.flip(1), y.flip(2))


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize(("groups", "causal"), [(1, False), (2, True), (HEADS, False)])
def test_heads_that_share_keys_and_values(groups: int, causal: bool) -> None:
    module = Heads(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True), groups)
    traced = opened(module, torch.randn(2, 5, 8), torch.randn(2, 5, 8))
    same(traced, module, torch.randn(3, 5, 8), torch.randn(3, 5, 8))


@pytest.mark.slow
def test_values_without_heads() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))

    module = Plain()
    same(opened(module, torch.randn(2, 4, 8)), module, torch.randn(5, 4, 8))


class Tokens(nn.Module):
    """Token ids and their mask through ``layers`` of attention; the mask is of truth values or of floats."""

    def __init__(self, floats: bool = False, layers: int = 2) -> None:
        super().__init__()
        self.floats = floats
        self.words, self.places = nn.Embedding(30, 8), nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 24) for _ in range(layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        mask = attention_mask[:, None, None, :].bool()
        if self.floats:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        for block in self.blocks:
            parts = block(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2).flatten(2)
        return x


def tokens(count: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids and a mask that lets at least one token through."""
    kept = torch.randint(1, length + 1, (count, 1))
    return torch.randint(30, (count, length)), (torch.arange(length) < kept).long()


@pytest.mark.matrix
@pytest.mark.parametrize("floats", [False, True])
def test_tokens_of_any_number_and_length(floats: bool) -> None:
    module = Tokens(floats)
    traced = opened(module, *tokens(2, 7))
    assert traced.dynamic_batch
    assert traced.dynamic_length
    for shape in ((2, 7), (5, 11), (1, 3), (9, 16)):
        same(traced, module, *tokens(*shape))


@pytest.mark.matrix
def test_layers_share_what_their_mask_needs() -> None:
    found = kinds(opened(Tokens(layers=3), *tokens(2, 7)))
    assert found["where"] == 1
    assert found["softmax"] == 3
    assert found["matmul"] == 6


@pytest.mark.matrix
def test_two_masks_get_a_bias_each() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            near, far = x[:, None, :, 0] > -9, x[:, None, :, 0] > -8
            for mask in (near, far, near, far):
                x = scaled_dot_product_attention(self.linear(x), x, x, attn_mask=mask)
            return x

    module = Two()
    traced = opened(module, torch.randn(2, 5, 8))
    assert kinds(traced)["where"] == 2
    same(traced, module, torch.randn(4, 5, 8))


@pytest.mark.matrix
def test_a_query_that_may_look_nowhere_stays_finite() -> None:
    module = Tokens(layers=1)
    traced = opened(module, *tokens(2, 7))
    ids, mask = tokens(3, 7)
    mask[1] = 0
    with torch.no_grad():
        got, wanted = traced.module(ids, mask), module(ids, mask)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got[[0, 2]], wanted[[0, 2]], rtol=1e-5, atol=1e-6)
