"""Hugging Face model folders: ``config.json`` and safetensors to a module, and the folder's tokenizer to token ids.

``transformers`` builds the module from its own code; a folder that brings code of its own is refused. Nothing is
fetched: only files of the folder are read.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.errors import InputError, one_line
from compress.files.known_folders import lookalike
from compress.models.growth import bounded, check_settings
from compress.models.weightfiles import extent, read_json

__all__ = [
    "PretrainedFolder",
    "TextReader",
    "is_classifier",
    "is_pretrained",
    "open_pretrained",
    "read_config",
    "save_pretrained",
    "text_reader",
    "without_head",
]

_CONFIG = "config.json"
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
)
_DEFAULT_LENGTH = 128


def is_pretrained(folder: Path) -> bool:
    """Whether ``folder`` is a model as ``save_pretrained`` writes it."""
    return (folder / _CONFIG).is_file()


@dataclass(frozen=True)
class PretrainedFolder:
    """A model folder that was read.

    Attributes:
        module: in eval mode, float32, without a key-value cache.
        text: how text becomes the module's inputs; None for models that take no token ids.
        notes: sentences for the report.
        head: parameters that the folder does not hold: those of a new classification head.
    """

    module: torch.nn.Module
    text: TextReader | None
    notes: tuple[str, ...]
    head: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextReader:
    """Token ids for a model: from text with the folder's tokenizer, or made up.

    Attributes:
        folder: where the tokenizer is.
        inputs: the module's parameters that a tokenizer fills, in the module's order.
        positional: all of the module's parameters.
        vocabulary: ids run from 0 to this.
        longest: tokens a sample may have at most.
        causal: whether the model predicts the next token: its samples are cut from running text.
    """

    folder: Path
    inputs: tuple[str, ...]
    positional: tuple[str, ...]
    vocabulary: int
    longest: int
    causal: bool

    def encode(
        self, texts: Sequence[str], length: int | None = None, second: Sequence[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """``texts`` as int64 [N, L] by input, L at most ``length`` tokens (None: 128, or what the model takes).

        A causal model's texts are run together and cut into N whole samples; other models get a text, or a pair of
        one of ``texts`` and one of ``second``, a sample, the shorter ones padded.

        Raises:
            InputError: there is no tokenizer, it is another model's, or the model takes no such length.
        """
        length = self.check_length(length)
        tokenizer = self._tokenizer()
        if self.causal:
            running = texts if second is None else itertools.chain.from_iterable(zip(texts, second, strict=True))
            with self._tokenizing():
                ids = [token for text in running for token in tokenizer(text)["input_ids"]]
            count = len(ids) // length
            if count == 0:
                raise InputError(f"the text holds {len(ids)} tokens, less than one sample of {length}; give more text")
            rows = torch.tensor(ids[: count * length], dtype=torch.int64).reshape(count, length)
            found = {"input_ids": rows}
        else:
            given = (list(texts),) if second is None else (list(texts), list(second))
            # Not every tokenizer says of itself which text of a pair a token is of, as its model may want to know.
            typed = "token_type_ids" in self.inputs
            with self._tokenizing():
                encoded = tokenizer(
                    *given,
                    padding=True,
                    truncation=True,
                    max_length=length,
                    return_tensors="pt",
                    return_token_type_ids=typed,
                )
            found = {name: value.to(torch.int64) for name, value in encoded.items()}
        ids_found = found["input_ids"]
        self.check_ids(ids_found, f"the tokenizer in {self.folder} is another model's:")
        found.setdefault("attention_mask", torch.ones_like(ids_found))
        found.setdefault("token_type_ids", torch.zeros_like(ids_found))
        return {name: found[name] for name in self.inputs}

    def example(self) -> dict[str, torch.Tensor]:
        """Two samples of ids at random, for models without data."""
        shape = (2, self.check_length(None))
        ids = torch.randint(self.vocabulary, shape, generator=torch.Generator().manual_seed(0))
        made = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
        }
        return {name: made[name] for name in self.inputs}

    def call_names(self, inputs: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
        """Names to hand ``inputs`` over by; () where position comes to the same."""
        return tuple(inputs) if tuple(inputs) != self.positional[: len(inputs)] else ()

    def check_ids(self, ids: torch.Tensor, source: str) -> None:
        """Refuse ``ids`` [N, L] that the model does not know, and more of them than it takes.

        Raises:
            InputError: naming ``source``.
        """
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocabulary:
            raise InputError(f"{source} token ids run from {low} to {high}, the model knows 0 to {self.vocabulary - 1}")
        if ids.shape[1] > self.longest:
            raise InputError(f"{source} {ids.shape[1]} tokens a sample, the model takes {self.longest}")

    def check_length(self, length: int | None) -> int:
        """``length``, or the usual one.

        Raises:
            InputError: the model takes no such length.
        """
        if length is None:
            return min(_DEFAULT_LENGTH, self.longest)
        if not 2 <= length <= self.longest:
            raise InputError(f"--length {length}: {self.folder} takes 2 to {self.longest} tokens a sample")
        return length

    @contextlib.contextmanager
    def _tokenizing(self) -> Iterator[None]:
        """A tokenizer of a damaged file fails as it is used; that of Rust with an exception that is no Exception."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:
            raise InputError(
                f"{self.folder} has a tokenizer that fails on the texts ({one_line(error)}); get the folder again"
            ) from error

    def _tokenizer(self) -> Any:
        transformers = _transformers()
        if not any((self.folder / name).is_file() for name in _TOKENIZERS):
            # transformers would make one that knows no word.
            raise InputError(
                f"{self.folder} has no tokenizer (none of {', '.join(_TOKENIZERS)}); give the samples as token ids in "
                f"an .npz with {', '.join(self.inputs)}"
            )
        try:
            with _quiet():
                tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:
            raise InputError(
                f"{self.folder} has no tokenizer that can be read ({one_line(error)}); give the samples as token ids "
                f"in an .npz with {', '.join(self.inputs)}"
            ) from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer


