"""SmoothQuant and AWQ: the function stays, the factors go where they cost nothing, and outliers lose their harm."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

import compress
from compress.errors import InputError
from compress.graph.layers import list_layers
from compress.graph.simplify import simplify
from compress.graph.traced import TracedModel, trace
from compress.records.layers import QuantOption
from compress.transform.table import apply_transform
from tests.every import every
from tests.sweep import sweep

LENGTH, WIDTH = 6, 16
OPTIONS = {
    "smoothquant": QuantOption(bits=8, act_bits=8),
    "awq": QuantOption(bits=3, symmetric=False, group_size=8),
}
TRANSFORMS = list(OPTIONS)


class RmsNorm(nn.Module):
    """A norm without bias, the weight multiplied from the left."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    """Attention and a gated MLP, each behind a norm; the residual reads the norm's input or, ``post``, its result."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm, post: bool = False) -> None:
        super().__init__()
        self.post = post
        self.embed, self.norm1, self.norm2 = nn.Linear(WIDTH, WIDTH), norm(WIDTH), norm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        with torch.no_grad():
            for each in (self.norm1, self.norm2):
                each.weight[[3, 10]] *= 100  # type: ignore[index]
                if isinstance(each, nn.LayerNorm):
                    each.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (2, WIDTH // 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = (y if self.post else x) + self.o(mixed)
        z = self.norm2(x)
        return x + self.down(silu(self.gate(z)) * self.up(z))


@functools.cache
def traced_block(norm: type[nn.Module], post: bool) -> tuple[Block, TracedModel]:
    module = Block(norm, post).eval()
    traced = trace(module, (torch.randn(2, LENGTH, WIDTH),))
    simplify(traced)
    return module, traced


class Scaled:
    """A block's graph before and after a transform."""

    def __init__(
        self,
        name: str,
        layers: Iterable[str] | None = None,
        *,
        norm: type[nn.Module] = nn.LayerNorm,
        post: bool = False,
    ) -> None:
        self.module, traced = traced_block(norm, post)
        self.traced, self.x = traced.copy(), torch.randn(48, LENGTH, WIDTH)
        options = {layer.name: OPTIONS[name] for layer in list_layers(self.traced)}
        options = options if layers is None else {layer: options[layer] for layer in layers}
        before = _tensors(self.traced)
        products = self.products()
        self.sentences = apply_transform(name, self.traced, (self.x[:8],), samples=(self.x,), options=options)
        after = _tensors(self.traced)
        self.changed = {key for key, value in after.items() if key not in before or not torch.equal(value, before[key])}
        self.added = self.products() - products

    def products(self) -> int:
        return len(self.traced.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor))

    def check_function(self) -> None:
        fresh = torch.randn(9, LENGTH, WIDTH)
        with torch.no_grad():
            wanted, got = self.module(fresh), self.traced.module(fresh)
        assert (got - wanted).norm() <= 1e-4 * wanted.norm()


