"""Hugging Face folders: tiny models written by save_pretrained, read, compressed, run; and everything that is refused.

Nothing is fetched.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import compress
from compress.data.samples import load_samples
from compress.errors import InputError
from compress.exporters.session import open_session, run_session
from compress.models.checkpoint import load_model
from compress.models.huggingface import is_pretrained, open_pretrained
from compress.streaming.shards import Shards
from compress.training.lowrank.job import LowRankOptions, truncate
from tests.every import every

transformers = pytest.importorskip("transformers", reason="needs the package transformers")
tokenizers = pytest.importorskip("tokenizers", reason="needs the package tokenizers")

WORDS, VOCABULARY, LONGEST = [f"w{i}" for i in range(50)], 60, 64
INDEX = "model.safetensors.index.json"
INPUTS = {
    "bert": ("input_ids", "attention_mask", "token_type_ids"),
    "llama": ("input_ids", "attention_mask"),
}


def _settings(layers: int) -> dict[str, int]:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    return {"vocab_size": VOCABULARY, "num_hidden_layers": layers, "max_position_embeddings": LONGEST, **sizes}


def bert(layers: int = 2) -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**_settings(layers))).eval()


def llama(layers: int = 2) -> nn.Module:
    settings = transformers.LlamaConfig(num_key_value_heads=2, **_settings(layers))
    return transformers.LlamaForCausalLM(settings).eval()


def save_tokenizer(folder: Path, words: list[str], ends: bool) -> None:
    """A word is a token; ``ends`` puts [CLS] and [SEP] around a text, and a pair's second into tokens of type 1."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if ends:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    names = {f"{name[1:-1].lower()}_token": name for name in special}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models by name: ``bert``, ``llama``; and with one layer, where two would only take longer."""
    torch.manual_seed(0)
    made = {}
    for name, module in {"bert": bert(), "llama": llama(), "bert-1": bert(1), "llama-1": llama(1)}.items():
        made[name] = tmp_path_factory.mktemp("models") / name
        module.save_pretrained(made[name])
        save_tokenizer(made[name], WORDS, ends="bert" in name)
    return made


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 texts of 3 to 11 words, one a line."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "texts.txt"
    path.write_text("\n".join(" ".join(generator.choice(WORDS, generator.integers(3, 12))) for _ in range(40)))
    return path


