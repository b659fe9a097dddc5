"""The operators over packed weights: what they compute, which kernel they choose, what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from compress.kernels import dispatch
from compress.kernels.dispatch import Call, choose
from compress.kernels.packed_linear import packed_linear, packed_lowrank_linear
from compress.kernels.table import KERNELS
from compress.records.registry import resolve

GPU_CALL = Call("packed_linear", "cuda", (9, 0), torch.bfloat16, 1, 4096, 4096, bits=4, group_size=128)


@pytest.mark.parametrize("rows", [(1,), (2, 3), (300,)])
def test_operators(rows: tuple[int, ...], device: str, lane_weight: Callable[..., Any], assert_near: Any) -> None:
    weight, exact = lane_weight(24, 96, 4, 32, device)
    x, bias = torch.randn(*rows, 96, device=device), torch.randn(24, device=device)
    up, down = torch.randn(24, 6, device=device), torch.randn(6, 96, device=device)
    packed = (weight.units, weight.scale, weight.zero_point)
    wanted = x.double() @ exact.T + bias.double()
    assert_near(packed_linear(x, *packed, bias, 4, 32), wanted)
    wanted += x.double() @ down.double().T @ up.double().T
    assert_near(packed_lowrank_linear(x, *packed, up, down, bias, 4, 32), wanted)


def test_opcheck(lane_weight: Callable[..., Any]) -> None:
    weight, _ = lane_weight(6, 40, 3, 32, "cpu")
    packed = (weight.units, weight.scale, weight.zero_point)
    x, up, down = torch.randn(2, 3, 40), torch.randn(6, 2), torch.randn(2, 40)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(packed_linear, (x, *packed, None, 3, 32), test_utils=checks)
    torch.library.opcheck(packed_lowrank_linear, (x, *packed, up, down, None, 3, 32), test_utils=checks)
    assert packed_linear(x[:0], *packed, None, 3, 32).shape == (0, 3, 6)


@pytest.mark.parametrize(
    ("change", "kernel"),
    [
        ({}, "packed_gemv"),
        ({"rows": 16}, "packed_dot"),
        ({"rows": 2048}, "packed_unpack"),
        ({"capability": (7, 5)}, "reference"),
        ({"device": "cpu", "capability": None}, "reference"),
        ({"group_size": 96}, "reference"),
        ({"group_size": 4096}, "packed_gemv"),
        ({"dtype": torch.float64}, None),
    ],
)
def test_choice(change: dict[str, Any], kernel: str | None) -> None:
    call = GPU_CALL._replace(**change)
    if kernel is None:
        with pytest.raises(TypeError, match=r"only inputs of torch\.float16, .*, not torch\.float64"):
            choose(call)
    else:
        assert choose(call).name == kernel


def test_refusals_are_sentences() -> None:
    refused = choose(GPU_CALL._replace(rows=2000, capability=(7, 5), group_size=96)).refused
    assert refused[0] == (
        "packed_gemv: only compute capability 8.0 and above, not 7.5; only 1 row, not 2000; "
        "only one scale an output, or groups of 16, 32, 64, 128 or 256, not of 96"
    )
    assert [reason.partition(":")[0] for reason in refused] == ["packed_gemv", "packed_dot", "packed_unpack"]
    assert (
        choose(GPU_CALL._replace(device="cpu", capability=None)).refused[0] == "packed_gemv: only on GPUs, not on cpu"
    )


@pytest.mark.parametrize("operator", KERNELS)
def test_without_triton_the_reference_runs(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    for call in (GPU_CALL._replace(operator=operator), Call(operator, "cpu", None, torch.float32, 1, 64, 64)):
        assert choose(call).name == "reference"


def test_a_call_made_again_is_decided_once(monkeypatch: pytest.MonkeyPatch) -> None:
    call = GPU_CALL._replace(rows=3, inputs=4160)
    first = choose(call)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "resolve", None)
        assert choose(GPU_CALL._replace(rows=3, inputs=4160)) is first
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert choose(call).name == "reference", "without triton it is another question"


@pytest.mark.parametrize(("gpu", "device"), [(None, "cpu"), ((8, 9), "cuda")])
def test_a_call_is_what_its_inputs_say(gpu: tuple[int, int] | None, device: str) -> None:
    call = Call.on(torch.zeros(2, 3, 40), "packed_linear", 24, gpu=gpu, bits=4, group_size=40)
    assert call == Call("packed_linear", device, gpu, torch.float32, 6, 24, 40, bits=4, group_size=40)
    image = Call.on(torch.zeros(2, 3, 8, 8), "int8_conv2d", 24, rows=72, inputs=27, gpu=gpu)
    assert (image.rows, image.outputs, image.inputs, image.device) == (72, 24, 27, device)


def test_each_operator_ends_in_its_reference() -> None:
    for kernels in KERNELS.values():
        last = list(kernels)[-1]
        assert last == "reference"
        assert resolve(kernels, last, "kernel").requires.capability is None


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("units", r"4 bits x 24 x 96 need contiguous int16 \(3, 1, 8, 32\)"),
        ("scale", r"groups of 32 need contiguous \(24, 3\)"),
        ("zero_point", r"groups of 32 need contiguous \(24, 3\)"),
    ],
)
def test_wrong_sizes_are_refused(field: str, message: str, lane_weight: Callable[..., Any]) -> None:
    weight, _ = lane_weight(24, 96, 4, 32, "cpu")
    wrong = replace(weight, **{field: getattr(weight, field)[:, :-1]})
    with pytest.raises(ValueError, match=message):
        packed_linear(torch.zeros(1, 96), wrong.units, wrong.scale, wrong.zero_point, None, 4, 32)
