from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import InputError
from compress.graph.traced import TracedModel, example_batch, first_output, trace
from tests.every import every


def small() -> TracedModel:
    return trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)), (torch.randn(1, 3, 8, 8),))


def test_the_batch_is_dynamic() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 2)
    )
    traced = trace(module, (torch.randn(1, 3, 8, 8),))
    assert traced.dynamic_batch
    assert not traced.notes
    with torch.no_grad():
        for batch in (1, 2, 5):
            x = torch.randn(batch, 3, 8, 8)
            torch.testing.assert_close(traced.module(x), module(x))


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(1, 12) * 2


def test_a_model_that_fixes_its_batch_is_traced_for_one() -> None:
    traced = trace(FixedBatch(), (torch.randn(4, 3, 4),))
    assert not traced.dynamic_batch
    assert traced.example[0].shape == (1, 3, 4)
    assert "fixes its batch size" in traced.notes[0]


class Choosing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return x


def test_control_flow_on_values_names_the_line() -> None:
    with pytest.raises(InputError, match=r"(?s)cannot trace the model.*test_traced\.py.*torch\.where"):
        trace(Choosing(), (torch.randn(2, 3),))


def test_a_wrong_input_shape_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"does not run on an input of shape \(2, 5\)"):
        trace(nn.Linear(3, 4), (torch.randn(2, 5),))


def test_a_copy_is_independent() -> None:
    traced = small()
    copied = traced.copy()
    assert [node.name for node in copied.graph.nodes] == [node.name for node in traced.graph.nodes]
    before = traced.tensor("0.weight").clone()
    copied.set_tensor("0.weight", torch.zeros_like(before))
    copied.notes.append("only here")
    assert torch.equal(traced.tensor("0.weight"), before)
    assert not copied.tensor("0.weight").any()
    assert not traced.notes


def test_set_tensor_makes_the_path_and_keeps_a_copy() -> None:
    traced = small()
    value = torch.ones(3)
    traced.set_tensor("quantizers.new.scale", value)
    value.zero_()
    assert traced.tensor("quantizers.new.scale").tolist() == [1.0, 1.0, 1.0]


def test_finish_drops_what_nobody_reads() -> None:
    traced = small()
    traced.set_tensor("loose.scale", torch.ones(1))
    (node,) = traced.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    traced.attribute("loose.scale", before=node)
    traced.finish()
    assert {name for name, _ in traced.module.named_buffers()} == set()
    assert {name for name, _ in traced.module.named_parameters()} == {"0.weight", "0.bias"}


def test_an_example_is_always_two_samples() -> None:
    for count in (1, 2, 7):
        x = torch.randn(count, 3)
        (example,) = example_batch((x,))
        assert example.shape == (2, 3)
        assert torch.equal(example[0], x[0])


def test_first_output() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    assert first_output(x) is x
    assert first_output((y, x)) is y
    assert first_output([[x], y]) is x
    assert first_output({"logits": y, "other": x}) is y
    with pytest.raises(InputError, match="returns int"):
        first_output(3)
    with pytest.raises(InputError, match="a tensor, or a tuple"):
        first_output([])
    assert first_output((None, {"loss": None, "logits": y})) is y


class Returning(nn.Module):
    """A linear, and whatever is made of its output."""

    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.what = nn.Linear(8, 4), what

    def forward(self, x: Tensor) -> Any:
        return self.what(self.linear(x))


@pytest.mark.parametrize(
    ("what", "left", "names"),
    [
        (lambda y: (None, y, y.shape[0]), ["output 0 (None)", "output 2 (SymInt)"], ()),
        (lambda y: {"loss": None, "logits": y, "kind": "x", "scale": 0.5}, ["kind ('x')", "scale (0.5)"], ("logits",)),
    ],
)
def test_what_is_no_tensor_is_left_out_with_a_note(
    what: Callable[[Tensor], Any], left: list[str], names: tuple[str, ...]
) -> None:
    module, x = Returning(what), torch.randn(5, 8)
    traced = trace(module, (x,))
    torch.testing.assert_close(traced.module(x), module.linear(x))
    assert traced.output_names == names
    (note,) = traced.notes
    assert note.endswith("is left out: only tensors are kept")
    assert every(each in note for each in left)


def test_one_number_a_batch_is_refused_where_rows_are_needed() -> None:
    with pytest.raises(InputError, match="first output is one number for the whole batch"):
        trace(Returning(lambda y: (y.sum(), y)), (torch.randn(2, 8),))


def test_run_concatenates_batches() -> None:
    traced = small()
    x = torch.randn(5, 3, 8, 8)
    got = traced.run(iter([(x[:2],), (x[2:],)]))
    torch.testing.assert_close(got, traced.module(x))
