"""The method as a whole: equal to genie where nothing is transformed, resumable, and safe where it cannot help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.calib import block_walk, reconstruction
from compress.calib.metaaug import method, phase
from compress.calib.metaaug.settings import PUBLISHED, MetaAug
from compress.calib.resume import ResumeStore
from compress.data.samples import Samples, load_samples
from compress.errors import InputError
from compress.intake.model import Intake, take_in
from compress.options import Options
from compress.pipeline.apply_plan import Compressed, apply_plan
from compress.plans.frame import make_plan
from tests.every import every

QUICK = MetaAug(steps=3, warm_up=20, rate=2e-2)


class Blocks(nn.Module):
    """A stem, two residual blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for first, second in (self.layers[:2], self.layers[2:]):
            x = torch.relu(x + second(torch.relu(first(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def samples() -> Samples:
    coarse = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(21))
    return load_samples(nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear"))


@pytest.fixture(scope="module")
def intake(samples: Samples) -> Intake:
    torch.manual_seed(20)
    return take_in(Blocks().eval(), samples=samples)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Callable[[MetaAug], None]:
    """Sets what the row of the table holds."""

    def put(wanted: MetaAug) -> None:
        monkeypatch.setattr(method, "METAAUG", replace(method.METAAUG, transform=wanted))

    put(QUICK)
    return put


def carried(
    intake: Intake,
    samples: Samples,
    name: str,
    folder: Path,
    say: Callable[[str], None] = lambda said: None,
    **changes: object,
) -> Compressed:
    given: dict[str, object] = {"bits": 2, "act_bits": 4, "iterations": 12, **changes}
    plan = make_plan(intake, Options(method=name, **given), samples)  # type: ignore[arg-type]
    store = ResumeStore(folder, "x")
    return apply_plan(intake.traced.copy(), plan, samples.inputs, store, lambda label: None, say)


def notes(done: Compressed) -> dict[str, str]:
    return {result.layer: result.note or "" for result in done.layers}


def assert_same(one: Compressed, other: Compressed) -> None:
    states = (one.model.module.state_dict(), other.model.module.state_dict())
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.mark.matrix
def test_without_a_change_it_is_genie_on_every_image_twice(
    intake: Intake, samples: Samples, settings: Callable[[MetaAug], None], unchanged: None, tmp_path: Path
) -> None:
    settings(replace(QUICK, margin_weight=0.0, similarity_weight=0.0))
    ends = ("stem", "head")  # those are learned on the originals alone
    done = carried(intake, samples, "metaaug", tmp_path / "a", ignore=ends)
    twice = load_samples(torch.cat([samples.inputs[0]] * 2))
    assert_same(done, carried(intake, twice, "genie", tmp_path / "b", ignore=ends))
    assert every(";" not in note for note in notes(done).values())
    once = carried(intake, samples, "genie", tmp_path / "c", ignore=ends)
    with pytest.raises(AssertionError):
        assert_same(done, once)


@pytest.mark.matrix
def test_ends_are_learned_on_the_originals(
    intake: Intake, samples: Samples, settings: Callable[[MetaAug], None], tmp_path: Path
) -> None:
    done = carried(intake, samples, "metaaug", tmp_path / "a")
    genie = carried(intake, samples, "genie", tmp_path / "b")
    packed = [[each.model.tensor(f"{layer}.weight_scale") for layer in ("stem", "layers.0")] for each in (done, genie)]
    assert torch.equal(packed[0][0], packed[1][0])
    assert not torch.equal(packed[0][1], packed[1][1])


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bytes_wherever_it_was(
    intake: Intake,
    samples: Samples,
    settings: Callable[[MetaAug], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    whole = carried(intake, samples, "metaaug", tmp_path / "whole", said.append)
    assert sum("warm-up" in each for each in said) == 10
    assert sum("meta step" in each for each in said) == 2 * QUICK.steps
    done = 0

    def stopping(plain: Callable[..., object], at: int) -> Callable[..., object]:
        def run(*args: object) -> object:
            nonlocal done
            done += 1
            if done == at:
                raise KeyboardInterrupt
            return plain(*args)

        return run

    said.clear()
    # Stem, one block and the second's meta phase are done when the first run ends, the second's again is not.
    for owner, name, at in ((phase.MetaPhase, "step", 2), (phase.MetaPhase, "step", 5), (block_walk, "reconstruct", 2)):
        done = 0
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stopping(getattr(owner, name), at))
            with pytest.raises(KeyboardInterrupt):
                carried(intake, samples, "metaaug", tmp_path / "continued", said.append)
    assert_same(whole, carried(intake, samples, "metaaug", tmp_path / "continued", said.append))
    assert sum("warm-up" in each for each in said) == 10
    assert sum("meta step 3 of 3" in each for each in said) == 2


@pytest.mark.matrix
def test_a_transformation_that_changes_nothing_is_reported(
    intake: Intake, samples: Samples, settings: Callable[[MetaAug], None], tmp_path: Path
) -> None:
    settings(replace(QUICK, warm_up=200, rate=1e-9, margin=0.9))
    said = notes(carried(intake, samples, "metaaug", tmp_path / "a"))
    for layer, note in said.items():
        assert ("collapsed to the identity" in note and "0.9 are wanted" in note) is layer.startswith("layers"), note


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("restored", [True, False])
def test_a_loss_that_is_not_finite_leaves_genie(
    restored: bool,
    intake: Intake,
    samples: Samples,
    settings: Callable[[MetaAug], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = phase.validation_loss
    seen = 0

    def spoilt(*args: object) -> Tensor:
        nonlocal seen
        seen += 1
        found = plain(*args)  # type: ignore[arg-type]
        return found * float("nan") if seen == 2 or not restored else found

    monkeypatch.setattr(phase, "validation_loss", spoilt)
    done = carried(intake, samples, "metaaug", tmp_path / "a")
    said = notes(done)
    assert f"without transformed copies: its meta loss is not finite at step {int(restored)}" in said["layers.0"]
    assert ("without" in said["layers.2"]) is not restored
    if not restored:
        assert_same(done, carried(intake, samples, "genie", tmp_path / "b"))


@pytest.mark.matrix
def test_images_that_teach_nothing_leave_genie(
    intake: Intake, settings: Callable[[MetaAug], None], tmp_path: Path
) -> None:
    few = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    for name, x, why in (
        ("few", few, "2 samples in a batch are fewer than the 3"),
        ("same", few[:1].repeat(40, 1, 1, 1), "all samples are the same"),
    ):
        done = carried(intake, load_samples(x), "metaaug", tmp_path / name, iterations=3)
        assert why in notes(done)["layers.0"]
        assert_same(done, carried(intake, load_samples(x), "genie", tmp_path / f"{name}-genie", iterations=3))


@pytest.mark.matrix
def test_fewer_images_than_a_batch(intake: Intake, settings: Callable[[MetaAug], None], tmp_path: Path) -> None:
    few = load_samples(torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(3)))
    done = carried(intake, few, "metaaug", tmp_path / "a", iterations=3)
    assert "without" not in notes(done)["layers.0"]


@pytest.mark.matrix
def test_a_block_whose_output_is_constant(
    settings: Callable[[MetaAug], None], tmp_path: Path, samples: Samples
) -> None:
    torch.manual_seed(1)
    module = Blocks().eval()
    with torch.no_grad():
        module.stem.bias.sub_(100)  # dead behind its ReLU
    done = carried(take_in(module, samples=samples), samples, "metaaug", tmp_path / "a", iterations=3)
    assert "without transformed copies: its output is the same for all samples" in notes(done)["layers.0"]


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("changes", [{"dynamic": True, "act_bits": None}, {"act_bits": None}], ids=str)
def test_inputs_that_have_no_grid_or_one_of_their_own(
    changes: dict[str, object], intake: Intake, samples: Samples, settings: Callable[[MetaAug], None], tmp_path: Path
) -> None:
    done = carried(intake, samples, "metaaug", tmp_path / "a", **changes)
    assert "without" not in notes(done)["layers.0"]


@pytest.mark.slow
def test_a_graph_that_begins_and_ends_with_a_block_and_returns_maps(
    settings: Callable[[MetaAug], None], tmp_path: Path, samples: Samples
) -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x)))

    torch.manual_seed(2)
    module = Alone().eval()
    done = carried(take_in(module, samples=samples), samples, "metaaug", tmp_path / "a")
    assert "without" not in notes(done)["up"]


@pytest.mark.matrix
@pytest.mark.parametrize("batch", [1, 16])
def test_a_batch_that_the_graph_fixes(
    batch: int, settings: Callable[[MetaAug], None], tmp_path: Path, samples: Samples
) -> None:
    class Fixed(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(batch, 1, 8, 8))

    torch.manual_seed(2)
    torch.export.save(torch.export.export(Fixed().eval(), (samples.inputs[0][:batch],)), tmp_path / "fixed.pt2")
    intake = take_in(tmp_path / "fixed.pt2", samples=samples)
    assert len(intake.traced.example[0]) == batch
    note = notes(carried(intake, samples, "metaaug", tmp_path / "a", iterations=3))["layers.0"]
    assert ("without transformed copies: 1 samples in a batch are fewer than" in note) is (batch == 1)


@pytest.mark.matrix
def test_the_published_settings_run(
    intake: Intake, samples: Samples, settings: Callable[[MetaAug], None], tmp_path: Path
) -> None:
    settings(replace(PUBLISHED, steps=2, warm_up=2, published_network=False))
    said = notes(carried(intake, samples, "metaaug", tmp_path / "a"))
    assert "without" not in said["layers.0"]


def test_one_reconstruction_serves_all() -> None:
    assert replace(method.METAAUG, transform=None) == reconstruction.GENIE
    assert replace(reconstruction.GENIE, transform=PUBLISHED) == method.METAAUG_PUBLISHED


def test_a_plan_has_one_way_of_transforming(intake: Intake, samples: Samples, tmp_path: Path) -> None:
    plan = make_plan(intake, Options(method="metaaug", bits=2, act_bits=4), samples)
    last = plan.choices[-1].model_copy(update={"method": "metaaug-published"})
    plan = plan.model_copy(update={"choices": (*plan.choices[:-1], last)})
    with pytest.raises(InputError, match="layers of metaaug and of metaaug-published"):
        apply_plan(intake.traced.copy(), plan, samples.inputs, ResumeStore(tmp_path, "x"), lambda label: None, print)


def test_without_steps_nothing_is_transformed(
    intake: Intake, samples: Samples, settings: Callable[[MetaAug], None], tmp_path: Path
) -> None:
    said: list[str] = []
    carried(intake, samples, "metaaug", tmp_path / "a", said.append, iterations=0)
    assert said == []


@pytest.mark.matrix
def test_time_left_counts_from_where_the_block_begins(
    intake: Intake,
    samples: Samples,
    settings: Callable[[MetaAug], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    now = 0.0
    plain = phase.MetaPhase.run

    def slow(*given: object) -> object:
        nonlocal now
        now += 1e6
        return plain(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(block_walk.time, "monotonic", lambda: now)
    monkeypatch.setattr(phase.MetaPhase, "run", slow)
    carried(intake, samples, "metaaug", tmp_path / "a", said.append)
    steps = [each for each in said if ": step" in each]
    assert steps
    assert every(each.endswith(" 0 s left") for each in steps)
