"""Equations of einsum."""

from __future__ import annotations

from collections.abc import Sequence


def letters_of(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """Letters of every operand and of the result, with `...` written out as digits, aligned to the right."""
    equation = equation.replace(" ", "")
    left, _, right = equation.partition("->")
    named = left.split(",")
    dots = [rank - len(letters.replace("...", "")) for letters, rank in zip(named, ranks, strict=True)]
    hidden = "0123456789"[: max([n for n, letters in zip(dots, named, strict=True) if "..." in letters], default=0)]
    inputs = [letters.replace("...", hidden[len(hidden) - n :]) for letters, n in zip(named, dots, strict=True)]
    if "->" in equation:
        return inputs, right.replace("...", hidden)
    letters = left.replace("...", "").replace(",", "")
    return inputs, hidden + "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
