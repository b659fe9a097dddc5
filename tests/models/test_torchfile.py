"""compress.models.torchfile, pickles and trust: what is allowed, what is advised, and what a file may have called."""

from __future__ import annotations

import argparse
import functools
import io
import pickle
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.errors import InputError
from compress.models.checkpoint import load_model
from compress.models.pickles import MADE, Name, survey
from compress.models.torchfile import read_safely
from compress.models.trust import DATA, is_model_class, may_be_allowed, runs_code
from tests.hostile import call, container, name, number, pickled, text, with_weights

CODE = [
    "torch.hub.load",
    "torch.load",
    "torch.serialization.load",
    "torch.jit.load",
    "torch.fx.graph_module.reduce_graph_module",
    "torch.utils.cpp_extension.CppExtension",
    "copy_reg._reconstructor",
    "__builtin__.eval",
    "__builtin__.apply",
    "builtins.eval",
    "builtins.getattr",
    "functools.reduce",
    "types.FunctionType",
    "types.CodeType",
    "argparse.FileType",
    "pathlib.Path.unlink",
    "subprocess.Popen",
    "posix.system",
    "cloudpickle.cloudpickle.CloudPickler",
    "dill._dill._create_function",
]
BESIDE = [
    "functools.partial",
    "omegaconf.dictconfig.DictConfig",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "timm.layers.create_act.get_act_layer",
    "mine.build",
]
OWN = [
    "mine.Net",
    "__main__.Net",
    "mine.blocks._Block",
    "torchvision.models.resnet.ResNet",
    "torch.nn.utils.weight_norm.WeightNorm",
]


