"""Ranks beside bits: which there are, what they cost and lose, and that more ways never make a plan worse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from compress.data.samples import Samples, load_samples
from compress.errors import InputError
from compress.graph.layers import list_layers
from compress.intake.model import Intake, take_in
from compress.lowrank.ranks import check_shares, layers_of, thin_layers, thin_ranks
from compress.options import Options, Search
from compress.pipeline.run import realize
from compress.plans.frame import begin_plan
from compress.plans.review import review_plan
from compress.records.layers import LayerSpec, QuantOption, Split
from compress.records.plan import Choice, Plan
from compress.search.allocator import Allocator
from compress.search.costs import Costs, export_ways, measure_costs
from compress.search.sensitivities import measure_errors
from compress.search.space import Space, Way
from tests.every import every
from tests.search.conftest import CPU, predicted_size, silent, space_of  # type: ignore[import-not-found]

RANKS = (0.25, 0.5)


def spec(**changes: object) -> LayerSpec:
    values = {"name": "a", "kind": "conv2d", "weight_shape": (64, 32, 3, 3), "macs": 64 * 32 * 9 * 49, "rows": 49}
    return LayerSpec(**(values | changes))  # type: ignore[arg-type]


def test_a_share_of_the_macs_gives_the_rank() -> None:
    layer = spec()
    (rank,) = thin_ranks(layer, (0.5,))
    assert rank == 24  # 64 * 288 / (64 + 288) / 2 = 26.2, in steps of 8
    down, up = thin_layers(layer, rank)
    assert (down.name, down.weight_shape) == ("a.down", (24, 32, 3, 3))
    assert (up.name, up.weight_shape) == ("a.up", (64, 24, 1, 1))
    assert down.macs + up.macs == 24 * (288 + 64) * 49 < 0.5 * layer.macs
    assert thin_ranks(spec(weight_shape=(10, 16), kind="linear"), RANKS) == (1, 3)


@pytest.mark.parametrize("changes", [{"groups": 8}, {"calls": 2}, {"refusal": "no"}, {"kind": "embedding"}])
def test_what_cannot_be_cut_has_no_ranks(changes: dict[str, object]) -> None:
    assert thin_ranks(spec(**changes), RANKS) == ()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 2.0])
def test_shares_out_of_range(share: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        check_shares((0.5, share))


@pytest.fixture(scope="module")
def space(intake: Intake) -> Space:
    return space_of(intake, weight_widths=(4, 8), ranks=RANKS, floats=True)


@pytest.fixture(scope="module")
def costs(intake: Intake, space: Space) -> Costs:
    return measure_costs(intake, space, CPU, Search(), timed=False, progress=silent)


def test_ranks_are_ways_on_floats_and_on_integers(intake: Intake, space: Space) -> None:
    ranks = thin_ranks(next(layer for layer in intake.layers if layer.name == "deep"), RANKS)
    assert len(ranks) == 2
    found = {(str(way.option), way.rank) for way in space.ways["deep"]}
    assert found == {(option, rank) for option in ("W4A8", "W8A8", "None") for rank in (None, *ranks)}
    assert every(way.split("deep") is None for way in space.ways["deep"] if way.rank is None)
    thin = next(way for way in space.ways["deep"] if way.rank and way.option)
    assert [choice.layer for choice in thin.choices("deep")] == ["deep.down", "deep.up"]


@pytest.mark.slow
def test_predicted_sizes_are_the_files(intake: Intake, space: Space, costs: Costs, tmp_path: Path) -> None:
    for number, bits in enumerate((None, 4, 8)):
        ways = {
            layer: next(way for way in found if way.rank and (way.option.bits if way.option else None) == bits)
            for layer, found in space.ways.items()
        }
        file = export_ways(intake.traced, ways, CPU, tmp_path / f"{number}.onnx")
        assert predicted_size(costs, ways) == pytest.approx(file.stat().st_size, rel=0.05)


@pytest.mark.slow
def test_errors_are_those_of_the_model_with_the_layer_cut(intake: Intake, space: Space, samples: Samples) -> None:
    options = Options(search=Search(sensitivity="gram"))
    frame = begin_plan(intake, options, samples)
    errors, _ = measure_errors(intake, options, frame, space, "gram", samples, silent)
    for layer, found in errors.items():
        by_rank = {way.rank: error for way, error in found.items() if way.option is None}
        ranks = sorted(rank for rank in by_rank if rank)
        assert by_rank[None] == 0.0
        assert by_rank[ranks[0]] > by_rank[ranks[-1]] > 0.0, layer
        for rank in ranks:
            widths = {way.option.bits: error for way, error in found.items() if way.rank == rank and way.option}
            assert widths[4] > widths[8] >= 0.9 * by_rank[rank], (layer, rank)
    # Gram's error of a float rank: what is left of the layer's own output.
    rank = min(way.rank for way in space.ways["body"] if way.rank)
    with torch.no_grad():
        x = torch.relu(intake.original.stem(samples.inputs[0]))  # type: ignore[operator, union-attr]
        rows = torch.nn.functional.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 72)
        y = rows @ intake.traced.tensor("body.weight").flatten(1).T
        best = torch.linalg.svdvals(y).square()
    assert errors["body"][Way(None, None, "float", rank)] == pytest.approx(
        float(best[rank:].sum() / best.sum()), rel=1e-2
    )


@pytest.mark.matrix
def test_more_ways_never_make_a_plan_worse(intake: Intake, space: Space, costs: Costs, samples: Samples) -> None:
    options = Options(search=Search(sensitivity="gram"))
    errors, _ = measure_errors(intake, options, begin_plan(intake, options, samples), space, "gram", samples, silent)
    keep = {"bits": lambda way: way.rank is None, "ranks": lambda way: way.option is None, "joint": lambda way: True}
    programs = {}
    for name, wanted in keep.items():
        ways = {layer: tuple(filter(wanted, found)) for layer, found in space.ways.items()}
        made = Allocator(intake.traced, replace(space, ways=ways), costs, CPU, Search(), silent)
        made.errors = errors
        programs[name] = made
    full = costs.float_totals["bops"]
    better = 0
    for share in (0.02, 0.05, 0.1, 0.3, 0.6):
        found = {}
        for name, allocator in programs.items():
            if allocator.smallest("bops", {}) <= share * full:  # type: ignore[operator]
                _, answer = allocator._solve("error", {"bops": share * full})
                found[name] = answer
        joint = found["joint"]
        assert joint.status == "optimal"
        for name, answer in found.items():
            assert joint.objective <= answer.objective * (1 + 1e-6) + 1e-9, (share, name)
        better += all(joint.objective < 0.999 * each.objective for name, each in found.items() if name != "joint")
    assert better, "a program over both has found nothing that one alone has not"


def plan_with(intake: Intake, samples: Samples, splits: tuple[Split, ...], option: QuantOption | None) -> Plan:
    names = [layer.name for layer in layers_of(intake.layers, splits)]
    choices = [
        Choice(layer=name, method="mse", option=option, format="integer" if option.act_bits else "float-weights")
        for name in names
        if option is not None
    ]
    return begin_plan(intake, Options(), samples).model_copy(update={"choices": tuple(choices), "splits": splits})


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("option", [None, QuantOption(bits=8, act_bits=8)], ids=str)
def test_a_plan_with_ranks_is_carried_out_and_proven(
    intake: Intake, samples: Samples, option: QuantOption | None, tmp_path: Path
) -> None:
    splits = (Split(layer="body", rank=20), Split(layer="deep", rank=40))
    plan = plan_with(intake, samples, splits, option)
    reviewed, notes = review_plan(plan, intake.layers, intake.fingerprint, samples.fingerprint, len(samples))
    assert not notes
    result = realize(intake, reviewed, samples, None, tmp_path / "out", overwrite=False, progress=silent)
    assert [row.name for row in result.report.layers] == [
        "stem", "body.down", "body.up", "deep.down", "deep.up", "left", "right",
    ]  # fmt: skip
    assert any("low rank: 2 layers" in note for note in result.report.notes)
    assert result.report.export_check.integer_layers == (7 if option else 0)
    with torch.no_grad():
        wanted = intake.original(samples.inputs[0])
        found = result.module(samples.inputs[0])
    assert float((found - wanted).norm() / wanted.norm()) < 0.2
    names = {layer.name for layer in list_layers(intake.traced)}
    assert "body" in names, "the intake's own graph is left whole"


@pytest.fixture(scope="module")
def linears() -> tuple[Intake, Samples]:
    """Two linears, the first wide enough for a branch, with inputs of unequal lengths."""
    torch.manual_seed(4)
    module = nn.Sequential(nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
    samples = load_samples(torch.randn(300, 96) * torch.logspace(0.7, -0.7, 96))
    return take_in(module.eval(), samples=samples), samples


@pytest.mark.matrix
def test_a_branch_corrects_few_bits(linears: tuple[Intake, Samples], tmp_path: Path) -> None:
    intake, samples = linears
    space = space_of(intake, weight_widths=(2, 4, 8), ranks=(0.5,), floats=True)
    branches = [way for way in space.ways["0"] if way.form == "branch"]
    assert {way.option.bits for way in branches if way.option} == {2, 4}
    assert not any(way.form == "branch" for way in space.ways["2"]), "too narrow for one"
    costs = measure_costs(intake, space, CPU, Search(), timed=False, progress=silent)
    options = Options(search=Search(sensitivity="output"))
    errors, _ = measure_errors(intake, options, begin_plan(intake, options, samples), space, "output", samples, silent)
    whole = {way.option.bits: way for way in space.ways["0"] if way.rank is None and way.option}
    for way in branches:
        assert way.option is not None
        plain = whole[way.option.bits]
        assert errors["0"][way] < 0.97 * errors["0"][plain], way
        cost, without = costs.layers["0"][way], costs.layers["0"][plain]
        assert without.size_bytes < cost.size_bytes < costs.layers["0"][whole[8]].size_bytes
        assert without.macs < cost.macs
    way = next(way for way in branches if way.option and way.option.bits == 2)
    names = way.names("0")
    assert names == ("0.down", "0", "0.up")
    plan = begin_plan(intake, Options(), samples).model_copy(
        update={"choices": way.choices("0"), "splits": (way.split("0"),)}
    )
    done = realize(intake, plan, samples, None, tmp_path / "out", overwrite=False, progress=silent)
    by_name = {row.name: row.option for row in done.report.layers}
    assert by_name == {"0.down": "W8A8", "0": "W2A8", "0.up": "W8A8", "2": "float"}
    x = samples.inputs[0]
    rounded = begin_plan(intake, Options(), samples).model_copy(update={"choices": whole[2].choices("0")})
    plain = realize(intake, rounded, samples, None, None, overwrite=False, progress=silent)
    with torch.no_grad():
        wanted, found, worse = intake.original(x), done.module(x), plain.module(x)
    assert float((found - wanted).norm()) < 0.97 * float((worse - wanted).norm())


@pytest.mark.matrix
def test_the_second_factor_makes_up_for_what_came_before(
    intake: Intake, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = (Split(layer="body", rank=6), Split(layer="deep", rank=12))
    plan = plan_with(intake, samples, splits, QuantOption(bits=4, act_bits=8))
    with torch.no_grad():
        wanted = intake.original(samples.inputs[0])

        def error() -> float:
            done = realize(intake, plan, samples, None, None, overwrite=False, progress=silent)
            return float((done.module(samples.inputs[0]) - wanted).norm() / wanted.norm())

        fitted = error()
        monkeypatch.setattr("compress.calib.calibrate.refit_up", lambda problem: (problem.weight, problem.bias))
        assert fitted < 0.95 * error()


def test_a_plan_that_splits_what_cannot_be_is_refused_by_name(intake: Intake, samples: Samples) -> None:
    splits = (Split(layer="body", rank=33), Split(layer="gone", rank=1), Split(layer="left", rank=2))
    plan = plan_with(intake, samples, splits[2:], None).model_copy(update={"splits": splits})
    with pytest.raises(InputError) as caught:
        review_plan(plan, intake.layers, intake.fingerprint, samples.fingerprint, len(samples))
    assert "layer body cannot be split: rank 33: allowed are 1 to 32" in str(caught.value)
    assert "layer gone cannot be split" in str(caught.value)
    assert "left" not in str(caught.value)
