"""What ONNX Runtime makes of exported files: real sessions, its own optimised graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.exporters.build import build_onnx, write_onnx
from compress.exporters.fusion import fused_operators, misplaced_layers
from compress.exporters.session import open_session, run_session
from compress.graph.traced import TracedModel
from compress.proof.gate import verify
from tests.every import every
from tests.sweep import sweep

CPU = "CPUExecutionProvider"
WIDTH = 32
LAYERS = ("stem", "left", "right", "down", "deep", "fc")


class Residual(nn.Module):
    """Everything an ordinary convolutional net is joined with."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.left = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.right = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.down = nn.Conv2d(WIDTH, WIDTH, 1)
        self.deep = nn.Conv2d(2 * WIDTH, WIDTH, 3, padding=1)
        self.fc = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.norm(self.stem(x))), 2)
        x = torch.relu(self.right(torch.relu(self.left(x))) + self.down(x))
        x = torch.cat([F.avg_pool2d(x, 2), F.max_pool2d(x, 2)], 1)
        return self.fc(F.relu6(self.deep(x)).mean((2, 3)))


class Chain(nn.Module):
    """Convolutions with the kinds of things that may stand between them, and linears."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.c = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.d, self.e, self.f = nn.Linear(WIDTH, 24), nn.Linear(24, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))))
        return self.f(torch.relu(self.e(torch.relu(self.d(x.mean((2, 3)))))))


Export = Callable[..., TracedModel]


@pytest.fixture
def export(compress_quickly: Callable[..., TracedModel]) -> Export:
    """``(path, module, shape, **options)``: quantize, write, and let the gate look at the file."""

    def run(path: Path, module: nn.Module, shape: tuple[int, ...] = (3, 16, 16), **options: Any) -> TracedModel:
        x = torch.randn(16, *shape)
        options = {"bits": 4, "calib": x} | options
        traced = compress_quickly(module, options.pop("calib"), shape, **options)
        write_onnx(build_onnx(traced), path, {})
        assert verify(traced, path, (x,), "noise").failures == ()
        return traced

    return run


def optimized_graph(path: Path) -> onnx.GraphProto:
    target = path.with_suffix(".optimized.onnx")
    open_session(path, "ORT_ENABLE_ALL", optimized=target)
    return onnx.load(target).graph


def layer_kinds(path: Path, layers: tuple[str, ...]) -> dict[str, list[str]]:
    found = fused_operators(path, CPU)
    return {layer: found.get(layer, []) for layer in layers}


@pytest.mark.parametrize(
    ("target", "bits", "act_bits"),
    [
        ("onnx-cpu", 3, 8),
        ("onnx-arm", 2, 2),
        # The same again at other widths, seconds each.
        *(pytest.param(*case, marks=pytest.mark.matrix) for case in [("onnx-cpu", 8, 8), ("onnx-cpu", 4, 4)]),
        *(pytest.param(*case, marks=pytest.mark.matrix) for case in [("onnx-arm", 8, 8), ("onnx-arm", 3, 8)]),
    ],
)
def test_everything_in_a_residual_net_becomes_integer(
    target: str, bits: int, act_bits: int, tmp_path: Path, export: Export
) -> None:
    path = tmp_path / "model.onnx"
    export(path, Residual(), target=target, bits=bits, act_bits=act_bits)
    kinds = layer_kinds(path, LAYERS)
    assert every(kinds[layer] == ["QLinearConv"] for layer in LAYERS[:-1]), kinds
    assert kinds["fc"] == ["QGemm"]
    operators = Counter(node.op_type for node in optimized_graph(path).node)
    assert operators["QuantizeLinear"] == 1
    assert operators["QLinearAdd"] == 1
    assert operators["QLinearConcat"] == 1
    assert not {"Conv", "Gemm", "Add", "Concat", "Relu", "AveragePool", "GlobalAveragePool"} & set(operators)
    # The stored form is what saves bytes: nothing unpacks at run time.
    assert not {"BitShift", "BitwiseAnd", "Unpack3", "Unpack4"} & set(operators)


FLOAT_LAYERS = {"onnx-cpu": ("stem", "left", "right", "deep", "down", "fc"), "onnx-arm": ("stem", "deep", "fc")}


@sweep(
    ("target", "ignored"),
    [(target, layer) for target, layers in FLOAT_LAYERS.items() for layer in layers],
    sample=[("onnx-cpu", "deep")],
)
def test_a_layer_left_float_really_stays_float(target: str, ignored: str, tmp_path: Path, export: Export) -> None:
    """ONNX Runtime quantizes a float Conv or Gemm between integer ones by itself, unless the exporter prevents it."""
    path = tmp_path / "model.onnx"
    traced = export(path, Residual(), target=target, ignore=(ignored,), first_last_bits=4)
    kinds = layer_kinds(path, LAYERS)
    assert set(kinds.pop(ignored)) <= {"Conv", "FusedConv", "Gemm", "FusedGemm"}
    assert every(kind in (["QLinearConv"], ["QGemm"]) for kind in kinds.values()), kinds
    # Its weights arrive unrounded.
    tensors = {each.name: onnx.numpy_helper.to_array(each) for each in optimized_graph(path).initializer}
    wanted = np.sort(traced.tensor(f"{ignored}.weight").numpy().reshape(-1))
    floats = [np.sort(each.reshape(-1)) for each in tensors.values() if each.dtype == np.float32]
    assert any(len(each) == len(wanted) and np.array_equal(each, wanted) for each in floats)


ACTIVATIONS = {"relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "leaky": F.leaky_relu, "gelu": F.gelu}


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_a_linear_before_an_activation_is_integer(name: str, tmp_path: Path, export: Export) -> None:
    """ONNX Runtime merges some activations with a Gemm into a float kernel before it looks for integers."""

    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(WIDTH, 24), nn.Linear(24, 24), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            return ACTIVATIONS[name](self.c(ACTIVATIONS[name](self.b(ACTIVATIONS[name](self.a(x))))))

    path = tmp_path / "model.onnx"
    export(path, Ends(), (WIDTH,), ignore=("b",))
    kinds = layer_kinds(path, ("a", "b", "c"))
    assert kinds["a"] == kinds["c"] == ["QGemm"]
    assert kinds["b"] in (["Gemm"], ["FusedGemm"])


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("ignored", ["b", "e"])
def test_a_float_layer_in_a_chain_stays_float(ignored: str, tmp_path: Path, export: Export) -> None:
    path = tmp_path / "model.onnx"
    export(path, Chain(), ignore=(ignored,))
    kinds = layer_kinds(path, ("a", "b", "c", "d", "e", "f"))
    assert set(kinds.pop(ignored)) <= {"Conv", "Gemm", "FusedGemm"}
    assert every(kind in (["QLinearConv"], ["QGemm"]) for kind in kinds.values()), kinds


@pytest.mark.slow
def test_onnx_runtime_would_quantize_it_by_itself(tmp_path: Path, export: Export) -> None:
    """The reason for the pass; when this fails, ONNX Runtime has changed and the pass can go."""
    path = tmp_path / "model.onnx"
    export(path, Chain(), ignore=("b",))
    model = onnx.load(path)
    (layer,) = (node for node in model.graph.node if node.name == "b")
    (dequantize,) = (node for node in model.graph.node if node.output[0] == layer.input[0])
    tensors = {each.name: each for each in model.graph.initializer}
    for position in (1, 2):
        name = dequantize.input[position]
        one = onnx.numpy_helper.to_array(tensors[name])[0]
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(one), f"{name}_scalar"))
        dequantize.input[position] = f"{name}_scalar"
    onnx.save(model, path)
    assert layer_kinds(path, ("b",)) == {"b": ["QLinearConv"]}


@pytest.mark.matrix
@pytest.mark.parametrize("bits", [3, 8])
def test_weights_only_is_the_float_net_with_other_weights(bits: int, tmp_path: Path, export: Export) -> None:
    path, plain = tmp_path / "model.onnx", tmp_path / "float.onnx"
    traced = export(path, Residual(), bits=bits, calib=None)
    operators = Counter(node.op_type for node in optimized_graph(path).node)
    assert operators["Conv"] + operators["FusedConv"] == 5
    assert not [kind for kind in operators if "Linear" in kind or kind.startswith("Q")]
    assert not {"Sub", "Cast", "BitShift"} & set(operators)  # all folded into plain weights
    found = layer_kinds(path, LAYERS)
    assert every(set(kinds) <= {"Conv", "FusedConv", "Gemm"} and len(kinds) == 1 for kinds in found.values()), found
    # The same net with the dequantised weights as ordinary float ones.
    values = {
        str(call.args[1].args[0].target).removesuffix("_packed"): call.args[1]
        for call in traced.graph.nodes
        if call.op == "call_function"
        and len(call.args) > 1
        and "dequantize" in str(getattr(call.args[1], "target", ""))
    }
    floats = traced.copy()
    for name, stored in values.items():
        (node,) = (each for each in floats.graph.nodes if each.name == stored.name)
        parts = [floats.tensor(str(part.target)) for part in node.args[:3]]
        floats.set_tensor(name, torch.ops.compress.dequantize_weight(*parts, *node.args[3:]))
        node.replace_all_uses_with(floats.attribute(name, before=node))
    floats.finish()
    write_onnx(build_onnx(floats), plain, {})
    x = torch.randn(5, 3, 16, 16)
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        (got,), (wanted,) = (run_session(open_session(each, level, threads=1), [(x,)]) for each in (path, plain))
        assert torch.equal(got, wanted), level


class Numbered(nn.Module):
    """Names that look like further calls of a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv_1 = nn.Conv2d(3, WIDTH, 3), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_1(torch.relu(self.conv_1(torch.tanh(self.conv(x))))).mean((2, 3))


