"""A plan: every decision, as data that saves, loads and explains itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from whalepy.errors import PlanError
from whalepy.planner.annotation import Annotation, from_data
from whalepy.planner.decide import Cut, Decisions, Orders
from whalepy.planner.degrees import Degrees

VERSION = 5


@dataclass(frozen=True)
class StagePlan:
    """One stage: its devices by level, and how they share what it computes."""

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
    devices: tuple[int, ...] = ()
    """Where each place's device stands in the cluster."""
    outer: int | None = None
    """Levels that cut the rows before microbatches do; None: all of them."""
    delay_bytes: tuple[int | None, ...] = ()
    """Per level: bytes of gradients that its links sum in the time that an all-reduce of nothing takes; gradients are
    reduced in buckets of the geometric mean of that and of all their bytes. None where devices do not compute while
    collectives are under way: buckets are of 25 MiB then. Empty: as the cluster says."""

    def coordinates_of(self, rank: int) -> tuple[int, ...]:
        """Where a rank stands on the levels."""
        places = list(product(*(range(size) for size in self.mesh)))
        return places[self.rank_of.index(rank)]

    def to_dict(self) -> dict[str, Any]:
        """The stage as data; `from_dict` gives it back."""
        return {
            "mesh": self.mesh,
            "cuts": [[c.level, c.weights, c.at_least_one] for c in self.cuts],
            "row_cuts": self.row_cuts,
            "orders": [[level, scope, list(order)] for (level, scope), order in self.orders.items()],
            "speeds": self.speeds,
            "device_types": self.device_types,
            "rank_of": self.rank_of,
            "devices": self.devices,
            "outer": self.outer,
            "delay_bytes": self.delay_bytes,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StagePlan:
        """The stage behind data. Raises ValueError for another number of delays than of levels."""
        if len(data["delay_bytes"]) not in (0, len(data["mesh"])):
            raise ValueError(f"{len(data['delay_bytes'])} delay_bytes for {len(data['mesh'])} levels")
        return cls(
            mesh=tuple(data["mesh"]),
            cuts=tuple(Cut(level, tuple(weights), least) for level, weights, least in data["cuts"]),
            row_cuts=tuple(data["row_cuts"]),
            orders={(level, scope): tuple(order) for level, scope, order in data["orders"]},
            speeds=tuple(data["speeds"]),
            device_types=tuple(data["device_types"]),
            rank_of=tuple(data["rank_of"]),
            devices=tuple(data["devices"]),
            outer=data["outer"],
            delay_bytes=tuple(data["delay_bytes"]),
        )

    def lines(self) -> Iterator[str]:
        """Levels, shares and devices, a line each."""
        for level, size in enumerate(self.mesh):
            yield f"  level {level}  {size} positions"
            for k, cut in enumerate(self.cuts):
                if cut.level == level:
                    what = "axes" if cut.at_least_one else "rows" if k == self.row_cuts[level] else "rows, inside"
                    yield f"           {what} {cut.shares}"
            for (at, _), order in self.orders.items():
                if at == level:
                    yield f"           split along {', '.join(order) or 'nothing'}"
        for place, (kind, speed, rank) in enumerate(zip(self.device_types, self.speeds, self.rank_of, strict=True)):
            yield f"  place {place}  rank {rank}  {kind}  speed {speed:g}"


@dataclass(frozen=True)
class Plan:
    """What every rank runs, and why. The same on all ranks; rank 0 makes it and broadcasts `to_json()`."""

    stages: tuple[StagePlan, ...]
    """In the order of the program; one where it is not cut into stages."""
    devices: int = 0
    """Of the cluster: those that no stage uses are idle."""
    schedule: str = "1f1b"
    microbatches: int = 1
    seed: int = 0
    fingerprint: str = ""
    """Of the captured graph: a plan belongs to one model."""
    rows: int = 0
    """Rows of the example batch."""
    notes: tuple[str, ...] = ()
    """What runs replicated for want of a rule, and why this plan."""
    annotation: Annotation = ()
    """The scopes that the planner chose for a model without any."""
    degrees: Degrees = ()
    """Those that the planner chose where annotations leave them open."""
    programs: Callable[[int], Any] | None = field(default=None, compare=False, repr=False)
    """Makes the program of a rank; only on a plan made in this process."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank that runs a stage, ascending."""
        return tuple(sorted({rank for stage in self.stages for rank in stage.rank_of}))

    @property
    def idle(self) -> tuple[int, ...]:
        """Ranks that run no stage."""
        return tuple(sorted(set(range(self.devices)) - set(self.ranks)))

    @property
    def hosts(self) -> tuple[tuple[int, ...], ...]:
        """The stages that share each set of devices, by first stage."""
        found: dict[frozenset[int], list[int]] = {}
        for k, stage in enumerate(self.stages):
            found.setdefault(frozenset(stage.rank_of), []).append(k)
        return tuple(map(tuple, found.values()))

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank runs."""
        return tuple(k for k, stage in enumerate(self.stages) if rank in stage.rank_of)

    @property
    def only(self) -> StagePlan:
        """The stage of a plan that has one. Raises PlanError for a pipeline."""
        if len(self.stages) != 1:
            raise PlanError(f"the plan has {len(self.stages)} stages", fix="read them one by one in plan.stages")
        return self.stages[0]

    @property
    def mesh(self) -> tuple[int, ...]:
        """Of the only stage."""
        return self.only.mesh

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Of the only stage."""
        return self.only.cuts

    @property
    def row_cuts(self) -> tuple[int | None, ...]:
        """Of the only stage."""
        return self.only.row_cuts

    @property
    def orders(self) -> Orders:
        """Of the only stage."""
        return self.only.orders

    @property
    def speeds(self) -> tuple[float, ...]:
        """Of the only stage."""
        return self.only.speeds

    @property
    def device_types(self) -> tuple[str, ...]:
        """Of the only stage."""
        return self.only.device_types

    @property
    def rank_of(self) -> tuple[int, ...]:
        """Of the only stage."""
        return self.only.rank_of

    def coordinates_of(self, rank: int) -> tuple[int, ...]:
        """Where a rank stands on the levels of the only stage."""
        return self.only.coordinates_of(rank)

    def program(self, rank: int) -> Any:
        """The program that `rank` runs; its `str` shows every operator, bridge and layout."""
        if self.programs is None:
            raise PlanError("this plan was loaded: only a plan made in this process has programs")
        if rank not in range(self.devices):
            raise PlanError(f"there is no rank {rank}; ranks are 0 to {self.devices - 1}")
        if rank in self.idle:
            raise PlanError(f"rank {rank} is idle", fix=f"ask for one of {', '.join(map(str, self.ranks))}")
        return self.programs(rank)

    def explain(self) -> str:
        """What runs replicated for want of a rule, and why this plan."""
        return "\n".join(self.notes) or "every operator has a rule"

    def to_json(self) -> str:
        """The plan as text; `from_json` gives it back."""
        data = {
            "version": VERSION,
            "stages": [stage.to_dict() for stage in self.stages],
            "devices": self.devices,
            "schedule": self.schedule,
            "microbatches": self.microbatches,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "rows": self.rows,
            "notes": self.notes,
            "annotation": self.annotation,
            "degrees": self.degrees,
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
                raise PlanError(
                    f"the plan has version {data['version']}, this whalepy reads {VERSION}",
                    fix="plan the model again, and save the plan",
                )
            return cls(
                stages=tuple(map(StagePlan.from_dict, data["stages"])),
                devices=data["devices"],
                schedule=data["schedule"],
                microbatches=data["microbatches"],
                seed=data["seed"],
                fingerprint=data["fingerprint"],
                rows=data["rows"],
                notes=tuple(data["notes"]),
                annotation=from_data(data["annotation"]),
                degrees=tuple(data.get("degrees", ())),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(
                f"the plan cannot be read: {error}", fix="save it again with --save or to_json()"
            ) from error

    def __str__(self) -> str:
        """Levels, shares and devices, a line each."""
        if len(self.stages) == 1:
            lines = [
                f"levels {' x '.join(map(str, self.only.mesh))}, microbatches {self.microbatches}",
                *self.only.lines(),
            ]
        else:
            lines = [f"{len(self.stages)} stages, schedule {self.schedule}, microbatches {self.microbatches}"]
            for k, stage in enumerate(self.stages):
                lines += [f"stage {k}  levels {' x '.join(map(str, stage.mesh))}", *stage.lines()]
        return "\n".join([*lines, *(f"rank {rank} is idle" for rank in self.idle)])


def stage_plan(decisions: Decisions, orders: Orders, **more: Any) -> StagePlan:
    """A stage of a plan, from its decisions."""
    return StagePlan(decisions.mesh, decisions.cuts, decisions.row_cuts, orders, **more)
