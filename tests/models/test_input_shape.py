"""compress.models.input_shape: the shape of one input, given, taken over, or found."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from compress.errors import InputError
from compress.models.input_shape import find_input_shape, parse_shape


def _net(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).eval()


def _pooled(conv: nn.Module) -> nn.Module:
    return _net(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("text", ["3,32,32", "3x32x32", " 3, 32, 32 ", "(3, 32, 32)", "3X32x32"])
def test_parse_shape(text: str) -> None:
    assert parse_shape(text) == (3, 32, 32)


@pytest.mark.parametrize("text", ["", "3,,32", "three", "3,-1,2", "3,0,2", "3.5,2"])
def test_parse_shape_refuses(text: str) -> None:
    with pytest.raises(InputError, match="not a list of positive numbers"):
        parse_shape(text)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (_pooled(nn.Conv2d(3, 4, 3, padding=1)), (3, 32, 32)),
        (_pooled(nn.Conv2d(3, 4, 3, stride=2)), (3, 224, 224)),
        (_pooled(nn.Conv2d(3, 4, 7)), (3, 224, 224)),
        (_pooled(nn.Conv2d(1, 4, 3)), (1, 28, 28)),
        (_net(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(2 * 64, 5)), (1, 8, 8)),
        (_net(nn.Conv2d(3, 2, 3, padding=1), nn.Flatten(), nn.Linear(2 * 64 * 64, 5)), (3, 64, 64)),
        (_net(nn.Linear(17, 4), nn.ReLU(), nn.Linear(4, 2)), (17,)),
        (_net(nn.Conv1d(2, 4, 5), nn.AdaptiveAvgPool1d(1)), (2, 128)),
        (_net(nn.Conv1d(1, 1, 1), nn.Flatten(), nn.Linear(16000, 2)), (1, 16000)),
    ],
)
def test_shape_is_found_by_trying(module: nn.Module, shape: tuple[int, ...]) -> None:
    found = find_input_shape(module)
    assert found.shape == shape
    assert found.source == f"found by trying: {'x'.join(map(str, shape))} runs through the model"


def test_no_usual_size_fits() -> None:
    module = _net(nn.Conv2d(3, 2, 3, padding=1), nn.Flatten(), nn.Linear(2 * 37 * 37, 5))
    with pytest.raises(InputError, match=r"tried 3x32x32, .*mat1 and mat2.*give --input-shape C,H,W"):
        find_input_shape(module)


def test_an_output_that_is_not_finite_is_no_success() -> None:
    class Bad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) / 0

    with pytest.raises(InputError, match="output is not finite"):
        find_input_shape(Bad().eval())


def test_nothing_to_guess_from() -> None:
    with pytest.raises(InputError, match=r"no Conv2d, Conv1d or Linear.*give --input-shape"):
        find_input_shape(_net(nn.ReLU()))


def test_given_shape_wins_and_is_checked() -> None:
    module = _pooled(nn.Conv2d(3, 4, 3))
    assert find_input_shape(module, given=(3, 40, 40)).source == "from --input-shape"
    with pytest.raises(
        InputError, match=r"shape 1x32x32 \(from --input-shape\) .*\(0\) expects 3 channels\. Give --inp"
    ):
        find_input_shape(module, given=(1, 32, 32))
    with pytest.raises(InputError, match=r"3x40x40 differs from the calibration data.*3x32x32"):
        find_input_shape(module, given=(3, 40, 40), data_shape=(3, 32, 32))


def test_linear_complaint_names_features() -> None:
    with pytest.raises(InputError, match="expects 5 features"):
        find_input_shape(_net(nn.Linear(5, 2)), given=(4,))


def test_shape_from_data() -> None:
    module = _pooled(nn.Conv2d(3, 4, 3))
    assert find_input_shape(module, data_shape=(3, 48, 48)).shape == (3, 48, 48)
    assert find_input_shape(module, data_shape=(3, 48, 48)).source == "from the calibration data"
    with pytest.raises(InputError, match=r"from the calibration data\).*expects 3 channels\. Give calibration data"):
        find_input_shape(module, data_shape=(48, 48, 3))


@pytest.mark.parametrize(("said", "size"), [(50, (50, 50)), ([20, 30], (20, 30))])
def test_the_size_that_a_config_names_is_tried_first(said: object, size: tuple[int, int]) -> None:
    module = _net(nn.Conv2d(3, 2, 10, stride=10), nn.Flatten(), nn.Linear(2 * (size[0] // 10) * (size[1] // 10), 4))
    module.config = SimpleNamespace(image_size=said)
    assert find_input_shape(module).shape == (3, *size)


class Reader(nn.Module):
    """Takes 4 to 40 token ids."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words, self.places, self.linear = nn.Embedding(30, width), nn.Embedding(40, width), nn.Linear(width, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.linear((self.words(ids) + self.places.weight[: ids.shape[1]]).mean(1))


@pytest.mark.parametrize(("width", "given", "length"), [(8, None, 8), (64, None, 16), (64, (5,), 5)])
def test_a_module_that_takes_token_ids(width: int, given: tuple[int, ...] | None, length: int) -> None:
    found = find_input_shape(Reader(width).eval(), given=given)
    assert (found.shape, found.vocabulary) == ((length,), 30)
    example = found.example()
    assert example.dtype == torch.int64
    assert example.shape == (1, length)
    assert 0 <= int(example.min()) < int(example.max()) < 30
    assert given is not None or found.source == f"found by trying: {length} token ids run through the model"


def test_token_data_and_further_inputs() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    tokens = _net(nn.Embedding(10, 4), nn.Linear(4, 2))
    assert find_input_shape(tokens, data_shape=(7,)).shape == (7,)
    assert find_input_shape(Pair(), data_shape=(7,)).shape == (7,)
    pair = (torch.ones(1, 7), torch.ones(1, 7))
    assert find_input_shape(Pair(), given=(7,), example=pair).shape == (7,)
    with pytest.raises(
        InputError, match=r"takes several inputs \(x, y\), which are not made up: give .* or, as `compress export`"
    ):
        find_input_shape(Pair(), given=(7,))


def test_shape_from_exported_program() -> None:
    module = _pooled(nn.Conv2d(3, 4, 3))
    example = (torch.ones(1, 3, 20, 20),)
    found = find_input_shape(module, example=example)
    assert (found.shape, found.source) == ((3, 20, 20), "from the .pt2 file")
    fixed = torch.export.export(module, example).module(check_guards=False)
    assert find_input_shape(fixed, data_shape=(3, 20, 20), example=example).shape == (3, 20, 20)
