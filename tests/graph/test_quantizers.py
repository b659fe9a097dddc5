from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from compress.graph.fold import fold_batch_norm
from compress.graph.layers import LAYER_KINDS, layer_calls, layer_name
from compress.graph.quantizers import Quantizer, fake_quantize_op, place_quantizers
from compress.graph.rewrite import input_quantizer, set_grid
from compress.graph.simplify import simplify
from compress.graph.traced import TracedModel, trace
from compress.kernels.table import register_operators

IMAGE = (3, 8, 8)


class Net(nn.Module):
    """Three convolutions and a linear; ``body(net, x)`` says how they are joined."""

    def __init__(self, body: object) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.c, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)  # type: ignore[operator]


class Placed:
    """A graph with quantizers and what there is to ask of it."""

    def __init__(self, body: object, bits: int | dict[str, int] = 8, dtype: torch.dtype = torch.uint8) -> None:
        register_operators()
        self.float_model = trace(Net(body).eval(), (torch.randn(2, *IMAGE),))
        simplify(self.float_model)
        fold_batch_norm(self.float_model)
        self.model: TracedModel = self.float_model.copy()
        layers = layer_calls(self.model)
        act_bits = bits if isinstance(bits, dict) else dict.fromkeys(layers, bits)
        self.quantizers: list[Quantizer] = place_quantizers(self.model, act_bits, dtype)

    def inputs_of(self, kind: str) -> list[list[fx.Node]]:
        """The operands of every call whose operator's name holds ``kind``."""
        nodes = [node for node in self.model.graph.nodes if kind in str(node.target) and node.op == "call_function"]
        return [[each for each in node.all_input_nodes if each.op == "call_function"] for node in nodes]

    def grid(self, node: fx.Node) -> str:
        assert node.target is fake_quantize_op(), f"{node} is not quantized"
        return str(node.args[1].target).removesuffix(".scale")

    def check(self) -> None:
        """What holds for every graph: unique names, grids set once, and next to nothing lost on a very fine grid."""
        names = [quantizer.name for quantizer in self.quantizers]
        assert len(set(names)) == len(names)
        nodes = self.model.graph.find_nodes(op="call_function", target=fake_quantize_op())
        assert {self.grid(node) for node in nodes} == set(names)
        order = [node.name for node in self.model.graph.nodes]
        assert [order.index(each.node) for each in self.quantizers] == sorted(
            order.index(n.node) for n in self.quantizers
        )
        for quantizer in self.quantizers:
            assert torch.isnan(self.model.tensor(f"{quantizer.name}.scale"))
            same = [node for node in nodes if self.grid(node) == quantizer.name]
            assert {node.args[3] for node in same} == {quantizer.bits}
            set_grid(self.model, quantizer.name, torch.tensor(32.0 / 2**quantizer.bits), torch.tensor(
                1 << (quantizer.bits - 1), dtype=torch.uint8))  # fmt: skip
        x = torch.randn(3, *IMAGE)
        with torch.no_grad():
            got, wanted = self.model.module(x), self.float_model.module(x)
        assert got.shape == wanted.shape
        if all(quantizer.bits == 8 for quantizer in self.quantizers):
            assert (got - wanted).abs().max() < 1.0


def residual(net: Net, x: Tensor) -> Tensor:
    y = torch.relu(net.a(x))
    return net.fc(torch.relu(net.b(y) + y).mean((2, 3)))


@pytest.mark.slow
def test_residual() -> None:
    placed = Placed(residual)
    placed.check()
    ((left, right),) = placed.inputs_of("aten.add")
    assert placed.grid(left) != placed.grid(right)  # each side has a scale of its own
    assert placed.grid(right) == placed.grid(layer_calls(placed.model)["b"][0].args[0])  # y is quantized once
    # The convolution's result, the add's result behind its ReLU, the pooled value: all on grids.
    for kind in ("conv2d", "adaptive_avg_pool2d", "linear"):
        for operands in placed.inputs_of(kind):
            assert placed.grid(operands[0])
    assert len(placed.quantizers) == 5  # x, y, b's result, the sum, the pooled


