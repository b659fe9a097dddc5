"""Which ways a layer has: what widths, data, target and options allow, and no others."""

from __future__ import annotations

import pytest

from compress.errors import InputError
from compress.intake.model import Intake
from compress.search.space import FLOAT, Space
from tests.every import every
from tests.search.conftest import space_of  # type: ignore[import-not-found]

LAYERS = ["stem", "body", "deep", "left", "right"]


def widths(space: Space, layer: str) -> set[tuple[int, int]]:
    return {way.widths for way in space.ways[layer]}


def test_widths_of_weights_and_inputs_are_combined(intake: Intake) -> None:
    space = space_of(intake, weight_widths=(2, 8), act_widths=(4, 8))
    assert list(space.ways) == LAYERS
    assert widths(space, "body") == {(2, 4), (2, 8), (8, 4), (8, 8)}
    # A narrow leading convolution is faster on floats.
    assert widths(space, "stem") == {(2, 32), (8, 32)}
    assert every(way.format == "float-weights" for way in space.ways["stem"])
    assert len(set(space.ways["body"])) == len(space.ways["body"])


def test_the_table_decides_where_latency_matters(intake: Intake) -> None:
    space = space_of(intake, timed=True, weight_widths=(4,), floats=True)
    for layer in LAYERS:
        assert widths(space, layer) == {(4, 8), (4, 32), (32, 32)}


def test_tied_inputs_have_their_weights_width(intake: Intake) -> None:
    space = space_of(intake, tied=True, weight_widths=(2, 3, 8))
    assert widths(space, "deep") == {(2, 2), (3, 3), (8, 8)}
    assert not space.separable


def test_without_data_inputs_stay_float(intake: Intake) -> None:
    space = space_of(intake, with_data=False, weight_widths=(3, 5), floats=True)
    assert widths(space, "deep") == {(3, 32), (5, 32), (32, 32)}
    for wrong in ({"act_widths": (4,)}, {"tied": True}):
        with pytest.raises(InputError, match="need calibration data"):
            space_of(intake, with_data=False, **wrong)


def test_float_is_a_way_where_allowed(intake: Intake) -> None:
    assert every(FLOAT in ways for ways in space_of(intake, floats=True).ways.values())
    assert not any(FLOAT in ways for ways in space_of(intake, floats=False).ways.values())


def test_the_ends_are_no_narrower_than_asked(intake: Intake) -> None:
    space = space_of(intake, weight_widths=(2, 4, 8), first_last_bits=6)
    assert widths(space, "stem") == {(8, 32)}
    assert widths(space, "right") == {(8, 8)}
    assert widths(space, "body") == {(2, 8), (4, 8), (8, 8)}


def test_ignored_layers_are_skipped_with_the_reason(intake: Intake) -> None:
    space = space_of(intake, ignore=("d*", "re:^left$"))
    assert list(space.ways) == ["stem", "body", "right"]
    assert {skip.layer: skip.reason for skip in space.skipped} == dict.fromkeys(("deep", "left"), "named by --ignore")
    with pytest.raises(InputError, match="nothing to compress"):
        space_of(intake, ignore=("*",))


def test_layers_that_read_one_value_can_be_one_unit(intake: Intake) -> None:
    assert space_of(intake).units == tuple((name,) for name in LAYERS)
    assert space_of(intake, grouped=True).units == (("stem",), ("body",), ("deep",), ("left", "right"))


def test_separable_errors_need_only_the_edges(intake: Intake) -> None:
    space = space_of(intake, weight_widths=(2, 4, 8), act_widths=(4, 6, 8))
    assert space.separable
    measured = {(trial.option.bits, trial.option.act_bits) for trial in space.trials("body")}
    assert measured == {(2, 8), (4, 8), (8, 8), (8, 4), (8, 6)}
    whole = space_of(intake, weight_widths=(2, 4, 8), tied=True)
    assert len(whole.trials("body")) == 3


@pytest.mark.parametrize("wrong", [{"weight_widths": (1, 4)}, {"act_widths": (9,)}, {"weight_widths": ()}])
def test_widths_out_of_range(intake: Intake, wrong: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match=r"allowed are 2 to 8|is empty"):
        space_of(intake, **wrong)


def test_one_width_or_several(intake: Intake) -> None:
    with pytest.raises(InputError, match="give either --act-bits"):
        space_of(intake, act_widths=(4, 8), act_bits=8)
    assert widths(space_of(intake, act_bits=6, weight_widths=(4,)), "deep") == {(4, 6)}
