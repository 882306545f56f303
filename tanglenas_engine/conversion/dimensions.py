"""Dimensions of tensors as products of atoms, and the atoms that must have one size.

A dimension is a product of atoms in row-major order: the 2304 outputs of a projection to q, k and v are 3 * 12 * 64
entries once a reshape has shown it. Atoms that meet in an operation are united. So all dimensions that hold one class
of atoms change together: a residual stream, the heads of an attention with the inputs of its output projection, the
channels of a depthwise convolution. A class is fixed as soon as one of its uses has no rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


class Atom:
    """A factor of a dimension: a class of entries that is kept or left out as a whole.

    Args:
        length: The number of entries in the given model.
        fixed: The reason why the length cannot vary; None as long as it can.
    """

    def __init__(self, length: int, fixed: str | None = None):
        self.length = length
        self._fixed = fixed
        self._parent: Atom | None = None
        self._parts: tuple[Atom, ...] | None = None
        self._joined = False
        self._independent = False

    @property
    def root(self) -> Atom:
        """The atom that stands for the class."""
        atom = self
        while atom._parent is not None:
            atom = atom._parent
        if atom is not self:
            self._parent = atom
        return atom

    @property
    def fixed(self) -> str | None:
        return self.root._fixed

    def fix(self, reason: str) -> None:
        """Keep the length of the class, and of its parts. The first reason stays."""
        root = self.root
        if root._fixed is None:
            root._fixed = reason
        for part in root._parts or ():
            part.fix(reason)

    @property
    def joined(self) -> bool:
        """True if the class is the width of a residual stream: two computed tensors with it are added."""
        return self.root._joined

    def join(self) -> None:
        self.root._joined = True

    @property
    def independent(self) -> bool:
        """True if the class counts the heads of an attention or another batch of matrix products."""
        return self.root._independent

    def count_products(self) -> None:
        self.root._independent = True

    def resolved(self) -> list[Atom]:
        """Return the classes that the atom consists of, in row-major order. Those of length 1 are left out."""
        root = self.root
        if root._parts is not None:
            return [atom for part in root._parts for atom in part.resolved()]
        return [root] if root.length > 1 else []

    def split(self, outer: int) -> tuple[Atom, Atom]:
        """Split the class into `outer` blocks and return both factors."""
        root = self.root
        factors = Atom(outer, root._fixed), Atom(root.length // outer, root._fixed)
        for factor in factors:
            factor._joined = root._joined
        root._parts = factors
        return factors

    def unite(self, other: Atom) -> None:
        first, second = self.root, other.root
        if first is second:
            return
        second._parent = first
        first._fixed = first._fixed or second._fixed
        first._joined |= second._joined
        first._independent |= second._independent


DATA = "the dimension is one of the data"
"""The reason that fixes batches, positions and pixels. Reports leave it out."""

Dim = tuple[Atom, ...]


def constant(length: int) -> Dim:
    """Return a dimension of the data."""
    return (Atom(length, DATA),)


def fresh(length: int) -> Dim:
    """Return a dimension that a layer makes, and that may vary."""
    return (Atom(length),)


def resolved(dim: Iterable[Atom]) -> list[Atom]:
    """Return the classes of atoms of a dimension in row-major order."""
    return [atom for part in dim for atom in part.resolved()]


def length(dim: Iterable[Atom]) -> int:
    return math.prod(atom.length for atom in dim)


def fix(dim: Iterable[Atom], reason: str) -> None:
    for atom in dim:
        atom.fix(reason)


def unite(first: Dim, second: Dim, reason: str) -> None:
    """Make two dimensions of the same length have the same atoms. If their factors do not align, they are fixed."""
    left, right = resolved(first), resolved(second)
    while left and right:
        a, b = left[0], right[0]
        if a is b:
            left, right = left[1:], right[1:]
        elif a.length == b.length:
            a.unite(b)
            left, right = left[1:], right[1:]
        elif a.length % b.length == 0:
            left = [*a.split(b.length), *left[1:]]
        elif b.length % a.length == 0:
            right = [*b.split(a.length), *right[1:]]
        else:
            fix([*left, *right], reason)
            return
        # An atom may be on both sides, so that a split or a union of one changes the other.
        left, right = resolved(left), resolved(right)
    fix([*left, *right], reason)


def regrouped(dims: Sequence[Dim], lengths: Sequence[int], reason: str) -> list[Dim]:
    """Return the dimensions of a tensor that is reshaped to `lengths`. Factors that do not align are fixed."""
    atoms = [atom for dim in dims for atom in resolved(dim)]
    found: list[Dim] = []
    for wanted in lengths:
        taken: list[Atom] = []
        while wanted > 1:
            atoms = resolved(atoms)
            if not atoms:
                return _mismatch(dims, lengths, reason)
            atom, *rest = atoms
            if wanted % atom.length == 0:
                taken.append(atom)
                atoms, wanted = rest, wanted // atom.length
            elif atom.length % wanted == 0:
                outer, inner = atom.split(wanted)
                taken.append(outer)
                atoms, wanted = [inner, *rest], 1
            else:
                return _mismatch(dims, lengths, reason)
        found.append(tuple(taken))
    return found


def _mismatch(dims: Sequence[Dim], lengths: Sequence[int], reason: str) -> list[Dim]:
    for dim in dims:
        fix(dim, reason)
    return [(Atom(length, reason),) for length in lengths]
