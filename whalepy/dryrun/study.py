"""One model studied for many plans: captured once, rehearsed where a number is not known yet."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from whalepy.dryrun.blocks import NO_BLOCKS, Blocks, module_of
from whalepy.dryrun.recompute import Recompute
from whalepy.dryrun.rehearse import NoRows, Rehearsed, rehearse
from whalepy.errors import PlanError, WhaleError
from whalepy.hardware.cluster import ClusterSpec, Device
from whalepy.planner.balance import Curve
from whalepy.planner.cost import DeviceCost, Network
from whalepy.planner.decide import Decisions, Orders
from whalepy.planner.degrees import Degrees
from whalepy.planner.plan import Plan, StagePlan
from whalepy.planner.shares import round_shares
from whalepy.planner.timeline import Played, RankTrack, play
from whalepy.planner.unfold import Sharding, whole_step
from whalepy.planner.units import kind_of
from whalepy.planner.work import Recorded, Rehearsal
from whalepy.primitives import Primitive
from whalepy.primitives.recording import remember
from whalepy.program.analysis import Program
from whalepy.program.costs import hint
from whalepy.program.layout import Sharded
from whalepy.runtime.arguments import Arguments, as_arguments, leaf_shapes
from whalepy.runtime.build import Analysed, Recipe, analysed, identity
from whalepy.runtime.planning import Choices, planned, program_for, speeds_of
from whalepy.runtime.steps import batch_symbols

_Cut = TypeVar("_Cut", StagePlan, Decisions)


@dataclass(frozen=True)
class Savings:
    """How memory is saved: what is kept in parts over the replicas, and what is computed again."""

    zero: int = 0
    recompute: Recompute = "none"
    regathers: bool = False
    """Values gathered along a sequence are kept as parts, and gathered again in the backward pass."""

    @property
    def words(self) -> tuple[str, ...]:
        """`zero 3`, `recompute full`; nothing for what is not done."""
        zero = (f"zero {self.zero}",) if self.zero else ()
        return (*zero, f"recompute {self.recompute}") if self.recompute != "none" else zero

    @property
    def flags(self) -> tuple[str, ...]:
        """The options that force them."""
        return tuple(f"--{words}" for words in self.words)


@dataclass
class Study:
    """A captured model, the batch it is asked for, and the optimizer."""

    recipe: Recipe
    example: Arguments
    program: Program
    optimizer: str
    rows: int
    blocks: Blocks = NO_BLOCKS
    master: bool = False
    """Whether parameters are kept in float32 beside those that the program reads."""
    cuts: dict[Hashable, Cut] = field(default_factory=dict[Hashable, "Cut"])
    degrees: Degrees = ()
    """Of the scopes whose annotations leave them open."""

    @classmethod
    def of(
        cls, recipe: Recipe, example: Any, optimizer: str, blocks: Blocks = NO_BLOCKS, *, master: bool = False
    ) -> Study:
        """Capture the model for a batch like `example`."""
        return cls.on(recipe, as_arguments(example), optimizer, blocks, master=master)

    @classmethod
    def on(
        cls, recipe: Recipe, arguments: Arguments, optimizer: str, blocks: Blocks = NO_BLOCKS, *, master: bool = False
    ) -> Study:
        """The same for arguments."""
        _, program = program_for(recipe, arguments)
        return cls.captured(recipe, arguments, program, optimizer, blocks, master=master)

    @classmethod
    def captured(
        cls,
        recipe: Recipe,
        arguments: Arguments,
        program: Program,
        optimizer: str,
        blocks: Blocks = NO_BLOCKS,
        *,
        master: bool = False,
    ) -> Study:
        """The same for a model that was captured already, with these arguments."""
        rows = 0 if program.batch is None else hint(program.axes.size(program.batch), program.hints)
        return cls(recipe, arguments, program, optimizer, rows, blocks, master)

    @property
    def sizes_depend_on_values(self) -> bool:
        """Whether some operator has as many results as a condition holds for."""
        return any(node.meta.get("unbacked_bindings") for node in self.program.nodes)

    @property
    def loads(self) -> list[int]:
        """FLOPs by operator, with those of the blocks that its own stands for."""
        paths = (module_of(node) or "" for node in self.program.nodes)
        pairs = zip(self.program.operators, paths, strict=True)
        return [round(op.flops * self.blocks.repeats(path)) for op, path in pairs]

    def settled(self, degrees: Degrees) -> Study:
        """The same model with these degrees where its annotations leave them open."""
        return self if degrees == self.degrees else replace(self, degrees=degrees, cuts={})

    def with_rows(self, rows: int) -> Study:
        """The same model asked for a batch of so many rows."""
        batch = self.batch_of(rows)
        program = analysed(self.program.captured, leaf_shapes(batch), sync_batchnorm=self.recipe.sync_batchnorm)
        return replace(self, example=batch, program=program, rows=rows, cuts={})

    def with_length(self, now: int, length: int) -> Study | None:
        """The same model asked for sequences of another length than now; None where the capture has fixed it."""
        example = self.batch_of_length(now, length)
        if example is None:
            return None
        shapes = leaf_shapes(example)
        program = analysed(self.program.captured, shapes, sync_batchnorm=self.recipe.sync_batchnorm)
        return replace(self, example=example, program=program, cuts={})

    def resized(self, example: Arguments, rows: int) -> Study:
        """The same model asked for another batch, of which only the sizes are new: what they cost is not told."""
        program = replace(self.program, hints=self.program.captured.bind(leaf_shapes(example)))
        return replace(self, example=example, program=program, rows=rows, cuts={})

    def candidate(
        self,
        levels: Sequence[Primitive] | None,
        cluster: ClusterSpec,
        speeds: Sequence[float],
        microbatches: int = 1,
        savings: Savings = Savings(),
        orders: Orders | None = None,
    ) -> Candidate:
        """The model under these scopes, outermost first, on every device of a cluster; None: under its own.

        `orders`: the classes of axes that each split is cut along, in place of those that are best.
        """
        self.check_microbatches(microbatches)
        run = min(microbatches, MICROBATCHES_RUN)
        named = None if levels is None else tuple((level.kind, level.degree) for level in levels)
        key = named, cluster, tuple(speeds), run, None if orders is None else tuple(orders.items())
        if key not in self.cuts:
            self.cuts[key] = self._cut(levels, cluster, speeds, run, orders)
        return Candidate(self, cluster, self.cuts[key], levels, microbatches, savings)

    def check_microbatches(self, count: int) -> None:
        """PlanError for more microbatches than rows."""
        if count > max(self.rows, 1):
            raise PlanError(
                f"{count} microbatches cannot be cut from {self.rows} rows",
                fix="choose fewer microbatches, or a larger batch",
            )

    def identity(self, levels: Sequence[Primitive] | None) -> str:
        """What a plan under these scopes knows the model by; None: under its own."""
        return identity(self.program if levels is None else _within(self.program, levels))

    def _cut(
        self,
        levels: Sequence[Primitive] | None,
        cluster: ClusterSpec,
        speeds: Sequence[float],
        microbatches: int,
        orders: Orders | None,
    ) -> Cut:
        program = self.program if levels is None else _within(self.program, levels)
        places = tuple(range(len(cluster.devices)))
        given = None if orders is None else _ordered(program, orders, len(places))
        try:
            degrees = self.degrees if levels is None else ()
            choices = Choices(microbatches, 0, given, idle=False, degrees=degrees)
            plan, main = planned(program, cluster, places, choices, speeds=tuple(speeds))
        except WhaleError as error:
            if levels is None:
                raise
            raise type(error)(error.what, fix=error.fix) from error  # no line of the user's made these scopes
        if len(main.stages) > 1:
            raise PlanError(
                "a dry run of pipelines is not there yet", fix="plan without stages, or train: compile runs them"
            )
        return Cut(plan, main.only, program, cluster)

    def batch_of_length(self, now: int, length: int) -> Arguments | None:
        """The example with sequences of another length than now; None where the capture has fixed it."""
        captured = self.program.captured
        symbols = {size for sizes in captured.inputs for size in sizes.shape if size.is_Symbol}
        longer = {s for s in symbols if self.program.hints.get(s) == now and s not in batch_symbols(captured)}
        if not longer:
            return None
        leaves, spec = pytree.tree_flatten(self.example)
        for sizes in captured.inputs:
            leaf = leaves[sizes.leaf]
            shape = [length if s in longer else n for s, n in zip(sizes.shape, leaf.shape, strict=True)]
            leaves[sizes.leaf] = torch.empty(shape, dtype=leaf.dtype, device="meta")
        example = pytree.tree_unflatten(leaves, spec)
        bindings = captured.bind(leaf_shapes(example))
        if captured.check_sizes(bindings) is not None or captured.branches_otherwise(bindings):
            return None
        return example

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


def _ordered(program: Program, orders: Orders, devices: int) -> Plan:
    """A plan of a program of which only the orders count."""
    stage = StagePlan((), (), (), orders, (), (), ())
    return Plan((stage,), devices=devices, fingerprint=identity(program))


def _within(program: Program, levels: Sequence[Primitive]) -> Program:
    """The program with all of it inside these scopes, in its graph too, from which microbatches are made."""
    scope = remember(levels)
    for node in program.captured.graph.graph.nodes:
        if node.op == "call_function":
            node.meta["scope"] = scope
    placed = (replace(op, scope=scope) if op.kind == "call" else op for op in program.operators)
    return replace(program, operators=tuple(placed))


MICROBATCHES_RUN = 3
"""Microbatches that are rehearsed, the first one, one more as large, and a smaller one: the others do the same."""


@dataclass
class Cut:
    """A model cut by some levels over a cluster, and what was rehearsed of it."""

    plan: Plan
    main: Analysed
    program: Program
    cluster: ClusterSpec
    recorded: dict[Hashable, Recorded] = field(default_factory=dict[Hashable, Recorded])


@dataclass
class Candidate:
    """A model under some levels on some devices: what each rank does with any number of rows."""

    study: Study
    cluster: ClusterSpec
    cut: Cut
    levels: Sequence[Primitive] | None
    microbatches: int = 1
    savings: Savings = Savings()
    known: dict[Hashable, Rehearsal] = field(default_factory=dict[Hashable, Rehearsal])

    @property
    def plan(self) -> Plan:
        """With as many microbatches as were run."""
        return self.cut.plan

    @property
    def main(self) -> Analysed:
        """The program of the plan."""
        return self.cut.main

    @property
    def replicas(self) -> int:
        """Parts that the rows are cut into."""
        count = 1
        for size, cut in zip(self.plan.mesh, self.plan.row_cuts, strict=True):
            count *= size if cut is not None else 1
        return count

    def with_length(self, now: int, length: int) -> Candidate | None:
        """The same plan for sequences of another length than now; None where the model does not take it."""
        study = self.study.with_length(now, length)
        if study is None:
            return None
        speeds = speeds_of(self.plan, len(self.cluster.devices))
        return study.candidate(self.levels, self.cluster, speeds, self.microbatches, self.savings, self.plan.orders)

    def again(self, speeds: Sequence[float]) -> Plan:
        """The same plan with default shares that follow these weights, by device."""
        places = tuple(range(len(self.cluster.devices)))
        choices = Choices(self.microbatches, self.plan.seed, None, idle=False, degrees=self.plan.degrees)
        return planned(self.cut.program, self.cluster, places, choices, speeds=tuple(speeds))[0]

    def kind_of(self, replica: int) -> Hashable:
        """Equal for replicas whose ranks do the same on alike devices."""
        devices = [(self._alike(rank), self.device(rank)) for rank in self._ranks[replica]]
        return frozenset((at, kind_of(device)) for at, device in devices)

    def ranks_of(self, replica: int) -> list[int]:
        """The ranks that share the rows of a replica, in the order of their coordinates inside it."""
        return self._ranks[replica]

    @cached_property
    def _ranks(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {replica: [] for replica in range(self.replicas)}
        for rank in self.plan.rank_of:
            found[self.replica_of(rank)].append(rank)
        return found

    def replica_of(self, rank: int) -> int:
        """The replica that a rank belongs to, in row-major order of the levels that cut rows."""
        return self._replica_of[rank]

    @cached_property
    def _replica_of(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for rank, at in self.coordinates.items():
            found[rank] = 0
            for level, size in enumerate(self.plan.mesh):
                if self.plan.row_cuts[level] is not None:
                    found[rank] = found[rank] * size + at[level]
        return found

    @cached_property
    def coordinates(self) -> dict[int, tuple[int, ...]]:
        """Rank -> where it stands on the levels."""
        return dict(zip(self.plan.rank_of, itertools.product(*map(range, self.plan.mesh)), strict=True))

    def work(self, rank: int, rows: int, cuts: Sequence[int] = ()) -> Rehearsal:
        """What a rank does with so many rows of its own.

        `cuts`: numbers of microbatches at which its program is cut, so that it has the parts that all ranks have.
        """
        larger = rows % self.microbatches
        key = self._alike(rank), rows, tuple(sorted({1, larger, *cuts} - {0, self.microbatches}))
        if key not in self.known:
            small = self._few(rows)
            recorded, more = self.recording(rank, small), 0
            if small < rows:
                recorded, more = self._with_prelude_of(rank, rows, recorded)
            bounds = [0, *key[2], self.microbatches] if self.microbatches > 1 else [0, 1]
            turns = [(self._which(a, b, larger), b - a) for a, b in itertools.pairwise(bounds)]
            self.known[key] = whole_step(recorded, turns, self.study.blocks.folds, self.sharding, more)
        return self.known[key]

    def _with_prelude_of(self, rank: int, rows: int, recorded: Recorded) -> tuple[Recorded, int]:
        """What was run of few rows with what goes ahead of all rows, and the bytes of inputs that were left out."""
        if not recorded.prelude:
            small = self._few(rows)
            return recorded, round(recorded.inputs * (rows / small - 1)) if small else 0
        whole = self.recording(rank, rows)
        more = whole.inputs - recorded.inputs
        ahead = (replace(event, memory=event.memory - more, peak=event.peak - more) for event in whole.prelude)
        return replace(recorded, prelude=tuple(ahead)), more

    def _few(self, rows: int) -> int:
        """Rows of the few microbatches that are run; the larger ones come first."""
        run = min(self.microbatches, MICROBATCHES_RUN)
        each, larger = divmod(rows, self.microbatches)
        return run * each + min(larger, run - 1)

    def _which(self, start: int, stop: int, larger: int) -> int:
        """Which of those that are run the microbatches from one number to another are like."""
        if start == 0:
            return 0
        return 2 if larger > 1 and stop > larger else 1

    def recording(self, rank: int, rows: int) -> Recorded:
        """What was run of a rank with so many rows of its own, all of them without savings of ZeRO."""
        key = self._alike(rank), rows, self.savings.recompute, self.savings.regathers
        if key not in self.cut.recorded:
            main, plan = _with_equal_rows(self.main, self.plan)
            study, fused = self.study, self.cluster.devices[0].profile.vendor != "CPU"
            saved = self.savings.recompute
            rehearsed = Rehearsed(
                study.recipe, study.optimizer, study.blocks, saved, study.master, self.savings.regathers, fused
            )
            batch = study.batch_of(rows * self.replicas)
            first = next(r for r in self.plan.rank_of if self._alike(r) == key[0])
            try:
                self.cut.recorded[key] = rehearse(rehearsed, main, plan, first, batch)
            except NoRows:  # of all the rows of a step there is at least one
                if rows:
                    raise
                self.cut.recorded[key] = self.recording(rank, 1)
        return self.cut.recorded[key]

    @property
    def sharding(self) -> Sharding:
        """How state is kept over the replicas: those of the largest level that cuts rows."""
        levels = [k for k, cut in enumerate(self.plan.row_cuts) if cut is not None]
        level = max(levels, key=lambda k: self.plan.mesh[k], default=0)
        replicas = self.plan.mesh[level] if levels else 1
        return Sharding(self.savings.zero, replicas, level, self.overlaps)

    @property
    def overlaps(self) -> bool:
        """Whether gradients are reduced during the backward pass: where collectives do not need the cores."""
        return all(device.profile.computes_beside for device in self.cluster.devices)

    def _alike(self, rank: int) -> tuple[int, ...]:
        """The coordinates inside a replica; of positions with equal parts of everything, the first stands for all."""
        return self._likes[rank]

    @cached_property
    def _likes(self) -> dict[int, tuple[int, ...]]:
        levels = self._inside
        return {
            rank: tuple(self._first_like[level][at[level]] for level in levels) for rank, at in self.coordinates.items()
        }

    def inside(self, rank: int) -> tuple[int, ...]:
        """The coordinates of a rank inside its replica."""
        return tuple(self.coordinates[rank][level] for level in self._inside)

    @cached_property
    def _inside(self) -> tuple[int, ...]:
        """The levels that cut no rows."""
        return tuple(level for level, cut in enumerate(self.plan.row_cuts) if cut is None)

    @cached_property
    def _first_like(self) -> dict[int, list[int]]:
        """By level that cuts no rows, each position's first with parts of the same sizes."""
        decisions, axes, hints = self.main.decisions, self.main.program.axes, self.main.program.hints
        layouts = [layout for modes in self.main.rewritten.layouts.values() for layout in modes]
        sharded = {kind for layout in (*layouts, *decisions.stored.values()) for kind in layout}
        cuts = {(k.cut, hint(axes.size(k.place.axis), hints)) for k in sharded if isinstance(k, Sharded)}
        parts: dict[int, list[tuple[int, ...]]] = {}
        for level, size in enumerate(self.plan.mesh):
            own = [(decisions.cuts[cut], units) for cut, units in sorted(cuts) if decisions.cuts[cut].level == level]
            shares = [round_shares(n, cut.weights, at_least_one=cut.at_least_one) for cut, n in own]
            parts[level] = [tuple(share[position] for share in shares) for position in range(size)]
        return {level: [found.index(one) for one in found] for level, found in parts.items()}

    def cost(self, rank: int) -> DeviceCost:
        """What operators take on the device of a rank; one object for devices of one kind."""
        return self._costs[rank]

    @cached_property
    def _costs(self) -> dict[int, DeviceCost]:
        kinds: dict[Hashable, DeviceCost] = {}
        devices = {rank: self.device(rank) for rank in self.plan.rank_of}
        return {r: kinds.setdefault((d.profile, d.speed), DeviceCost(d)) for r, d in devices.items()}

    def device(self, rank: int) -> Device:
        """What a rank runs on."""
        return self.cluster.devices[self.device_of[rank]]

    @cached_property
    def device_of(self) -> Mapping[int, int]:
        """Rank -> index of its device."""
        return dict(zip(self.plan.rank_of, self.plan.only.devices, strict=True))

    def curves(self, replica: int, at: Sequence[int]) -> tuple[Curve, Curve]:
        """By rows: seconds of compute of the slowest rank of a replica, and the largest part of a memory in use."""
        ranks = list({(self._alike(r), kind_of(self.device(r))): r for r in self.ranks_of(replica)}.values())
        seconds = [max(self.cost(r).busy_s(self.work(r, n)) for r in ranks) for n in at]
        filled = [max(self.filled(r, n) for r in ranks) for n in at]
        return Curve(tuple(at), tuple(seconds)), Curve(tuple(at), tuple(filled))

    def peak(self, rank: int, rows: int) -> int:
        """Bytes in use on the device of a rank at most."""
        return self.work(rank, rows).peak + self.cost(rank).runtime_bytes

    def filled(self, rank: int, rows: int) -> float:
        """The part of the memory of a rank's device that is in use at most."""
        return self.peak(rank, rows) / self.device(rank).memory_bytes

    def played(self, rows: Sequence[int]) -> Played:
        """The step with these rows per replica."""
        cuts = sorted({number % self.microbatches for number in rows})
        works = {rank: self.work(rank, rows[self.replica_of(rank)], cuts) for rank in self.plan.rank_of}
        costs = {rank: self.cost(rank) for rank in self.plan.rank_of}
        played = play(self.plan.mesh, self.plan.rank_of, works, costs, Network(self.cluster, self.device_of))
        tracks = dict(zip(self.plan.ranks, played.tracks, strict=True))
        return replace(played, tracks=tuple(tracks.get(rank, RankTrack()) for rank in range(self.plan.devices)))


def _with_equal_rows(main: Analysed, plan: Plan) -> tuple[Analysed, Plan]:
    """The same with equal shares on the levels that cut rows."""
    made = replace(main, decisions=_equal(main.decisions))
    if main.prologue is not None:
        made = replace(made, prologue=replace(main.prologue, decisions=_equal(main.prologue.decisions)))
    return made, replace(plan, stages=(_equal(plan.only),))


def _equal(decided: _Cut) -> _Cut:
    row_cuts = {cut for cut in decided.row_cuts if cut is not None}
    cuts = tuple(
        replace(cut, weights=(1.0,) * len(cut.weights)) if k in row_cuts else cut for k, cut in enumerate(decided.cuts)
    )
    return replace(decided, cuts=cuts)
