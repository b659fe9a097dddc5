"""Inputs made of noise: what they fit, that they are the same again, and which models cannot have any."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.data.image_fit import fit_images
from compress.data.norm_distance import norm_distance
from compress.data.samples import load_samples
from compress.data.synthetic import synthesize, synthetic_count
from compress.errors import InputError
from compress.intake.job import open_work
from compress.options import Options, Source
from tests.every import every


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def trained(x: Tensor) -> nn.Sequential:
    """Two convolutions whose BatchNorm layers hold the statistics of ``x``."""
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4),
    )  # fmt: skip
    with torch.no_grad():
        net(x)
    return net.eval()


class Log(nn.Module):
    """What takes no number below zero."""

    def forward(self, x: Tensor) -> Tensor:
        return x.log()


def far(count: int = 256) -> Tensor:
    """Images unlike standard noise, in level and in scale."""
    return 3 + 0.5 * torch.randn(count, 1, 8, 8).cumsum(3)


def test_the_distance_is_that_of_the_definition() -> None:
    x = far()
    net = trained(x)
    y = torch.randn(32, 1, 8, 8)
    with torch.no_grad():
        output, distance, norms = norm_distance(net, y)
    assert torch.equal(output, net(y))
    assert norms == 2
    terms = []
    for end in (1, 4):
        seen, norm = net[:end](y).detach().double(), net[end]
        shift = (seen.mean((0, 2, 3)) - norm.running_mean) ** 2 / norm.running_var
        spread = (seen.var((0, 2, 3), correction=0) / norm.running_var).sqrt() - 1
        terms.append((shift + spread**2).mean())
    assert float(distance) == pytest.approx(float(sum(terms) / 2), rel=1e-3)
    assert float(norm_distance(net, x)[1].detach()) < 1e-6  # nothing but rounding, on what the statistics are of


@pytest.mark.matrix
def test_inputs_fit_the_statistics_batch_by_batch() -> None:
    net = trained(far())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    samples = synthesize(net, (torch.zeros(1, 1, 8, 8),), "model", most=100)
    x = samples.inputs[0]
    assert x.shape == (100, 1, 8, 8)
    noise = float(norm_distance(net, torch.randn(64, 1, 8, 8))[1].detach())
    for part in x.split(64):
        assert float(norm_distance(net, part)[1].detach()) < 0.02 * noise
    assert every(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.matrix
def test_the_same_again_and_from_the_cache(cache: Path) -> None:
    net = trained(far())
    example = (torch.zeros(1, 1, 8, 8),)
    told: list[str] = []
    first = synthesize(net, example, "model", most=8, progress=lambda what, done, total: told.append(what))
    assert told
    told.clear()
    again = synthesize(net, example, "model", most=8, progress=lambda what, done, total: told.append(what))
    assert torch.equal(first.inputs[0], again.inputs[0])
    assert first.notes == again.notes
    assert not told
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:-5])  # cut short
    anew = synthesize(net, example, "model", most=8)
    assert torch.equal(first.inputs[0], anew.inputs[0])
    assert not torch.equal(first.inputs[0], synthesize(net, example, "model", most=8, seed=1).inputs[0])


@pytest.mark.parametrize(
    ("module", "example", "why"),
    [
        (nn.Sequential(nn.Linear(4, 2)), (torch.zeros(1, 4),), "the model has none; give samples"),
        (nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)), (torch.zeros(2, 4),), "the model has none"),
        (nn.BatchNorm1d(4).eval(), (torch.zeros(1, 4), torch.zeros(1, 4)), "takes 2 inputs, one is made up"),
        (nn.BatchNorm1d(4).eval(), (torch.zeros(1, 4, dtype=torch.int64),), "takes whole numbers"),
        (nn.Sequential(Log(), nn.BatchNorm1d(4)).eval(), (torch.zeros(1, 4),), "makes NaN or infinity of noise"),
    ],
)
def test_what_has_nothing_to_fit(module: nn.Module, example: tuple[Tensor, ...], why: str) -> None:
    with pytest.raises(InputError, match=why):
        synthesize(module, example, "model", most=8)


def test_no_step_is_taken_from_what_is_not_finite() -> None:
    asked: list[Tensor] = []

    def terms(images: Tensor) -> tuple[Tensor, ...]:
        asked.append(images)
        return (images.log().mean(),)

    start = -torch.ones(2, 3)
    fit = fit_images(start, terms, 20, 0.1)
    assert len(asked) == 1
    assert torch.equal(fit.images, start)
    assert every(math.isnan(value) for value in (*fit.before, *fit.after))


class Torn(nn.Module):
    """Two layers that keep other statistics of one value: no input fits both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.b.running_mean += 100

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x) + self.b(x))


