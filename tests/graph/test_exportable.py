from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compress
from compress.errors import InputError
from compress.exporters.fusion import name_before
from compress.exporters.session import open_session
from compress.models.input_shape import find_input_shape


class Function(nn.Module):
    """A convolution, and any function of the input and of what it gives."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any], convolution: nn.Module | None = None) -> None:
        super().__init__()
        self.c, self.function = convolution or nn.Conv2d(3, 4, 3, padding=1), function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.c(x))


def two_views(x: Tensor, _: Tensor) -> Tensor:
    left, right = torch.cat([x, x.flip(3)]).mean(3).chunk(2)
    return left - 2 * right


CASES = {
    "maxima of 3 and 6 in 16": lambda x, y: torch.cat([F.adaptive_max_pool2d(y, k).flatten(1) for k in (1, 3, 6)], 1),
    "means of 3 by 5 in 16": lambda x, y: F.adaptive_avg_pool2d(y, (3, 5)),
    "maxima of 5 in 16, 1-d": lambda x, y: F.adaptive_max_pool1d(y[:, :, 0], 5),
    "two views in a batch": two_views,
    "its input is returned": lambda x, y: (y, x),
    "one value twice": lambda x, y: (y, y),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_file_computes_it(case: str, tmp_path: Path) -> None:
    module, x = Function(CASES[case]).eval(), torch.randn(3, 3, 16, 16)
    compress.export(module, tmp_path / "m.onnx", input_shape=(3, 16, 16))
    session = open_session(tmp_path / "m.onnx", "ORT_ENABLE_ALL")
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = module(x)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_an_lstm_with_a_projection_is_refused_by_name() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rnn = nn.Linear(6, 6), nn.LSTM(6, 8, proj_size=4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(self.first(x))[0]

    with pytest.raises(InputError, match=r"^rnn is an LSTM with proj_size.*proj_size=0"):
        compress.inspect(Net(), input_shape=(5, 6))


def test_infinities_are_outputs_and_nan_is_none() -> None:
    def model(value: float) -> nn.Module:
        return Function(lambda x, y: y.mean((2, 3)).masked_fill(x[:, 0, 0, :4] > 0.5, value))

    assert find_input_shape(model(-torch.inf), given=(3, 8, 8)).shape == (3, 8, 8)
    with pytest.raises(InputError, match="not finite"):
        find_input_shape(model(torch.nan), given=(3, 8, 8))


def test_a_name_that_looks_like_the_runtimes_own_is_kept() -> None:
    own = {"cls_token_proj", "fused x", "a", "b_nchwc"}
    assert name_before("cls_token_proj", own) == "cls_token_proj"
    assert name_before("cls_token_proj_token_3", own) == "cls_token_proj"
    assert name_before("cls_token_proj/MatMulAddFusion", own) == "cls_token_proj"
    assert name_before("fused x", own) == "fused x"
    assert name_before("fused a", own) == "a"
    assert name_before("b_nchwc", own) == "b_nchwc"
    assert name_before("a_token_7") == "a"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cls_token_proj", "conv_nchwc"])
def test_layers_of_such_names_pass_the_gate(name: str) -> None:
    net = nn.Sequential()
    net.add_module(name, nn.Linear(8, 8) if "token" in name else nn.Conv1d(8, 8, 3))
    net.add_module("out", nn.ReLU())
    shape = (8,) if "token" in name else (8, 8)
    found = compress.quantize(
        net, bits=4, calib=torch.randn(32, *shape), method="minmax", act_bits=8, first_last_bits=7
    )
    assert found.report.layers[0].name == name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_is_refused_by_name() -> None:
    scripted = torch.jit.script(nn.Linear(3, 3))
    with pytest.raises(InputError, match=r"^the model is a TorchScript module"):
        compress.inspect(scripted)
    with pytest.raises(InputError, match=r"^1 is a TorchScript module"):
        compress.inspect(nn.Sequential(nn.Linear(3, 3), scripted))