def test_every_layer_reads_a_grid_of_its_width() -> None:
    placed = Placed(residual, {"a": 8, "b": 4, "fc": 6})
    placed.check()
    for name, bits in {"a": 8, "b": 4, "fc": 6}.items():
        (call,) = layer_calls(placed.model)[name]
        quantizer = input_quantizer(call)
        assert quantizer is not None
        assert quantizer.args[3] == bits


@pytest.mark.slow
def test_narrow_layers_beside_an_add_of_eight_bits() -> None:
    placed = Placed(residual, {"a": 4, "b": 4, "fc": 4})
    placed.check()
    ((left, right),) = placed.inputs_of("aten.add")
    assert left.args[3] == right.args[3] == 8
    narrow = layer_calls(placed.model)["b"][0].args[0]
    assert narrow.args[3] == 4
    assert narrow.args[0] is right  # from the wide one, not from the float value
    by_layer = {quantizer.layers: quantizer for quantizer in placed.quantizers if quantizer.layers}
    assert by_layer[("b",)].exclusive
    assert by_layer[("b",)].bits == 4


def test_a_chain_at_four_bits_needs_nothing_wider() -> None:
    placed = Placed(lambda net, x: torch.relu(net.c(torch.relu(net.b(torch.relu(net.a(x)))))), 4)
    assert [quantizer.bits for quantizer in placed.quantizers] == [4, 4, 4, 8]  # the last result is no layer's input
    placed.check()


def test_concatenation() -> None:
    placed = Placed(lambda net, x: net.fc(torch.cat([net.b(net.a(x)), net.c(net.a(x))], 2).mean((2, 3))))
    placed.check()
    ((left, right),) = placed.inputs_of("aten.cat")
    assert placed.grid(left) != placed.grid(right)


MOVES = {
    "max pool": lambda net, x: net.b(F.max_pool2d(torch.relu(net.a(x)), 2)),
    "pad": lambda net, x: net.b(F.pad(F.max_pool2d(torch.relu(net.a(x)), 2), (1, 1))),
    "slice": lambda net, x: net.b(torch.relu(net.a(x))[:, :, ::2, ::2]),
    "permute": lambda net, x: net.b(net.a(x).permute(0, 1, 3, 2)),
    "flatten": lambda net, x: F.linear(net.fc(net.a(x).flatten(2).permute(0, 2, 1)), torch.ones(3, 2)),
    "pool, slice, pad": lambda net, x: net.b(F.pad(F.max_pool2d(net.a(x), 2)[:, :, 1:], (0, 0, 1, 0))) + 0,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MOVES))
def test_values_that_only_move_keep_one_grid(name: str) -> None:
    placed = Placed(MOVES[name])
    placed.check()
    (reader,) = layer_calls(placed.model)["fc" if name == "flatten" else "b"]
    after = input_quantizer(reader)
    assert after is not None
    value: fx.Node = reader.args[0]
    seen = set()
    while value.target not in LAYER_KINDS:
        if value.target is fake_quantize_op():
            seen.add(placed.grid(value))
        value = value.args[0]
    assert seen == {placed.grid(after)}
    assert layer_name(value) == "a"


def test_a_pad_with_another_value_is_no_move() -> None:
    placed = Placed(lambda net, x: net.b(F.pad(torch.relu(net.a(x)), (1, 1), value=2.0)))
    placed.check()
    (reader,) = layer_calls(placed.model)["b"]
    assert placed.grid(reader.args[0]) != placed.grid(reader.args[0].args[0].args[0])


def test_average_pools_have_their_own_result() -> None:
    placed = Placed(lambda net, x: net.b(F.avg_pool2d(torch.relu(net.a(x)), 2)))
    placed.check()
    ((before,),) = placed.inputs_of("aten.avg_pool2d")
    (reader,) = layer_calls(placed.model)["b"]
    assert placed.grid(before) != placed.grid(reader.args[0])


