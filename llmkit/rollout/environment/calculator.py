"""Arithmetic, exactly, and nothing else: what a model writes is parsed, never run."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

_MOST_CHARS, _MOST_BITS = 1000, 4096
_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}
_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "^": "**", "（": "(", "）": ")", ",": "", "，": ""})


def calculate(expression: str) -> str:
    """The value of + - * / // % ** and brackets: a whole number, or a decimal of at most ten digits after the point.

    Raises:
        ValueError: saying what is wrong, in words for the model.
    """
    text = expression.translate(_SIGNS).strip()
    if len(text) > _MOST_CHARS:
        raise ValueError(f"longer than {_MOST_CHARS} characters")
    try:
        value = _value(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("not an arithmetic expression") from None
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    if value.denominator == 1:
        return str(value.numerator)
    scaled = round(value * 10**10)
    digits = f"{abs(scaled):011d}"
    return (f"{'-' if scaled < 0 else ''}{digits[:-10]}.{digits[-10:]}").rstrip("0").rstrip(".")


def _value(node: ast.expr, text: str) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        written = str(node.value) if type(node.value) is int else ast.get_source_segment(text, node)
        return _bounded(Fraction((written or "0").replace("_", "")))  # 0.1 as it is written, not as a float has it
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, text)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, text), _value(node.right, text)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in _BINARY:
            return _bounded(_BINARY[type(node.op)](left, right))
    raise ValueError("only numbers, + - * / // % ** and brackets are known")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) > _MOST_BITS:
        raise ValueError("a power must be a whole number, and not large")
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if size * abs(exponent) > _MOST_BITS:
        raise ValueError("the number is too large")
    return base**exponent.numerator


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MOST_BITS:
        raise ValueError("the number is too large")
    return value
