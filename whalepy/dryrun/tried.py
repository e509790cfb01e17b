"""What a user may force, and one plan that was played with its rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from whalepy.dryrun.recompute import Recompute
from whalepy.dryrun.study import Candidate, Savings
from whalepy.planner.forecast import Verdict
from whalepy.planner.form import Width
from whalepy.planner.timeline import Played

TIGHT = 0.84
"""Above this part of a device's memory a plan is called tight: allocators leave gaps, and published runs went out of
memory that are predicted to fill 85 % of it (benchmarks/published/fits.csv)."""


Balance = Literal["exact", "whale", "equal"]
"""How rows and blocks are shared out: by seconds, exactly; by FLOP rates, as Whale does; or equally."""


@dataclass(frozen=True)
class Options:
    """What the user forces; None leaves it to the planner."""

    replicate: int | None = None
    split: int | None = None
    microbatches: int | None = None
    shares: tuple[float, ...] | Literal["equal"] | None = None
    optimizer: str = "adamw"
    precision: str | None = None
    top: int = 5
    zero: int | None = None
    recompute: Recompute | None = None
    stages: int | None = None
    widths: tuple[Width, ...] | None = None
    schedule: str | None = None
    balance: Balance = "exact"
    beyond: bool = True
    """Whether it is wanted too what other schedules, other savings of memory, more rows, longer sequences and fewer
    devices would do: that takes more runs."""

    @property
    def savings(self) -> Savings:
        """What is forced, and otherwise nothing."""
        return Savings(self.zero or 0, self.recompute or "none")

    @property
    def saves_freely(self) -> bool:
        """Whether the planner decides how memory is saved."""
        return self.zero is None and self.recompute is None


@dataclass(frozen=True)
class Tried:
    """One plan with its rows, played."""

    candidate: Candidate
    rows: tuple[int, ...]
    """Per replica."""
    strategy: str
    flags: str
    played: Played

    @property
    def step_s(self) -> float:
        """Seconds of one step."""
        return self.played.step_s

    def rows_of(self, rank: int) -> int:
        """Rows of the global batch that a rank works on."""
        return self.rows[self.candidate.replica_of(rank)]

    def peak(self, rank: int) -> int:
        """Bytes in use on a rank's device at most."""
        return self.candidate.peak(rank, self.rows_of(rank))

    def capacity(self, rank: int) -> int:
        """Bytes of memory of a rank's device."""
        return self.candidate.device(rank).memory_bytes

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """All ranks, in order."""
        return self.candidate.plan.ranks

    @cached_property
    def tightest(self) -> int:
        """The rank with the largest part of its memory in use."""
        return max(self.ranks, key=lambda rank: self.peak(rank) / self.capacity(rank))

    @property
    def filled(self) -> float:
        """The largest part of a memory in use."""
        return self.peak(self.tightest) / self.capacity(self.tightest)

    @property
    def missing(self) -> dict[int, int]:
        """Per rank that runs out of memory: by how much."""
        over = {rank: self.peak(rank) - self.capacity(rank) for rank in self.ranks}
        return {rank: by for rank, by in over.items() if by > 0}

    @property
    def verdict(self) -> Verdict:
        """Whether it can be trained on these devices."""
        return "no" if self.filled > 1 else "tight" if self.filled > TIGHT else "fits"

    @property
    def not_runnable(self) -> tuple[str, ...]:
        """What the runtime does not execute yet."""
        precision = ("mixed precision",) if self.candidate.study.master else ()
        return (*self.candidate.savings.words, *precision)

    @property
    def order(self) -> tuple[Any, ...]:
        """Sorts plans from best to worst: those that fit, then the fastest; ties by fewer splits, then by name."""
        return self.verdict == "no", self.step_s if self.verdict != "no" else self.filled, self.strategy
