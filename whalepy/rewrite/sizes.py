"""Local sizes as numbers: what evaluates terms for one place of the mesh, and how many elements each position holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np

from whalepy.program.axes import Size
from whalepy.program.layout import Sharded
from whalepy.rewrite.bindings import DimTerms, MoveBinding, Term, ValueTerms

Coordinates = tuple[int, ...]
"""One position per level, outermost first."""


class LocalSizes(Protocol):
    """Evaluates terms for one place of the mesh at the sizes of one step."""

    def value(self, size: Size) -> int:
        """A size that no level cuts."""
        ...

    def term_size(self, term: Term) -> int:
        """Local size of a term."""
        ...

    def dim_size(self, dim: DimTerms) -> int:
        """Local size of a dim."""
        ...

    def lengths(self, term: Term) -> tuple[int, ...]:
        """Lengths by position on the last level of the term's chain."""
        ...

    def start(self, dim: DimTerms) -> int:
        """First index held along a dim whose leading term is cut."""
        ...


SizesAt = Callable[[Coordinates], LocalSizes]


@dataclass(frozen=True)
class Held:
    """What each position of one level holds of a value that is sharded on it.

    `dim` of `shape` is lead x (segments end to end) x trail; a segment is (pre, lengths by position, post).
    """

    shape: tuple[int, ...]
    dim: int
    lead: int
    segments: tuple[tuple[int, tuple[int, ...], int], ...]
    trail: int

    def elements(self, position: int) -> int:
        """Elements that a position holds."""
        return self._slab * self.along(position)

    def along(self, position: int) -> int:
        """Local size of the sharded dim at a position."""
        return self.lead * self.trail * sum(pre * lengths[position] * post for pre, lengths, post in self.segments)

    def shared(self, position: int, other: Held, other_position: int) -> int:
        """Elements that a position holds here and another position holds under `other`."""
        if self.dim != other.dim:
            return self._slab // self.shape[other.dim] * self.along(position) * other.along(other_position)
        common = np.intersect1d(self._indices(position), other._indices(other_position), assume_unique=True)
        return self._slab * len(common)

    @property
    def _slab(self) -> int:
        return prod(size for d, size in enumerate(self.shape) if d != self.dim)

    def _indices(self, position: int) -> np.ndarray:
        whole = np.arange(self.shape[self.dim]).reshape(self.lead, -1, self.trail)
        found: list[np.ndarray] = []
        at = 0
        for pre, lengths, post in self.segments:
            size = pre * sum(lengths) * post
            segment = whole[:, at : at + size].reshape(self.lead, pre, sum(lengths), post, self.trail)
            first = sum(lengths[:position])
            found.append(segment[:, :, first : first + lengths[position]].reshape(-1))
            at += size
        return np.concatenate(found)


def held(binding: MoveBinding, kind: Sharded, term: Term, sizes: LocalSizes) -> Held:
    """How the value of a move lies over the move's level as this shard."""
    place = kind.place
    whole = binding.terms[place.dim]
    lengths = sizes.lengths(term)
    return Held(
        shape=local_shape(binding.terms, sizes),
        dim=place.dim,
        lead=prod(map(sizes.term_size, whole[: place.term])),
        segments=tuple((sizes.value(pre), lengths, sizes.value(post)) for pre, post in term.parts),
        trail=prod(map(sizes.term_size, whole[place.term + 1 :])),
    )


def local_shape(terms: Sequence[DimTerms], sizes: LocalSizes) -> tuple[int, ...]:
    """The shape of what this place holds."""
    return tuple(sizes.dim_size(dim) for dim in terms)


def symbols_in(terms: ValueTerms) -> set[object]:
    """The free sizes that a shape depends on."""
    return {symbol for dim in terms for term in dim for symbol in getattr(term.size, "free_symbols", ())}