def test_silu() -> None:
    placed = Placed(lambda net, x: net.c(net.b(F.silu(net.a(x))) * torch.sigmoid(net.c(net.a(x)))))
    placed.check()
    for operands in placed.inputs_of("aten.mul"):
        for operand in operands:
            assert placed.grid(operand)


def test_a_shared_module_has_a_grid_for_each_call() -> None:
    placed = Placed(lambda net, x: net.b(torch.relu(net.b(torch.relu(net.a(x))))))
    placed.check()
    first, second = layer_calls(placed.model)["b"]
    assert placed.grid(first.args[0]) != placed.grid(second.args[0])
    assert sum("b" in quantizer.layers for quantizer in placed.quantizers) == 2


def test_a_relu_is_absorbed_only_where_it_reads_alone() -> None:
    placed = Placed(lambda net, x: net.b(torch.relu(y := net.a(x))) + y)
    placed.check()
    ((relu_input,),) = placed.inputs_of("aten.relu")
    assert placed.grid(relu_input)  # the convolution's own result is on a grid, and the ReLU's is on another
    (reader,) = layer_calls(placed.model)["b"]
    assert placed.grid(reader.args[0]) != placed.grid(relu_input)


@pytest.mark.slow
def test_a_float_layer_gets_no_quantizer_of_its_own() -> None:
    placed = Placed(lambda net, x: net.c(torch.relu(net.b(torch.relu(net.a(x))))), {"a": 8, "c": 8})
    placed.check()
    assert len(placed.quantizers) == 4  # x, a's result, c's input, c's result


def test_without_integer_layers_nothing_is_placed() -> None:
    assert not Placed(residual, {}).quantizers


@pytest.mark.slow
def test_exclusive_means_that_only_layers_read_it() -> None:
    placed = Placed(lambda net, x: net.b(y := torch.relu(net.a(x))) + net.c(y))
    placed.check()
    by_layers = {quantizer.layers: quantizer for quantizer in placed.quantizers}
    assert by_layers[("b", "c")].exclusive
    placed = Placed(residual)
    assert not next(each for each in placed.quantizers if "b" in each.layers).exclusive


def test_what_no_integer_operator_reads_gets_no_grid() -> None:
    placed = Placed(lambda net, x: torch.cat([net.b(y := net.a(x)), torch.relu(net.c(y) + y)[:, :1] * 2], 1))
    placed.check()
    assert [quantizer.node for quantizer in placed.quantizers] == [
        "fake_quantize_default",
        "fake_quantize_default_1",
        "fake_quantize_default_2",
        "fake_quantize_default_3",
    ]
    assert {quantizer.name for quantizer in placed.quantizers} == {
        f"quantizers.{name}" for name in ("x", "conv2d", "conv2d_1", "conv2d_2")
    }


def test_a_move_that_floats_read_too_leaves_its_value_as_it_is() -> None:
    placed = Placed(lambda net, x: torch.where((part := x[:, :, 1:]).sum(1, True) > 0, net.a(part), net.a(x[:, :, 1:])))
    placed.check()
    moved = [node for node in placed.model.graph.nodes if node.target is torch.ops.aten.slice.Tensor]
    ((compared,),) = placed.inputs_of("aten.sum")
    assert compared in moved
    first, second = layer_calls(placed.model)["a"]
    assert first.args[0].args[0] is compared  # rounded behind the move
    assert second.args[0].args[0].args[0].name != "x"  # rounded before it: nothing else reads it


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_zero_points_have_the_targets_type(dtype: torch.dtype) -> None:
    placed = Placed(residual, 8, dtype)
    assert len(placed.quantizers) == 5
    for quantizer in placed.quantizers:
        assert placed.model.tensor(f"{quantizer.name}.zero_point").dtype == dtype
