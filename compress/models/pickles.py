"""What a pickle asks for, read off its opcodes without carrying one out: names, calls and short words.

A pickle is a program for a stack machine. :func:`survey` runs it on symbols: a name stands for what it would import, a
call's result for nothing. That is enough to know every call beforehand, which torch's weights_only reader makes of any
name it knows: ``nn.Linear(20000, 20000)`` is 70 bytes of pickle and 1.6 GB of memory.
"""

from __future__ import annotations

import _compat_pickle
import pickletools
from dataclasses import dataclass, field
from typing import IO, Any

__all__ = ["MADE", "Call", "Name", "Survey", "survey"]

_LONGEST_WORD = 64
# Opcodes that change what lies under their arguments and leave it there.
_IN_PLACE = frozenset({"BUILD", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"})
_TUPLES = frozenset({"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"})
_REMEMBER = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_RECALL = frozenset({"GET", "BINGET", "LONG_BINGET"})
_MARK = object()
_OTHER = object()
# Stands for the result of a call, and for a storage of the file.
MADE = object()


class Name(str):
    """``module.attribute``, as Python 3 calls it."""

    __slots__ = ()


@dataclass(frozen=True)
class Call:
    """``name(*arguments)``, or with ``new`` ``name.__new__(name, *arguments)``.

    Arguments are :class:`Name`, :data:`MADE`, tuples of the same, what was written out, or stand for anything else.
    """

    name: Name
    arguments: tuple[object, ...]
    new: bool


@dataclass
class Survey:
    """Names, calls of names in their order, and all strings of up to 64 characters."""

    names: set[str] = field(default_factory=set)
    calls: list[Call] = field(default_factory=list)
    words: set[str] = field(default_factory=set)


def survey(stream: IO[bytes], programs: int = 1) -> Survey:
    """Of ``programs`` pickles one after another.

    Raises:
        ValueError: they are damaged.
    """
    found = Survey()
    for _ in range(programs):
        try:
            _run(stream, found)
        except (IndexError, KeyError) as error:
            raise ValueError("a pickle that takes from an empty stack") from error
    return found


def _run(stream: IO[bytes], found: Survey) -> None:
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name == "GLOBAL":
            stack.append(_name(str(argument)))
            found.names.add(stack[-1])
        elif name in _REMEMBER:
            memo[argument] = stack[-1]
        elif name in _RECALL:
            stack.append(memo[argument])
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, called = stack.pop(), stack.pop()
            if isinstance(called, Name):  # torch's reader calls nothing else
                given = arguments if isinstance(arguments, tuple) else (_OTHER,)
                found.calls.append(Call(called, given, name == "NEWOBJ"))
            stack.append(MADE)
        else:
            taken = _take(stack, opcode)
            stack += _left(opcode, argument, taken)
            if isinstance(argument, str) and len(argument) <= _LONGEST_WORD:
                found.words.add(argument)


def _name(written: str) -> Name:
    module, _, attribute = written.partition(" ")
    if (module, attribute) in _compat_pickle.NAME_MAPPING:
        module, attribute = _compat_pickle.NAME_MAPPING[module, attribute]
    else:
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
    return Name(f"{module}.{attribute}")


def _take(stack: list[Any], opcode: pickletools.OpcodeInfo) -> list[Any]:
    """Remove what the opcode takes: so many, or all down to the last mark and what is named under that."""
    kinds = opcode.stack_before
    if pickletools.markobject not in kinds:
        start = len(stack) - len(kinds)
    else:
        start = _last_mark(stack) - kinds.index(pickletools.markobject)
    if start < 0:
        raise IndexError
    taken = stack[start:]
    del stack[start:]
    return taken


def _last_mark(stack: list[Any]) -> int:
    for n in range(len(stack) - 1, -1, -1):
        if stack[n] is _MARK:
            return n
    raise IndexError


def _left(opcode: pickletools.OpcodeInfo, argument: object, taken: list[Any]) -> list[Any]:
    """What the opcode leaves in the place of what it has taken."""
    if opcode.name == "MARK":
        return [_MARK]
    if opcode.name in _IN_PLACE:
        return taken[:1]
    if opcode.name in _TUPLES:
        return [tuple(each for each in taken if each is not _MARK)]
    if opcode.name == "BINPERSID":
        return [MADE]
    if argument is not None and len(opcode.stack_after) == 1:
        return [argument]
    return [_OTHER] * len(opcode.stack_after)
