"""Budgets buy the member they should, times are kept for the machine they hold on, and tampered folders are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.errors import InfeasibleBudget, InputError
from compress.lowrank.norms import recalibrate
from compress.training.lowrank import timing
from compress.training.lowrank.choice import WEIGHT_BYTES, choose_member, family_budgets
from compress.training.lowrank.family import Family, FamilyMember, plot, read_family
from compress.training.lowrank.job import LowRankOptions, truncate
from compress.training.lowrank.timing import MemberTimer
from tests.networks import let_fall, normed_mlp


def net() -> nn.Module:
    """Its weights fall off, so that there is something to cut."""
    module = normed_mlp(16, 48, 4)
    let_fall(module[0], module[3])
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family") / "out"
    module = net()
    x = torch.randn(200, 16)
    recalibrate(module, [x])
    module.eval()
    with torch.no_grad():
        labels = module(x).argmax(1)
    truncate(module, (x, labels), folder, test=(x, labels), options=LowRankOptions(smallest=0.2))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "family"))


def chosen(folder: Path, *texts: str, timer: Any = None) -> FamilyMember:
    _, family = read_family(folder)
    return choose_member(family, family_budgets(texts, family), timer)


@pytest.mark.slow
def test_budgets_of_what_is_known_without_measuring(made: Path) -> None:
    _, family = read_family(made)
    for limit in (1.0, 0.6, 0.3):
        member = chosen(made, f"macs={limit}x")
        fitting = [each for each in family.members if each.macs <= limit * family.dense_macs]
        assert member.loss == min(each.loss for each in fitting)
        size = chosen(made, f"size={limit}x")
        assert size.weights <= limit * family.dense_weights
        assert chosen(made, f"size={limit * family.dense_weights * WEIGHT_BYTES}B") == size
    assert chosen(made, f"macs={family.dense_macs // 2}") == chosen(made, "macs=0.5x")
    assert family.dense_metric is not None
    kept = chosen(made, "drop=10")
    within = [each for each in family.members if 100 * (family.dense_metric - (each.metric or 0)) <= 10]
    assert kept.macs == min(each.macs for each in within) < family.dense_macs
    both = chosen(made, "drop=10,size=0.5x")
    assert both.weights <= 0.5 * family.dense_weights


@pytest.mark.slow
def test_budgets_that_nothing_keeps_say_what_is_reachable(made: Path) -> None:
    _, family = read_family(made)
    least = family.members[-1]
    with pytest.raises(InfeasibleBudget, match=f"the smallest that a member reaches is {least.macs:,} MACs"):
        chosen(made, "macs=1")
    with pytest.raises(InfeasibleBudget, match=r"size is limited to 0\.0 kB; the smallest that a member reaches is"):
        chosen(made, "size=1B")
    with pytest.raises(InfeasibleBudget, match=r"no member keeps all budgets: drop is limited to 0\.00 points, and"):
        chosen(made, "drop=0", f"macs={least.macs}")
    without = family.model_copy(update={"metric_name": None})
    with pytest.raises(InputError, match="make the family with --test"):
        family_budgets(["drop=1"], without)
    with pytest.raises(InputError, match="this family has mean squared error"):
        family_budgets(["drop=1"], family.model_copy(update={"metric_name": "mean squared error"}))


class Stopwatch(MemberTimer):
    """A machine on which a member takes as long as it has MACs, and the dense model 1,000 us."""

    speed = 1.0

    def _measure(self, numbers: Sequence[int], done: int, total: int) -> list[float]:
        self.measured += len(numbers)
        shares = [self.family.members[number].macs / self.family.dense_macs for number in numbers]
        return [1000 * self.speed, *(1000 * self.speed * share for share in shares)]


def test_a_latency_budget_is_met_by_bisection_and_timed_once(folder: Path) -> None:
    module, family = read_family(folder)
    timer = Stopwatch(folder, module, family)
    member = chosen(folder, "latency=0.5x", timer=timer)
    assert member == chosen(folder, "macs=0.5x"), "time is proportional to MACs here"
    assert 1 <= timer.measured <= len(family.members).bit_length() + 1
    assert chosen(folder, "latency=500us", timer=timer) == member
    again = Stopwatch(folder, module, family)
    assert chosen(folder, "latency=0.5x", timer=again) == member
    assert again.measured == 0, "kept in latency.json"
    slower = Stopwatch(folder, module, family)
    slower.speed = 3.0  # the same machine while it does something else
    everyone = slower.times(range(len(family.members)))
    assert everyone[0] == pytest.approx(1000 * family.members[0].macs / family.dense_macs)
    assert slower.measured < len(family.members)
    other = Stopwatch(folder, module, family, threads=2)
    other.times([0])
    assert other.measured == 1, "another number of threads is another table"
    assert len(json.loads((folder / "latency.json").read_text())["tables"]) == 2
    with pytest.raises(InfeasibleBudget, match=r"the smallest that a member reaches is .* ms \(0\.\d\dx of the dense"):
        chosen(folder, "latency=1us", timer=again)
    with pytest.raises(InfeasibleBudget, match="within the other budgets"):
        chosen(folder, "latency=1us,drop=30", timer=again)


@pytest.mark.matrix
@torch.no_grad()
def test_a_transformer_on_token_ids(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    module = nn.Sequential(nn.Embedding(50, 32), nn.TransformerEncoder(layer, 1), nn.Flatten(), nn.Linear(256, 3))
    ids = torch.randint(0, 50, (64, 8))
    family = truncate(module.eval(), ids, tmp_path / "out", options=LowRankOptions(smallest=0.3)).family
    names = [f"1.layers.0.{name}" for name in ("self_attn.q", "self_attn.out", "linear1", "linear2")]
    assert set(names) <= set(family.members[0].ranks), "attention is opened before it is counted"
    assert family.dense_macs == 8 * (4 * 32 * 32 + 2 * 32 * 64) + 256 * 3
    assert family.members[-1].macs <= 0.3 * family.dense_macs
    assert family.inputs[0].dtype == "int64"
    found, _ = read_family(tmp_path / "out")
    assert MemberTimer(tmp_path / "out", found, family).times([len(family.members) - 1])


@pytest.mark.slow
def test_members_are_really_timed(folder: Path) -> None:
    module, family = read_family(folder)
    timer = MemberTimer(folder, module, family)
    last = len(family.members) - 1
    assert timer.times([0, last])[last] > 0
    assert timer.dense_us > 0
    assert timer.measured == 2
    assert sorted(each.name for each in folder.iterdir() if each.suffix == ".json") == ["family.json", "latency.json"]


def test_times_of_another_machine_or_family_do_not_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, family = read_family(folder)
    Stopwatch(folder, module, family).times([0])
    real = timing.conditions
    monkeypatch.setattr(timing, "conditions", lambda *given: real(*given) | {"processor": "another"})
    elsewhere = Stopwatch(folder, module, family)
    elsewhere.times([0])
    assert elsewhere.measured == 1
    changed = family.model_copy(update={"dense_macs": family.dense_macs + 1})
    with pytest.raises(InputError, match=r"belongs to another family\.json; delete it"):
        MemberTimer(folder, module, changed)
    (folder / "latency.json").write_text("{")
    with pytest.raises(InputError, match="is damaged; delete it"):
        MemberTimer(folder, module, family)
    with pytest.raises(InputError, match="--batch 0: at least 1"):
        MemberTimer(folder, module, family, batch=0)


@pytest.mark.parametrize("name", ["family.pt", "family.json", "norms.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"has no {name}: `compress lowrank train`"):
        read_family(folder)


@pytest.mark.parametrize("name", ["family.pt", "norms.safetensors"])
def test_a_tampered_file_is_named(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is not the file that family.json was written with"):
        read_family(folder)


def test_a_damaged_record_is_refused(folder: Path) -> None:
    text = (folder / "family.json").read_text()
    (folder / "family.json").write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match="is damaged, or of another version"):
        read_family(folder)
    family = Family.model_validate_json(text)
    larger = family.members[1].model_copy(update={"ranks": family.members[1].ranks | {"3": 99}})
    changed = family.model_copy(update={"members": (family.members[0], larger)})
    (folder / "family.json").write_text(changed.model_dump_json())
    with pytest.raises(InputError, match="was changed: member 1 has rank 99 in layer 3, which has 0 to 48"):
        read_family(folder)
    (folder / "family.json").write_text(family.model_copy(update={"members": family.members[1:]}).model_dump_json())
    with pytest.raises(InputError, match="are not of one run: their ranks differ"):
        read_family(folder)


def test_a_picture_is_drawn_whole_or_not_at_all(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    family = read_family(made)[1]
    costs = [float(each.macs) for each in family.members]
    picture = tmp_path / "latency.SVG"
    plot(family, picture, costs, "MACs")
    whole = picture.read_bytes()
    assert b"<svg" in whole

    def draw_half(self: Figure, path: Path, **settings: Any) -> None:
        path.write_bytes(whole[:100])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Figure, "savefig", draw_half)
    with pytest.raises(InputError, match=r"cannot write .*latency\.SVG: No space left"):
        plot(family, picture, costs, "MACs")
    assert picture.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["latency.SVG"]


def test_a_name_that_is_no_pictures_is_refused(made: Path, tmp_path: Path) -> None:
    family = read_family(made)[1]
    for name in ("latency", "latency.onnx", "latency.png.bak"):
        with pytest.raises(InputError, match=r"is no picture's name; it may end in .*\.png.*\.svg"):
            plot(family, tmp_path / name, [], "MACs")
    (tmp_path / "drawn.png").mkdir()
    with pytest.raises(InputError, match="is a folder; name a file"):
        plot(family, tmp_path / "drawn.png", [], "MACs")
