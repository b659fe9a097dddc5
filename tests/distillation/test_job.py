"""The whole way: a folder that --calib takes, killed runs to the same bytes, a model's own terms, refusals by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from compress.data.samples import load_samples
from compress.distillation.distiller import Distilled
from compress.distillation.job import _originals, _warnings
from compress.distillation.neighbours import find_neighbours
from compress.distillation.standardisation import Standardisation
from compress.errors import InputError
from tests.distillation.bars import arrays, run
from tests.every import every


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.mark.slow
def test_folder_that_calib_takes(tmp_path: Path, cache: Path) -> None:
    report = run(tmp_path / "out", cache)
    folder = tmp_path / "out"
    assert sorted(each.name for each in folder.iterdir()) == ["distill.json", "distilled.npz", "distilled.png"]
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    samples = load_samples(folder / "distilled.npz", labelled=True)
    assert samples.inputs[0].shape == (6, 1, 8, 8)
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 0, 1, 1, 2, 2]
    with np.load(folder / "distilled.npz") as held:
        assert str(held["provenance"]) == report.provenance
        assert float(held["step_size"]) == pytest.approx(report.step_size)
        assert float(held["learned_step_size"]) == pytest.approx(report.learned_step_size)
        assert held["mean"] == pytest.approx(arrays()["images"].mean(), abs=1e-5)
    with PIL.Image.open(folder / "distilled.png") as sheet:
        assert sheet.size == (2 * 64 + 2, 3 * 64 + 2 * 2)
    assert json.loads((folder / "distill.json").read_text())["iteration"] == report.iteration
    assert sorted(report.scores) == [0, 3, 6]
    assert report.scores[report.iteration] == max(report.scores.values())
    assert len(report.losses) == len(report.matching) == 6
    # Same seed, same bytes; another seed, another set.
    run(tmp_path / "again", cache)
    run(tmp_path / "other", cache, settings={"seed": 1}, expert_folder=cache / "other")
    first, again, other = ((tmp_path / name / "distilled.npz").read_bytes() for name in ("out", "again", "other"))
    assert first == again != other


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_killed_and_continued_to_the_same_bytes(tmp_path: Path, cache: Path, stop: int) -> None:
    run(tmp_path / "whole", cache, settings={"looks": 0})

    def kill(what: str, done: int, total: int) -> None:
        if what.startswith("distilling") and done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", cache, progress=kill, settings={"looks": 0})
    assert not (tmp_path / "killed").exists()
    # Every iteration that was finished is kept, whether it was due to be written or not.
    work = tmp_path / ".killed.work"
    assert sorted(each.name for each in work.iterdir()) == ["preview.png"] * (stop > 2) + ["state.safetensors"]
    if stop > 2:
        with pytest.raises(
            InputError,
            match=r"holds the state of another run; different: --steps \(4 then, 5 now\), "
            r"--lr-images \(None then, 2 now\)\. Finish that run with what it was begun with, choose another --out, or "
            "throw it away with --overwrite",
        ):
            run(tmp_path / "killed", cache, settings={"looks": 0, "steps": 5, "rate_images": 2.0})
    done: list[int] = []
    report = run(
        tmp_path / "killed", cache, settings={"looks": 0},
        progress=lambda what, at, total: done.append(at) if what.startswith("distilling") else None,
    )  # fmt: skip
    assert (report.iteration, done) == (6, list(range(stop + 1, 7)))
    names = ("distilled.npz", "distilled.png")
    assert every(
        (tmp_path / "killed" / each).read_bytes() == (tmp_path / "whole" / each).read_bytes() for each in names
    )


@pytest.mark.matrix
def test_the_learned_step_size_is_told_beside_the_one_kept(tmp_path: Path, cache: Path) -> None:
    # Networks learn nothing at the learned one, and the usual one is kept.
    settings = {"rate": 1e-5, "rate_rate": 1e-12}
    report = run(tmp_path / "small", cache, settings=settings)
    assert report.step_size == 0.01
    assert report.learned_step_size == pytest.approx(1e-5, rel=1e-3)
    with pytest.raises(KeyboardInterrupt):  # it outlives a stop
        run(tmp_path / "again", cache, settings=settings, progress=stop_at(5))
    again = run(tmp_path / "again", cache, settings=settings)
    assert (again.step_size, again.learned_step_size) == (report.step_size, report.learned_step_size)
    unjudged = run(tmp_path / "unjudged", cache, settings={"looks": 0})
    assert unjudged.step_size == unjudged.learned_step_size


@pytest.mark.slow
def test_nothing_left_to_judge_on(tmp_path: Path, cache: Path) -> None:
    report = run(tmp_path / "all", cache, settings={"each": 20, "iterations": 1}, hold_out=0.2)
    assert (report.iteration, report.scores) == (1, {})
    assert any("no set was judged" in note for note in report.notes)


@pytest.mark.matrix
def test_mtt_is_ast_without_its_parts(tmp_path: Path, cache: Path) -> None:
    report = run(tmp_path / "mtt", cache, method="mtt", expert_folder=cache / "mtt", settings={"rate": 0.005})
    used = report.settings["distillation"]
    assert isinstance(used, dict)
    assert (used["momentum"], used["beta"], used["balance"], used["perturbation"]) == (0.0, "none", False, 0.0)
    assert (used["representative"], used["rate"]) == (False, 0.05)
    # One term alone: what is minimised is what MTT minimises.
    assert report.losses == report.matching


@pytest.mark.matrix
def test_ablations_change_the_first_loss(tmp_path: Path, cache: Path) -> None:
    changes: tuple[dict[str, Any], ...] = (
        {}, {"beta": "none"}, {"balance": True}, {"perturbation": 0.0}, {"representative": False}
    )  # fmt: skip
    losses = [
        run(tmp_path / f"{number}", cache, settings={"iterations": 1, "looks": 0, **change}).losses[0]
        for number, change in enumerate(changes)
    ]
    assert len(set(losses)) == 5


@pytest.mark.matrix
def test_whitening_goes_back(tmp_path: Path, cache: Path) -> None:
    x = torch.from_numpy(arrays()["images"])
    whitened = Standardisation.of(x, whiten=True)
    z = whitened.apply(x)
    torch.testing.assert_close(whitened.invert(z), x, rtol=1e-4, atol=1e-4)
    variances = torch.linalg.eigvalsh(z.flatten(1).T.cov(correction=0))
    assert float(variances.max()) <= 1.0
    # The set says it all: whatever its network saw can be made of it, and of other images.
    run(tmp_path / "zca", cache, zca=True, expert_folder=cache / "zca", mean=[0.5], std=[2.0])
    assert sorted(each.name for each in (tmp_path / "zca").iterdir()) == [
        "distill.json", "distilled.npz", "distilled.png"
    ]  # fmt: skip
    with np.load(tmp_path / "zca" / "distilled.npz") as held:
        mean, std = (held[name].reshape(-1, 1, 1) for name in ("mean", "std"))
        seen = (((x.numpy() - 0.5) / 2 - mean) / std).reshape(60, -1) - held["centre"]
        np.testing.assert_allclose(seen @ held["whitening"], z.flatten(1).numpy(), rtol=1e-2, atol=1e-3)
        assert (held["data_mean"].tolist(), held["data_std"].tolist()) == ([0.5], [2.0])


def test_a_channel_that_does_not_vary_is_only_centred() -> None:
    x = torch.stack([torch.full((50, 16, 16), 0.1), torch.randn(50, 16, 16)], 1)
    standard = Standardisation.of(x)
    assert standard.std[0] == 1.0
    assert float(standard.apply(x)[:, 0].abs().max()) < 1e-6


def test_neighbours_are_those_of_a_plain_search() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.rand((300, 3, 8, 8), generator=generator) + 100  # far from 0, where products round most
    images = torch.cat([torch.rand((20, 3, 8, 8), generator=generator) + 100, real[7:9]])
    found = find_neighbours(images, torch.arange(22), real)
    apart = torch.stack([(real - image).double().square().mean((1, 2, 3)).sqrt() for image in images]).min(1)
    assert found.nearest == tuple(apart.indices.tolist())
    assert found.distances == pytest.approx(apart.values.tolist(), rel=1e-4)
    assert found.distances[-2:] == (0.0, 0.0)


def test_neighbours_name_copies() -> None:
    real = torch.from_numpy(arrays()["images"])
    found = find_neighbours(torch.stack([real[5], real[7] + 9]), torch.tensor([5, 7]), real)
    assert found.nearest[0] == 5
    assert found.distances[0] == found.to_start[0] == 0.0
    assert found.to_start[1] == pytest.approx(9.0, rel=1e-4)
    assert (found.nearest_is_start, found.nearer_than_typical) in ((1, 1), (2, 1))
    assert 0 < found.typical < found.distances[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"each": 21}}, "--ipc 21 images a class are asked for, and class 0 has 20"),
        ({"data": {"images": arrays()["images"]}}, "no labels"),
        ({"data": {"images": np.zeros((6, 4), np.float32), "labels": np.arange(6) % 3}}, r"images \[N, C, H, W\]"),
        ({"settings": {"last": 9}}, "--start-epochs 9 --ahead 2: .* epoch 10, and experts have 3"),
        ({"settings": {"steps": 1}}, "--steps 1 --ahead 2"),
        ({"settings": {"beta": "some"}}, "--intermediate some: known are aggregate"),
        ({"settings": {"rate_images": -1.0}}, "--lr-images -1: a number above 0"),
        ({"settings": {"batch": 0}}, "--batch 0: at least 1"),
        ({"settings": {"looks": -1}}, "--looks -1: at least 0"),
        ({"settings": {"seed": -1}}, "--seed -1: 0 to 4294967295"),
        ({"settings": {"perturbation": float("nan")}}, "--perturbation nan: a number, 0 or above"),
        ({"settings": {"model_weight": -1.0}}, "--model-weight -1: a number, 0 or above"),
        ({"settings": {"model_steps": -1}}, "--model-steps -1: at least 0"),
        ({"data": arrays() | {"images": np.full((60, 1, 8, 8), 3.0, np.float32)}}, "all 60 images are the same"),
        ({"network": "nope:make"}, "--network nope:make: there is no Python module 'nope'"),
        ({"expert_folder": Path(__file__)}, r"--expert-folder .*test_job\.py: it is a file, and a folder is wanted"),
        ({"method": "mtt", "settings": {"balance": True}}, "--balance: a part of AST"),
        ({"method": "mt"}, "--method mt: known are ast, mtt"),
        ({"method": "mtt", "settings": {"beta": "adaptive"}}, "--intermediate adaptive: a part of AST"),
    ],
)
def test_refusals(tmp_path: Path, cache: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tmp_path / "out", cache, **change)


@pytest.mark.matrix
def test_real_images_are_written_only_when_asked_for(tmp_path: Path, cache: Path) -> None:
    settings = {"rate_images": 1e-30}  # images stay what they are
    with pytest.raises(
        InputError,
        match=r"nothing is written: no iterate was better than the 6 real images of the start .*; try more "
        r"--iterations or another --lr-images, or write real images with --allow-originals",
    ):
        run(tmp_path / "out", cache, settings={"rate_images": 1e30}, allow_originals=False)
    assert not (tmp_path / "out").exists()
    # The same run goes on from its state, and says what it has written.
    report = run(tmp_path / "out", cache, settings={"rate_images": 1e30})
    assert report.iteration == 0
    assert report.warnings == (
        "the 6 images written are real ones: no iterate was better; treat this file like the originals",
    )
    near = run(tmp_path / "near", cache, settings={"looks": 0, **settings}, allow_originals=False)
    assert near.iteration == 6
    assert len(near.warnings) == 1
    assert "6 of the 6 images written are nearest to the real ones they began as" in near.warnings[0]
    assert "treat this file like the originals" in near.warnings[0]
    # Far from all real images, and still nearest to others than they began as.
    far = find_neighbours(torch.full((2, 1, 8, 8), 9.0), torch.tensor([0, 1]), torch.from_numpy(arrays()["images"]))
    assert (far.nearest_is_start, far.nearer_than_typical) == (0, 0)
    found = Distilled(torch.zeros(2, 1, 8, 8), 0.1, 6, {}, [], [])
    assert _warnings(found, far) == []
    told = _originals(found, 2, Path(".a.work"))
    assert "another --lr-images (each with --overwrite, as .a.work keeps this run's state), or write real" in told


@pytest.mark.matrix
def test_images_that_blow_up_leave_the_best_so_far(tmp_path: Path, cache: Path) -> None:
    report = run(tmp_path / "far", cache, settings={"rate_images": 1e30})
    assert report.iteration == 0
    assert any("stopped early: the loss was" in note for note in report.notes)
    assert np.isfinite(np.load(tmp_path / "far" / "distilled.npz")["images"]).all()
    # With nothing judged there is no best, and what it has come to is worth nothing.
    with pytest.raises(InputError, match=r"images would not be finite after it; .* or give --looks"):
        run(tmp_path / "none", cache, settings={"rate_images": 1e38, "looks": 0})
    assert not (tmp_path / "none").exists()


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        run(tmp_path / "out", cache)
    with pytest.raises(InputError, match="not a folder that `compress distill` has written"):
        run(tmp_path / "out", cache, overwrite=True)


def stop_at(stop: int) -> Any:
    def kill(what: str, done: int, total: int) -> None:
        if what.startswith("distilling") and done == stop:
            raise KeyboardInterrupt

    return kill


@pytest.mark.matrix
def test_stopped_under_overwrite_goes_on_and_another_run_begins_anew(tmp_path: Path, cache: Path) -> None:
    settings = {"looks": 0}
    first = run(tmp_path / "out", cache, settings=settings)
    state = tmp_path / ".out.work" / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", cache, settings=settings, overwrite=True, progress=stop_at(5))
    held = state.read_bytes()
    # A typo is refused before anything is thrown away.
    wrongs: tuple[dict[str, Any], ...] = (
        {"model": "typo.pt", "settings": settings},
        {"network": "nope:make", "settings": settings},
        {"settings": {"each": 21}},
    )
    for wrong in wrongs:
        with pytest.raises(InputError):
            run(tmp_path / "out", cache, overwrite=True, **wrong)
    assert state.read_bytes() == held
    seen: list[int] = []
    again = run(
        tmp_path / "out", cache, settings=settings, overwrite=True,
        progress=lambda what, done, total: seen.append(done) if what.startswith("distilling") else None,
    )  # fmt: skip
    assert seen == [6]
    assert again.provenance == first.provenance

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", cache, settings=settings, overwrite=True, progress=stop_at(5))
    changed = {"looks": 0, "steps": 5}
    with pytest.raises(InputError, match="exists already"):
        run(tmp_path / "out", cache, settings=changed)
    report = run(tmp_path / "out", cache, settings=changed, overwrite=True)
    assert len(report.losses) == 6
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


@pytest.mark.matrix
def test_what_others_keep_in_the_work_folder_stays(tmp_path: Path, cache: Path) -> None:
    work = tmp_path / ".out.work"
    work.mkdir()
    (work / "mine.txt").write_text("mine")
    (work / ".state.safetensors.999999999.partial").write_text("half written")
    run(tmp_path / "out", cache, settings={"iterations": 1, "looks": 0})
    run(tmp_path / "out", cache, settings={"iterations": 1, "looks": 0}, overwrite=True)
    assert [each.name for each in work.iterdir()] == ["mine.txt"]
    (tmp_path / ".other.work").write_text("mine")
    with pytest.raises(InputError, match=r"\.other\.work is a file, .* give another --out"):
        run(tmp_path / "other", cache)


def test_current_folder_is_not_replaced(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(
            InputError, match=r"--out \. is the current folder or one around it; give a new folder's name"
        ):
            run(Path(), cache, overwrite=overwrite)
