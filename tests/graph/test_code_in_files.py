"""Code in every string of our own files, one string at a time: none of it runs, whatever reads the file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import compress
from compress import api
from compress.errors import CompressError, InputError
from compress.files.known_folders import FAMILY_FILE
from compress.graph.names import is_identifier, is_tensor_name
from compress.graph.traced import trace
from compress.measure.latency_table import open_table
from compress.plans.plan_file import load_plan
from compress.sparse.base import base_hash, base_tensors, tensor_hashes
from compress.sparse.delta import SparseDelta, SparseTensor
from compress.sparse.deltafile import content_digest, write_delta
from compress.training.lowrank.family import FamilyInput
from compress.training.lowrank.job import LowRankOptions, truncate
from tests.forgery import forge_report
from tests.networks import let_fall, normed_mlp
from tests.sweep import sweep

# Without dots, at which names are cut, and without slashes.
_CALL = 'getattr(__import__("os"), "mkdir")("mark")'
_SAME = _CALL.replace('"', "'")
FORMS = {
    "an argument's default": f"x={_CALL}",
    "a quoted part": f'x"), {_CALL}, ("',
    "a part in single quotes": f"x'), {_SAME}, ('",
    "a line of its own": f"x\n{_CALL}\n",
    "a comment's end": f"x)\n    {_CALL}\n    (",
    "an expression": _CALL,
    "something to add": f" + {_CALL}",
    "a dunder": f"__class__ and {_CALL}",
    "torch.os": "torch.os.system",
}
PLACES = ("def f({}): pass", "def f({}, y=1): pass", "y = 1; z = y{}", "x = 1; {}", "x = 1; x.{}", "{}", "dict({}=1)")
PLACES += ("x = ''\nif x == '':\n    str({})",)
PLACES += ('str("{}")', "str('{}')")

Path_ = tuple[str | int, ...]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The mark would be made in the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def marked() -> bool:
    """Whether code has run; the next is looked for afresh."""
    there = Path("mark").exists()
    if there:
        Path("mark").rmdir()
    return there


def strings(value: Any, at: Path_ = ()) -> Iterator[tuple[Path_, bool, str]]:
    """Places of all strings in JSON, whether each is a key, and what it says."""
    if isinstance(value, str):
        yield at, False, value
    elif isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str):
                yield (*at, key), True, key
            yield from strings(each, (*at, key))


def edited(value: Any, at: Path_, is_key: bool, text: str) -> Any:
    """A copy of JSON with ``text`` at that place."""
    if not at:
        return text
    first, *rest = at
    if isinstance(value, list):
        return [edited(each, tuple(rest), is_key, text) if n == first else each for n, each in enumerate(value)]
    if is_key and not rest:
        return {text if key == first else key: each for key, each in value.items()}
    return {key: edited(each, tuple(rest), is_key, text) if key == first else each for key, each in value.items()}


def places(content: Any, whole: bool) -> list[tuple[Path_, bool]]:
    """All places of strings, or one of each kind: in whichever entry of a list, but of a graph's nodes one of each."""
    found: dict[tuple[object, ...], tuple[Path_, bool]] = {}
    for at, is_key, _ in strings(content):
        kind: list[object] = [is_key]
        within = content
        for part in at[:-1]:
            within = within[part]
            kind.append(within.get("op") if isinstance(within, dict) and isinstance(part, int) else part)
        kind.append("*" if isinstance(at[-1], int) else at[-1])
        found.setdefault((at, is_key) if whole else tuple(kind), (at, is_key))
    return list(found.values())


def run_all(
    content: Any,
    write: Callable[[Any], object],
    read: Callable[[], object],
    whole: bool,
    forms: Iterable[str] = FORMS,
) -> tuple[int, int]:
    """Read the file with code in its strings, one by one; how often it was read, and refused.

    Nothing but a sentence may come of it.
    """
    read_times = refusals = 0
    ran, broken = [], []
    for place in places(content, whole):
        for form in forms:
            write(edited(content, *place, FORMS[form]))
            try:
                read()
            except CompressError:
                refusals += 1
            except Exception as error:  # noqa: BLE001 - what is looked for
                broken.append((place, form, f"{type(error).__name__}: {error}"))
            if marked():
                ran.append((place, form))
            read_times += 1
    assert ran == []
    assert broken == []
    return read_times, refusals


