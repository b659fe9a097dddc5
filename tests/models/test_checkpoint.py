"""compress.models.checkpoint, factory and pt2: every kind of model file in, every refusal with its sentence."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from compress.data.samples import load_samples
from compress.errors import InputError
from compress.models.checkpoint import fingerprint, load_model

FACTORIES = """
import torch
from torch import nn
def net(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
def other(): return nn.Sequential(nn.Conv2d(3, 5, 3))
def needs(width): return nn.Linear(width, 2)
def nothing(): return None
number = 3
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False)
        self.b = nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
    def forward(self, x): return self.layer(x)
"""


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"factories_{tmp_path.name}"  # a fresh name: imported modules stay in sys.modules
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return name


def _refused(path: Path, message: str, **options: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_model(path, **options)
    assert path.name in str(caught.value)


X = torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)


def test_whole_module(tmp_path: Path) -> None:
    net = _net().train()
    torch.save(net, tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt")
    assert not any(part.training for part in loaded.module.modules())
    assert torch.equal(loaded.module(X), net.eval()(X))
    assert (loaded.example, loaded.notes, loaded.source) == (None, (), str(tmp_path / "m.pt"))
    assert loaded.fingerprint == fingerprint(net)
    net[0].bias.data[0] += 1
    assert loaded.fingerprint != fingerprint(net)


def test_transformer_layers_and_data_parallel_need_no_allow(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
    torch.save(nn.DataParallel(nn.TransformerEncoder(layer, 1)), tmp_path / "m.pt")
    assert isinstance(load_model(tmp_path / "m.pt").module, nn.TransformerEncoder)


@pytest.mark.parametrize("nest", [None, "state_dict", "model_state", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_state_dict(tmp_path: Path, factories: str, nest: str | None, prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in _net().state_dict().items()}
    torch.save({nest: state, "epoch": 3} if nest else state, tmp_path / "w.th")
    loaded = load_model(tmp_path / "w.th", model=f"{factories}:net")
    assert torch.equal(loaded.module(X), _net()(X))


def test_half_and_safetensors_and_old_formats(tmp_path: Path, factories: str) -> None:
    spec = f"{factories}:net"
    torch.save(_net().half(), tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt")
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}
    assert loaded.notes == ("8 float16 tensors converted to float32.",)
    safetensors.torch.save_file(_net().bfloat16().state_dict(), tmp_path / "w.safetensors")
    loaded = load_model(tmp_path / "w.safetensors", model=spec)
    assert loaded.notes == ("8 bfloat16 tensors converted to float32.",)
    state = {name: t for name, t in _net().state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert load_model(tmp_path / "old.pth", model=spec).fingerprint == fingerprint(_net())
    torch.save(_net(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    _refused(tmp_path / "old.pt", "whole module in the format before torch 1.6.*save its state_dict")


def test_tied_weights_stored_once(tmp_path: Path, factories: str) -> None:
    safetensors.torch.save_file({"a.weight": torch.ones(3, 3)}, tmp_path / "w.safetensors")
    module = load_model(tmp_path / "w.safetensors", model=f"{factories}:Tied").module
    assert torch.equal(module.b.weight, torch.ones(3, 3))


def test_files_that_are_none(tmp_path: Path) -> None:
    _refused(tmp_path / "absent.pt", "There is no file")
    _refused(tmp_path, "a folder without a config.json")
    (tmp_path / "empty.pt").write_bytes(b"")
    _refused(tmp_path / "empty.pt", "is empty; save or download it again")
    (tmp_path / "text.pt").write_text("hello, this is text")
    _refused(tmp_path / "text.pt", r"is not a PyTorch file \(it begins with b'hello, t'\)")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": 1}))
    _refused(tmp_path / "plain.pt", "is a plain pickle, not written by torch.save")
    (tmp_path / "m.onnx").write_text("x")
    _refused(tmp_path / "m.onnx", "m.onnx is an ONNX file.*; `compress bench .*m.onnx` times it")
    _refused((tmp_path / "m.onnx").rename(tmp_path / "m.doc"), "ends in '.doc'; a model file ends in .pt")
    with zipfile.ZipFile(tmp_path / "z.pt", "w") as archive:
        archive.writestr("a.txt", "a")
    _refused(tmp_path / "z.pt", "zip archive but not a PyTorch file")
    (tmp_path / "bad.safetensors").write_bytes(b"\x00" * 4)
    _refused(tmp_path / "bad.safetensors", "truncated or no safetensors file")


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated(tmp_path: Path, zipped: bool) -> None:
    torch.save(_net().state_dict(), tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "m.pt").read_bytes()
    for part in (0.2, 0.5, 0.95):
        (tmp_path / "cut.pt").write_bytes(content[: int(len(content) * part)])
        _refused(tmp_path / "cut.pt", "truncated")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript(tmp_path: Path) -> None:
    for name in ("s.pt", "s.jit", "s.torchscript", "s.pt2"):
        torch.jit.trace(_net(), X).save(str(tmp_path / name))
        _refused(tmp_path / name, "is a TorchScript archive, which is not supported; save the module")


def test_contents_that_are_no_model(tmp_path: Path) -> None:
    for content, message in [
        (torch.ones(2, 3), r"holds one tensor of shape \[2, 3\], not a model"),
        ([1, 2], "holds an object of type list"),
        ({"epoch": 3, "loss": 0.5}, "dictionary without weights .keys: 'epoch', 'loss'"),
    ]:
        torch.save(content, tmp_path / "c.pt")
        _refused(tmp_path / "c.pt", message)


def test_state_dict_and_factory_errors(tmp_path: Path, factories: str) -> None:
    path = tmp_path / "w.pt"
    torch.save(_net().state_dict(), path)
    _refused(path, r"weights \(0.weight, 0.bias, 1.weight, ...\).*that builds it, --model package.module:factory$")
    for name, message in [
        (
            "other",
            r"does not fit --model .*:other: the model has no 1.weight, .* and 3 more; 0.weight is \[4, 3, 3, 3\] ",
        ),
        ("needs", "raised TypeError: needs.. missing 1 required.*wrap it in a function that needs none"),
        ("nothing", "returned a NoneType, not a torch.nn.Module"),
        ("number", "is a int, not a function"),
        ("absent", "has no 'absent'; it has .*net"),
    ]:
        with pytest.raises(InputError, match=message):
            load_model(path, model=f"{factories}:{name}")
    state = _net().state_dict()
    del state["4.weight"], state["4.bias"]
    torch.save(state, path)
    _refused(path, "it lacks 4.weight, 4.bias", model=f"{factories}:net")
    (tmp_path / "breaks_here.py").write_text("import a_library_that_is_not_there")
    for spec, message in [
        ("no_such_module_at_all:f", "no Python module 'no_such_module_at_all' on PYTHONPATH or in the current folder"),
        ("breaks_here:f", "it needs the module 'a_library_that_is_not_there'; install it"),
        ("no colon", "not of the form package.module:name"),
    ]:
        with pytest.raises(InputError, match=message):
            load_model(path, model=spec)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    for place, name in [(lambda n: n[4].weight, "4.weight"), (lambda n: n[1].running_var, "1.running_var")]:
        net = _net()
        place(net).data.view(-1)[:2] = torch.tensor([float("nan"), float("inf")])
        torch.save(net, tmp_path / "m.pt")
        _refused(tmp_path / "m.pt", f"{name} holds 2 values that are NaN or infinite")
    net = _net()
    net.register_buffer("mask", torch.full((2,), -torch.inf))
    torch.save(net, tmp_path / "m.pt")
    assert load_model(tmp_path / "m.pt").notes == ()


class Evil:
    """Runs a command when unpickled by a reader that runs code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_does_not_run(tmp_path: Path, zipped: bool) -> None:
    path, mark = tmp_path / "e.pt", tmp_path / "ran"
    torch.save({"state_dict": _net().state_dict(), "x": Evil(mark)}, path, _use_new_zipfile_serialization=zipped)
    for allow in ((), ("posix.system",)):
        with pytest.raises(InputError, match=r"asks for posix\.system, which is no part of a model") as caught:
            load_model(path, allow=allow)
        assert "--allow" not in str(caught.value)
    assert not mark.exists()


