"""One model studied for many plans: captured once, rehearsed where a number is not known yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from whalepy.dryrun.rehearse import rehearse
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.balance import Curve
from whalepy.planner.cost import DeviceCost, Network
from whalepy.planner.decide import Decisions
from whalepy.planner.plan import Plan
from whalepy.planner.timeline import Played, play
from whalepy.planner.work import Rehearsal
from whalepy.primitives import Primitive
from whalepy.primitives.recording import remember
from whalepy.program.analysis import Program
from whalepy.program.costs import hint
from whalepy.runtime.arguments import Arguments, as_arguments, leaf_shapes
from whalepy.runtime.build import Analysed, Recipe, analysed
from whalepy.runtime.planning import Choices, planned, program_for

_Cut = TypeVar("_Cut", Plan, Decisions)


@dataclass
class Study:
    """A captured model, the batch it is asked for, and the optimizer."""

    recipe: Recipe
    example: Arguments
    program: Program
    optimizer: str
    rows: int

    @classmethod
    def of(cls, recipe: Recipe, example: Any, optimizer: str) -> Study:
        """Capture the model for a batch like `example`."""
        arguments = as_arguments(example)
        _, program = program_for(recipe, arguments)
        rows = 0 if program.batch is None else hint(program.axes.size(program.batch), program.hints)
        return cls(recipe, arguments, program, optimizer, rows)

    def with_rows(self, rows: int) -> Study:
        """The same model asked for a batch of so many rows."""
        batch = self.batch_of(rows)
        program = analysed(self.program.captured, leaf_shapes(batch), sync_batchnorm=self.recipe.sync_batchnorm)
        return replace(self, example=batch, program=program, rows=rows)

    def candidate(
        self, levels: Sequence[Primitive] | None, cluster: ClusterSpec, speeds: Sequence[float], microbatches: int
    ) -> Candidate:
        """The model under these scopes, outermost first, on every device of a cluster; None: under its own."""
        scope = remember(levels or ())
        operators = tuple(replace(op, scope=scope or op.scope) for op in self.program.operators)
        program = replace(self.program, operators=operators)
        choices = Choices(microbatches, 0, None)
        places = tuple(range(len(cluster.devices)))
        plan, main = planned(program, cluster, places, choices, speeds=tuple(speeds))
        return Candidate(self, cluster, plan, main, program, levels)

    def batch_of(self, rows: int) -> Arguments:
        """The example with another number of rows."""
        leaves, spec = pytree.tree_flatten(self.example)
        dims = self.program.captured.batch_inputs
        made = [
            leaf
            if dim is None or not isinstance(leaf, torch.Tensor)
            else torch.empty((*leaf.shape[:dim], rows, *leaf.shape[dim + 1 :]), dtype=leaf.dtype, device="meta")
            for leaf, dim in zip(leaves, dims, strict=True)
        ]
        return pytree.tree_unflatten(made, spec)


@dataclass
class Candidate:
    """A model under some levels on some devices: what each rank does with any number of rows."""

    study: Study
    cluster: ClusterSpec
    plan: Plan
    main: Analysed
    program: Program
    levels: Sequence[Primitive] | None
    known: dict[tuple[tuple[int, ...], int], Rehearsal] = field(
        default_factory=dict[tuple[tuple[int, ...], int], Rehearsal]
    )

    @property
    def replicas(self) -> int:
        """Parts that the rows are cut into."""
        count = 1
        for size, cut in zip(self.plan.mesh, self.plan.row_cuts, strict=True):
            count *= size if cut is not None else 1
        return count

    def again(self, speeds: Sequence[float]) -> Plan:
        """The same plan with default shares that follow these weights, by device."""
        places = tuple(range(len(self.cluster.devices)))
        choices = Choices(self.plan.microbatches, self.plan.seed, None)
        return planned(self.program, self.cluster, places, choices, speeds=tuple(speeds))[0]

    def ranks_of(self, replica: int) -> list[int]:
        """The ranks that share the rows of a replica, in the order of their coordinates inside it."""
        return [rank for rank in self.plan.rank_of if self.replica_of(rank) == replica]

    def replica_of(self, rank: int) -> int:
        """The replica that a rank belongs to, in row-major order of the levels that cut rows."""
        at, number = self.plan.coordinates_of(rank), 0
        for level, size in enumerate(self.plan.mesh):
            if self.plan.row_cuts[level] is not None:
                number = number * size + at[level]
        return number

    def inside(self, rank: int) -> tuple[int, ...]:
        """The coordinates of a rank on the levels that cut no rows."""
        at = self.plan.coordinates_of(rank)
        return tuple(c for c, cut in zip(at, self.plan.row_cuts, strict=True) if cut is None)

    def work(self, rank: int, rows: int) -> Rehearsal:
        """What a rank does with so many rows of its own."""
        key = self.inside(rank), rows
        if key not in self.known:
            main, plan = _with_equal_rows(self.main, self.plan)
            study, foreach = self.study, self.cluster.devices[0].profile.vendor != "CPU"
            batch = study.batch_of(rows * self.replicas)
            self.known[key] = rehearse(study.recipe, main, plan, rank, batch, study.optimizer, foreach=foreach)
        return self.known[key]

    def cost(self, rank: int) -> DeviceCost:
        """What operators take on the device of a rank."""
        return DeviceCost(self.cluster.devices[self.device_of[rank]])

    @property
    def device_of(self) -> Mapping[int, int]:
        """Rank -> index of its device."""
        return {rank: place for place, rank in enumerate(self.plan.rank_of)}

    def curves(self, replica: int, at: Sequence[int]) -> tuple[Curve, Curve]:
        """By rows: seconds of compute of the slowest rank of a replica, and the largest part of a memory in use."""
        ranks = self.ranks_of(replica)
        seconds = [max(self.cost(r).busy_s(self.work(r, n)) for r in ranks) for n in at]
        filled = [max(self.filled(r, n) for r in ranks) for n in at]
        return Curve(tuple(at), tuple(seconds)), Curve(tuple(at), tuple(filled))

    def peak(self, rank: int, rows: int) -> int:
        """Bytes in use on the device of a rank at most."""
        return self.work(rank, rows).peak + self.cost(rank).runtime_bytes

    def filled(self, rank: int, rows: int) -> float:
        """The part of the memory of a rank's device that is in use at most."""
        return self.peak(rank, rows) / self.cluster.devices[self.device_of[rank]].memory_bytes

    def played(self, rows: Sequence[int]) -> Played:
        """The step with these rows per replica."""
        works = {rank: self.work(rank, rows[self.replica_of(rank)]) for rank in self.plan.rank_of}
        costs = {rank: self.cost(rank) for rank in self.plan.rank_of}
        return play(self.plan.mesh, self.plan.rank_of, works, costs, Network(self.cluster, self.device_of))


def _with_equal_rows(main: Analysed, plan: Plan) -> tuple[Analysed, Plan]:
    """The same with equal shares on the levels that cut rows."""
    made = replace(main, decisions=_equal(main.decisions))
    if main.prologue is not None:
        program, decisions, ahead = main.prologue
        made = replace(made, prologue=(program, _equal(decisions), ahead))
    return made, _equal(plan)


def _equal(decided: _Cut) -> _Cut:
    row_cuts = {cut for cut in decided.row_cuts if cut is not None}
    cuts = tuple(
        replace(cut, weights=(1.0,) * len(cut.weights)) if k in row_cuts else cut for k, cut in enumerate(decided.cuts)
    )
    return replace(decided, cuts=cuts)