class Odd(nn.Module):
    """Its graph has arguments by name, constants, a string, names that are no identifiers, and names its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"conv-1": nn.Conv2d(2, 32, 3), "1": nn.Linear(32, 64)})
        self.act = nn.GELU(approximate="tanh")

    def forward(self, input: Tensor) -> dict[str, Tensor]:
        x = self.act(self.parts["conv-1"](input)).mean((2, 3))
        steps = torch.arange(32, dtype=torch.float32, device=x.device)
        return {"logits": self.parts["1"](x + steps), "scores/0": x.to(torch.float64)}


def original(folder: Path) -> nn.Module:
    """The module that was compressed to ``folder``."""
    module = Odd().eval()
    module.load_state_dict(torch.load(folder / "weights.pt"))
    return module


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    torch.manual_seed(0)
    module = Odd().eval()
    api.quantize(module, bits=4, input_shape=(2, 6, 6), out=folder / "out", bench=False)
    torch.save(module.state_dict(), folder / "out" / "weights.pt")
    return folder / "out"


@pytest.fixture
def folder(finished: Path, here: Path) -> Path:
    return Path(shutil.copytree(finished, here / "out"))


def write_graph(folder: Path, content: dict[str, Any]) -> None:
    """With its hashes right, as whoever means harm would write them."""
    said = {name: value for name, value in content.items() if name != "graph_sha256"}
    digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    (folder / "graph.json").write_text(json.dumps(said | {"graph_sha256": digest}))
    forge_report(folder)


def test_every_form_leaves_a_mark_where_it_is_pasted() -> None:
    """Else the tests below could not fail."""
    for form, text in FORMS.items():
        if form == "torch.os":
            continue
        for place in PLACES:
            with contextlib.suppress(Exception):
                exec(place.format(text), {})
        assert marked(), form


def test_the_files_are_read_where_they_are_as_they_were(folder: Path) -> None:
    """Neither are the hashes of the tests wrong, nor is what is refused below refused for nothing."""
    content = json.loads((folder / "graph.json").read_text())
    write_graph(folder, content)
    assert set(api.load(folder)(torch.randn(1, 2, 6, 6))[0].shape) == {1, 64}
    calls = [node for node in content["nodes"] if node["op"] == "call_function"]
    assert any(node["kwargs"]["dict"] for node in calls)
    said = {text for *_, text in strings(content)}
    assert {"device", "dtype", "tanh", "scores/0", "parts.conv-1.bias"} <= said


FEW = ("an argument's default", "a quoted part", "torch.os")


@sweep(("whole", "forms"), [(False, FEW), (False, tuple(FORMS)), (True, FEW)], sample=[(False, FEW)])
@pytest.mark.slow
def test_graphs(whole: bool, forms: tuple[str, ...], folder: Path) -> None:
    def read() -> None:
        api.load(folder)
        api.export(folder, folder / "again.onnx", overwrite=True)  # what loads is used

    content = json.loads((folder / "graph.json").read_text())
    del content["graph_sha256"]  # written anew
    times, refusals = run_all(content, lambda changed: write_graph(folder, changed), read, whole, forms)
    assert refusals > 0.9 * times  # what may stand for anything are names of outputs


@pytest.mark.parametrize(
    ("op", "text"),
    [
        ("placeholder", f"x={_CALL}"),
        ("placeholder", "class"),
        ("placeholder", "*x"),
        ("get_attr", f'x"), {_CALL}, ("'),
        ("get_attr", "parts.in.weight"),
        ("output", "x"),
    ],
)
def test_a_refusal_names_file_field_and_value(folder: Path, op: str, text: str) -> None:
    content = json.loads((folder / "graph.json").read_text())
    number = next(n for n, node in enumerate(content["nodes"]) if node["op"] == op)
    content["nodes"][number]["target"] = text
    if op == "get_attr":  # the tensor is there, too
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        save_file(tensors | {text: torch.zeros(1)}, folder / "model.safetensors")
        content["tensors_sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    write_graph(folder, content)
    for use in (api.load, api.verify, lambda path: api.export(path, "out.onnx"), lambda path: compress.bench([path])):
        with pytest.raises(InputError) as refused:
            use(folder)
        assert f"graph.json: nodes[{number}].target is {text!r}; allowed is" in str(refused.value)
    assert not marked()


@pytest.mark.parametrize("name", ["x", "_x1", "größe"])
def test_names_that_are_names(name: str) -> None:
    assert is_identifier(name)
    assert is_tensor_name(f"{name}.0.conv-1.a b/c")


@pytest.mark.parametrize("name", ["", "x y", "1x", "if", "None", "x=1", "x\n", "x.y", None, 3, "*x", *FORMS.values()])
def test_names_that_are_none(name: object) -> None:
    assert not is_identifier(name)
    # Dots and digits are what a tensor's name may have, and quotes would hold the rest.
    assert is_tensor_name(name) == (name in ("x y", "1x", "x.y", "torch.os.system"))


# A module's name has no dots; without them one of the forms is a name like any other.
CODE_WITHOUT_DOTS = [text for each in FORMS.values() if not is_tensor_name(text := each.replace(".", "_"))]


def test_all_forms_but_one_are_code_without_their_dots() -> None:
    assert len(CODE_WITHOUT_DOTS) == len(FORMS) - 1


@pytest.mark.parametrize("text", CODE_WITHOUT_DOTS)
def test_modules_whose_names_are_code(text: str) -> None:
    """As a model file may bring them: the keys of a module's children are any strings."""
    module = nn.Sequential(nn.Conv2d(2, 4, 3))
    module._modules[text] = nn.Conv2d(4, 4, 1)
    torch.save(module, "model.pt")
    for use in (
        lambda: api.quantize("model.pt", input_shape=(2, 6, 6)),
        lambda: trace(module, (torch.ones(1, 2, 6, 6),)),
    ):
        with pytest.raises(InputError, match="the model has a module called "):
            use()
    assert not marked()


