"""Index spaces: which dims of which values run over the same indices.

Every dim of every value is a product of `Space`s, major first. A rule unites the spaces of dims that share a factor; a
reshape splits a space into parts, and all dims that refer to it see the split. So "the sequence" is one class of
spaces through the whole graph, also inside a flattened (batch * sequence) dim, whatever the model calls it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from spcompile.graph.sizes import Size, quotient, same


class Space:
    """One index space, in a union-find forest. Compare by `find()`.

    size: number of indices. parts: if it was split, its factors, major first.
    prefix_of: the longer space whose layout over ranks it shares, being its beginning (x[:, :n]); set by propagation.
    is_sequence: between what an axis splits otherwise, ranks have rows of it; of a family, on its longest.
    takes_turns: it is split where something wants the sequence whole, so it is no sequence, which may have an order.
    """

    def __init__(self, size: Size) -> None:
        self.size = size
        self.parts: list[Space] | None = None
        self.prefix_of: Space | None = None
        self.is_sequence = False
        self.takes_turns = False
        self._parent: Space | None = None

    def find(self) -> Space:
        """The representative of this space's class."""
        root = self
        while root._parent is not None:
            root = root._parent
        while self._parent is not None:
            self._parent, self = root, self._parent
        return root

    def unite(self, other: Space) -> None:
        """Declare two spaces of equal size to be one."""
        mine, theirs = self.find(), other.find()
        if mine is not theirs:
            theirs._parent = mine

    def split(self, major: Size, minor: Size) -> None:
        """Refine this class into two factors."""
        root = self.find()
        assert root.parts is None
        root.parts = [Space(major), Space(minor)]

    def family(self) -> Space:
        """The space whose layout this one follows: the longest that it is a prefix of."""
        root = self.find()
        seen = {root}
        while root.prefix_of is not None and root.prefix_of.find() not in seen:
            root = root.prefix_of.find()
            seen.add(root)
        return root

    def __repr__(self) -> str:
        return f"Space({self.find().size})"


def leaves(spaces: Iterable[Space]) -> list[Space]:
    """The finest known factors, as class representatives."""
    found: list[Space] = []
    for space in spaces:
        root = space.find()
        found.extend(leaves(root.parts) if root.parts is not None else [root])
    return found


def unify(left: Sequence[Space], right: Sequence[Space]) -> bool:
    """Unite two products of spaces with equal total size, splitting where their borders differ.

    Returns False where a border of one falls inside a space of the other and does not divide it.
    """
    a, b = leaves(left), leaves(right)
    while a and b:
        first, second = a[0].find(), b[0].find()
        if first is second or same(first.size, second.size):
            first.unite(second)
            a, b = a[1:], b[1:]
        elif (rest := quotient(first.size, second.size)) is not None:
            first.split(second.size, rest)
            a, b = leaves(a), leaves(b)  # the space may stand on both sides
        elif (rest := quotient(second.size, first.size)) is not None:
            second.split(first.size, rest)
            a, b = leaves(a), leaves(b)
        else:
            return False
    return not a and not b