def refusal(file: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_model(file, **options)
    message = str(caught.value)
    assert message.startswith(str(file))
    assert "\n" not in message
    assert "add_safe_globals" not in message
    return message


@pytest.mark.parametrize("dotted", CODE)
def test_what_runs_code_is_never_advised_nor_allowed(tmp_path: Path, dotted: str) -> None:
    file = container(tmp_path / "m.pt", with_weights(name(dotted)))
    for allow in ((), (dotted,)):
        message = refusal(file, allow=allow)
        assert "which is no part of a model and can run commands" in message
        assert "--allow" not in message
        assert "weights_only=False" not in message  # to load it so is what the file waits for


@pytest.mark.parametrize("dotted", BESIDE)
def test_what_lies_beside_weights_has_a_way_out(tmp_path: Path, dotted: str) -> None:
    message = refusal(container(tmp_path / "m.pt", with_weights(name(dotted))))
    assert dotted in message
    assert "--allow" not in message
    way = f"torch.save(torch.load('{tmp_path}/m.pt', weights_only=False)['state_dict'], 'w.pt')"
    assert way in message
    assert not is_model_class(dotted)


@pytest.mark.parametrize("dotted", OWN)
def test_a_class_of_a_model_is_advised(tmp_path: Path, dotted: str) -> None:
    message = refusal(container(tmp_path / "m.pt", call(dotted, new=True)))
    assert f"add --allow {dotted.replace('__main__', 'your_module')};" in message
    assert may_be_allowed(dotted)


def test_of_a_lightning_checkpoint_the_class_that_matters(tmp_path: Path) -> None:
    inside = ("builtins.dict", "builtins.int", "builtins.list", "collections.defaultdict", "typing.Any")
    inside += ("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "omegaconf.nodes.AnyNode")
    inside += ("omegaconf.dictconfig.DictConfig",)
    body = b"(" + b"".join(map(name, inside)) + b"t"
    message = refusal(container(tmp_path / "l.ckpt", with_weights(body)))
    assert "beside weights it holds omegaconf.dictconfig.DictConfig, omegaconf.base.ContainerMetadata and 2 more" in (
        message
    )
    assert "['state_dict'], 'w.pt'); then give w.pt and --model package.module:factory" in message
    assert not any(each in message for each in inside[:5])


def test_what_wraps_anything_is_not_allowed_and_said_so(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    module.norm = functools.partial(nn.LayerNorm, eps=1e-6)  # type: ignore[assignment]
    torch.save(module, tmp_path / "m.pt")
    message = refusal(tmp_path / "m.pt", allow=["functools.partial"])
    assert "--allow takes no functools.partial, which wraps whatever it is given" in message
    assert "weights_only=False).state_dict(), 'w.pt')" in message


@pytest.mark.parametrize("spec", ["os.system", "torch.nn.functional.torch.hub.load", "json.decoder.scanner.re.compile"])
def test_a_name_that_leads_to_code_is_not_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    (tmp_path / "leads.py").write_text("import os, json, torch\n")
    monkeypatch.chdir(tmp_path)
    given = spec if spec.startswith("torch") else f"leads.{spec}"
    message = None
    with pytest.raises(InputError) as caught:
        load_model(container(tmp_path / "m.pt", name(given)), allow=[given])
    message = str(caught.value)
    assert f"--allow {given} is " in message
    assert "can run code; leave it out" in message


def test_plain_data_needs_no_allow(tmp_path: Path) -> None:
    state = nn.Linear(2, 2).state_dict()
    beside = {
        "args": argparse.Namespace(lr=0.1, out=Path("a/b"), sizes={1, 2}, kinds=[int, dict]),
        "when": datetime(2026, 12, 1, tzinfo=UTC),
        "counts": defaultdict(list),  # torch's reader fills no other mappings than these below
        "last": deque(maxlen=3),
        "seen": Counter("aab"),
        "ordered": OrderedDict(a=1),
    }
    torch.save({"state_dict": state, **beside}, tmp_path / "c.pt")
    found = read_safely(tmp_path / "c.pt")
    assert isinstance(found, dict)
    assert {key: found[key] for key in beside} == beside
    assert torch.equal(found["state_dict"]["weight"], state["weight"])


def test_no_data_runs_code() -> None:
    assert not any(map(runs_code, DATA))
    assert all(map(may_be_allowed, DATA))


TENSOR = call(
    "torch._utils._rebuild_tensor_v2",
    b"((" + text("storage") + name("torch.FloatStorage") + text("0") + text("cpu") + number(1) + b"tQ",
    number(0) + number(2**31 - 1) + b"\x85" + number(0) + b"\x85\x89" + call("collections.OrderedDict"),
).replace(b"((", b"(", 1)


@pytest.mark.parametrize(
    "body",
    [
        call("torch.nn.modules.linear.Linear", number(20000), number(20000)),
        call("torch.nn.modules.transformer.Transformer", number(512), number(8), number(10**6)),
        call("torch._C._nn.gelu", name("torch.float32")),
        call("torch.FloatTensor", number(20000), number(20000)),
        call("torch.FloatTensor", number(20000), number(20000), new=True),
        call("torch.storage.UntypedStorage", number(2**31 - 1), new=True),
        call("torch.storage.UntypedStorage", number(2**31 - 1)),
        call("builtins.set", TENSOR),
        call("builtins.list", TENSOR),
        call("collections.Counter", TENSOR),
        call(
            "torch._tensor._rebuild_from_type_v2",
            name("torch.nn.modules.linear.Linear"),
            name("torch.Tensor"),
            b"(" + number(20000) + number(20000) + b"t}",
        ),
    ],
)
def test_calls_that_take_what_they_like(tmp_path: Path, body: bytes) -> None:
    message = refusal(container(tmp_path / "m.pt", body, {"0": bytes(4)}))
    assert "called, which takes as much time and memory as a file of any size likes" in message


def test_the_tensor_above_is_one(tmp_path: Path) -> None:
    """Else what is refused there would be refused for another reason."""
    found = read_safely(container(tmp_path / "t.pt", TENSOR, {"0": bytes(4)}))
    assert isinstance(found, torch.Tensor)
    assert found.shape == (2**31 - 1,)


def test_a_survey_is_what_a_pickle_would_do() -> None:
    stream = io.BytesIO(pickled(call("a.B", text("x"), number(3)) + b"q\x01" + call("c.d", b"h\x01", new=True)))
    found = survey(stream)
    assert found.names == {"a.B", "c.d"}
    first, second = found.calls
    assert (first.name, first.arguments, first.new) == (Name("a.B"), ("x", 3), False)
    assert (second.name, second.arguments, second.new) == ("c.d", (MADE,), True)
    assert found.words == {"x"}
    real = survey(io.BytesIO(pickle.dumps({"a": (argparse.Namespace(b=1),)}, protocol=2)))
    assert [call.name for call in real.calls] == ["argparse.Namespace"]
    for broken in (b"\x80\x02R.", b"\x80\x02h\x05.", b"\x80\x02t.", b"\x80\x02"):
        with pytest.raises(ValueError, match="pickle"):
            survey(io.BytesIO(broken))


def test_weights_too_many_are_named_with_the_way_to_leave_them_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two.py").write_text("from torch import nn\ndef net(): return nn.Sequential(nn.Linear(2, 2))\n")
    monkeypatch.chdir(tmp_path)
    state = nn.Sequential(nn.Linear(2, 2)).state_dict()
    extra = {"aux.0.weight": torch.ones(1), "aux.0.bias": torch.ones(1), "step": torch.ones(1)}
    torch.save(state | extra, tmp_path / "w.pt")
    message = refusal(tmp_path / "w.pt", model="two:net")
    assert "the model has no aux.0.weight, aux.0.bias, step. " in message
    assert "leave them out: --allow 'unused:aux.*' --allow 'unused:step'." in message
    loaded = load_model(tmp_path / "w.pt", model="two:net", allow=["unused:aux.*", "unused:step"])
    assert torch.equal(loaded.module[0].weight, state["0.weight"])  # type: ignore[index]
    assert loaded.notes == ("left out, as the model has no such weights: aux.0.weight, aux.0.bias, step",)
    torch.save(extra, tmp_path / "w.pt")  # what the model needs is not left out
    assert "it lacks 0.weight, 0.bias" in refusal(tmp_path / "w.pt", model="two:net", allow=["unused:*"])
