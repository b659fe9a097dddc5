"""What operators do not take is refused with a sentence, or goes to a kernel that takes it, before any launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compress.kernels import packed_linear as packed_module
from compress.kernels.delta_linear import add_delta_, delta_linear, packed_delta_linear
from compress.kernels.delta_rows import DeltaRows
from compress.kernels.dispatch import Call, choose
from compress.kernels.int8_conv2d import dequantize_codes, int8_conv2d
from compress.kernels.int8_linear import int8_dynamic_linear, int8_linear
from compress.kernels.lanes import LaneWeight, unit_shape
from compress.kernels.lowrank_linear import lowrank_linear
from compress.kernels.packed_linear import choose_packed, packed_linear, packed_lowrank_linear

OUTPUTS, INPUTS = 8, 32


def lanes(outputs: int = OUTPUTS, inputs: int = INPUTS) -> tuple[Tensor, Tensor, Tensor]:
    """Units, scales and zero points of 4 bits."""
    units = torch.zeros(unit_shape(outputs, inputs, 4), dtype=torch.int16)
    return units, torch.ones(outputs, 1), torch.zeros(outputs, 1, dtype=torch.uint8)


def calls() -> dict[str, tuple[Any, list[Any]]]:
    """Every operator over packed weights, bytes, factors or deltas, and arguments that it takes."""
    x, bias = torch.ones(2, INPUTS), torch.zeros(OUTPUTS)
    up, down = torch.ones(OUTPUTS, 3), torch.ones(3, INPUTS)
    grid = (torch.ones(()), torch.zeros((), dtype=torch.uint8))
    bytes8 = (torch.ones(OUTPUTS, INPUTS, dtype=torch.int8), torch.ones(OUTPUTS), torch.zeros(OUTPUTS).int())
    delta = DeltaRows.from_flat((OUTPUTS, INPUTS), torch.tensor([5]), torch.ones(1))
    deltas, task = (delta.starts, delta.columns, delta.values), torch.zeros(2, dtype=torch.int32)
    image, kernel = torch.ones(1, 4, 6, 6), torch.ones(OUTPUTS, 3, 3, 4, dtype=torch.int8)
    return {
        "packed_linear": (packed_linear, [x, *lanes(), bias, 4, INPUTS]),
        "packed_lowrank_linear": (packed_lowrank_linear, [x, *lanes(), up, down, bias, 4, INPUTS]),
        "lowrank_linear": (lowrank_linear, [x, up, down, bias, 3]),
        "int8_linear": (int8_linear, [x, *grid, *bytes8, bias, 8]),
        "int8_dynamic_linear": (int8_dynamic_linear, [x, *bytes8, bias, True]),
        "int8_conv2d": (
            int8_conv2d,
            [image, *grid, kernel, *bytes8[1:], bias, 8, [1], [1], [1], 1, False, torch.ones(1), grid[1], 8],
        ),
        "delta_linear": (delta_linear, [x, torch.ones(OUTPUTS, INPUTS), *deltas, task, bias]),
        "packed_delta_linear": (packed_delta_linear, [x, *lanes(), *deltas, task, bias, 4, INPUTS]),
        "add_delta_": (add_delta_, [torch.ones(OUTPUTS, INPUTS), *deltas, 0]),
    }


@pytest.mark.parametrize("name", calls())
def test_tensors_on_another_device_are_refused(name: str) -> None:
    """A kernel would take an address of theirs for one of its own GPU."""
    operator, given = calls()[name]
    operator(*given)
    places = [place for place, each in enumerate(given) if isinstance(each, Tensor)][1:]
    assert len(places) > 2
    for place in places:
        elsewhere = [*given]
        elsewhere[place] = given[place].to("meta")
        with pytest.raises(ValueError, match=r"on meta.* on cpu"):
            # The function itself: torch calls an operator's shape function where a tensor holds nothing.
            operator._init_fn(*elsewhere)


EMPTY_BYTES = (torch.ones(0, INPUTS, dtype=torch.int8), torch.ones(0), torch.zeros(0, dtype=torch.int32))


def test_no_outputs_are_none() -> None:
    x, grid = torch.ones(2, INPUTS), (torch.ones(()), torch.zeros((), dtype=torch.uint8))
    none = DeltaRows.from_flat((0, INPUTS), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    deltas = (none.starts, none.columns, none.values)
    for got in (
        packed_linear(x, *lanes(0), None, 4, INPUTS),
        packed_lowrank_linear(x, *lanes(0), torch.ones(0, 3), torch.ones(3, INPUTS), None, 4, INPUTS),
        lowrank_linear(x, torch.ones(0, 3), torch.ones(3, INPUTS), None, 3),
        int8_linear(x, *grid, *EMPTY_BYTES, None, 8),
        int8_dynamic_linear(x, *EMPTY_BYTES, None, True),
        packed_delta_linear(x, *lanes(0), *deltas, None, None, 4, INPUTS),
        delta_linear(x, torch.ones(0, INPUTS), *deltas, None, None),
    ):
        assert got.shape == (2, 0)
    add_delta_(torch.ones(0, INPUTS), *deltas)


@pytest.mark.parametrize("x", [torch.ones(2, 0), torch.ones(())], ids=["none", "no dimension"])
def test_no_inputs_are_refused(x: Tensor) -> None:
    for name, (operator, given) in calls().items():
        if name not in ("int8_conv2d", "add_delta_"):
            with pytest.raises(
                ValueError, match=r"x of shape \(.*\); a linear takes \[\.\.\., I\], of 1 input or more"
            ):
                operator(x, *given[1:])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("packed_linear", {2: torch.ones(OUTPUTS)}, r"scale of shape \(8,\); a weight has a row of them"),
        (
            "packed_lowrank_linear",
            {4: torch.ones(OUTPUTS, 0), 5: torch.ones(0, INPUTS)},
            r"needs \[8, R\] and \[R, 32\] of a rank R from 1 on",
        ),
        ("packed_lowrank_linear", {4: torch.ones(OUTPUTS), 5: torch.ones(())}, r"up \(8,\) and down \(\)"),
        ("lowrank_linear", {1: torch.ones(OUTPUTS)}, r"up \(8,\) and down \(3, 32\) at rank 3; allowed are \[O, R\]"),
        ("int8_linear", {3: torch.ones(8, 4, 8, dtype=torch.int8)}, r"weight torch\.int8 \(8, 4, 8\); 8 x 32 need"),
        ("int8_linear", {3: torch.ones((), dtype=torch.int8)}, r"weight torch\.int8 \(\); 0 x 32 need"),
        ("delta_linear", {4: torch.ones(1).int()}, r"values of torch\.int32; allowed are torch\.float16"),
        ("int8_conv2d", {3: torch.ones(8, 3, 4, dtype=torch.int8)}, r"weight \(8, 3, 4\); a convolution takes \[O, k"),
        ("int8_conv2d", {3: torch.ones(0, 3, 3, 4, dtype=torch.int8)}, r"weight \(0, 3, 3, 4\).* none of them 0"),
        ("int8_conv2d", {8: [0]}, r"stride \[0\]; a convolution takes one number for both sides, or two, from 1 on"),
        ("int8_conv2d", {8: [1, 2, 1]}, r"stride \[1, 2, 1\]"),
        ("int8_conv2d", {9: [-1]}, r"padding \[-1\]; .* or two, from 0 on"),
        ("int8_conv2d", {10: []}, r"dilation \[\]"),
        ("int8_conv2d", {11: 0}, r"in 0 groups"),
        ("int8_conv2d", {13: None}, "a next grid has both, and floats have neither"),
        ("int8_conv2d", {14: None}, "a next grid has both, and floats have neither"),
    ],
)
def test_sizes_and_types_that_are_none(name: str, change: dict[int, Any], message: str) -> None:
    operator, given = calls()[name]
    with pytest.raises(ValueError, match=message):
        operator(*(change.get(place, each) for place, each in enumerate(given)))


def test_codes_that_are_none() -> None:
    zero = torch.zeros((), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"codes torch\.float32, .* codes are torch\.int8"):
        dequantize_codes(torch.ones(2, 3), torch.ones(()), zero)
    with pytest.raises(ValueError, match=r"scale \(3,\)"):
        dequantize_codes(torch.ones(2, 3, dtype=torch.int8), torch.ones(3), zero)


def test_units_at_an_odd_place_go_to_a_kernel_that_reads_them_one_by_one() -> None:
    units, scale, zero_point = lanes()
    odd = torch.zeros(units.numel() + 1, dtype=torch.int16)[1:].view(units.shape)
    why = "only units that begin at a multiple of 4 bytes"
    for given, refused in ((units, False), (odd, True)):
        choice = choose_packed(torch.ones(1, INPUTS), LaneWeight(given, scale, zero_point, 4, INPUTS, INPUTS))
        assert (why in choice.refused[0]) is refused
    call = Call("packed_linear", "cuda", (9, 0), torch.bfloat16, 1, 4096, 4096, bits=4, group_size=128)
    assert choose(call).name == "packed_gemv"
    assert choose(call._replace(aligned=False)).name == "packed_dot"


def test_a_branch_that_was_just_written_is_not_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def remember(*given: Any) -> Any:
        asked.append(given[3])
        return choose_packed(*given)

    monkeypatch.setattr(packed_module, "choose_packed", remember)
    x, up, down = torch.ones(2, INPUTS), torch.ones(OUTPUTS, 3), torch.ones(3, INPUTS)
    with torch.no_grad():
        for factors in (
            (up, down),
            (up.clone().requires_grad_(), down),
            (up, down.clone().requires_grad_()),
            (up.T.contiguous().T, down),  # copied for the call
            (up, down.T.contiguous().T),
        ):
            packed_lowrank_linear(x, *lanes(), *factors, None, 4, INPUTS)
    assert asked == [False, True, True, True, True]
    call = Call("packed_linear", "cuda", (9, 0), torch.bfloat16, 1, 4096, 4096, bits=4, group_size=128, rank=32)
    assert choose(call._replace(trained=True)).name == "packed_dot"
