"""The transformation fits images of any size, and learns to leave them as they are."""

from __future__ import annotations

import pytest
import torch

from compress.calib.metaaug.network import UNet, make_network, widths_for
from compress.calib.metaaug.warm_start import warm_start
from tests.every import every


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "widths"),
    [
        ((1, 8, 8), (8, 16)),
        ((1, 28, 28), (8, 16, 32)),
        ((3, 32, 32), (16, 32, 64, 128)),
        ((3, 7, 7), (16, 32)),
        ((3, 224, 224), (16, 32, 64, 128, 256)),
        ((2, 9, 30), (16, 32)),
        ((3, 1, 5), (16,)),
    ],
    ids=str,
)
def test_widths_follow_the_images_and_sizes_come_back(shape: tuple[int, ...], widths: tuple[int, ...]) -> None:
    assert widths_for(shape) == widths
    network = make_network(shape, published=False, seed=0).eval()
    x = torch.randn(2, *shape)
    with torch.no_grad():
        y = network(x)
        assert y.shape == x.shape
        torch.testing.assert_close(network(x[1:]), y[1:], rtol=1e-4, atol=1e-5)  # whatever is beside it


def test_the_published_network() -> None:
    with torch.device("meta"):
        network = UNet(3, (64, 128, 256, 512, 1024), learned_upsampling=True)
        assert network(torch.randn(2, 3, 50, 37)).shape == (2, 3, 50, 37)
    assert sum(each.numel() for each in network.parameters()) == pytest.approx(31e6, rel=0.02)


def test_its_seed_decides_the_weights_and_leaves_torchs_own_numbers_alone() -> None:
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    one, two = (make_network((1, 8, 8), False, seed=4).state_dict() for _ in range(2))
    assert torch.equal(torch.rand(3), wanted)
    assert every(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.matrix
def test_warm_up_ends_when_images_come_back() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.interpolate(torch.randn(64, 1, 4, 4, generator=generator), scale_factor=2.0)
    network = make_network((1, 8, 8), False, seed=0)
    seen: list[tuple[int, int, float]] = []
    warm_start(network, images, 400, margin=0.5, seed=0, progress=lambda *said: seen.append(said))
    done, total, error = seen[-1]
    assert error <= 0.05
    assert done < total == 400
    with torch.no_grad():
        assert float((network.eval()(images) - images).square().mean()) == pytest.approx(error)
