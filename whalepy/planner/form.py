"""Forms of a pipeline: what a search may choose from, and where the stages go before their blocks are cut."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from whalepy.errors import PlanError
from whalepy.planner.block_table import Way
from whalepy.planner.cost import Route
from whalepy.planner.stage_cost import StageCosts
from whalepy.planner.units import Unit


class Width(NamedTuple):
    """How the devices of a stage, in each copy of it, share its work."""

    replicate: int = 1
    """Parts of the rows."""
    split: int = 1

    def __str__(self) -> str:
        return f"{self.replicate}x{self.split}" if self.split > 1 else str(self.replicate)

    @property
    def devices(self) -> int:
        return self.replicate * self.split


def parse_widths(text: str) -> tuple[Width, ...]:
    """`6,2x2` or `3*1x2,4`: per stage the parts of its rows and, behind an x, the degree of split of each of them.

    Raises PlanError for anything else, and for fewer than two stages.
    """
    found: list[Width] = []
    for part in text.split(","):
        match = _WIDTH.fullmatch(part.strip())
        if match is None:
            raise PlanError(f"--widths {text!r}: {part.strip()!r} is no width", fix=_WIDTHS)
        count, replicate, split = (int(number or 1) for number in match.groups())
        if min(count, replicate, split) < 1 or len(found) + count > _MOST_STAGES:
            raise PlanError(f"--widths {text!r}: {part.strip()!r} is no width", fix=_WIDTHS)
        found += [Width(replicate, split)] * count
    if len(found) < 2:
        raise PlanError(f"--widths {text!r} is one stage", fix="give --replicate and --split for one stage")
    return tuple(found)


_WIDTH = re.compile(r"(?:(\d{1,6})\*)?(\d{1,6})(?:x(\d{1,6}))?")
_WIDTHS = "give each stage's devices: 6,2x2 is six parts of the rows, then two parts that are each split by two"
_MOST_STAGES = 100_000


@dataclass(frozen=True)
class Limits:
    """What a search may choose from; None: anything."""

    stages: int | None = None
    chunks: int = 1
    """Stages on each group of devices."""
    replicate: int | None = None
    split: int | None = None
    microbatches: int | None = None
    equal: bool = False
    """Whether every copy gets the same rows."""
    shares: tuple[float, ...] | None = None
    """Weights of the rows of each copy."""
    savings: Sequence[tuple[int, str]] = ((0, "none"),)
    """Degrees of ZeRO with ways to recompute."""
    filled: float = 1.0
    """The part of a memory that may be in use."""
    in_time: bool = True
    """Whether the model can be cut into microbatches."""
    widths: tuple[Width, ...] | None = None
    """Of the stages on each group of devices."""
    unlike: bool = True
    """Whether stages may have unlike widths."""

    def counts(self, rows: int, copies: int) -> list[int]:
        """Numbers of microbatches worth a try, by the rows in each."""
        own = rows // copies
        if self.microbatches is not None or not self.in_time:
            count = self.microbatches or 1
            return [count] if count <= max(own, 1) else []
        return sorted({1, *(math.ceil(own / (1 << k)) for k in range(own.bit_length()))})


Groups = tuple[tuple[Unit, ...], ...]


def adding(way: Way, microbatches: int) -> Way:
    """The same with so many microbatches."""
    return Way(way.split, way.recompute, adds=microbatches > 1)


@dataclass(frozen=True)
class Shape:
    """Where the stages go, as numbers of units."""

    way: Way
    zero: int
    stages: int
    groups: int
    """Of units; each has every so many of the stages."""
    copies: int
    kinds: tuple[int, ...]
    """Of device, in the order in which they are taken."""
    across: bool = True
    """Whether the copies of a stage are neighbours, else the stages of a copy."""

    def numbers(self, there: Sequence[int]) -> NDArray[np.int64]:
        """How many units of each kind, of so many there are, each group has."""
        ends = np.cumsum([0, *there]).clip(max=self.groups * self.copies)[:, None]
        group = np.arange(self.groups)
        if self.across:
            return np.diff((ends - group * self.copies).clip(0, self.copies), axis=0)
        return np.diff(((ends - group + self.groups - 1) // self.groups).clip(min=0), axis=0)

    def groups_of(self, units: Sequence[Sequence[Unit]]) -> Groups:
        """The units of each group, one per copy, of those of each kind."""
        row = [unit for kind in self.kinds for unit in units[kind]]
        if self.across:
            return tuple(tuple(row[g * self.copies : (g + 1) * self.copies]) for g in range(self.groups))
        return tuple(tuple(row[g : self.groups * self.copies : self.groups]) for g in range(self.groups))


@dataclass
class Form:
    """Where the stages go: all that is chosen before their blocks, rows and microbatches."""

    recompute: str
    zero: int
    stages: int
    groups: Groups
    """Per group of devices, as many units for each copy; of more stages than groups, each group has every so many."""
    copies: int
    costs: StageCosts
    known: dict[tuple[int, int], tuple[float, float]] = field(
        default_factory=dict[tuple[int, int], tuple[float, float]]
    )

    @cached_property
    def widths(self) -> tuple[Width, ...]:
        """Of each stage."""
        own = widths_of(self.groups, self.copies)
        return tuple(own[k % len(own)] for k in range(self.stages))

    @cached_property
    def columns(self) -> list[tuple[int, ...]]:
        """Per copy, the kind of each of its stages."""
        kinds = [[unit.kind for unit in group[:: len(group) // self.copies]] for group in self.groups]
        return list(zip(*(kinds[k % len(kinds)] for k in range(self.stages)), strict=True))

    @cached_property
    def kinds(self) -> list[set[int]]:
        """Per group, those of its units."""
        return [{unit.kind for unit in group} for group in self.groups]

    @cached_property
    def reducing(self) -> list[Route | None]:
        """Per group, what gradients cross between those that have a part of the rows."""
        return [self.costs.reducing(group) if len(group) > 1 else None for group in self.groups]

    def crossing(self, source: int, target: int) -> tuple[float, float]:
        """Between two stages: seconds of latency, and per byte of one copy."""
        key = source % len(self.groups), target % len(self.groups)
        if key not in self.known:
            same = key[0] == key[1]
            one, other = (self.groups[g] for g in key)
            self.known[key] = (0.0, 0.0) if same else self.costs.crossing(one, other, self.copies)
        return self.known[key]

    def of(self, k: int, microbatches: int, rows: int) -> tuple[Way, int]:
        """How a rank of a stage computes, and the rows it has of so many in a microbatch of one copy."""
        ways, parts = self._ways[k]
        return ways[microbatches > 1], -(-rows // parts)

    @cached_property
    def _ways(self) -> list[tuple[tuple[Way, Way], int]]:
        """Per stage: with one microbatch, and with several; parts of the rows."""
        known = {
            width: ((Way(width.split, self.recompute), Way(width.split, self.recompute, adds=True)), width.replicate)
            for width in set(self.widths)
        }
        return [known[width] for width in self.widths]


def widths_of(groups: Groups, copies: int) -> tuple[Width, ...]:
    """Of the stages of each group."""
    return tuple(Width(len(group) // copies, len(group[0].devices)) for group in groups)