def open_pretrained(folder: Path, classes: int | None = None, seed: int = 0) -> PretrainedFolder:
    """The module that ``folder`` holds.

    Args:
        classes: put a new head with so many outputs on it, instead of the head it may have: classes, or one number.
        seed: of the new head's weights.

    Raises:
        InputError: transformers is not installed, a file is missing or damaged, the folder brings code of its own, or
            the weights do not fit the architecture that ``config.json`` names; or that has no form with such a head.
    """
    _, architecture, _ = read_config(folder)
    name, given, notes = architecture.__name__, dict[str, Any](), []
    if classes is not None:
        architecture, given = _transformers().AutoModelForSequenceClassification, {"num_labels": classes}
        name = f"a classifier on {name}"
    module, missing, unused = _from_pretrained(folder, architecture, name, given, seed)
    if missing and classes is None and _is_pooler(missing, architecture):
        module, missing, unused = _from_pretrained(folder, architecture, name, {"add_pooling_layer": False}, seed)
        notes.append(f"{folder.name} holds no pooler, and {name} is taken without one")
    if missing and classes is None:
        raise InputError(f"{folder}: the weights lack {', '.join(missing[:4])} of {name}; they are another model's")
    if unused:
        notes.append(f"{folder.name} holds weights that {name} does not use: {', '.join(unused[:4])}")
    module.config.use_cache = False
    if missing:
        what = "one number" if classes == 1 else f"{classes} classes"
        notes.append(f"{type(module).__name__} with a new head for {what} ({', '.join(missing)})")
    return PretrainedFolder(module.eval(), text_reader(folder, module), tuple(notes), tuple(missing))


def _from_pretrained(
    folder: Path, architecture: Any, name: str, given: Mapping[str, Any], seed: int
) -> tuple[Any, list[str], list[str]]:
    """The module, its parameters that the folder does not hold, and what that holds besides."""
    try:
        with _quiet(), torch.random.fork_rng(devices=[]), bounded(folder / _CONFIG, extent(folder)):
            torch.manual_seed(seed)
            module, loading = architecture.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True,
                **given,
            )  # fmt: skip
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{folder} cannot be read as {name}: {one_line(error)}") from error
    missing = sorted([*loading["missing_keys"], *(str(each) for each in loading["mismatched_keys"])])
    return module, missing, sorted(loading["unexpected_keys"])


def _is_pooler(missing: Sequence[str], architecture: Any) -> bool:
    """Whether nothing but a pooler is missing, which ``architecture`` goes without: encoders are saved so, too."""
    return all("pooler" in each.split(".") for each in missing) and (
        "add_pooling_layer" in inspect.signature(architecture).parameters
    )


