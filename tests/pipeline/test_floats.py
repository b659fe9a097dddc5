"""Every parameter is in a layer, left float with a reason, or among the others; and the first note says how much is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

from compress import api
from compress.cli.main import app
from compress.data.samples import Samples
from compress.intake.model import Intake, take_in
from compress.pipeline.floats import float_note
from compress.records.layers import LayerSpec, QuantOption
from compress.records.plan import Choice, Plan, Skip
from tests.networks import Encoder, Language, Residual


class Around(nn.Module):
    """A function around tensors and modules."""

    def __init__(self, forward: Callable[..., Tensor], *shapes: tuple[int, ...], **modules: nn.Module) -> None:
        super().__init__()
        self.function = forward
        self.w = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def layers(module: nn.Module, *shape: int) -> tuple[list[tuple[str, str, int, int]], dict[str, int]]:
    """Names, kinds, weights and MACs of the layers; and what is in none."""
    intake = take_in(module.eval(), input_shape=shape)
    assert counted(intake) == sum(each.numel() for each in module.parameters())
    return [(each.name, each.kind, each.parameters, each.macs) for each in intake.layers], intake.others


def counted(intake: Intake) -> int:
    return sum(layer.parameters for layer in intake.layers) + sum(intake.others.values())


@pytest.mark.parametrize(
    ("module", "shape", "wanted", "others"),
    [
        (nn.Conv3d(1, 4, 3), (1, 6, 6, 6), ("conv3d", 108, 108 * 64), 4),
        (nn.ConvTranspose1d(2, 4, 3), (2, 6), ("conv_transpose1d", 24, 24 * 6), 4),
        (nn.ConvTranspose2d(2, 4, 3), (2, 6, 6), ("conv_transpose2d", 72, 72 * 36), 4),
        (nn.ConvTranspose3d(2, 4, 3), (2, 6, 6, 6), ("conv_transpose3d", 216, 216 * 216), 4),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_convolutions_that_stay_float(
    module: nn.Module, shape: tuple[int, ...], wanted: tuple[str, int, int], others: int
) -> None:
    found, rest = layers(nn.Sequential(module), *shape)
    assert found == [("0", *wanted)]
    assert rest == {"0.bias": others}


def test_all_matrices_of_a_recurrent_layer_count() -> None:
    found, rest = layers(Around(lambda self, x: self.r(x)[0], r=nn.LSTM(5, 7, 2, batch_first=True)), 4, 5)
    weights = 4 * 7 * (5 + 7 + 7 + 7)
    assert found == [("r", "lstm", weights, weights * 4)]
    assert sum(rest.values()) == 4 * 28


@pytest.mark.parametrize(
    ("module", "shape", "kind", "macs"),
    [
        (Around(lambda self, x: self.w[0] @ x, (10, 6)), (6, 3), "matmul", 10 * 6 * 3),
        (Around(lambda self, x: torch.einsum("nld,kd->nlk", x, self.w[0]), (10, 6)), (3, 6), "einsum", 3 * 60),
        (Around(lambda self, x: torch.einsum("...d,dk", x, self.w[0]), (6, 10)), (3, 6), "einsum", 3 * 60),
        (Around(lambda self, x: torch.einsum("nhd,hdk->nhk", x, self.w[0]), (3, 6, 7)), (3, 6), "einsum", 126),
        (Around(lambda self, x: x @ self.w[0], (3, 6, 7)), (3, 2, 6), "matmul", 2 * 126),
        (Around(lambda self, x: (x @ self.w[0].t()) @ self.w[0], (10, 6)), (6,), "matmul", 2 * 60),
    ],
)
def test_products_that_are_no_layers_are_listed(
    module: nn.Module, shape: tuple[int, ...], kind: str, macs: int
) -> None:
    intake = take_in(module.eval(), input_shape=shape)
    (layer,) = intake.layers
    assert (layer.name, layer.kind, layer.macs) == ("w.0", kind, macs)
    assert layer.refusal is not None
    assert "a product with a stored matrix that is no linear layer" in layer.refusal
    assert counted(intake) == module.w[0].numel()  # type: ignore[index, union-attr]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.middle = nn.Embedding(30, 16), nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.middle(self.words(ids)) @ self.words.weight.t()


@pytest.mark.parametrize(
    "turn", [lambda w: w.t(), lambda w: w.T, lambda w: w.transpose(0, 1), lambda w: w.permute(1, 0)]
)
def test_a_product_with_a_transposed_matrix_is_a_linear(turn: Callable[[Tensor], Tensor]) -> None:
    module = Around(lambda self, x: self.first(x) @ turn(self.w[0]), (10, 6), first=nn.Linear(6, 6)).eval()
    x = torch.randn(5, 6)
    intake = take_in(module, input_shape=(6,))
    assert [(each.name, each.kind, each.refusal) for each in intake.layers] == [
        ("first", "linear", None), ("w.0", "linear", None),
    ]  # fmt: skip
    with torch.no_grad():
        assert torch.equal(intake.traced.module(x), F.linear(module.first(x), module.w[0]))  # type: ignore[operator, index]


@pytest.mark.slow
def test_a_transposed_table_is_the_linears_weight() -> None:
    module, ids = Tied().eval(), torch.randint(0, 30, (4, 7))
    report = api.quantize(module, calib=ids.repeat(9, 1), bits=8, method="mse").report
    assert [(row.name, row.option) for row in report.layers] == [("middle", "W8A8"), ("words", "W8A8")]
    assert report.float_distance is not None
    assert report.float_distance.outputs[0].relative_l2 < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("module", [Residual(), Encoder(), Language(30, 8)], ids=["images", "encoder", "language"])
def test_every_parameter_is_counted_once(module: nn.Module, tmp_path: Path) -> None:
    module.eval()
    ids = torch.randint(0, 30, (2, 9))
    calib = {"Encoder": (ids, torch.ones_like(ids)), "Language": (ids,)}.get(type(module).__name__)
    samples = Samples(calib, None, "ids") if calib else None
    intake = take_in(module, input_shape=None if calib else (3, 8, 8), samples=samples)
    # BatchNorm is a part of the convolution before it: a factor and a shift a channel become its bias.
    folded = sum(2 * each.num_features for each in module.modules() if isinstance(each, nn.BatchNorm2d))
    assert counted(intake) == sum(each.numel() for each in module.parameters()) - folded


def test_the_note_gives_both_shares() -> None:
    def spec(name: str, weights: int, macs: int, refusal: str | None = None) -> LayerSpec:
        return LayerSpec(name=name, kind="linear", weight_shape=(weights,), macs=macs, rows=1, refusal=refusal)

    def plan(*choices: tuple[str, int | None], skipped: tuple[Skip, ...] = ()) -> Plan:
        chosen = tuple(
            Choice(layer=name, method="mse", option=QuantOption(bits=4, act_bits=act), format="x")
            for name, act in choices
        )
        return Plan(
            choices=chosen, skipped=skipped, target="ort-cpu", observer="mse", iterations=0, model_fingerprint="x"
        )

    specs = [spec("a", 600, 100), spec("b", 300, 300, "no kernel")]
    skipped = (Skip(layer="b", reason="no kernel"),)
    # 300 of b and 100 others, of 1,000 in all; without activations on integers nothing is said of MACs.
    assert float_note(plan(("a", None), skipped=skipped), specs, {"a.bias": 60, "b.bias": 40}) == (
        "40.0% of the weights are stored as floats: 1 of 2 layers, and 100 other numbers (biases, norms and the like; "
        "a.bias: 60)"
    )
    said = float_note(plan(("a", 8), skipped=skipped), specs, {"b.bias": 100})
    assert said.startswith("WARNING: 40.0% of the weights are stored as floats")
    assert said.endswith(
        "; 75.0% of the layers' multiply-accumulates run on floats; most multiply-accumulates are those of b (linear: "
        "no kernel)"
    )
    assert "run on floats" in float_note(plan(("a", 8), ("b", None)), specs, {})
    said = float_note(plan(("b", None), skipped=(Skip(layer="a", reason="named by --ignore"),)), specs, {})
    assert said == (
        "WARNING: 66.7% of the weights are stored as floats: 1 of 2 layers, and 0 other numbers (biases, norms and the "
        "like); most weights are those of a (linear: named by --ignore)"
    )


class Volumes(nn.Module):
    """Nearly all of its weights are in convolutions that stay float."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv3d(1, 16, 3), nn.Conv3d(16, 16, 3), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3, 4)))