def _tensors(traced: TracedModel) -> dict[str, Tensor]:
    named = [*traced.module.named_parameters(), *traced.module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


@pytest.mark.matrix
@sweep("post", [False, True], sample=[True])
@pytest.mark.parametrize("norm", [nn.LayerNorm, RmsNorm])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_function_stays(name: str, norm: type[nn.Module], post: bool) -> None:
    scaled = Scaled(name, norm=norm, post=post)
    scaled.check_function()
    assert "of 4 inputs of linears scaled" in scaled.sentences[0]
    assert scaled.sentences[-1].startswith(f"{name} changed the outputs by")


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("norm", [nn.LayerNorm, RmsNorm])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_norm_takes_the_factor_of_its_readers(name: str, norm: type[nn.Module]) -> None:
    scaled = Scaled(name, "qkv", norm=norm)
    taken = {"norm1.weight", "norm1.bias"} if norm is nn.LayerNorm else {"norm1.weight"}
    assert scaled.changed == taken | {"q.weight", "k.weight", "v.weight"}
    assert scaled.added == 0
    scaled.check_function()


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMS)
def test_one_factor_for_all_readers(name: str) -> None:
    scaled = Scaled(name, "qkv")
    module = scaled.module
    weights = {layer: scaled.traced.tensor(f"{layer}.weight") / getattr(module, layer).weight for layer in "qkv"}
    factor = module.norm1.weight / scaled.traced.tensor("norm1.weight")
    assert not torch.allclose(factor, torch.ones(WIDTH))
    for found in weights.values():
        torch.testing.assert_close(found, factor.expand(WIDTH, -1), rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_value_projection_takes_it_through_attention(name: str) -> None:
    scaled = Scaled(name, "o")
    assert scaled.changed == {"o.weight", "v.weight", "v.bias"}
    assert scaled.added == 0
    scaled.check_function()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_ungated_half_takes_it(name: str) -> None:
    scaled = Scaled(name, ["down"])
    assert scaled.changed == {"down.weight", "up.weight", "up.bias"}
    assert scaled.added == 0
    scaled.check_function()


@pytest.mark.slow
def test_smoothquant_multiplies_where_a_residual_reads_the_norm_too() -> None:
    scaled = Scaled("smoothquant", "qkv", post=True)
    (factor,) = scaled.changed - {"q.weight", "k.weight", "v.weight"}
    assert scaled.traced.tensor(factor).shape == (WIDTH,)
    assert scaled.added == 1
    assert "1 by a product of its own" in scaled.sentences[0]
    scaled.check_function()


def test_awq_leaves_it_alone() -> None:
    scaled = Scaled("awq", "qkv", post=True)
    assert scaled.changed == set()
    assert scaled.added == 0
    assert "1 left alone" in scaled.sentences[0]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_norm_with_one_reader_that_is_not_asked_for(name: str) -> None:
    """q and k are to stay as they are, so that the norm cannot take what is v's alone."""
    scaled = Scaled(name, "v")
    assert not {"norm1.weight", "q.weight", "k.weight"} & scaled.changed
    assert scaled.added == (1 if name == "smoothquant" else 0)
    scaled.check_function()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_layers_of_the_other_kind_are_left_alone(name: str) -> None:
    """SmoothQuant is for quantized inputs, AWQ for float ones."""
    traced = traced_block(nn.LayerNorm, False)[1].copy()
    before = _tensors(traced)
    other = OPTIONS["awq" if name == "smoothquant" else "smoothquant"]
    options = {layer.name: other for layer in list_layers(traced)}
    x = torch.randn(48, LENGTH, WIDTH)
    sentences = apply_transform(name, traced, (x[:8],), samples=(x,), options=options)
    assert sentences[0].startswith("0 of 0 inputs")
    assert every(torch.equal(before[key], value) for key, value in _tensors(traced).items())


@pytest.mark.parametrize("name", TRANSFORMS)
def test_both_need_data(name: str) -> None:
    with pytest.raises(InputError, match=r"SmoothQuant, AWQ.* need calibration data"):
        compress.quantize(nn.Linear(4, 4), input_shape=(4,), **{name: True})  # type: ignore[arg-type]


class Outliers(nn.Module):
    """Two channels of a norm 100 times larger than the rest, read by weights that are somewhat smaller for it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        with torch.no_grad():
            self.norm.bias.normal_()
            self.norm.weight[[3, 17]] *= 100
            self.norm.bias[[3, 17]] *= 100
            self.a.weight[:, [3, 17]] /= 10

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(gelu(self.a(self.norm(x))))


@pytest.mark.matrix
def test_smoothquant_takes_the_harm_from_outliers() -> None:
    module, x, fresh = Outliers().eval(), torch.randn(64, LENGTH, 32), torch.randn(200, LENGTH, 32)
    errors = {}
    for asked in (False, True):
        result = compress.quantize(module, calib=x, bits=8, method="mse", observer="minmax", smoothquant=asked)
        assert result.report.plan.steps.smoothquant is asked
        with torch.no_grad():
            errors[asked] = float((result.module(fresh) - module(fresh)).norm())
    assert errors[True] <= 0.5 * errors[False]
