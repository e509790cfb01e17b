"""A model cut into stages on some devices: what each rank does in each action, and the step of all of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

from whalepy.dryrun.course import Step
from whalepy.dryrun.forms import StageForm, form_of, form_of_rank, stages_beside, told_of
from whalepy.dryrun.rehearse import Rehearsed, rehearse_stages
from whalepy.dryrun.silent import SilentBoundary
from whalepy.dryrun.study import Candidate, Study
from whalepy.dryrun.tried import Tried
from whalepy.hardware.cluster import Device
from whalepy.planner.cost import DeviceCost, Network
from whalepy.planner.plan import StagePlan
from whalepy.planner.schedule.actions import COMPUTES, SENDS, Action, Schedule
from whalepy.planner.schedule.simulate import simulate
from whalepy.planner.shares import round_shares
from whalepy.planner.timeline import Played, play
from whalepy.planner.unfold import Sharding, moved, whole_actions
from whalepy.planner.work import Acted, ActionsRehearsal, Part, RecordedActions, Rehearsal, Stretch
from whalepy.program.costs import hint
from whalepy.program.layout import Sharded
from whalepy.runtime.boundary import Exchanges
from whalepy.runtime.build import Analysed
from whalepy.runtime.extents import Coordinates, Grid, StepSizes, grid_of
from whalepy.runtime.pipeline import Crossed, Pipeline
from whalepy.runtime.programs import schedule_of
from whalepy.runtime.steps import batch_symbols, sizes_of_microbatch

Messages = Mapping[tuple[int, int], int]
"""Bytes by (from rank, to rank)."""


@dataclass
class PipelineCandidate(Candidate):
    """A model in stages: its ranks are rehearsed on the batch of the plan, with the rows that the plan gives them."""

    pipeline: Pipeline = field(kw_only=True)
    rehearsed: dict[Hashable, ActionsRehearsal] = field(default_factory=dict[Hashable, ActionsRehearsal])
    recorded: dict[Hashable, tuple[int, RecordedActions]] = field(
        default_factory=dict[Hashable, "tuple[int, RecordedActions]"]
    )
    """By what is run: the first rank that was rehearsed, and what it does."""
    taken: dict[Action | int, Played] = field(default_factory=dict["Action | int", Played])
    """By action, and by stage for what follows its update."""

    def with_rows(self, rows: int) -> PipelineCandidate:
        """The same plan and programs for a batch of so many rows."""
        return self._on(self.study.resized(self.study.batch_of(rows), rows))

    def with_length(self, now: int, length: int) -> PipelineCandidate | None:
        """The same plan and programs for sequences of another length than now; None where the model refuses them."""
        example = self.study.batch_of_length(now, length)
        return None if example is None else self._on(self.study.resized(example, self.study.rows))

    def _on(self, study: Study) -> PipelineCandidate:
        return replace(self, study=study, known={}, rehearsed={}, recorded={}, taken={})

    # -- who and where

    @property
    def stages(self) -> tuple[Analysed, ...]:
        """The program of every stage."""
        return self.pipeline.stages

    @property
    def replicas(self) -> int:
        """Parts that scopes around all stages cut the rows into."""
        return self.pipeline.arrangement.copies

    @cached_property
    def schedule(self) -> Schedule:
        """The actions of each group of devices."""
        return schedule_of(self.pipeline, self.plan, self.microbatches, training=True)

    @cached_property
    def actions(self) -> Mapping[int, tuple[Action, ...]]:
        """The actions of each rank."""
        of = {own[0].stage: own for own in self.schedule if own}
        return {rank: next(of[k] for k in self.plan.stages_of(rank) if k in of) for rank in self.plan.ranks}

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        """How each stage cuts the rows."""
        return tuple(grid_of(self.plan, stage) for stage in self.plan.stages)

    @cached_property
    def exchanges(self) -> dict[tuple[int, int], dict[Any, Exchanges]]:
        """What crosses between two stages on all ranks, by microbatch, and for parameters once per step: as known."""
        return {}

    @cached_property
    def places(self) -> tuple[Mapping[int, Coordinates], ...]:
        """Per stage: rank -> where it stands on its levels."""
        return tuple({rank: stage.coordinates_of(rank) for rank in stage.rank_of} for stage in self.plan.stages)

    @cached_property
    def coordinates(self) -> dict[int, tuple[int, ...]]:
        """Rank -> where it stands on the levels of its first stage."""
        return {rank: self.places[self.plan.stages_of(rank)[0]][rank] for rank in self.plan.ranks}

    @cached_property
    def device_of(self) -> Mapping[int, int]:
        """Rank -> index of its device."""
        pairs = (pair for stage in self.plan.stages for pair in zip(stage.rank_of, stage.devices, strict=True))
        return dict(pairs)

    @cached_property
    def _costs(self) -> dict[int, DeviceCost]:
        kinds: dict[Hashable, DeviceCost] = {}
        devices: dict[int, Device] = {rank: self.device(rank) for rank in self.plan.ranks}
        return {r: kinds.setdefault((d.profile, d.speed), DeviceCost(d)) for r, d in devices.items()}

    @cached_property
    def network(self) -> Network:
        """What connects the ranks."""
        return Network(self.cluster, self.device_of)

    def rows_of(self, rank: int) -> int:
        """Rows of the global batch that go through a rank."""
        stage = self.plan.stages_of(rank)[0]
        return sum(length for _, length in self.grids[stage].row_pieces(self.study.rows, self.places[stage][rank]))

    @cached_property
    def copies(self) -> tuple[int, ...]:
        """Rows of each part that scopes around all stages cut the rows into."""
        grid, outer = self.grids[0], self.plan.stages[0].outer or 0
        whole = grid.rows(self.study.rows)
        levels = sum(level < outer for level in grid.row_levels)
        found: Counter[Coordinates] = Counter()
        for at, rows in whole.items():
            found[at[:levels]] += rows
        return tuple(found.values())

    @property
    def overlaps(self) -> bool:
        """Whether gradients are reduced during the backward pass: in a pipeline at its end."""
        return False

    @cached_property
    def owners(self) -> Mapping[str, int]:
        """The stage that keeps each parameter; those that nothing reads are kept by the first."""
        names = (name for name, _ in self.study.recipe.model.named_parameters())
        return {name: self.pipeline.owners.get(name, 0) for name in names}

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Elements of each parameter, with those of the blocks that its own stands for."""
        repeats = self.study.blocks.repeats
        named = self.study.recipe.model.named_parameters()
        return {name: round(value.numel() * repeats(name)) for name, value in named}

    def modules_of(self, k: int) -> tuple[str, ...]:
        """The blocks whose parameters a stage keeps, and the modules of those outside all blocks."""
        known = self.study.blocks
        owned = ((known.of(name), name.rpartition(".")[0]) for name, owner in self.owners.items() if owner == k)
        found = dict.fromkeys(path for b, module in owned for path in (known.stand_for[b] if b >= 0 else (module,)))
        order = {path: place for place, path in enumerate(known.whole or known.paths)}
        blocks = iter(sorted((path for path in found if path in order), key=order.__getitem__))
        return tuple(next(blocks) if path in order else path for path in found)

    # -- what was run

    @cached_property
    def stand_ins(self) -> tuple[int, ...]:
        """For each microbatch one of the same sizes everywhere; the first of the step stands for itself alone."""
        sizes = [
            tuple(tuple(grid.microbatch(self.study.rows, m).values()) for grid in self.grids)
            for m in range(self.microbatches)
        ]
        return tuple(
            0 if m == 0 else next(k for k, size in enumerate(sizes) if k and size == own) for m, own in enumerate(sizes)
        )

    def stand_in(self, action: Action) -> Action:
        """The action that was run in its place."""
        return action if action.microbatch is None else action._replace(microbatch=self.stand_ins[action.microbatch])

    def acts_of(self, rank: int) -> ActionsRehearsal:
        """What a rank does in each action; ranks with parts of the same sizes are rehearsed once."""
        key = self.kind_of_rank(rank)
        if key not in self.rehearsed:
            shardings = {k: self._sharding(k) for k in self.plan.stages_of(rank)}
            self.rehearsed[key] = whole_actions(self._recorded_actions(rank), self.study.blocks.folds, shardings)
        return self.rehearsed[key]

    def _recorded_actions(self, rank: int) -> RecordedActions:
        """What was run of a rank; where another one runs the same program in another stage, what was run of that."""
        form = form_of_rank(self, rank)
        if form not in self.recorded:
            self.recorded[form] = rank, self.run(rank)
        other, recorded = self.recorded[form]
        if other == rank:
            return recorded
        stages = dict(zip(stages_beside(self, other), stages_beside(self, rank), strict=True))
        there, here = ([b for k in self.plan.stages_of(r) for b in self.forms[k].blocks] for r in (other, rank))
        blocks = dict(zip(there, here, strict=True))
        return told_of(recorded, stages, blocks)

    def run(self, rank: int) -> RecordedActions:
        """A rehearsal of a rank."""
        study, saved = self.study, self.savings
        fused = self.cluster.devices[0].profile.vendor != "CPU"
        rehearsed = Rehearsed(
            study.recipe, study.optimizer, study.blocks, saved.recompute, study.master, saved.regathers, fused
        )
        return rehearse_stages(rehearsed, self.pipeline, self.plan, rank, study.example, set(self.stand_ins))

    @cached_property
    def forms(self) -> tuple[StageForm, ...]:
        """What ranks of different stages have in common."""
        known = self.study.blocks
        return tuple(form_of(stage, at, known) for stage, at in zip(self.stages, self.plan.stages, strict=True))

    def _sharding(self, k: int) -> Sharding:
        """How a stage keeps its state over its replicas: those of the largest level that cuts rows."""
        placed = self.plan.stages[k]
        levels = [level for level, cut in enumerate(placed.row_cuts) if cut is not None]
        level = max(levels, key=placed.mesh.__getitem__, default=0)
        return Sharding(self.savings.zero, placed.mesh[level] if levels else 1, level)

    def kind_of_rank(self, rank: int) -> Hashable:
        """Equal for ranks that hold parts of the same sizes of everything."""
        return self._kinds[rank]

    @cached_property
    def _kinds(self) -> Mapping[int, Hashable]:
        return {
            rank: tuple((k, self.sizes_of(k, self.places[k][rank])) for k in self.plan.stages_of(rank))
            for rank in self.plan.ranks
        }

    def sizes_of(self, k: int, at: Coordinates) -> Hashable:
        """Equal for places of a stage with parts of the same sizes of everything."""
        placed, grid = self.plan.stages[k], self.grids[k]
        rows = tuple(length for _, length in grid.row_pieces(self.study.rows, at))
        inside = tuple(self._first_of(k)[level][at[level]] for level, cut in enumerate(placed.row_cuts) if cut is None)
        return rows, inside

    def _first_of(self, k: int) -> Sequence[Sequence[int]]:
        return self._firsts[k]

    @cached_property
    def _firsts(self) -> tuple[list[list[int]], ...]:
        return tuple(first_alike(stage, placed) for stage, placed in zip(self.stages, self.plan.stages, strict=True))

    def work(self, rank: int, rows: int, cuts: Sequence[int] = ()) -> Rehearsal:
        """What a rank does in a step: each action as often as it comes, where most is held then."""
        key = self.kind_of_rank(rank)
        if key not in self.known:
            self.known[key] = self._whole(rank)
        return self.known[key]

    def _whole(self, rank: int) -> Rehearsal:
        run = self.acts_of(rank)
        most: dict[Action, int] = {}
        often: Counter[Action] = Counter()
        for action, held, _ in self.held(rank):
            most[action] = max(most.get(action, 0), held)
            often[action] += 1
        parts: list[Part] = list(run.prelude)
        for action, held in most.items():
            if inner := tuple(moved(run.acts[action].parts, held)):
                parts.append(Stretch(inner, often[action]))
        parts += [*run.update, *chain.from_iterable(run.gathers.values())]
        return Rehearsal(tuple(parts), run.parameters, run.buffers, run.gradients, run.optimizer, run.inputs)

    def held(self, rank: int) -> Iterator[tuple[Action, int, Acted]]:
        """In the order of a rank's actions: what was run for each, and the bytes held before it."""
        run = self.acts_of(rank)
        held = run.before
        for action in self.actions[rank]:
            ran = self.stand_in(action)
            yield ran, held, run.acts[ran]
            held += run.acts[ran].grows

    # -- time

    def played(self, rows: Sequence[int]) -> Played:
        """The step of all ranks; the rows are those of the plan."""
        simulated = simulate(self.schedule, self.seconds)
        free = simulate(self.schedule, lambda action: 0.0 if action.op in SENDS else self.seconds(action))
        return Step(self, simulated, simulated.step_s - free.step_s).played()

    def seconds(self, action: Action) -> float:
        """Seconds of an action: on the slowest rank of its group, or on the wire."""
        ran = self.stand_in(action)
        return self.network.crossing_s(self.messages(ran)) if action.op in SENDS else self.played_action(ran).step_s

    def played_action(self, action: Action) -> Played:
        """A compute action or REDUCE of all ranks of its stage, with the collectives inside it."""
        if action not in self.taken:
            stage = self.plan.stages[action.stage]
            works = {rank: self._rehearsal(rank, action) for rank in stage.rank_of}
            self.taken[action] = _played(stage, works, self._costs, self.network)
        return self.taken[action]

    def gathered(self, k: int) -> Played:
        """The parameters of a stage put together after the update."""
        if k not in self.taken:
            stage = self.plan.stages[k]
            works = {rank: Rehearsal(self.acts_of(rank).gathers[k]) for rank in stage.rank_of}
            self.taken[k] = _played(stage, works, self._costs, self.network)
        return self.taken[k]

    def _rehearsal(self, rank: int, action: Action) -> Rehearsal:
        run = self.acts_of(rank)
        key = self.kind_of_rank(rank), action
        if key not in self.known:
            first = run.prelude if action == self.first_of(rank) else ()
            self.known[key] = Rehearsal((*first, *run.acts[action].parts))
        return self.known[key]

    def first_of(self, rank: int) -> Action | None:
        """The first action that a rank computes: what comes ahead of the step takes its time there."""
        return next((action for action in self.actions[rank] if action.op in COMPUTES), None)

    # -- what crosses

    def messages(self, send: Action) -> Messages:
        """Bytes that a send moves, by the ranks that give and take them."""
        return self._messages[send]

    @cached_property
    def _messages(self) -> Mapping[Action, Messages]:
        sends = dict.fromkeys(self.stand_in(a) for own in self.schedule for a in own if a.op in SENDS)
        return {send: self._crossing(send) for send in sends}

    def _crossing(self, send: Action) -> Messages:
        backward = send.op in ("SEND_B", "SEND_G")
        peer = -1 if send.peer is None else send.peer
        pair = (peer, send.stage) if backward else (send.stage, peer)
        crossed = (self.pipeline.values if send.op in ("SEND_F", "SEND_B") else self.pipeline.parameters)[pair]
        sizes = self.crossing_sizes(pair, send.microbatch)
        found: dict[tuple[int, int], int] = {}
        for rank in self.plan.stages[send.stage].rank_of:
            boundary = self.boundary(crossed, pair, rank)
            traffic = boundary.traffic(send.microbatch, lambda: sizes, sum(sizes[0].rows.values()))
            for other, parts in traffic[backward].sends.items():
                if other != rank:
                    found[rank, other] = boundary.size_of(parts)
        return found

    def crossed_bytes(self) -> dict[tuple[int, int], int]:
        """Bytes that cross in a step, by the ranks that give and take them."""
        found: Counter[tuple[int, int]] = Counter()
        for own in self.schedule:
            for action in own:
                if action.op in SENDS:
                    found.update(self.messages(self.stand_in(action)))
        return dict(found)

    def traffic(self) -> tuple[Mapping[int, float], Mapping[int, float]]:
        """Bytes inside, and out of, each node: of stages and of collectives in them, as rings through their nodes."""
        inside: defaultdict[int, float] = defaultdict(float)
        out: defaultdict[int, float] = defaultdict(float)
        for (source, target), size in self.crossed_bytes().items():
            here, there = self.network.node_of(source), self.network.node_of(target)
            (inside if here == there else out)[here] += size
        leaving: dict[tuple[int, int, int], float] = {}
        sent_of: dict[Hashable, Mapping[tuple[int, int], int]] = {}
        for rank in self.plan.ranks:
            node, kind = self.network.node_of(rank), self.kind_of_rank(rank)
            if kind not in sent_of:
                sent_of[kind] = self._sent(rank)
            for (k, level), size in sent_of[kind].items():
                if (k, rank, level) not in leaving:
                    leaving.update(self._leaving(k, rank, level))
                leaves = leaving[k, rank, level]
                inside[node] += size * (1 - leaves)
                out[node] += size * leaves
        return inside, out

    def _sent(self, rank: int) -> Mapping[tuple[int, int], int]:
        """Bytes that a rank sends in collectives, by stage and level."""
        acts = self.acts_of(rank)
        often = Counter(self.stand_in(action) for action in self.actions[rank])
        done = [(act.stage, event, often[act] * n) for act in often for event, n in acts.acts[act].weighted]
        done += [(k, event, 1) for k, gathers in acts.gathers.items() for event in gathers]
        sent: Counter[tuple[int, int]] = Counter()
        for k, event, times in done:
            if event.collective:
                sent[k, event.level] += times * event.bytes
        return sent

    def _leaving(self, k: int, rank: int, level: int) -> dict[tuple[int, int, int], float]:
        """By stage, rank and level: the part of what each rank of a group sends around it that leaves its node."""
        places = self.places[k]
        mine = places[rank][:level] + places[rank][level + 1 :]
        members = [other for other, at in places.items() if at[:level] + at[level + 1 :] == mine]
        nodes = Counter(self.network.node_of(member) for member in members)
        share = {node: 0.0 if own == len(members) else 1 / own for node, own in nodes.items()}
        return {(k, member, level): share[self.network.node_of(member)] for member in members}

    def boundary(self, crossed: tuple[Crossed, ...], pair: tuple[int, int], rank: int) -> SilentBoundary:
        """What crosses between two stages as a rank of either sees it."""
        return SilentBoundary.between(self.plan, pair, crossed, self.grids, rank, self.exchanges.setdefault(pair, {}))

    def crossing_sizes(self, pair: tuple[int, int], m: int | None) -> tuple[StepSizes, StepSizes]:
        """The sizes of a microbatch at both ends; none for what crosses once per step."""
        nothing = StepSizes({}, {}, {(): 0})
        return (nothing, nothing) if m is None else (self._step_sizes(pair[0], m), self._step_sizes(pair[1], m))

    def _step_sizes(self, k: int, m: int) -> StepSizes:
        program, grid, total = self.study.program, self.grids[k], self.study.rows
        rows = grid.rows(total) if self.microbatches == 1 else grid.microbatch(total, m)
        number = None if self.microbatches == 1 else m
        symbols = batch_symbols(program.captured)
        return sizes_of_microbatch(program.hints, symbols, rows, first=not number, microbatch=number)


