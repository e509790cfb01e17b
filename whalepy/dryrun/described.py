"""A description of layers as a study and its candidates: what a captured model is to the rest of the dry run."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

from torch import nn

from whalepy.dryrun.blocks import Blocks
from whalepy.dryrun.layers import Described, Kept, Place, check, record
from whalepy.dryrun.study import MICROBATCHES_RUN, Candidate, Cut, Savings, Study
from whalepy.hardware.cluster import ClusterSpec
from whalepy.hardware.layer_profile import LayerEntry, LayerFile
from whalepy.planner import decide
from whalepy.planner.decide import Orders
from whalepy.planner.forecast import ModulePart
from whalepy.planner.plan import Plan, StagePlan
from whalepy.planner.work import Recorded
from whalepy.primitives import Primitive
from whalepy.program.analysis import Program
from whalepy.runtime.build import Analysed, Recipe

NO_SAVINGS = Savings()


class Layers(nn.Module):
    """Stands for a model of which only costs are known: it has no annotations and no code."""


@dataclass
class DescribedStudy(Study):
    """A description of layers, the batch it is asked for, and the optimizer."""

    described: Described = field(kw_only=True)

    @classmethod
    def of_file(cls, file: LayerFile, optimizer: str, rows: int) -> DescribedStudy:
        """The layers of a file for a batch of so many rows."""
        described = Described(file)
        blocks = Blocks((), described.folds)
        nothing: Any = None  # no code: what reads the captured program of a study is replaced below
        recipe, example = Recipe(Layers()), ((), {})
        return cls(recipe, example, cast(Program, nothing), optimizer, rows, blocks, file.master, described=described)

    def with_rows(self, rows: int) -> DescribedStudy:
        """The same layers asked for a batch of so many rows."""
        return replace(self, rows=rows, cuts={})

    @property
    def sizes_depend_on_values(self) -> bool:
        """False: the figures are those of fixed sizes."""
        return False

    def batch_of_length(self, now: int, length: int) -> None:
        """None: the figures are those of one length."""

    def candidate(
        self,
        levels: Sequence[Primitive] | None,
        cluster: ClusterSpec,
        speeds: Sequence[float],
        microbatches: int = 1,
        savings: Savings = NO_SAVINGS,
        orders: Orders | None = None,
    ) -> DescribedCandidate:
        """The layers under these levels, outermost first, on every device of a cluster; a split cuts equal parts.

        Raises PlanError or AnnotationError where the file lacks figures for them, PlanError for too many microbatches.
        """
        self.check_microbatches(microbatches)
        named = tuple((level.kind, level.degree or 1) for level in levels or ())
        key = named, cluster, tuple(speeds)
        if key not in self.cuts:
            nothing: Any = None
            plan = _plan(named, cluster, speeds, self.rows)
            self.cuts[key] = Cut(plan, cast(Analysed, nothing), self.program, cluster)
        found = DescribedCandidate(self, cluster, self.cuts[key], levels, microbatches, savings)
        for place in dict.fromkeys(found.place(rank) for rank in found.plan.rank_of):
            check(self.described.file, place)
        return found


def _plan(levels: Sequence[tuple[str, int]], cluster: ClusterSpec, speeds: Sequence[float], rows: int) -> Plan:
    """Levels over all devices, in the order of the cluster."""
    mesh = tuple(degree for _, degree in levels) or (1,)
    cuts = tuple(decide.Cut(level, (1.0,) * degree) for level, degree in enumerate(mesh))
    kinds = [kind for kind, _ in levels] or ["replicate"]
    everything = tuple(range(len(cluster.devices)))
    stage = StagePlan(
        mesh=mesh,
        cuts=cuts,
        row_cuts=tuple(level if kind == "replicate" else None for level, kind in enumerate(kinds)),
        orders={},
        speeds=tuple(speeds),
        device_types=tuple(device.type for device in cluster.devices),
        rank_of=everything,
        devices=everything,
    )
    return Plan((stage,), devices=len(everything), rows=rows)


@dataclass
class DescribedCandidate(Candidate):
    """A description of layers under some levels on some devices."""

    def place(self, rank: int) -> Place:
        """Where a rank works."""
        return self._places[rank]

    @cached_property
    def described(self) -> Described:
        """The layers."""
        return cast(DescribedStudy, self.study).described

    @cached_property
    def _places(self) -> dict[int, Place]:
        cut = [at is not None for at in self.plan.row_cuts]
        sizes = self.plan.mesh
        replica = next((level for level, rows in enumerate(cut) if rows), -1)
        split = next((level for level, rows in enumerate(cut) if not rows), -1)
        parts = sizes[split] if split >= 0 else 1
        copies = sizes[replica] if replica >= 0 else 1
        return {
            rank: Place(self.cost(rank).device.profile, parts, split, copies, replica) for rank in self.plan.rank_of
        }

    def _alike(self, rank: int) -> tuple[int, ...]:
        """By type of device: seconds are those of a type, and the parts of a split are equal."""
        return (self._types[rank],)

    @cached_property
    def _types(self) -> dict[int, int]:
        kinds: dict[Hashable, int] = {}
        return {rank: kinds.setdefault(place.device, len(kinds)) for rank, place in self._places.items()}

    def recording(self, rank: int, rows: int) -> Recorded:
        """What a rank does with so many rows of its own, from the figures of the file."""
        full, count = self.savings.recompute == "full", self._run_of(rows)
        key = self._alike(rank), rows, len(count), full
        if key not in self.cut.recorded:
            foreach = self.cluster.devices[0].profile.vendor != "CPU"
            kept = Kept(self.study.optimizer, foreach, full)
            self.cut.recorded[key] = record(self.described, self.place(rank), kept, count)
        return self.cut.recorded[key]

    def _run_of(self, rows: int) -> tuple[int, ...]:
        """Rows of each of the microbatches that are run; the larger ones come first."""
        run = min(self.microbatches, MICROBATCHES_RUN)
        each, larger = divmod(rows, run)
        return tuple(each + (k < larger) for k in range(run))


def modules_of_layers(described: Described) -> tuple[ModulePart, ...]:
    """The whole, and each line of the file."""
    each = [_part(layer) for layer in described.file.layers]
    total = ModulePart("", 1, sum(part.parameters for part in each), sum(part.flops for part in each))
    return (total, *each)


def _part(layer: LayerEntry) -> ModulePart:
    parameters = layer.repeat * (layer.on(layer.parameters, 1) or 0.0)
    return ModulePart(layer.name, layer.repeat, round(parameters), layer.repeat * (layer.on(layer.flops, 1) or 0.0))
