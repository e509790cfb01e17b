"""What each block of a model takes, by rows of a microbatch: what a search over stages is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from whalepy.planner.work import Event, Holdings


@dataclass(frozen=True)
class BlockWork:
    """What one block does with the rows of one microbatch, on one rank of those that share it."""

    forward: tuple[Event, ...]
    backward: tuple[Event, ...]
    saved: int
    """Bytes kept from its forward to its backward."""
    peak: int
    """Bytes held at most within it, beyond what is held before it and what stays: its gradients, what is saved."""
    sends: int
    """Bytes that it and the blocks before it leave for those after it; their gradients come back."""
    holdings: Holdings


class Way(NamedTuple):
    """How a rank computes its part of a model."""

    split: int = 1
    """The degree of split around it."""
    recompute: str = "none"
    """What it computes again."""
    adds: bool = False
    """Whether it adds its gradients to those of microbatches before."""


@dataclass(frozen=True)
class Lent:
    """A parameter that the first block to read it shares with a later one: it is sent there, its gradient back."""

    owner: int
    """A place in the order of blocks, as `reader`."""
    reader: int
    size: int
    """Bytes, unsplit."""


class BlockTable(Protocol):
    """The blocks of a model, as they run. Operators outside all blocks belong to the one before them."""

    @property
    def order(self) -> Sequence[int]:
        """For each block of the model, which of those in `works` stands for it."""
        ...

    @property
    def rows(self) -> int:
        """Of the global batch."""
        ...

    @property
    def splits(self) -> Sequence[int]:
        """The degrees of split that the model can be cut by, ascending; 1 is the first."""
        ...

    @property
    def lent(self) -> Sequence[Lent]:
        """Parameters that several blocks read."""
        ...

    def works(self, way: Way, rows: int) -> Sequence[BlockWork]:
        """The blocks that stand for all, with so many rows in a microbatch."""
        ...

    def update(self, way: Way) -> Sequence[Event]:
        """The optimizer over all parameters of the blocks that stand for all."""
        ...
