"""A model in several files, small enough to be quantized in a tenth of a second, and what a folder holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from torch import Tensor

GROUP = 32
VOCABULARY = 100


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder in several files, found through its index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found: dict[str, Tensor] = {}
    for file in sorted(set(index.values())):
        with safetensors.safe_open(folder / file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name, place in index.items() if place == file}
    return found


def weight_files(folder: Path) -> dict[str, bytes]:
    """What stands in the safetensors files, by name."""
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def save_llama(folder: Path, blocks: int, seed: int = 0) -> Path:
    """Weights and embeddings of the usual spread, so that quantizing one block changes what the next one reads."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    module = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        module.model.embed_tokens.weight.mul_(50)  # drawn with a deviation of 0.02
    module.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks in bfloat16; not to be written to."""
    return save_llama(tmp_path_factory.mktemp("models") / "llama", blocks=3)


@pytest.fixture
def own_llama(llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "own"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of two blocks in float32, in one file."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.BertConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
    )
    folder = tmp_path_factory.mktemp("models") / "bert"
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids int64 [24, 32]."""
    file = tmp_path_factory.mktemp("data") / "ids.npz"
    np.savez(file, input_ids=np.random.default_rng(0).integers(0, VOCABULARY, (24, 32)))
    return file
