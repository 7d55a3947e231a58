"""The rules of ops that move elements along a dim, where ranks send each other what crosses a border."""

from __future__ import annotations

import pytest
from rule_calls import Call, call, x

from spcompile.sharding.rules import rule_of
from spcompile.sharding.rules.rule import Move

MOVING: list[tuple[Call, str, list[Move]]] = [
    (
        call("cat", [x(2, 5, 4), x(2, 7, 4)], 1),
        "a d c, a e c -> a b c | b: moved, d: moved, e: moved",
        [Move(0, 0, 1, 0, 0, 5), Move(1, 0, 1, 0, 5, 7)],
    ),
    (
        call("cat", [x(2, 1, 4), x(2, 99, 4), x(2, 1, 4)], -2),
        "a 1 c, a d c, a 1 c -> a b c | b: moved, d: moved",
        [Move(0, 0, 1, 0, 0, 1), Move(1, 0, 1, 0, 1, 99), Move(2, 0, 1, 0, 100, 1)],
    ),
    (
        call("cat", [x(2, 4), x(128, 4)]),
        "[c] b, d b -> a b | a: moved, d: moved",
        [Move(0, 0, 0, 0, 0, 2), Move(1, 0, 0, 0, 2, 128)],
    ),
    (call("slice.Tensor", x(9, 4), 0, 2), "c b -> a b | a: moved, c: moved", [Move(0, 0, 0, 2, 0, 7)]),
    (call("slice.Tensor", x(9, 4), 0, -4, -1), "c b -> a b | a: moved, c: moved", [Move(0, 0, 0, 5, 0, 3)]),
    (call("slice.Tensor", x(9, 4), 0, 0, 4), "c b -> a b | a: moved, c: moved", [Move(0, 0, 0, 0, 0, 4)]),
    (call("narrow", x(200, 4), 0, 7, 2), "c b -> [a] b | c: moved", [Move(0, 0, 0, 7, 0, 2)]),
    (call("select.int", x(9, 4), 0, -1), "b a -> a | b: moved", [Move(0, 0, 0, 8, 0, 1)]),
    (
        call("split_with_sizes", x(4, 9), [1, 6, 2], 1),
        "a d -> a 1, a b, a c | b: moved, c: moved, d: moved",
        [Move(0, 0, 1, 0, 0, 1), Move(0, 1, 1, 1, 0, 6), Move(0, 2, 1, 7, 0, 2)],
    ),
    (
        call("constant_pad_nd", x(2, 9, 4), [0, 0, 3, -2]),
        "a d c -> a b c | b: moved, d: moved",
        [Move(0, 0, 1, 0, 3, 7)],
    ),
    (call("pad", x(9, 4), [0, 0, -3, 2]), "c b -> a b | a: moved, c: moved", [Move(0, 0, 0, 3, 0, 6)]),
    (
        call("roll", x(4, 9), [-2], [1]),
        "a c -> a b | b: moved, c: moved",
        [Move(0, 0, 1, 0, 7, 2), Move(0, 0, 1, 2, 0, 7)],
    ),
]
STAY = [
    call("slice.Tensor", x(9, 4), 0, 0, 8),  # a beginning keeps the layout of the whole
    call("constant_pad_nd", x(9, 4), [0, 0, 1, 0], 2.0),
    call("constant_pad_nd", x(9, 4), [1, 0, 1, 0]),
    call("pad", x(1, 9, 4), [1, 1], "circular"),
    call("roll", x(9, 4), [1, 1], [0, 1]),
    call("roll", x(9, 4), [1]),
    call("unbind.int", x(9, 4)),
    call("cat", [x(0), x(9, 4)]),
]


@pytest.mark.parametrize(("of", "text", "moves"), MOVING, ids=[f"{c.name} {text}" for c, text, _ in MOVING])
def test_what_moves(of: Call, text: str, moves: list[Move]) -> None:
    plain = rule_of(of.node())
    assert plain is not None
    rule = plain.moving
    assert rule is not None
    assert rule.text() == text
    assert list(rule.moves) == moves
    assert not plain.moves


@pytest.mark.parametrize("of", STAY, ids=[str(c.args) for c in STAY])
def test_what_does_not(of: Call) -> None:
    rule = rule_of(of.node())
    assert rule is not None
    assert rule.moving is None
