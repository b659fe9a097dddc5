"""What a user would pick instead, on the same float ONNX file and the same calibration samples.

onnxruntime's own tools run here. NNCF pins other packages, so it runs in an interpreter of its own, given by
``--nncf-python``: ``python -m venv peer && peer/bin/pip install nncf onnx onnxruntime torch==2.13.0``.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

__all__ = ["peer_files", "prepare_file", "quantize_statically"]

_NNCF = """
import sys, numpy as np, onnx, nncf
float_file, samples, out = sys.argv[1:]
model = onnx.load(float_file)
name = model.graph.input[0].name
data = nncf.Dataset(list(np.load(samples)), lambda sample: {name: sample[None]})
onnx.save(nncf.quantize(model, data, subset_size=len(np.load(samples, mmap_mode="r"))), out)
"""


class _Reader(CalibrationDataReader):
    def __init__(self, name: str, samples: np.ndarray) -> None:
        self._batches: Iterator[dict[str, np.ndarray]] = iter(
            [{name: samples[start : start + 32]} for start in range(0, len(samples), 32)]
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def prepare_file(float_file: Path, folder: Path) -> Path:
    """``float_file`` as onnxruntime's tools want it, written into ``folder``."""
    prepared = folder / "prepared.onnx"
    quant_pre_process(str(float_file), str(prepared))
    return prepared


def quantize_statically(
    prepared: Path, path: Path, input_name: str, samples: Tensor, *, reduce_range: bool = False
) -> None:
    """onnxruntime's static quantization of ``prepared`` into ``path``: U8S8, a grid for each output channel.

    Args:
        reduce_range: 7 bits for weights, as its documentation asks for on x86 without VNNI.
    """
    quantize_static(
        str(prepared),
        str(path),
        _Reader(input_name, samples.numpy()),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=reduce_range,
        calibrate_method=CalibrationMethod.MinMax,
    )


def peer_files(
    float_file: Path, input_name: str, samples: Tensor, folder: Path, nncf_python: str | None
) -> dict[str, Path]:
    """ONNX files by the peers' names, written into ``folder``."""
    prepared = prepare_file(float_file, folder)
    files = {"onnxruntime static": folder / "ort-static.onnx", "onnxruntime dynamic": folder / "ort-dynamic.onnx"}
    quantize_statically(prepared, files["onnxruntime static"], input_name, samples)
    quantize_dynamic(str(prepared), str(files["onnxruntime dynamic"]), weight_type=QuantType.QUInt8)
    if nncf_python is not None:
        files["nncf"] = folder / "nncf.onnx"
        with tempfile.NamedTemporaryFile(suffix=".npy") as stored:
            np.save(stored, samples.numpy()[:300])  # NNCF's own default subset
            stored.flush()
            command = [nncf_python, "-c", _NNCF, str(prepared), stored.name, str(files["nncf"])]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return files
