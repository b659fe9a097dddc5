"""Archives of torch.export (.pt2): checked for everything torch's reader would execute, then read.

What torch 2.13.0 does with an archive: torch.export.load is NOT safe on a file from a stranger. Files made for the
trial ran a command (1, opaque objects of 2, 4) or imported a module of their choice (7) inside torch.export.load. Of
5 and 6 no working file was made (torch's verifier refused "torch.os.system"); they, 3, 8 and 9 are from its sources.

1. data/weights, data/constants: entries marked `use_pickle` go through torch.load(weights_only=False); example inputs
   and the older data/weights/model.pt through weights_only=True with a silent second try at False.
   Guard: TORCH_FORCE_WEIGHTS_ONLY_LOAD while it reads.
2. data/constants/opaque_obj_*: pickle.loads; custom_obj_*: compiled classes. Guard: refused.
3. data/aotinductor/*: shared libraries, loaded. Guard: refused.
4. `expr_str` of dynamic sizes goes to sympy.sympify, which is eval(). Guard: a fixed set of names and signs, and no
   number of thousands of bits (compress.models.expression).
5. `target` of a node is looked up from torch, math or operator by name, "torch.os.system" included, and called when
   the model runs. Guard: aten operators, a few control-flow ones and size arithmetic; others by --allow.
6. Names of nodes, parameters and arguments are pasted into the Python source of forward(). Guard: identifiers, and
   dotted names without quotes, brackets or line ends.
7. Tree specs import the module of an enum or of a defaultdict's factory. Guard: tuple, list, dict, OrderedDict.
8. `guards_code` is compiled into the module by .module(). Guard: check_guards=False.
9. After a RuntimeError torch.export.load starts anew with the reader for archives of torch 2.7 and older, on members
   the checks never saw. Guard: load_pt2, the newer reader alone, on the records that it will read itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.export.pt2_archive._package import load_pt2

from compress.errors import InputError, one_line
from compress.graph.names import is_identifier
from compress.models.expression import is_size_expression

__all__ = ["load_exported"]

# aten operators that write or map files named by their arguments.
_FILE_OPERATORS = frozenset({"save", "from_file"})
_CONTROL_FLOW = frozenset(
    {"cond", "while_loop", "map_impl", "scan", "associative_scan", "wrap_with_set_grad_enabled", "wrap_with_autocast"}
)
_ATEN = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)")
_HIGHER_ORDER = re.compile(r"torch\.ops\.higher_order\.(\w+)")
_SIZE_ARITHMETIC = re.compile(
    r"_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|pos|and_|or_|xor|not_|eq|ne|lt|le|gt|ge|lshift|rshift)"
    r"|math\.(ceil|floor|trunc|sqrt|log2|exp|cos|sin|tan|pow)"
    r"|torch\.(sym_(int|float|max|min|not|ite|sum|sqrt)|_sym_(sqrt|log2|cos|sin|tan|exp))"
)
_PLAIN = re.compile(r"[\w.\-+/ ]*")
_DOTTED = re.compile(r"[\w.\-/ ]*")
_TREES = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
# Text that is stored or quoted, never compiled (guards_code: see 8 above).
_TEXT = frozenset({"metadata", "as_string", "as_strings", "guards_code"})


def load_exported(
    file: Path, allow: Sequence[str] = ()
) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...] | None, list[str]]:
    """The module of a .pt2 archive, its example inputs when they are positional tensors, and notes.

    Raises:
        InputError: the archive is damaged, older than torch 2.8, was exported in training mode, or holds anything
            that would run code.
    """
    try:
        reader = torch._C.PyTorchFileReader(str(file))
        records = reader.get_all_records()
    except RuntimeError as error:
        raise InputError(f"{file} is truncated or damaged ({one_line(error)}); export it again.") from error
    models = [name for name in records if name.startswith("models/")]
    if "archive_format" not in records or models != ["models/model.json"]:
        raise InputError(
            f"{file} was not written by torch.export.save of torch 2.8 or newer (its models: {models or 'none'}); "
            "export it again with the installed torch."
        )
    check = _Check(file, frozenset(allow))
    for name in records:
        if name.startswith("data/aotinductor/"):
            raise check.refused("compiled AOTInductor code")
        if name == "models/model.json":
            check.graph(_json(reader.get_record(name), file))
        elif name.startswith("data/constants/") and name.endswith("_constants_config.json"):
            check.constants(_json(reader.get_record(name), file))
    try:
        with _forced_weights_only(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its schema and its copies of constants
            program = load_pt2(str(file)).exported_programs["model"]
            module = program.module(check_guards=False)
    except Exception as error:
        raise InputError(
            f"{file} could not be read as an exported program ({one_line(error)}); it is damaged, from another torch "
            f"than {torch.__version__}, or holds pickled objects: export it again."
        ) from error
    _check_eval_mode(module, file)
    positional, named = program.example_inputs or ((), {})
    if positional and not named and all(isinstance(x, torch.Tensor) for x in positional):
        return module, tuple(positional), []
    return module, None, [f"{file.name} has no example inputs that are all positional tensors; none were taken."]


def _json(record: bytes, file: Path) -> object:
    try:
        return json.loads(record)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({one_line(error)}); export it again.") from error


@contextlib.contextmanager
def _forced_weights_only() -> Iterator[None]:
    """Make every torch.load in between a weights_only one, whatever its caller asks for."""
    forced = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    saved = {name: os.environ.get(name) for name in forced}
    os.environ.update(forced)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


class _Check:
    """Walks the JSON of an archive and refuses what is not plain data."""

    def __init__(self, file: Path, allow: frozenset[str]) -> None:
        self.file = file
        self.allow = allow

    def refused(self, what: str) -> InputError:
        return InputError(
            f"{self.file} was not loaded: it holds {what[:150]}, which could run code; export the model again from its "
            "source, with plain tensors going in and out."
        )

    def constants(self, config: object) -> None:
        entries = config.get("config") if isinstance(config, dict) else None
        if not isinstance(entries, dict):
            raise self.refused("a list of constants that cannot be read")
        for name, entry in entries.items():
            if not isinstance(entry, dict) or not str(entry.get("path_name")).startswith("tensor_"):
                raise self.refused(f"the constant {name!r}, a pickled or compiled object")

    def graph(self, value: object, key: str = "") -> None:
        if key in _TEXT:
            return
        if isinstance(value, dict):
            for name, part in value.items():
                if key == "range_constraints":
                    self._expression(name)
                elif _PLAIN.fullmatch(name) is None:
                    raise self.refused(f"the name {name!r}")
                if part and name in ("as_custom_obj", "custom_obj", "custom_obj_values"):
                    raise self.refused("a custom class object")
                if key == "as_string_to_argument":
                    self._identifier(name)
                self.graph(part, name)
        elif isinstance(value, list):
            for part in value:
                self.graph(part, key)
        elif isinstance(value, str):
            self._text(value, key)

    def _text(self, text: str, key: str) -> None:
        if key in ("target", "as_operator"):
            self._operator(text)
        elif key == "expr_str":
            self._expression(text)
        elif key in ("name", "as_name", "forward_arg_names", "user_input_name"):
            self._identifier(text)
        elif key in ("in_spec", "out_spec"):
            self._tree(_json(text.encode(), self.file))
        elif (_PLAIN if key == "torch_version" else _DOTTED).fullmatch(text) is None:
            raise self.refused(f"{key} {text!r}")

    def _expression(self, text: str) -> None:
        if not is_size_expression(text):
            raise self.refused(f"the size expression {text!r}")

    def _identifier(self, name: str) -> None:
        if name and not is_identifier(name):
            raise self.refused(f"the name {name!r}")

    def _operator(self, target: str) -> None:
        aten = _ATEN.fullmatch(target)
        if aten:
            packet = getattr(torch.ops.aten, aten[1], None)
            overload = getattr(packet, aten[2], None)
            if isinstance(overload, torch._ops.OpOverload) and aten[1] not in _FILE_OPERATORS:
                return
        higher = _HIGHER_ORDER.fullmatch(target)
        if (higher and higher[1] in _CONTROL_FLOW) or _SIZE_ARITHMETIC.fullmatch(target):
            return
        custom = re.fullmatch(r"(torch\.ops\.\w+\.[a-zA-Z]\w*)(\.\w+)?", target)
        if not custom or aten or higher:
            raise self.refused(f"a call of {target!r}")
        if not {target, custom[1]} & self.allow:
            raise InputError(
                f"{self.file} was not loaded: its graph calls {target}, which is no operator of PyTorch's own (aten). "
                f"If you trust it, import what registers it and add --allow {custom[1]}."
            )

    def _tree(self, spec: object) -> None:
        """`[protocol, node]`, a node being {"type", "context" (JSON in a string), "children_spec"}."""
        if not isinstance(spec, list) or len(spec) != 2 or not isinstance(spec[1], dict):
            raise self.refused("an input or output structure that cannot be read")
        pending = [spec[1]]
        while pending:
            node = pending.pop()
            context = node.get("context")
            context = _json(context.encode(), self.file) if isinstance(context, str) else context
            keys = context if isinstance(context, list) else [] if context is None else [context]
            # A key of a dict can be the name of an argument in the source of forward().
            plain = all(isinstance(k, int) or (isinstance(k, str) and re.fullmatch(r"[\w.\-]*", k)) for k in keys)
            if node.get("type") not in _TREES or not plain:
                raise self.refused(f"an input or output of type {node.get('type')} with keys {keys}")
            children = node.get("children_spec", [])
            if not isinstance(children, list) or not all(isinstance(child, dict) for child in children):
                raise self.refused("an input or output structure that cannot be read")
            pending += children


def _check_eval_mode(module: torch.fx.GraphModule, file: Path) -> None:
    aten = torch.ops.aten
    for node in module.graph.nodes:
        trained = (
            (node.target is aten.batch_norm.default and node.args[5] is True)
            or (node.target is aten.dropout.default and node.args[2] is True)
            or node.target in (aten._native_batch_norm_legit.default, aten._native_batch_norm_legit_functional.default)
        )
        if trained:
            raise InputError(
                f"{file} was exported in training mode ({node.name} updates statistics or drops values); call "
                "model.eval() and export it again."
            )