def save_pretrained(module: torch.nn.Module, folder: Path) -> None:
    """Write a folder's ``module``, without the tokenizer, to another folder."""
    with _quiet():
        module.save_pretrained(folder)  # type: ignore[operator]


def without_head(module: torch.nn.Module) -> torch.nn.Module:
    """The encoder inside a folder's ``module``."""
    return module.base_model  # type: ignore[return-value]


def is_classifier(module: torch.nn.Module) -> bool:
    """Whether a folder's ``module`` has a classification head."""
    return type(module).__name__.endswith("ForSequenceClassification")


def _architecture(folder: Path, settings: Mapping[str, Any]) -> tuple[str, Any]:
    """Name and class of what ``config.json`` says the folder holds."""
    transformers = _transformers()
    names = settings.get("architectures") or []
    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise InputError(
            f"{folder / _CONFIG} names the architecture {name!r}, which transformers {transformers.__version__} does "
            "not have"
        )
    return str(name), found


def read_config(folder: Path) -> tuple[dict[str, Any], Any, Any]:
    """``config.json``, the class that it names, and the settings of that class; all weights are known to be there.

    Raises:
        InputError: as :func:`open_pretrained`.
    """
    if (mistaken := lookalike(folder)) or not is_pretrained(folder):
        raise InputError(mistaken or f"{folder} holds no {_CONFIG}; give a Hugging Face model folder")
    settings = read_json(folder / _CONFIG)
    if "auto_map" in settings:
        raise InputError(
            f"{folder} builds its model with code of its own (auto_map in config.json), which is not run; save the "
            "weights as .safetensors and give --model package.module:factory"
        )
    check_settings(folder / _CONFIG, settings, extent(folder))
    _, architecture = _architecture(folder, settings)
    try:
        with _quiet():
            config = architecture.config_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"{folder / _CONFIG} cannot be read ({one_line(error)})") from error
    return settings, architecture, config


def text_reader(folder: Path, module: Any) -> TextReader | None:
    """How text becomes the inputs of ``module``, which was built from ``folder``; None where it takes no token ids."""
    parameters = inspect.signature(module.forward).parameters
    if "input_ids" not in parameters:
        return None
    _check_one_tower(folder, module)
    embeddings = module.get_input_embeddings()
    settings = module.config
    inputs = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in parameters]
    if getattr(settings, "type_vocab_size", 0) < 2 and "token_type_ids" in inputs:
        inputs.remove("token_type_ids")
    if settings.is_encoder_decoder:
        raise InputError(f"{folder} holds an encoder and a decoder; from Python, give its .get_encoder() instead")
    return TextReader(
        folder,
        tuple(name for name in parameters if name in inputs),
        tuple(parameters),
        vocabulary=embeddings.num_embeddings,
        longest=_longest(module),
        causal="CausalLM" in type(module).__name__ or "LMHead" in type(module).__name__,
    )


def _check_one_tower(folder: Path, module: Any) -> None:
    """Models that read different things side by side have no output a sample, but one a pair."""
    kind = _transformers().PreTrainedModel
    towers = {name: part.main_input_name for name, part in module.named_children() if isinstance(part, kind)}
    if len(set(towers.values())) > 1:
        told, first = " and ".join(f"{name} ({given})" for name, given in towers.items()), next(iter(towers))
        raise InputError(
            f"{folder} holds a {type(module).__name__} of {told}, which are compressed one at a time; save one as a "
            f"folder: AutoModel.from_pretrained('{folder}').{first}.save_pretrained('{first}')"
        )


def _longest(module: Any) -> int:
    """Tokens that the model has positions for; some count them from behind the padding's."""
    most = getattr(module.config, "max_position_embeddings", None) or 1 << 20
    for name, part in module.named_modules():
        padding = getattr(part, "padding_idx", None)
        if name.endswith("position_embeddings") and isinstance(part, torch.nn.Embedding) and padding is not None:
            return min(most, part.num_embeddings) - padding - 1
    return int(most)


def _transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        with _quiet():
            import transformers
    except ImportError as error:
        raise InputError(
            "Hugging Face folders need the package transformers: pip install 'compress-toolchain[hf]'"
        ) from error
    return transformers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers logs, warns and draws bars of its own; what matters of it becomes notes and errors."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
