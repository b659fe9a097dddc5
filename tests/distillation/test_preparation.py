"""What a distillation stands on: unseen images to judge on, a model that fits the images, and what it will take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compress.data.samples import load_samples
from compress.distillation.job import DistillOptions, distill
from compress.distillation.model_terms import ModelTerms
from compress.distillation.preparation import prepare
from compress.distillation.preview import preview
from compress.distillation.standardisation import Standardisation
from compress.errors import InputError
from tests.distillation.bars import EXPERTS, SETTINGS, arrays, run
from tests.every import every


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.mark.slow
def test_judged_on_what_no_expert_has_seen(tmp_path: Path, cache: Path) -> None:
    report = run(tmp_path / "held", cache, hold_out=0.2, expert_folder=cache / "held")
    assert report.judged == "12 images held out from the experts"
    assert f"sets were judged on {report.judged}, none of them among the start's" in report.notes
    data = arrays()
    ready = prepare(data, tmp_path / "other", 3, DistillOptions(settings=SETTINGS, experts=EXPERTS, width=4, depth=2))
    kept = ready.kept.tolist()
    assert (len(kept), len(ready.unseen)) == (48, 12)
    assert np.bincount(data["labels"][kept]).tolist() == [16, 16, 16]
    # Neither are they in the mean, nor in what the experts' files are known by.
    assert ready.standardisation.mean.item() == pytest.approx(data["images"][kept].mean(), abs=1e-6)
    unseen = ready.standardisation.invert(ready.unseen)
    assert not any((unseen == each).flatten(1).all(1).any() for each in torch.from_numpy(data["images"][kept]))
    with pytest.raises(InputError, match="is a trajectory of other data"):
        run(tmp_path / "held", cache, hold_out=0.3, expert_folder=cache / "held", overwrite=True)

    np.savez(tmp_path / "test.npz", images=data["images"][:9] + 0.01, labels=data["labels"][:9])
    tested = run(tmp_path / "tested", cache, test=tmp_path / "test.npz", hold_out=0.2)
    assert tested.judged == f"9 images of {tmp_path / 'test.npz'}"
    assert not run(tmp_path / "unjudged", cache, hold_out=0.2, settings={"looks": 0}).judged  # all for the experts
    for change, told in (
        ({"hold_out": 0.6}, r"--hold-out 0\.6: a share of the images, 0 to 0\.5"),
        ({"test": tmp_path / "test.npz", "settings": {"looks": 0}}, "--test with --looks 0: no set is judged then"),
        ({"test": {"images": np.random.rand(6, 1, 4, 4), "labels": [0] * 6}}, r"shape \[1, 4, 4\], .* \[1, 8, 8\]"),
    ):
        with pytest.raises(InputError, match=told):
            run(tmp_path / "refused", cache, **change)  # type: ignore[arg-type]


@pytest.mark.matrix
def test_a_set_that_suits_a_model(tmp_path: Path, cache: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6, momentum=None),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    x, labels = torch.from_numpy(arrays()["images"]), torch.from_numpy(arrays()["labels"])
    model(x)
    model.eval()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    terms = ModelTerms(model, x, labels, 3, Standardisation.of(x))
    standard = Standardisation.of(x).apply(x)
    with torch.no_grad():
        statistics, logits = terms.values(standard, labels)
        noise = terms.values(torch.randn_like(standard), labels)[0]
    assert float(statistics) < 1e-3  # the data that made the statistics fits them
    assert float(logits) < 1e-8
    assert float(noise) > 10 * float(statistics)

    settings = {"iterations": 30, "looks": 0, "model_weight": 4.0, "model_steps": 0}
    run(tmp_path / "plain", cache, settings=settings)
    report = run(tmp_path / "suited", cache, settings=settings, model=model, allow_poor_model=True)
    with torch.no_grad():
        plain, suited = (
            sum(map(float, terms.values(Standardisation.of(x).apply(held.inputs[0]), torch.arange(6) // 2)))
            for held in (load_samples(tmp_path / name / "distilled.npz") for name in ("plain", "suited"))
        )
    assert suited < plain
    assert not any("no BatchNorm" in note for note in report.notes)
    assert every(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    without = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    assert any(
        "no BatchNorm" in note for note in run(tmp_path / "logits", cache, model=without, allow_poor_model=True).notes
    )


@pytest.mark.matrix
def test_last_steps_on_the_model_alone(tmp_path: Path, cache: Path) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6, momentum=None), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3)
    )
    x, labels = torch.from_numpy(arrays()["images"]), torch.from_numpy(arrays()["labels"])
    model(x)
    terms = ModelTerms(model.eval(), x, labels, 3, Standardisation.of(x))
    start = torch.randn((6, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    kept, six = start.clone(), torch.arange(6) // 2
    fit = terms.fitted(start, six, 60)
    with torch.no_grad():
        for images, told in ((start, fit.before), (fit.images, fit.after)):
            assert tuple(map(float, terms.values(images, six))) == pytest.approx(told, rel=1e-3, abs=1e-6)
    assert sum(fit.after) < 0.1 * sum(fit.before)
    assert fit.moved == pytest.approx(float((fit.images - start).square().mean().sqrt()))
    assert torch.equal(start, kept)
    assert terms.fitted(start, six, 0).after == fit.before  # nothing is done, and said to be

    changed = {"model": model, "allow_poor_model": True}
    report = run(tmp_path / "fitted", cache, settings={"model_steps": 60}, **changed)
    assert report.iteration > 0
    assert report.fitted is not None
    assert report.fitted.distance[1] < report.fitted.distance[0]
    assert report.fitted.accuracy is not None
    assert any(note.startswith("60 steps on the model's terms alone took the set from") for note in report.notes)
    # Real images of the start stay what they are, and are said to be.
    real = run(tmp_path / "real", cache, settings={"rate_images": 1e30}, **changed)
    assert (real.iteration, real.fitted) == (0, None)


@pytest.mark.matrix
def test_a_model_that_takes_other_images(tmp_path: Path, cache: Path) -> None:
    data = arrays()
    x, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"])
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(1, momentum=None)
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(64, 3))
    norm(x)
    model.eval()
    with torch.no_grad():  # the class means, which make a good classifier of bars
        means = torch.stack([norm(x)[labels == each].mean(0).flatten() for each in range(3)])
        model[2].weight.copy_(means)
        model[2].bias.copy_(-means.square().sum(1) / 2)
    said: list[str] = []
    options = DistillOptions(
        settings=replace(SETTINGS, looks=0), experts=EXPERTS, width=4, depth=2, expert_folder=cache / "ast", model=model
    )
    report = distill(data, tmp_path / "fits", classes=3, options=options, say=said.append)
    assert report.model_accuracy is not None
    assert report.model_distance is not None
    assert report.model_accuracy > 0.9
    assert report.model_distance < 1e-3
    assert said[0].startswith("the model gives ")
    assert said[0] in report.notes
    assert not any("scale" in warning for warning in report.warnings)
    # Bytes in the place of what it was trained on: everything looks alike.
    scaled = data | {"images": 255 * data["images"]}
    told = r"--model: the model gives .* % of the real images their label, and they are .* from its BatchNorm "
    with pytest.raises(
        InputError, match=told + r"statistics .*guessing gives 33\.3 %.* --mean and --std.*--allow-poor-model"
    ):
        prepare(scaled | {"labels": (data["labels"] + 1) % 3}, tmp_path / "far", 3, options)
    terms = ModelTerms(model, 255 * x, labels, 3, Standardisation.of(255 * x))
    assert "it seems to take images of another scale; see --mean and --std" in terms.doubts[0]


@pytest.mark.parametrize("gradients", ["recomputed", "unrolled"])
def test_preview_writes_nothing(tmp_path: Path, cache: Path, gradients: str) -> None:
    options = DistillOptions(
        settings=replace(SETTINGS, gradients=gradients), experts=EXPERTS, width=4, depth=2,
        expert_folder=tmp_path / "experts",
    )  # fmt: skip
    found = preview(arrays(), tmp_path / "out", classes=3, options=options)
    assert not list(tmp_path.iterdir())
    assert (found.images, found.shape, found.looks, found.expert_steps) == (48, (1, 8, 8), 3, 6)
    assert found.judged == "12 images held out from the experts"
    assert 0 < found.seconds < 60
    assert found.memory_bytes > 4 * arrays()["images"].nbytes
    experts = prepare(arrays(), tmp_path / "out", 3, options).experts
    experts.train()
    again = preview(arrays(), tmp_path / "out", classes=3, options=options)
    assert again.experts_there == 2
    assert again.expert_bytes == sum(experts.read(number)[0].nbytes for number in range(2))
    with pytest.raises(InputError, match="--ipc 21 images a class are asked for"):
        preview(arrays(), tmp_path / "out", classes=3, options=replace(options, settings=replace(SETTINGS, each=21)))
