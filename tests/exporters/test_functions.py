from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from compress.exporters.functions import DOMAIN, OPSET, unpack_function, unpack_name
from compress.exporters.session import open_session
from compress.quant.packing import pack, unpack

SHAPES = [(1,), (3, 5), (7, 1, 3, 3), (2, 3, 4), (64, 9)]


def unpack_model(bits: int, packed: torch.Tensor, shape: tuple[int, ...], constant: bool) -> bytes:
    """A file that calls the function once, on an initialiser (folded at load time) or on an input."""
    node = helper.make_node(unpack_name(bits), ["packed", "shape"], ["codes"], domain=DOMAIN)
    tensors = [numpy_helper.from_array(torch.tensor(shape).numpy(), "shape")]
    inputs = []
    if constant:
        tensors.append(numpy_helper.from_array(packed.numpy(), "packed"))
    else:
        inputs.append(helper.make_tensor_value_info("packed", TensorProto.UINT8, list(packed.shape)))
    output = helper.make_tensor_value_info("codes", TensorProto.INT8, list(shape))
    graph = helper.make_graph([node], "unpack", inputs, [output], tensors)
    model = helper.make_model(
        graph,
        ir_version=8,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        functions=[ir.to_proto(unpack_function(bits))],
    )
    onnx.checker.check_model(model)
    return model.SerializeToString()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_equals_packing_in_onnx_runtime(bits: int, shape: tuple[int, ...], level: str) -> None:
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
    codes.view(-1)[0], codes.view(-1)[-1] = (1 << bits) - 1, 0
    packed = pack(codes, bits)
    wanted = unpack(packed, bits, codes.numel()).reshape(shape).int() - (1 << (bits - 1))
    for constant in (True, False):
        session = open_session(unpack_model(bits, packed, shape, constant), level, threads=1)
        (got,) = session.run(None, {} if constant else {"packed": packed.numpy()})
        assert got.dtype == "int8"
        assert torch.equal(torch.from_numpy(got).int(), wanted)


@pytest.mark.parametrize("bits", range(2, 8))
def test_only_standard_operators(bits: int) -> None:
    function = unpack_function(bits)
    assert {node.domain for node in function} == {""}
    assert function.name == f"Unpack{bits}"
