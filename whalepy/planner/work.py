"""What one rank does in a step: operators, collectives, memory; stretches that repeat are written once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from whalepy.planner.schedule.actions import Action

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
    block: int = -1
    """The block of the model it belongs to; -1 outside all blocks."""
    kind: str = ""
    """What profiles measure apart: convolution, attention (each also "backward"), what normalises, exponentials, tanh;
    else empty."""
    beside: bool = False
    """Whether a collective runs beside the operators that follow it, until a `Wait`."""
    seconds: float | None = None
    """As measured on this rank's type of device; None: as its FLOPs and bytes say."""
    outputs: int = 0
    """Elements of the result of a product; 0: not known."""


@dataclass(frozen=True)
class Wait:
    """Until at most so many of the collectives that run beside the operators are still under way."""

    phase: Phase
    outstanding: int = 0


@dataclass(frozen=True)
class Stretch:
    """Parts of a step that are done several times in a row."""

    parts: tuple[Part, ...]
    repeats: int
    grows: int = 0
    """Bytes held after each time beyond those held before it."""


Part = Event | Wait | Stretch


@dataclass(frozen=True)
class Holdings:
    """Bytes that the parameters of one block take on one rank."""

    parameters: int = 0
    copies: int = 0
    """Of what the program reads, where that is not the parameter itself."""
    first_gradients: int = 0
    """As the backward pass makes them."""
    gradients: int = 0
    """As the optimizer reads them."""
    optimizer: int = 0
    apart: int = 0
    """Of the first gradients, those of which every replica has a part of its own: nothing reduces them."""

    def __add__(self, other: Holdings) -> Holdings:
        return self._with(other, 1)

    def times(self, number: int) -> Holdings:
        """Of so many blocks like this one."""
        return Holdings()._with(self, number)

    def _with(self, other: Holdings, number: int) -> Holdings:
        return Holdings(
            self.parameters + number * other.parameters,
            self.copies + number * other.copies,
            self.first_gradients + number * other.first_gradients,
            self.gradients + number * other.gradients,
            self.optimizer + number * other.optimizer,
            self.apart + number * other.apart,
        )

    @property
    def gathered(self) -> int:
        """Bytes that the program reads."""
        return self.copies or self.parameters


@dataclass(frozen=True)
class Fold:
    """Blocks that repeat: three times in what was run, `repeats` times in the model."""

    first: int
    """Number of the first block."""
    period: int
    """Blocks per repeat."""
    repeats: int

    def blocks(self, repeat: int) -> range:
        """The numbers of one of the three repeats that were run."""
        start = self.first + repeat * self.period
        return range(start, start + self.period)


KEPT = 3
"""Repeats of a fold that are run: a first one, one that stands for all in between, and a last one."""


@dataclass(frozen=True)
class Recorded:
    """A step as it ran: with few microbatches, and few of the blocks that repeat."""

    prelude: tuple[Event, ...]
    microbatches: tuple[tuple[Event, ...], ...]
    gradient: tuple[Event, ...]
    optimizer: tuple[Event, ...]
    holdings: Mapping[int, Holdings]
    """By block; -1 for parameters outside all blocks."""
    buffers: int
    inputs: int
    foreach: bool = False
    """Whether the optimizer updates all parameters at once."""


@dataclass(frozen=True)
class Acted:
    """One action of a pipeline; the bytes held are counted from those held before it."""

    parts: tuple[Part, ...]
    grows: int
    """Bytes held after it beyond those held before it."""
    lead: int = 0
    """How many parts, the first ones, make the tensors that its stage reads; as it ran."""

    @cached_property
    def peak(self) -> int:
        """Bytes held at most within it, beyond those held before it."""
        return max([0, self.grows, *_peaks(self.parts, 0)])

    @cached_property
    def weighted(self) -> tuple[tuple[Event, int], ...]:
        """Every event with how often it happens."""
        return tuple(_weighted(self.parts, 1))


@dataclass(frozen=True)
class RecordedActions:
    """A step of one rank of a pipeline as it ran: with few microbatches, and few of the blocks that repeat."""

    prelude: tuple[Event, ...]
    before: int
    """Bytes held when the first action begins."""
    acts: Mapping[Action, Acted]
    """Of events alone."""
    optimizer: tuple[Event, ...]
    holdings: Mapping[int, Mapping[int, Holdings]]
    """By stage, then by block; -1 for parameters outside all blocks."""
    buffers: int
    inputs: int
    sent: Mapping[tuple[int, int], int]
    """Bytes sent to other ranks, by the stages that they cross between."""
    foreach: bool = False
    """Whether the optimizer updates all parameters at once."""
    borrowed: Mapping[int, int] = field(default_factory=dict[int, int])
    """By stage, bytes of gradients that it reduces for other stages."""


@dataclass(frozen=True)
class ActionsRehearsal:
    """What one rank of a pipeline does in each action, and ahead of them and after them; bytes as in `Rehearsal`."""

    prelude: tuple[Part, ...]
    before: int
    """Bytes held when the first action begins."""
    acts: Mapping[Action, Acted]
    update: tuple[Part, ...]
    gathers: Mapping[int, tuple[Event, ...]]
    """By stage, what puts its parameters together again where each replica updates a part of them."""
    parameters: int
    buffers: int
    gradients: int
    optimizer: int
    inputs: int


@dataclass(frozen=True)
class Rehearsal:
    """What one rank does in its second step, when gradients are freed and optimizer state is there."""

    parts: tuple[Part, ...]
    parameters: int = 0
    """Bytes of its boxes; below the same of buffers, gradients, optimizer state and its rows of the inputs."""
    buffers: int = 0
    gradients: int = 0
    optimizer: int = 0
    inputs: int = 0

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """Every event, those that repeat once."""
        return tuple(event for event, _ in self.weighted)

    @cached_property
    def weighted(self) -> tuple[tuple[Event, int], ...]:
        """Every event with how often it happens."""
        return tuple(_weighted(self.parts, 1))

    @cached_property
    def peak(self) -> int:
        """Bytes held at most."""
        return max(_peaks(self.parts, 0))

    @cached_property
    def peak_event(self) -> Event:
        """The event at which most is held."""
        return max(self.events, key=lambda event: event.peak)

    @cached_property
    def flops(self) -> int:
        """Of the products of the step."""
        return sum(event.flops * times for event, times in self.weighted)


def _weighted(parts: Sequence[Part], times: int) -> Iterator[tuple[Event, int]]:
    for part in parts:
        if isinstance(part, Event):
            yield part, times
        elif isinstance(part, Stretch):
            yield from _weighted(part.parts, times * part.repeats)


def _peaks(parts: Sequence[Part], more: int) -> Iterator[int]:
    for part in parts:
        if isinstance(part, Event):
            yield part.peak + more
        elif isinstance(part, Stretch):
            yield from _peaks(part.parts, more + max(part.grows, 0) * (part.repeats - 1))
