"""A synthetic model of two billion parameters, quantized block by block: memory and time.

``python -m benchmarks.large`` makes the model (random weights, bfloat16, Llama's shape) in a temporary folder,
quantizes all of it by rounding and a few blocks by GPTQ, each in a process of its own, and writes
``benchmarks/results/large.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.accuracy import RESULTS

SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 30, "vocab_size": 32000}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the model is kept  [default: a temporary folder]")
    parser.add_argument("--blocks", type=int, default=2, help="of GPTQ")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        model = folder / "model"
        parameters = make(model)
        ids = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (arguments.samples, arguments.length))
        np.savez(folder / "ids.npz", input_ids=ids)
        result: dict[str, Any] = {
            "command": f"python -m benchmarks.large --blocks {arguments.blocks} --samples {arguments.samples} "
            f"--length {arguments.length}",
            "parameters": parameters,
            "model_bytes": sum(path.stat().st_size for path in model.glob("*.safetensors")),
            "runs": {
                "rounding, all blocks": run(model, folder / "rounded", "--method", "mse"),
                f"gptq, {arguments.blocks} blocks": run(
                    model, folder / "gptq", "--calib", str(folder / "ids.npz"), "--blocks", str(arguments.blocks),
                    "--samples", str(arguments.samples),
                ),
            },
        }  # fmt: skip
        result["written_bytes"] = sum(path.stat().st_size for path in (folder / "rounded").glob("*.safetensors"))
    (RESULTS / "large.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def make(folder: Path) -> int:
    """Write the model unless it is there; its number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SHAPE, num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=2048, tie_word_embeddings=False
    )
    with torch.device("meta"):
        parameters = sum(each.numel() for each in LlamaForCausalLM(config).parameters())
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1GB")
        torch.set_default_dtype(torch.float32)
    return parameters


def run(model: Path, out: Path, *arguments: str) -> dict[str, Any]:
    """Seconds, seconds a block and for all of them, and peak memory of a process of its own."""
    command = [sys.executable, "-m", "compress", "stream", str(model), "--out", str(out), "--json", "--quiet"]
    done = subprocess.run([*command, "--bits", "4", *arguments], check=True, capture_output=True, text=True)
    report = json.loads(done.stdout)
    return {
        "seconds": report["seconds"],
        "seconds_a_block": report["seconds_a_block"],
        "seconds_all_blocks": report["seconds_a_block"] * report["blocks"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        "linears": len(report["layers"]),
        "environment": report["environment"],
    }


if __name__ == "__main__":
    main()
