"""A plan: every decision, as data that saves, loads and explains itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from whalepy.errors import PlanError
from whalepy.planner.decide import Cut, Decisions, Orders

VERSION = 2


@dataclass(frozen=True)
class Plan:
    """What every rank runs, and why. The same on all ranks; rank 0 makes it and broadcasts `to_json()`."""

    mesh: tuple[int, ...]
    """Number of positions per level, outermost first."""
    cuts: tuple[Cut, ...]
    row_cuts: tuple[int | None, ...]
    """Per level: the cut of the rows of the inputs, None where every position gets the same rows."""
    orders: Orders
    """Per (level, split scope by order of appearance): axis classes, first choice first."""
    speeds: tuple[float, ...]
    """Relative speed of the device at each place of the mesh, row-major."""
    device_types: tuple[str, ...]
    rank_of: tuple[int, ...]
    """Rank that runs at each place of the mesh, row-major."""
    microbatches: int = 1
    seed: int = 0
    fingerprint: str = ""
    """Of the captured graph: a plan belongs to one model."""
    rows: int = 0
    """Rows of the example batch."""
    notes: tuple[str, ...] = ()
    """What runs replicated for want of a rule, and why this plan."""
    annotation: tuple[tuple[str, int], ...] = ()
    """Scopes over the whole model, outermost first, that the planner chose for a model without annotations."""
    programs: Callable[[int], Any] | None = field(default=None, compare=False, repr=False)
    """Makes the program of a rank; only on a plan made in this process."""

    def coordinates_of(self, rank: int) -> tuple[int, ...]:
        """Where a rank stands on the levels."""
        places = list(product(*(range(size) for size in self.mesh)))
        return places[self.rank_of.index(rank)]

    def program(self, rank: int) -> Any:
        """The program that `rank` runs; its `str` shows every operator, bridge and layout."""
        if self.programs is None:
            raise PlanError("this plan was loaded: only a plan made in this process has programs")
        if rank not in self.rank_of:
            raise PlanError(f"there is no rank {rank}; ranks are {min(self.rank_of)} to {max(self.rank_of)}")
        return self.programs(rank)

    def explain(self) -> str:
        """What runs replicated for want of a rule, and why this plan."""
        return "\n".join(self.notes) or "every operator has a rule"

    def to_json(self) -> str:
        """The plan as text; `from_json` gives it back."""
        data = {
            "version": VERSION,
            "mesh": self.mesh,
            "cuts": [[c.level, c.weights, c.at_least_one] for c in self.cuts],
            "row_cuts": self.row_cuts,
            "orders": [[level, scope, list(order)] for (level, scope), order in self.orders.items()],
            "speeds": self.speeds,
            "device_types": self.device_types,
            "rank_of": self.rank_of,
            "microbatches": self.microbatches,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "rows": self.rows,
            "notes": self.notes,
            "annotation": self.annotation,
        }
        return json.dumps(data, indent=1)

    def save(self, path: str | Path) -> None:
        """Write `to_json()` to a file that `compile(..., plan=path)` loads."""
        Path(path).write_text(self.to_json() + "\n")

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan behind a text. Raises PlanError for one that is cut short or of another version."""
        try:
            data = json.loads(text)
            if data["version"] != VERSION:
                raise PlanError(f"the plan has version {data['version']}, this whalepy reads {VERSION}")
            return cls(
                mesh=tuple(data["mesh"]),
                cuts=tuple(Cut(level, tuple(weights), least) for level, weights, least in data["cuts"]),
                row_cuts=tuple(data["row_cuts"]),
                orders={(level, scope): tuple(order) for level, scope, order in data["orders"]},
                speeds=tuple(data["speeds"]),
                device_types=tuple(data["device_types"]),
                rank_of=tuple(data["rank_of"]),
                microbatches=data["microbatches"],
                seed=data["seed"],
                fingerprint=data["fingerprint"],
                rows=data["rows"],
                notes=tuple(data["notes"]),
                annotation=tuple((kind, degree) for kind, degree in data["annotation"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(
                f"the plan cannot be read: {error}", fix="save it again with --save or to_json()"
            ) from error

    def __str__(self) -> str:
        """Levels, shares and devices, a line each."""
        lines = [f"levels {' x '.join(map(str, self.mesh))}, microbatches {self.microbatches}"]
        for level, size in enumerate(self.mesh):
            lines.append(f"  level {level}  {size} positions")
            for k, cut in enumerate(self.cuts):
                if cut.level == level:
                    what = "axes" if cut.at_least_one else "rows" if k == self.row_cuts[level] else "rows, inside"
                    lines.append(f"           {what} {cut.shares}")
            for (at, _), order in self.orders.items():
                if at == level:
                    lines.append(f"           split along {', '.join(order) or 'nothing'}")
        for place, (kind, speed, rank) in enumerate(zip(self.device_types, self.speeds, self.rank_of, strict=True)):
            lines.append(f"  place {place}  rank {rank}  {kind}  speed {speed:g}")
        return "\n".join(lines)


def plan_of(decisions: Decisions, orders: Orders, **more: Any) -> Plan:
    """The plan behind decisions."""
    return Plan(decisions.mesh, decisions.cuts, decisions.row_cuts, orders, **more)
