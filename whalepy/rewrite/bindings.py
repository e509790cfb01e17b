"""What a rewritten program is told at each step: sizes, offsets, moves and streams, as pure data.

The graph is the same on all ranks. A binding says, over free sizes and shares, what one extra argument of the graph is;
the runtime evaluates it for its own rank and the sizes of the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from whalepy.program.axes import Size
from whalepy.program.layout import Type, communicates, gradient_kind, value_kind


@dataclass(frozen=True)
class Term:
    """One factor of a dim: its whole size, and the levels that cut it, outermost first."""

    size: Size
    chain: tuple[tuple[int, int], ...] = ()
    """(level, cut) of every level that shards it."""
    batch: bool = False
    axis_size: Size = 1
    """Size of the axis that is cut: the term itself, or an axis inside each part of a sum."""
    parts: tuple[tuple[Size, Size], ...] = ((1, 1),)
    """Per part of a sum: product of the sizes before and after the cut axis."""


DimTerms = tuple[Term, ...]
ValueTerms = tuple[DimTerms, ...]


@dataclass(frozen=True)
class LocalSize:
    """This rank's size of a dim."""

    dim: DimTerms


@dataclass(frozen=True)
class GlobalSize:
    """A size as the local model would see it: of the whole step (`step`) or of one microbatch."""

    size: sympy.Expr
    step: bool


@dataclass(frozen=True)
class Start:
    """First index of this rank along a dim whose leading term is cut."""

    dim: DimTerms


@dataclass(frozen=True)
class Stream:
    """Seed of a random operator: by seed, step, microbatch, node and the coordinates of the levels that shard it."""

    node: int
    levels: tuple[int, ...]


@dataclass(frozen=True)
class Reducer:
    """Access to one level's group, for kernels that communicate inside."""

    level: int


@dataclass(frozen=True)
class First:
    """1.0 in the first microbatch of a step, 0.0 in the others."""


@dataclass(frozen=True)
class MoveBinding:
    """A change of type on one level. `terms` is the layout of the value with this level taken as whole."""

    level: int
    source: Type
    target: Type
    terms: ValueTerms
    source_term: Term | None = None
    target_term: Term | None = None
    """The term that is cut, its chain ending with this level, for shards."""
    learns: bool = True
    """Whether a gradient can come back: a trainable parameter stands behind the value."""

    @property
    def is_retype(self) -> bool:
        """Whether the forward moves nothing."""
        return value_kind(self.source) == value_kind(self.target)

    @property
    def communicates(self) -> bool:
        """Whether ranks need each other's elements of the value, on a level of several."""
        return communicates(self.source, self.target)

    @property
    def communicates_back(self) -> bool:
        """The same of its gradient."""
        return self.learns and communicates(gradient_kind(self.target), gradient_kind(self.source))


Binding = LocalSize | GlobalSize | Start | Stream | Reducer | First | MoveBinding