@pytest.mark.slow
def test_names_with_numbers_are_not_taken_for_further_calls(tmp_path: Path, export: Export) -> None:
    path = tmp_path / "model.onnx"
    export(path, Numbered(), ignore=("conv",))
    found = fused_operators(path, CPU)
    assert found["conv_1"] == found["conv_1#1"] == ["QLinearConv"]
    assert set(found["conv"]) <= {"Conv", "FusedConv"}
    assert not misplaced_layers(found, {"conv": "float", "conv_1": "integer"})


@pytest.mark.slow
def test_float_linears_are_known_by_name_behind_a_transpose_and_before_a_scale(tmp_path: Path, export: Export) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.across, self.head = nn.Linear(16, 24), nn.Linear(24, 20, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.across(x.flatten(2).transpose(1, 2)))
            return torch.tanh(self.head(y) / 30.0) * 30.0  # as Gemma's logits

    path = tmp_path / "model.onnx"
    export(path, Scaled(), (16, 4, 4), calib=None)
    assert layer_kinds(path, ("across", "head")) == {"across": ["FusedMatMul"], "head": ["FusedMatMul"]}


@pytest.mark.slow
def test_conv1d_and_linears_on_sequences_fuse(tmp_path: Path, export: Export) -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv1d(6, WIDTH, 3, padding=1), nn.Linear(WIDTH, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.conv(x)).permute(0, 2, 1))

    path = tmp_path / "model.onnx"
    export(path, Sequence(), (6, 20))
    found = layer_kinds(path, ("conv", "fc"))
    assert found["conv"] == ["QLinearConv"]
    assert found["fc"][0] in {"MatMulIntegerToFloat", "QLinearMatMul"}


def test_misplaced_layers() -> None:
    operators = {
        "a": ["QLinearConv"],
        "b": ["Conv"],
        "c#1": ["QGemm"],
        "c": ["Gemm"],
        "Add": ["QLinearAdd"],
        "b_1": ["Conv"],
    }
    assert not misplaced_layers(operators, {"a": "integer", "b": "float", "b_1": "float"})
    assert misplaced_layers(operators, {"a": "float"}) == [
        "layer a is planned float, but ONNX Runtime runs it as QLinearConv"
    ]
    assert misplaced_layers(operators, {"b": "integer"}) == [
        "layer b is planned integer, but ONNX Runtime runs it as Conv"
    ]
    assert misplaced_layers(operators, {"c": "integer"}) == [
        "layer c is planned integer, but ONNX Runtime runs it as Gemm"
    ]
    assert "has no node of that name" in misplaced_layers(operators, {"d": "float"})[0]