def first_alike(stage: Analysed, placed: StagePlan) -> list[list[int]]:
    """By level, each position's first with parts of the same sizes of all that is cut there, rows left aside."""
    decisions, axes, hints = stage.decisions, stage.program.axes, stage.program.hints
    layouts = [layout for modes in stage.rewritten.layouts.values() for layout in modes]
    sharded = {kind for layout in (*layouts, *decisions.stored.values()) for kind in layout}
    cuts = {(k.cut, hint(axes.size(k.place.axis), hints)) for k in sharded if isinstance(k, Sharded)}
    found: list[list[int]] = []
    for level, size in enumerate(placed.mesh):
        own = [(decisions.cuts[cut], units) for cut, units in sorted(cuts) if decisions.cuts[cut].level == level]
        shares = [round_shares(n, cut.weights, at_least_one=cut.at_least_one) for cut, n in own]
        parts = [tuple(share[position] for share in shares) for position in range(size)]
        found.append([parts.index(one) for one in parts])
    return found


def _played(
    stage: StagePlan, works: Mapping[int, Rehearsal], costs: Mapping[int, DeviceCost], network: Network
) -> Played:
    """By place in the ascending order of the stage's ranks."""
    return play(stage.mesh, stage.rank_of, works, costs, network)


@dataclass(frozen=True)
class PipelineTried(Tried):
    """A pipeline, played."""

    def rows_of(self, rank: int) -> int:
        """Rows of the global batch that go through a rank."""
        assert isinstance(self.candidate, PipelineCandidate)
        return self.candidate.rows_of(rank)
