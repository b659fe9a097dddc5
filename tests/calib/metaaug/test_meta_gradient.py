"""The gradient through the inner step, against finite differences and a plain reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.calib.blocks import find_blocks
from compress.calib.frontier import Frontier
from compress.calib.metaaug.network import make_network
from compress.calib.metaaug.phase import MetaPhase
from compress.calib.metaaug.settings import MetaAug
from compress.calib.reconstruction import BlockMethod, BlockProblem, LearnedBlock
from compress.calib.soft import SoftGrid
from compress.graph.fold import fold_batch_norm
from compress.graph.layers import layer_calls
from compress.graph.rewrite import layer_bias, set_weight
from compress.graph.simplify import simplify
from compress.graph.traced import trace
from compress.kernels.table import register_operators
from compress.quant.grid import mse_grid, quantize
from compress.quant.problem import ActivationGrid
from tests.every import every

register_operators()

METHOD = BlockMethod(whole_blocks=True, learn_grids=True, learn_scales=True, learn_biases=True, drop=0.0)


class Smooth(nn.Module):
    """A stem, a residual block, a head, without a kink."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        x = F.silu(x + self.b(F.silu(self.a(x))))
        return 30 * self.head(x.mean((2, 3)))


@pytest.fixture(params=[False, True], ids=["persistent", "restarted"])
def phase(request: pytest.FixtureRequest, tmp_path: Path) -> MetaPhase:
    """Weights of 3 bits, stem included, activations as they are; all in float64."""
    torch.manual_seed(3)
    x = torch.randn(24, 1, 8, 8, dtype=torch.float64)
    plain = trace(Smooth().double(), (x[:2],))
    simplify(plain)
    fold_batch_norm(plain)
    model = plain.copy()
    starts = {}
    for layer in layer_calls(plain):
        weight = plain.tensor(f"{layer}.weight")
        starts[layer] = (weight, quantize(weight, *mse_grid(weight, 3, symmetric=True), 3))
        set_weight(model, layer, starts[layer][1], "float")
    block = find_blocks(plain)[1]
    assert block.input is not None
    calls = {layer: layer_calls(model)[layer][0] for layer in block.layers}
    ahead, reference = Frontier(model, (x,), tmp_path / "quantized"), Frontier(plain, (x,), tmp_path / "float")
    ahead.advance(block.input, keep=(block.input,))
    reference.advance(block.output, keep=(block.input, block.output))
    biases = {call.name: (call.target, layer_bias(model, call)) for call in calls.values()}
    weights = {call.args[1].name: starts[layer] for layer, call in calls.items()}  # type: ignore[union-attr]
    problem = BlockProblem(block, ahead, reference, len(x), 8, weights, {}, biases)  # type: ignore[arg-type]
    learned = LearnedBlock(problem, METHOD, torch.Generator().manual_seed(0))
    settings = MetaAug(batch=8, validation=16, margin=0.5, restart=request.param)
    network = make_network((1, 8, 8), False, seed=1).double().eval()
    return MetaPhase(network, learned, plain, model, (x,), "x", x, settings, seed=5)


@pytest.mark.slow(cases=1)
def test_it_equals_central_differences(phase: MetaPhase) -> None:
    index, judged = torch.arange(8), torch.arange(8, 24)
    x = phase.values[index]
    start = phase.learned.trainables()

    def loss() -> Tensor:
        """Two inner steps where the state persists; the validation loss alone, which T reaches by them only."""
        phase.learned.hold(start)
        after = phase.inner_step(index, phase.network(x))
        if not phase.settings.restart:
            phase.learned.hold(after)
            after = phase.inner_step(index, phase.network(x))
        return phase.validation_loss(judged, after)

    with torch.no_grad():
        phase.network.exit.bias.add_(0.3)  # type: ignore[operator, union-attr]
    loss()  # fixes the inner rates
    weights = list(phase.network.parameters())
    gradients = torch.autograd.grad(loss(), weights)
    # Where rounding of the loss itself is nothing beside the difference.
    largest = max(float(each.abs().max()) for each in gradients)
    telling = [number for number, each in enumerate(gradients) if float(each.abs().max()) > 1e-2 * largest]
    assert len(telling) >= 5
    for number in torch.tensor(telling)[torch.randperm(len(telling), generator=torch.Generator().manual_seed(7))[:5]]:
        weight, gradient = weights[number], gradients[number]
        place = int(gradient.abs().argmax())
        values = []
        for way in (1, -1):
            with torch.no_grad():
                weight.view(-1)[place] += way * 1e-5
            values.append(float(loss().detach()))
            with torch.no_grad():
                weight.view(-1)[place] -= way * 1e-5
        measured = (values[0] - values[1]) / 2e-5
        assert float(gradient.view(-1)[place]) == pytest.approx(measured, rel=1e-2)


@pytest.mark.slow(cases=1)
def test_the_block_is_left_as_it_was_and_copies_get_better_for_it(phase: MetaPhase) -> None:
    before = {name: value.detach().clone() for name, value in phase.learned.trainables().items()}
    outcome = phase.run(lambda done, total, loss: None)
    assert outcome.failure is None
    assert outcome.change >= 0.45  # of 0.5
    moved = phase.learned.trainables()
    assert every(torch.equal(moved[name], value) for name, value in before.items()) is phase.settings.restart


@pytest.mark.parametrize("masked", [False, True])
def test_rounding_is_differentiated_twice_as_its_plain_form_is(masked: bool) -> None:
    grid = ActivationGrid(torch.tensor(0.3, dtype=torch.float64), torch.tensor(2, dtype=torch.uint8), 3, learnable=True)
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    mask = (torch.rand(6, 5, generator=generator) < 0.5).double() if masked else torch.ones(6, 5).double()
    weight = torch.randn(5, 4, generator=generator, dtype=torch.float64)

    class Fixed:
        def draw(self, shape: torch.Size) -> Tensor:
            return mask

    def plain(x: Tensor, factor: Tensor) -> Tensor:
        scale = grid.scale * factor.exp()
        steps = x / scale
        codes = torch.clamp(steps + (steps.round() - steps).detach(), -2, 5)
        return torch.lerp(x, codes * scale, mask)

    def ours(x: Tensor, factor: Tensor) -> Tensor:
        soft = SoftGrid(grid, Fixed(), True)  # type: ignore[arg-type]
        soft.factor_log = factor
        return soft(x)

    found = []
    for rounded in (plain, ours):
        x, w = values.clone().requires_grad_(), weight.clone().requires_grad_()
        factor = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        inner = (rounded(x, factor) @ w).tanh().square().mean()
        first = torch.autograd.grad(inner, (x, factor, w), create_graph=True)
        outer = sum((each * (1 + each)).sum() for each in first) + (rounded(x.square(), factor) @ (w - first[2])).sum()
        found.append(torch.autograd.grad(outer, (x, factor, w)))  # type: ignore[arg-type]
    for one, other in zip(*found, strict=True):
        assert float(one.abs().sum()) > 0
        torch.testing.assert_close(one, other)
