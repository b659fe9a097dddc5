"""Files and folders of ours that are taken for models: what each is, and what to do with it instead."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors

__all__ = ["lookalike"]

_FOLDERS = {
    "family.json": "a low-rank family; `compress lowrank extract {0} -o model.pt` cuts a model out of it",
    "distilled.npz": "a distilled set; give it as samples, --calib {0}/distilled.npz, beside the model",
    "graph.json": "a model that is compressed already; `compress bench`, `verify` and `export` take it, and "
    "compress.load in Python; give the model it was made of",
    "front.json": "plans of `compress sweep`; `compress apply PLAN MODEL` carries one out",
}
_DELTAS = {
    "delta": "a delta; `compress sparse inspect {0}` describes it, and --delta {0} adds it to the model it belongs to",
    "undo": "what takes a delta out again; `compress sparse revert` uses it",
}


def lookalike(path: Path) -> str | None:
    """What ``path``, which is no model, is, in a sentence; None where it is nothing of ours."""
    if path.is_dir():
        found = next((said for name, said in _FOLDERS.items() if (path / name).is_file()), None)
    else:
        found = _DELTAS.get(_kind_of_delta(path)) if path.suffix == ".safetensors" else None
    return f"{path} is {found.format(path)}." if found else None


def _kind_of_delta(path: Path) -> str:
    """As its header says (compress/sparse/deltafile.py); "" where it has none."""
    try:
        with safetensors.safe_open(path, "np") as file:
            _, _, header = (file.metadata() or {}).get("compress.delta", "").partition(" ")
        return str(json.loads(header)["kind"]) if header else ""
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
        return ""  # damaged: whoever reads it says so
