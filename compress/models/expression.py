"""Size expressions of .pt2 archives: torch hands them to sympy, which evaluates them as Python.

Allowed are sympy's and torch's functions by name, symbols, numbers and signs, and what they come to is bounded: sympy
calculates ``9**9**9**9`` before it looks at it.
"""

from __future__ import annotations

import ast
import re

__all__ = ["is_size_expression"]

_SIGNS = re.compile(r"[\w\s.,()+\-*/%<>=&|~]*")
_SYMBOL = re.compile(r"(s|u|f|z|zf|zuf|i)\d+")
_WORDS = re.compile(
    # sympy's and torch's functions as sympy.srepr writes them, and the assumptions of symbols
    "Symbol|Integer|Rational|Float|precision|Add|Mul|Pow|Max|Min|Abs|Mod|And|Or|Not|True|False|true|false|oo|int_oo|Half"
    "|One|Zero|NegativeOne|Infinity|NegativeInfinity|Equality|Unequality|LessThan|GreaterThan|StrictLessThan"
    "|StrictGreaterThan|Eq|Ne|Lt|Le|Gt|Ge|Where|Identity|PythonMod|CleanDiv|CeilDiv|FloorDiv|ModularIndexing|CeilToInt"
    "|FloorToInt|TruncToInt|TruncToFloat|RoundToInt|RoundDecimal|ToFloat|LShift|RShift|PowByNatural|FloatPow"
    "|FloatTrueDiv|IntTrueDiv|IsNonOverlappingAndDenseIndicator|Piecewise|ExprCondPair|ITE|floor|ceiling|sqrt"
    "|positive|negative|nonnegative|nonpositive|zero|nonzero|integer|real|finite|infinite|commutative"
)
_POWERS = ("Pow", "PowByNatural", "FloatPow")
_LONGEST = 1 << 14  # characters; torch's own are a line
_MOST_BITS = 1 << 12
_FLOAT_BITS = 400  # below 1e100
_TOO_MANY = 1 << 62


def is_size_expression(text: str) -> bool:
    """Whether sympy may have ``text``: known words and signs, and no number of more than 4,096 bits on the way."""
    # A single quoted word names a symbol: sympy makes at most a symbol of it, with no brackets to call.
    bare = re.sub(r"'([A-Za-z]\w*|[\d.]+(e[+-]?\d\d?)?)'", "0", text)
    bare = re.sub(r"(?<!\w)\d+(\.\d*)?(e[+-]?\d\d?)?(?!\w)", "0", bare)
    words = re.findall(r"[^\W\d]\w*", bare)
    known = all(_WORDS.fullmatch(word) or _SYMBOL.fullmatch(word) for word in words)
    if not known or _SIGNS.fullmatch(bare) is None or len(text) > _LONGEST:
        return False
    try:
        return _bits(ast.parse(text, mode="eval").body) <= _MOST_BITS
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _bits(node: ast.AST) -> int:
    """At least as many bits as the value of ``node`` has, a symbol counting one."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, int):
            return max(node.value.bit_length(), 1)
        if isinstance(node.value, str) and node.value.isdigit():
            return max(int(node.value).bit_length(), 1)
        return _FLOAT_BITS if isinstance(node.value, float) else 1
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _power(_bits(node.left), _bits(node.right))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.LShift):
        return _power(2, _bits(node.right)) + _bits(node.left)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 2:
        if node.func.id in _POWERS:
            return _power(*map(_bits, node.args))
        if node.func.id == "LShift":
            return _power(2, _bits(node.args[1])) + _bits(node.args[0])
    return max(sum(map(_bits, ast.iter_child_nodes(node))), 1)


def _power(base: int, exponent: int) -> int:
    """Bits of a power; an exponent of b bits is below two to the b."""
    return min(base << exponent, _TOO_MANY) if exponent < 32 else _TOO_MANY