def tokens(count: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids, and a mask that lets the first few through."""
    kept = torch.randint(3, length + 1, (count, 1))
    return torch.randint(4, VOCABULARY, (count, length)), (torch.arange(length) < kept).long()


def save_ids(path: Path, ids: Tensor, mask: Tensor) -> Path:
    np.savez(path, attention_mask=mask.numpy(), input_ids=ids.numpy())
    return path


def refused(call: Callable[..., object], *parts: object, **settings: object) -> None:
    with pytest.raises(InputError) as caught:
        call(**settings)
    for part in parts:
        assert str(part) in str(caught.value)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_folder_is_the_model_that_was_saved(name: str, folders: dict[str, Path]) -> None:
    assert is_pretrained(folders[name])
    found = open_pretrained(folders[name])
    original = getattr(transformers, type(found.module).__name__).from_pretrained(folders[name]).eval()
    assert type(found.module) is type(bert(1) if name == "bert" else llama(1))
    assert not found.module.training
    assert not found.module.config.use_cache
    assert found.notes == ()
    ids, mask = tokens(3, 9)
    with torch.no_grad():
        got, wanted = (module(input_ids=ids, attention_mask=mask)[0] for module in (found.module, original))
    torch.testing.assert_close(got, wanted)
    assert found.text is not None
    assert found.text.inputs == INPUTS[name]
    assert (found.text.vocabulary, found.text.longest) == (VOCABULARY, LONGEST)
    assert found.text.causal is (name == "llama")


def test_load_model(folders: dict[str, Path], tmp_path: Path) -> None:
    loaded, again = (load_model(folders["bert"]) for _ in range(2))
    assert loaded.source == str(folders["bert"])
    assert loaded.fingerprint == again.fingerprint != load_model(folders["bert-1"]).fingerprint
    assert loaded.parameters[:3] == INPUTS["bert"][:3]
    assert loaded.text is not None
    refused(lambda: load_model(folders["bert"], model="package:factory"), folders["bert"], "leave out --model")
    refused(lambda: load_model(tmp_path), tmp_path, "config.json")


def test_shards_and_half_precision(folders: dict[str, Path], tmp_path: Path) -> None:
    module = open_pretrained(folders["bert"]).module
    module.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    names = set(json.loads((tmp_path / "shards" / INDEX).read_text())["weight_map"].values())
    assert len(names) > 1
    again = open_pretrained(tmp_path / "shards").module
    assert every(torch.equal(value, again.state_dict()[name]) for name, value in module.state_dict().items())
    missing = sorted(names)[1]
    (tmp_path / "shards" / missing).unlink()
    refused(lambda: open_pretrained(tmp_path / "shards"), tmp_path, missing, INDEX, f"{len(names)} files")
    module.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert {value.dtype for value in open_pretrained(tmp_path / "half").module.parameters()} == {torch.float32}


@pytest.mark.slow
def test_low_rank_reads_text(folders: dict[str, Path], text: Path, tmp_path: Path) -> None:
    options = LowRankOptions(smallest=0.6, length=8)
    found = truncate(folders["bert-1"], text, tmp_path / "out", options=options).family
    assert [(each.shape, each.dtype) for each in found.inputs] == [((8,), "int64")] * 3
    assert found.members[-1].macs < 0.8 * found.dense_macs


def test_text_becomes_tokens(folders: dict[str, Path], text: Path) -> None:
    lines = text.read_text().splitlines()
    reader = open_pretrained(folders["bert"]).text
    assert reader is not None
    samples = load_samples(text, text=reader, length=9)
    ids, mask, types = samples.inputs
    assert ids.shape == mask.shape == types.shape == (40, 9)
    assert not types.any()
    for row, line in enumerate(lines):
        words = [4 + WORDS.index(word) for word in line.split()][:7]
        padding = [0] * (7 - len(words))
        assert ids[row].tolist() == [2, *words, 3, *padding]
        assert mask[row].tolist() == [1] * (len(words) + 2) + padding
    reader = open_pretrained(folders["llama"]).text
    assert reader is not None
    stream = [4 + WORDS.index(word) for line in lines for word in line.split()]
    samples = load_samples(text, text=reader, length=16)
    assert samples.inputs[0].flatten().tolist() == stream[: len(stream) // 16 * 16]
    assert samples.inputs[1].all()


def run_both(result: compress.api.Result, inputs: tuple[Tensor, ...]) -> None:
    """The file gives what the graph gives."""
    assert result.folder is not None
    with torch.no_grad():
        wanted = result.module(*inputs)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        found = run_session(open_session(result.folder / "model.onnx", level), [inputs])
        for got, each in zip(found, wanted, strict=True):
            assert got.shape == each.shape
            assert (got - each).norm() <= 0.02 * each.norm(), level


def values_of(result: compress.api.Result) -> dict[str, list[str | int]]:
    assert result.folder is not None
    graph = onnx.load(result.folder / "model.onnx").graph
    return {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


OUTPUTS = {"last_hidden_state": ["batch", "sequence", 32], "pooler_output": ["batch", 32]}


@pytest.mark.matrix
def test_compress_with_text(folders: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """A causal model; its samples are cut from all texts together."""
    result = compress.quantize(folders["llama-1"], calib=text, out=tmp_path / "out", bits=8, method="mse", length=16)
    assert result.report.export_check.integer_layers == 8
    names = list(values_of(result).items())
    assert names[:2] == [(name, ["batch", "sequence"]) for name in INPUTS["llama"]]
    run_both(result, tokens(5, 23))


@pytest.mark.slow
def test_compress_with_ids(folders: dict[str, Path], tmp_path: Path) -> None:
    calib = save_ids(tmp_path / "ids.npz", *tokens(40, 12))
    result = compress.quantize(folders["bert-1"], calib=calib, out=tmp_path / "out", bits=8, method="mse")
    # The model can do without token types, and nobody gave any.
    assert values_of(result) == {name: ["batch", "sequence"] for name in INPUTS["bert"][:2]} | OUTPUTS
    ids, mask = tokens(5, 23)
    run_both(result, (ids, mask))
    with torch.no_grad():
        wanted = open_pretrained(folders["bert-1"]).module(input_ids=ids, attention_mask=mask).last_hidden_state
        got = result.module(ids, mask)[0]
    assert (got - wanted)[mask.bool()].norm() <= 0.05 * wanted[mask.bool()].norm()


@pytest.mark.matrix
def test_compress_without_data(folders: dict[str, Path], tmp_path: Path) -> None:
    result = compress.quantize(folders["bert-1"], out=tmp_path / "out", bits=8)
    assert result.report.export_check.integer_layers == 0
    assert values_of(result) == {name: ["batch", "sequence"] for name in INPUTS["bert"]} | OUTPUTS
    ids, mask = tokens(5, 23)
    run_both(result, (ids, mask, torch.randint(2, ids.shape)))


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["bert-1"], tmp_path / "copy"))


def test_folders_that_are_refused(copied: Path, folders: dict[str, Path]) -> None:
    config, weights = copied / "config.json", copied / "model.safetensors"
    whole = config.read_text()
    config.write_text(json.dumps(json.loads(whole) | {"auto_map": {"AutoModel": "modeling.Own"}}))
    refused(lambda: open_pretrained(copied), copied, "auto_map in config.json", "--model package.module:factory")
    for name in ("NoSuchModel", "os", "__doc__", "BertConfig", None):
        config.write_text(json.dumps(json.loads(whole) | {"architectures": [name]}))
        refused(lambda: open_pretrained(copied), config, f"the architecture {name!r}", transformers.__version__)
    for content, what in (("{", "is not JSON"), ("[1]", "is not a JSON object")):
        config.write_text(content)
        refused(lambda: open_pretrained(copied), config, what)
    config.write_text(whole)
    weights.write_bytes((folders["bert"] / weights.name).read_bytes()[:5000])
    refused(lambda: open_pretrained(copied), weights, "is damaged", "download the folder again")
    shutil.copy(folders["llama-1"] / weights.name, copied)
    refused(lambda: open_pretrained(copied), copied, "of BertModel", "another model's")
    weights.rename(copied / "pytorch_model.bin")
    refused(lambda: open_pretrained(copied), copied, "no model.safetensors", "pytorch_model.bin is a pickle")
    (copied / "pytorch_model.bin").unlink()
    refused(lambda: open_pretrained(copied), copied, "has a config.json but no model.safetensors")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", "..", ""])
def test_an_index_names_files_of_its_folder_alone(copied: Path, name: str) -> None:
    weights = copied / "model.safetensors"
    names = list(safetensors.torch.load_file(weights))
    weights.rename(copied.parent / "outside.safetensors")
    (copied / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    for call in (lambda: open_pretrained(copied), lambda: Shards(copied)):
        refused(call, copied / INDEX, f"names {name!r}", ".safetensors files in its own folder alone")
    (copied / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, 3)}))
    refused(lambda: open_pretrained(copied), copied / INDEX, "no weight_map of tensors and files")


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, and the weights beside it are "),
        ({"vocab_size": 10**9}, "vocab_size is 1000000000, and no tensor beside it has a dimension above 64"),
        ({"hidden_size": 4 * 10**5, "num_attention_heads": 4}, "values and more (in "),
        ({"num_labels": 10**8}, "num_labels is 100000000"),
        ({"max_position_embeddings": 10**10}, "values and more (in "),
    ],
)
def test_settings_beyond_the_weights(copied: Path, setting: dict[str, int], what: str) -> None:
    """None of it is built: the names of ten million labels alone take a gigabyte."""
    config = copied / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | setting))
    refused(lambda: open_pretrained(copied), config, what, ": get the folder again")


def test_weights_that_are_not_used_are_named(copied: Path) -> None:
    weights = safetensors.torch.load_file(copied / "model.safetensors")
    extra = weights | {"head.weight": torch.zeros(3, 3)}
    safetensors.torch.save_file(extra, copied / "model.safetensors", {"format": "pt"})
    (note,) = load_model(copied).notes
    assert note == "copy holds weights that BertModel does not use: head.weight"


def test_an_encoder_without_a_pooler(tmp_path: Path) -> None:
    module = bert(1)
    module.pooler = None
    module.save_pretrained(tmp_path / "bare")
    found = open_pretrained(tmp_path / "bare")
    assert found.notes == ("bare holds no pooler, and BertModel is taken without one",)
    assert found.module.pooler is None
    ids, mask = tokens(3, 9)
    with torch.no_grad():
        got, wanted = (each(input_ids=ids, attention_mask=mask)[0] for each in (found.module, module))
    torch.testing.assert_close(got, wanted)


def test_two_towers_are_refused_and_one_is_taken(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 1}
    words = {**sizes, "vocab_size": VOCABULARY, "max_position_embeddings": LONGEST}
    config = transformers.CLIPConfig(text_config=words, vision_config={**sizes, "image_size": 16, "patch_size": 8})
    module = transformers.CLIPModel(config)
    module.save_pretrained(tmp_path / "both")
    parts = "a CLIPModel of text_model (input_ids) and vision_model (pixel_values)"
    refused(lambda: open_pretrained(tmp_path / "both"), parts, ".text_model.save_pretrained('text_model')")
    for part in ("text_model", "vision_model"):
        getattr(transformers.AutoModel.from_pretrained(tmp_path / "both"), part).save_pretrained(tmp_path / part)
        assert (open_pretrained(tmp_path / part).text is None) is (part == "vision_model")


def test_token_ids_that_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    quantize = functools.partial(compress.quantize, folders["bert-1"])
    ids, mask = tokens(40, 12)
    for wrong, found in ((VOCABULARY, f" to {VOCABULARY},"), (-1, "from -1 to")):
        ids[7, 3] = wrong
        calib = save_ids(tmp_path / f"{wrong}.npz", ids, mask)
        refused(quantize, calib, found, f"0 to {VOCABULARY - 1}", calib=calib)
    calib = save_ids(tmp_path / "long.npz", *tokens(8, LONGEST + 1))
    refused(quantize, calib, "65 tokens a sample", "takes 64", calib=calib)


def test_texts_that_are_refused(copied: Path, folders: dict[str, Path], text: Path, tmp_path: Path) -> None:
    quantize = functools.partial(compress.quantize, calib=text)
    for length in (1, 0, LONGEST + 1):
        refused(quantize, f"--length {length}", copied, f"2 to {LONGEST}", model=copied, length=length)
    refused(quantize, text, "Hugging Face model folder", ".npz", model=nn.Linear(4, 4))
    save_tokenizer(copied, [*(f"x{i}" for i in range(20)), *WORDS], ends=True)
    refused(quantize, copied, "is another model's", f"0 to {VOCABULARY - 1}", model=copied)
    bare = Path(shutil.copytree(folders["llama-1"], tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")))
    refused(quantize, bare, "has no tokenizer", ".npz", *INPUTS["llama"], model=bare)


def test_a_running_text_shorter_than_a_sample(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("w1 w2\nw3\n")
    refused(lambda: compress.quantize(folders["llama-1"], calib=path, length=8), "3 tokens", "one sample of 8")
