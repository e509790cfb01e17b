"""What one rank does in a step, as counted in a rehearsal: operators, collectives, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["forward", "backward", "gradient", "optimizer"]


@dataclass(frozen=True)
class Event:
    """One operator, or one collective, of one rank."""

    phase: Phase
    name: str
    """The line of the user's code it comes from, or the operator."""
    flops: int
    """Of products alone: what a rate in FLOP/s bounds."""
    bytes: int
    """Read and written; of a collective, what this rank sends."""
    dtype: str
    memory: int
    """Bytes held when it ends."""
    peak: int
    """Bytes held at most since the event before."""
    collective: str = ""
    """all-gather, all-reduce, reduce-scatter or all-to-all; empty for an operator."""
    level: int = -1
    """The level of a collective."""


@dataclass(frozen=True)
class Rehearsal:
    """What one rank does in its second step, when gradients are freed and optimizer state is there."""

    events: tuple[Event, ...]
    parameters: int
    """Bytes of its boxes; below the same of buffers, gradients, optimizer state and its rows of the inputs."""
    buffers: int
    gradients: int
    optimizer: int
    inputs: int

    @property
    def peak(self) -> int:
        """Bytes held at most."""
        return max(event.peak for event in self.events)

    @property
    def flops(self) -> int:
        """Of the products of the step."""
        return sum(event.flops for event in self.events)