@pytest.mark.slow
def test_a_model_that_stays_float_is_a_warning_and_the_first_note(tmp_path: Path) -> None:
    report = api.quantize(Volumes(), bits=4, input_shape=(1, 6, 6, 6)).report
    weights, rest = 16 * 27 + 16 * 16 * 27 + 64, 16 + 16 + 4
    share = (weights - 64 + rest) / (weights + rest)
    assert report.notes[0] == (
        f"WARNING: {share:.1%} of the weights are stored as floats: 2 of 3 layers, and 36 other numbers (biases, norms "
        "and the like); most weights are those of b (conv3d: 3-d convolutions are not compressed yet)"
    )
    assert report.notes[0] in report.warnings
    assert {skip.layer for skip in report.plan.skipped} == {"a", "b"}


@pytest.mark.slow
def test_inspect_counts_them_all(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ConvTranspose2d(4, 2, 3)), tmp_path / "model.pt")
    command = ["inspect", str(tmp_path / "model.pt"), "--input-shape", "1,6,6"]
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)
    assert [(layer["name"], layer["macs"]) for layer in found["layers"]] == [("0", 36 * 16), ("1", 72 * 16)]
    assert found["others"] == {"0.bias": 4, "1.bias": 2}
    text = " ".join(CliRunner().invoke(app, command).output.split())
    assert "2 layers, 108 weights, 6 other numbers (biases, norms and the like), 1,728 MACs a sample" in text