def test_custom_class_needs_allow(tmp_path: Path, factories: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    own = __import__(factories).Own()
    torch.save(own, tmp_path / "m.pt")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    _refused(tmp_path / "m.pt", rf"needs {factories}\.Own, beyond torch.nn's own.*add --allow {factories}\.Own;")
    loaded = load_model(tmp_path / "m.pt", allow=[f"{factories}.Own"], model="x:y")
    assert loaded.fingerprint == fingerprint(own)
    assert "--model x:y was not used" in loaded.notes[0]
    with zipfile.ZipFile(tmp_path / "m.pt") as source, zipfile.ZipFile(tmp_path / "main.pt", "w") as target:
        for entry in source.namelist():  # as a script would have saved it
            target.writestr(entry, source.read(entry).replace(f"c{factories}\n".encode(), b"c__main__\n"))
    _refused(tmp_path / "main.pt", r"--allow your_module\.Own")
    assert load_model(tmp_path / "main.pt", allow=[f"{factories}.Own"]).fingerprint == fingerprint(own)


def _export(path: Path, net: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> Path:
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(net or _net().to(dtype), (X.to(dtype),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    return path


@pytest.mark.slow
def test_exported_program(tmp_path: Path) -> None:
    loaded = load_model(_export(tmp_path / "m.pt2"))
    assert loaded.example is not None
    assert torch.equal(loaded.example[0], X)
    assert torch.allclose(loaded.module(torch.cat([X, X])), _net()(torch.cat([X, X])))
    assert not any(part.training for part in loaded.module.modules())
    half = load_model(_export(tmp_path / "h.pt2", dtype=torch.float16))
    assert "converted to float32" in half.notes[0]
    assert half.example is not None
    assert half.example[0].dtype == torch.float32
    _refused(_export(tmp_path / "t.pt2", _net().train()), "exported in training mode.*call model.eval")
    (tmp_path / "m.pt2").rename(tmp_path / "m.pt")
    _refused(tmp_path / "m.pt", r"rename it to m\.pt2")
    (tmp_path / "m.pt").rename(tmp_path / "c.pt2")
    (tmp_path / "c.pt2").write_bytes((tmp_path / "c.pt2").read_bytes()[:-300])
    _refused(tmp_path / "c.pt2", "truncated")
    torch.save(_net(), tmp_path / "s.pt2")
    _refused(tmp_path / "s.pt2", "written by torch.save, not torch.export.save")


def _edit(records: dict[str, bytes], change: Callable[[dict[str, Any]], None], record: str) -> None:
    content = json.loads(records[record])
    change(content)
    records[record] = json.dumps(content).encode()


GRAPH, CONSTANTS, WEIGHTS = (
    "models/model.json",
    "data/constants/model_constants_config.json",
    "data/weights/model_weights_config.json",
)
RUN = "__import__('os').system('touch ran')"


def _attack(records: dict[str, bytes], kind: str) -> None:
    def graph(content: dict[str, Any]) -> None:
        inner = content["graph_module"]["graph"]
        node = next(n for n in inner["nodes"] if "relu" in n["target"])
        signature = content["graph_module"]["module_call_graph"][0]["signature"]
        if kind == "operator":
            node["target"] = "torch.os.system"
        elif kind == "file operator":
            node["target"] = "torch.ops.aten.save.default"
        elif kind == "foreign operator":
            node["target"] = "torch.ops.torchvision.nms.default"
        elif kind == "expression":
            sizes = next(t["sizes"] for t in inner["tensor_values"].values() if "as_expr" in json.dumps(t["sizes"]))
            sizes[0]["as_expr"]["expr_str"] = RUN
        elif kind == "name":
            inner["inputs"][-1]["as_tensor"]["name"] = f"x: {RUN}"
        elif kind == "argument":
            signature["forward_arg_names"] = [f"x={RUN}"]
        elif kind == "parameter":
            content["graph_module"]["signature"]["input_specs"][0]["parameter"]["parameter_name"] = f'a.b", {RUN}, "c'
        elif kind == "tree":
            bad = {"type": "builtins.list", "context": '{"__enum__": 1, "fqn": "antigravity:x", "name": "y"}'}
            signature["in_spec"] = json.dumps([1, {**bad, "children_spec": []}])
        elif kind == "factory":
            bad = {"type": "collections.defaultdict", "context": {"default_factory_module": "antigravity"}}
            signature["out_spec"] = json.dumps([1, {**bad, "children_spec": []}])

    buffer = io.BytesIO()
    torch.save((Evil(Path("ran")), {}), buffer)
    pickled = {"is_param": False, "use_pickle": True, "tensor_meta": None}
    if kind == "inputs":
        records["data/sample_inputs/model.pt"] = buffer.getvalue()
    elif kind == "weight":
        records["data/weights/evil"] = buffer.getvalue()
        _edit(records, lambda c: c["config"].update({"e": {**pickled, "path_name": "evil"}}), WEIGHTS)
    elif kind == "constant":
        records["data/constants/opaque_obj_0"] = pickle.dumps(Evil(Path("ran")))
        _edit(records, lambda c: c["config"].update({"e": {**pickled, "path_name": "opaque_obj_0"}}), CONSTANTS)
    elif kind == "library":
        records["data/aotinductor/model/x.so"] = b"ELF"
    else:
        _edit(records, graph, GRAPH)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("operator", "a call of 'torch.os.system', which could run code; export the model again"),
        ("file operator", "a call of 'torch.ops.aten.save.default'"),
        ("foreign operator", r"calls torch.ops.torchvision.nms.default.*add --allow torch\.ops\.torchvision\.nms\."),
        ("expression", "the size expression"),
        ("name", 'the name "x: __import__'),
        ("argument", 'the name "x=__import__'),
        ("parameter", "parameter_name 'a.b\", __import__"),
        ("tree", "an input or output of type builtins.list"),
        ("factory", "an input or output of type collections.defaultdict"),
        ("inputs", "could not be read as an exported program.*or holds pickled objects"),
        ("weight", "could not be read as an exported program.*or holds pickled objects"),
        ("constant", "the constant 'e', a pickled or compiled object"),
        ("library", "compiled AOTInductor code"),
    ],
)
def test_exported_attacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(_export(tmp_path / "good.pt2")) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    _attack(records, kind)
    with zipfile.ZipFile(tmp_path / "evil.pt2", "w") as archive:
        for name, content in records.items():
            archive.writestr(f"evil/{name}", content)
    _refused(tmp_path / "evil.pt2", message)
    assert not (tmp_path / "ran").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


RESNET = """
import torch
import torch.nn.functional as F
from torch import nn
class Block(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.pad = o // 4 if i != o else 0
    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad)) if self.pad else x))
class ResNet20(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[Block(16, 16, 1) for _ in range(3)])
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)
    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))
"""


@pytest.mark.real
def test_resnet20_on_cifar10(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = shared_data / "cifar10/resnet20-12fca82f.th"
    (tmp_path / "resnet20_for_test.py").write_text(RESNET)
    monkeypatch.chdir(tmp_path)
    module = load_model(weights, model="resnet20_for_test:ResNet20").module
    samples = load_samples(
        shared_data / "cifar10/cifar10_test_a.npz", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), labelled=True
    )
    with torch.no_grad():
        answers = torch.cat([module(*batch).argmax(1) for batch in samples.take(1000).batches(500)])
    assert int((answers == samples.take(1000).labels).sum()) == 938