@pytest.mark.slow
def test_inputs_that_do_not_fit_are_refused_with_what_was_reached() -> None:
    module = Torn().eval()
    # Halfway, at 50, both are 50 deviations off, and no nearer place is for both.
    with pytest.raises(
        InputError, match=r"made inputs from [\d.e+]+ to 2\.5e\+03 of what .*, and 0\.5 at most is needed"
    ):
        open_work(module, "synthetic", None, Options(samples=16), Source(input_shape=(4,)))
    # The gate takes them, as it has nothing better.
    assert len(synthesize(module, (torch.zeros(2, 4),), "model", most=16, steps=2)) == 16


def test_inputs_are_made_where_gradients_are_off() -> None:
    start = torch.ones(2, 3)
    with torch.no_grad():
        assert float(fit_images(start, lambda x: (x.square().mean(),), 20, 0.1).images.abs().max()) < 1


def test_where_no_inputs_are_made() -> None:
    with pytest.raises(InputError, match="inputs without labels are made for the --calib of quantize, allocate"):
        load_samples("synthetic", labelled=True)


@pytest.mark.matrix
def test_a_cache_that_takes_no_files_is_no_obstacle(cache: Path) -> None:
    net, example = trained(far()), (torch.zeros(1, 1, 8, 8),)
    kept = synthesize(net, example, "model", most=4)
    assert len(kept.notes) == 1
    for path in cache.iterdir():
        path.unlink()
    cache.rmdir()
    cache.touch()  # where its folder should be
    samples = synthesize(net, example, "model", most=4)
    assert torch.equal(samples.inputs[0], kept.inputs[0])
    assert samples.notes[1:] == (f"the inputs are not kept for the next run: {cache}: File exists",)


@pytest.mark.matrix
def test_what_a_run_gets() -> None:
    net, x = trained(far()), far(8)
    source = Source()
    work = open_work(net, "synthetic", {"x": x.numpy(), "y": net(x).argmax(1).numpy()}, Options(samples=3), source)
    assert work.samples is not None
    assert work.samples.inputs[0].shape == (3, 1, 8, 8)  # as the labelled images
    assert any("made of noise, without data" in note for note in work.notes)
    assert len(open_work(net, "synthetic", None, Options(), Source(input_shape=(1, 8, 8))).samples or ()) == 128


@pytest.mark.matrix
def test_an_exported_program_of_one_batch_size(tmp_path: Path) -> None:
    net = trained(far())
    torch.export.save(torch.export.export(net, (torch.zeros(3, 1, 8, 8),)), tmp_path / "net.pt2")
    work = open_work(tmp_path / "net.pt2", "synthetic", None, Options(samples=7), Source())
    assert work.samples is not None
    x = work.samples.inputs[0]
    assert x.shape == (9, 1, 8, 8)  # whole batches
    before, after = (norm_distance(net, images)[1].detach() for images in (torch.randn(3, 1, 8, 8), x[:3]))
    assert float(after) < 0.1 * float(before)


@pytest.mark.parametrize(
    ("shape", "count"), [((3, 32, 32), 128), ((3, 64, 32), 64), ((3, 224, 224), 32), ((1, 16000), 32), ((784,), 128)]
)
def test_fewer_of_large_ones(shape: tuple[int, ...], count: int) -> None:
    assert synthetic_count(shape) == count


@pytest.mark.slow
def test_it_calibrates_as_real_images_do_and_noise_does_not() -> None:
    real, test = far(128), far(128)
    net = trained(far(512))
    wanted = net(test).detach()
    errors = {}
    for name, calib in {"real": real, "synthetic": "synthetic", "noise": torch.randn(128, 1, 8, 8)}.items():
        result = compress.quantize(net, calib=calib, bits=4, act_bits=4, method="mse", input_shape=(1, 8, 8))
        with torch.no_grad():
            errors[name] = float((result.module(test) - wanted).square().mean() / wanted.var())
    assert errors["synthetic"] < 1.5 * errors["real"], errors
    assert errors["noise"] > 1.5 * errors["synthetic"], errors


@pytest.mark.matrix
def test_weights_alone_come_with_the_hint() -> None:
    source = Source(input_shape=(1, 8, 8))
    net = trained(far())
    assert any("--calib synthetic makes" in note for note in open_work(net, None, None, Options(), source).notes)
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 2)).eval()
    for module, options in ((plain, Options()), (net, Options(act_bits=8)), (net, Options(group_size=32))):
        assert open_work(module, None, None, options, source).hint is None
