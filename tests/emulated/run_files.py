"""Runs ONNX files on the processor it finds itself on: numpy and onnxruntime alone, which start in seconds under qemu.

``python run_files.py FILES ANSWERS``: for every ``NAME.onnx`` of the folder FILES, with inputs by name in ``NAME.npz``
beside it, the outputs by name go to ``NAME.npz`` in the folder ANSWERS. Sessions are a user's, on one thread.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort


def main(files: Path, answers: Path) -> None:
    """Every file of the folder."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors only: the optimiser warns about initialisers it folded
    for file in sorted(files.glob("*.onnx")):
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        outputs = session.run(None, dict(np.load(file.with_suffix(".npz"))))
        names = [each.name for each in session.get_outputs()]
        np.savez(answers / f"{file.stem}.npz", **dict(zip(names, outputs, strict=True)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
