"""What the folders of this program hold, and what those and others are that are taken for a model or samples."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import safetensors

from compress.errors import InputError

__all__ = [
    "BASE_FILE",
    "FAMILY_FILE",
    "FRONT_FILE",
    "GRAPH_FILE",
    "ONNX_FILE",
    "PLAN_FILE",
    "REPORT_FILE",
    "SET_FILE",
    "TENSORS_FILE",
    "existing_file",
    "lookalike",
    "read_json",
]

ONNX_FILE = "model.onnx"
TENSORS_FILE = "model.safetensors"
GRAPH_FILE = "graph.json"
BASE_FILE = "base.safetensors"
PLAN_FILE = "plan.json"
REPORT_FILE = "report.json"
FAMILY_FILE = "family.json"
FRONT_FILE = "front.json"
SET_FILE = "distilled.npz"

_FOLDERS = {
    FAMILY_FILE: "a low-rank family; `compress lowrank extract {0} -o model.pt` cuts a model out of it",
    SET_FILE: "a distilled set; give it as samples, --calib {0}/distilled.npz, beside the model",
    GRAPH_FILE: "a model that is compressed already; `compress bench`, `verify` and `export` take it, and "
    "compress.load in Python; give the model it was made of",
    FRONT_FILE: "a folder of plans of `compress sweep`; `compress apply PLAN MODEL` carries one out",
}
_STREAMED = (
    "what `compress stream` has written, for transformers to load; `compress verify` looks for damage, other verbs "
    "take the folder it was made of"
)
_FINISHED = "a part of {0.parent}, a model that is compressed already: neither a model to compress nor samples"
_PARTS = (TENSORS_FILE, BASE_FILE)
_DELTAS = {
    "delta": "a delta; `compress sparse inspect {0}` describes it, and --delta {0} adds it to the model it belongs to",
    "undo": "what takes a delta out again; `compress sparse revert` uses it",
}
_FORMATS = {
    ".onnx": "an ONNX file, which models are exported to; `compress bench {0}` times it, `compress verify {0}` judges "
    "its codes; to compress it, give the PyTorch model that it was exported from",
    ".ort": "a file of ONNX Runtime's own; give the PyTorch model that it was made from",
    ".gguf": "a file of llama.cpp; give the Hugging Face folder that it was made from",
    ".tflite": "a TensorFlow Lite file; give a PyTorch model",
    ".keras": "a Keras file; give a PyTorch model",
}
_SCRIPT = (
    "a TorchScript archive, which is not supported; save the module with torch.save or export it with "
    "torch.export.save to a .pt2 file"
)


def lookalike(path: Path) -> str | None:
    """What ``path``, which is neither a model nor samples, is, in a sentence; None where it may be one."""
    found: str | None = None
    if (path / "config.json").is_file():  # a Hugging Face folder, whatever else lies in it
        found = _STREAMED if (path / PLAN_FILE).is_file() and _is_packed(path / "config.json") else None
    elif path.is_dir():
        found = next((said for name, said in _FOLDERS.items() if (path / name).is_file()), None)
    elif path.suffix == ".safetensors":
        found = _DELTAS.get(_kind_of_delta(path))
        if path.name in _PARTS and (path.parent / GRAPH_FILE).is_file():
            found = _FINISHED
    elif path.is_file():
        found = _FORMATS.get(path.suffix.lower()) or (_SCRIPT if _is_script(path) else None)
    return f"{path} is {found.format(path)}." if found else None


def _is_packed(config: Path) -> bool:
    """Whether it is of a model whose weights are integers; a plan may lie beside one of floats, too."""
    try:
        return "quantization_config" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _is_script(path: Path) -> bool:
    """Whether torch.jit.save has written it, by the names of its members."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [name.partition("/")[2] for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False  # whatever it is, whoever reads it says so
    return "constants.pkl" in inside or any(name.startswith("code/") for name in inside)


def _kind_of_delta(path: Path) -> str:
    """As its header says (compress/sparse/deltafile.py); "" where it has none."""
    try:
        with safetensors.safe_open(path, "np") as file:
            _, _, header = (file.metadata() or {}).get("compress.delta", "").partition(" ")
        return str(json.loads(header)["kind"]) if header else ""
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
        return ""  # damaged: whoever reads it says so


def existing_file(folder: Path, name: str) -> Path:
    """Where ``name`` is in ``folder``, of a run of ours.

    Raises:
        InputError: it is not there; with what the folder is instead, where that is known.
    """
    if not (folder / name).is_file():
        mistaken = None if (folder / GRAPH_FILE).is_file() else lookalike(folder)
        raise InputError(mistaken or f"{folder} holds no {name}; give a folder that `compress quantize` has written")
    return folder / name


def read_json(folder: Path, name: str) -> dict[str, object]:
    """What the JSON object ``name`` in ``folder`` says.

    Raises:
        InputError: it is missing, no JSON or no object.
    """
    try:
        content = json.loads(existing_file(folder, name).read_text())
    except ValueError as error:
        raise InputError(
            f"{folder / name} is not JSON ({error}); write it again with the command that made it"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{folder / name} is not a JSON object; compress the model again")
    return content