def test_names_in_quotes_are_computed_with(finished: Path) -> None:
    """Hyphens may be in names of modules; an exported program once had them in its source, and warned."""
    module = original(finished)
    x = torch.randn(4, 2, 6, 6)
    assert torch.nn.functional.cosine_similarity(api.load(finished)(x)[0], module(x)["logits"]).min() > 0.9


@pytest.mark.matrix  # minutes: every one that is read is carried out
def test_plans(folder: Path) -> None:
    module = original(folder)
    api.allocate(module, input_shape=(2, 6, 6), budgets=("size=0.9x",), sensitivity="weight", out="plan.json")
    content = json.loads(Path("plan.json").read_text())
    assert content["allocation"]["chosen"]

    def read() -> None:
        load_plan(Path("plan.json"))
        api.apply("plan.json", module, input_shape=(2, 6, 6), bench=False)

    few = ("a quoted part", "an expression", "a line of its own")
    run_all(content, lambda changed: Path("plan.json").write_text(json.dumps(changed)), read, whole=False, forms=few)


@pytest.mark.slow
def test_families(here: Path) -> None:
    module = normed_mlp(16, 48, 4)
    let_fall(module[0], module[3])
    x = torch.randn(64, 16)
    labels = torch.randint(4, (64,))
    truncate(module.eval(), (x, labels), here / "family", options=LowRankOptions(smallest=0.2))
    file = here / "family" / FAMILY_FILE
    content = json.loads(file.read_text())

    def read() -> None:
        model = api.load(here / "family")
        model.set_member(1)
        [each.example(2) for each in model.family.inputs]

    _, refusals = run_all(content, lambda changed: file.write_text(json.dumps(changed)), read, whole=False)
    assert refusals


@pytest.mark.parametrize("dtype", ["hub", "os.system", "float99", "Tensor", ""])
def test_a_family_takes_dtypes_alone(dtype: str) -> None:
    with pytest.raises(ValueError, match="no dtype of torch's"):
        FamilyInput(shape=(1,), dtype=dtype)


@sweep("forms", [FEW, tuple(FORMS)], sample=[FEW])
@pytest.mark.slow
def test_deltas(folder: Path, forms: tuple[str, ...]) -> None:
    base = original(folder)
    name, index = "parts.1.weight", torch.tensor([1, 5, 7])
    dense = {"parts.1.bias": torch.ones(64)}
    tensors = {name: SparseTensor((64, 32), "float32", index, torch.ones(3))}
    whole = base_hash(tensor_hashes(base_tensors(base)), dense)
    write_delta(SparseDelta(whole, tensors, dense, {"how": "by hand"}, tuple(dense)), "good.safetensors", "fp32")
    api.load(folder, deltas="good.safetensors")
    with safetensors.safe_open("good.safetensors", "pt") as file:
        header = json.loads(file.metadata()["compress.delta"].partition(" ")[2])
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping

    def write(changed: dict[str, Any]) -> None:
        # A tensor that was renamed is there by its new name.
        new = next((each for each in changed.get("tensors", ()) if each != name), name)
        renamed = {key.replace(name, new): value for key, value in stored.items()}
        text = json.dumps(changed)
        save_file(renamed, "d.safetensors", {"compress.delta": f"{content_digest(text, renamed)} {text}"})

    def read() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deltas that name no base
            api.load(folder, deltas="d.safetensors", any_base=True)(torch.ones(1, 2, 6, 6))
        api.inspect(base, deltas=["d.safetensors"], input_shape=(2, 6, 6))

    _, refusals = run_all(header, write, read, whole=False, forms=forms)
    assert refusals


@pytest.mark.matrix
def test_latency_tables() -> None:
    table, module = Path("latency.json"), Odd().eval()

    def plan() -> None:
        api.allocate(
            module, calib=torch.randn(8, 2, 6, 6), budgets=("latency=9x", "size=0.7x"), sensitivity="weight",
            latency_table=str(table), weight_widths=(8,), bench=True,
        )  # fmt: skip

    plan()
    content = json.loads(table.read_text())
    provider, threads = content["provider"], content["threads"]

    def read() -> None:
        found, _ = open_table(table, provider, threads)
        found.find("conv2d", "integer")

    run_all(content, lambda changed: table.write_text(json.dumps(changed)), read, whole=False)
    # Planned by: every name of an operator at once.
    rows = [
        row | {"signature": text, "compute": text}
        for row, text in zip(content["operators"] * len(FORMS), FORMS.values(), strict=False)
    ]
    table.write_text(json.dumps(content | {"operators": rows}))
    plan()
    assert not marked()
