"""The programs of all ranks as text, the order of their actions, and their verification, at the example's sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import sympy

from whalepy.errors import PlanError
from whalepy.planner.decide import Decisions
from whalepy.planner.plan import Plan, StagePlan
from whalepy.planner.schedule.actions import MESSAGES, SENDS, Action, Crossing, Lending, Schedule
from whalepy.planner.schedule.generators import forward_only
from whalepy.planner.schedule.kinds import compute_actions
from whalepy.planner.schedule.lowering import lowered
from whalepy.planner.schedule.messages import Message, verify_messages
from whalepy.planner.schedule.releasing import releasing
from whalepy.planner.schedule.verify import verify as verify_schedule
from whalepy.program.analysis import Program
from whalepy.rewrite.exchanges import collect
from whalepy.rewrite.explain import explain_text
from whalepy.rewrite.printing import RankProgram, Ranks, program_text, rank_program
from whalepy.rewrite.rewrite import Rewritten
from whalepy.rewrite.sizes import Coordinates, SizesAt
from whalepy.rewrite.verify import verify
from whalepy.runtime.boundary import Boundary, Exchanges
from whalepy.runtime.build import Analysed
from whalepy.runtime.extents import Extents, Grid, StepSizes, grid_of
from whalepy.runtime.pipeline import Pipeline
from whalepy.runtime.row_order import needs_row_order
from whalepy.runtime.steps import batch_symbols, rows_in, sizes_of_microbatch


def example_sizes(
    program: Program, decisions: Decisions, microbatches: int = 1, *, outer: int | None = None, whole: bool = False
) -> SizesAt:
    """Sizes of the first microbatch (or of the whole step) of the example inputs, for the rank at given coordinates."""
    hints: Mapping[sympy.Symbol, int] = program.hints
    grid = Grid(decisions.mesh, decisions.cuts, decisions.row_cuts, outer, microbatches)
    total = rows_in(program.captured, hints)
    rows = grid.rows(total) if whole else grid.microbatch(total, 0)
    sizes = sizes_of_microbatch(hints, batch_symbols(program.captured), rows, first=True)

    def at(coordinates: Coordinates) -> Extents:
        return Extents(grid, coordinates, sizes)

    return at


def actions_of(main: Pipeline, plan: Plan, rank: int, microbatches: int, *, training: bool) -> tuple[Action, ...]:
    """What a rank does in a step, in order; nothing on an idle rank."""
    schedule = schedule_of(main, plan, microbatches, training=training)
    return next((own for own in schedule if own and own[0].stage in plan.stages_of(rank)), ())


def schedule_of(main: Pipeline, plan: Plan, microbatches: int, *, training: bool) -> Schedule:
    """The actions of each group of devices that share their stages."""
    return releasing(_lowered(main, plan, microbatches, training=training))


def _lowered(main: Pipeline, plan: Plan, microbatches: int, *, training: bool) -> Schedule:
    crossings = [Crossing(*pair, any(v.learns for v in values)) for pair, values in main.values.items()]
    lendings = [Lending(*pair, any(v.learns for v in values)) for pair, values in main.parameters.items()]
    hosts = plan.hosts
    if training:
        return lowered(compute_actions(plan.schedule, hosts, microbatches), crossings, lendings, trained(main))
    plain = [replace(crossing, backward=False) for crossing in crossings]
    lent = [replace(lending, backward=False) for lending in lendings]
    return lowered(forward_only(hosts, microbatches), plain, lent, ())


def trained(main: Pipeline) -> tuple[int, ...]:
    """The stages through which the backward pass goes: something in them, or before them, learns."""
    found: list[int] = []
    for k, stage in enumerate(main.stages):
        learns = any(any(op.result_grad) for op in stage.program.operators if op.kind in ("parameter", "received"))
        ends = any(v.learns for (source, _), values in main.values.items() if source == k for v in values)
        if learns and (ends or stage.program.captured.results):
            found.append(k)
    return tuple(found)


def programs_of(main: Pipeline, plan: Plan) -> Callable[[int], RankProgram]:
    """Makes the program of a rank; for microbatches, below what is computed of the whole batch before them."""

    def of(rank: int) -> RankProgram:
        mine = plan.stages_of(rank)
        made = [_program_of_stage(main.stages[k], plan, k, rank) for k in mine]
        if len(main.stages) == 1:
            return made[0]
        actions = " ".join(map(str, actions_of(main, plan, rank, plan.microbatches, training=True)))
        parts = [f"stage {k} of {len(main.stages)}\n{one.text}" for k, one in zip(mine, made, strict=True)]
        return replace(made[0], text="\n\n".join([f"actions of a step: {actions}", *parts]))

    return of


def _program_of_stage(stage: Analysed, plan: Plan, k: int, rank: int) -> RankProgram:
    placed = plan.stages[k]
    ranks = Ranks(stage.chains, placed.rank_of)
    sizes = example_sizes(stage.program, stage.decisions, plan.microbatches, outer=placed.outer)
    made = rank_program(stage.rewritten, stage.program, stage.decisions, ranks, rank, sizes)
    if stage.prologue is None:
        return made
    ahead = stage.prologue
    whole = example_sizes(ahead.program, ahead.decisions, plan.microbatches, outer=placed.outer, whole=True)
    text = program_text(ahead.rewritten, ahead.program, ahead.decisions, ranks, rank, whole)
    return replace(made, text=f"once per step, on the whole batch:\n{text}\n\nper microbatch:\n{made.text}")


def notes_of(main: Pipeline) -> tuple[str, ...]:
    """What runs replicated for want of a rule, along which classes split scopes were cut, and what of the model the
    capture does not keep; a line each."""
    found = [line for s in main.stages for line in explain_text(s.program, s.decisions, s.chains).splitlines()]
    schedule = [note for stage in main.stages for note in stage.notes]
    return (*dict.fromkeys(found), *schedule, *main.stages[0].program.captured.warnings)


def verify_ranks(main: Pipeline, plan: Plan, microbatches: int, *, training: bool = True) -> None:
    """Verify the programs of all ranks together, and the order of their actions. Raises VerificationError.

    PlanError: something needs the rows of the whole batch in their order, and ranks hold them by microbatches.
    """
    for stage, placed in zip(main.stages, plan.stages, strict=True):
        _check_order_of_rows(stage, placed, plan, microbatches)
        verify_stage(stage, placed, microbatches, training=training)
        if stage.prologue is not None:
            ahead = stage.prologue
            whole = example_sizes(ahead.program, ahead.decisions, microbatches, outer=placed.outer, whole=True)
            _verify(ahead.program, ahead.rewritten, placed.mesh, placed.rank_of, whole, backward=False)
    if len(main.stages) > 1 and training:
        crossings = [Crossing(*pair, any(v.learns for v in values)) for pair, values in main.values.items()]
        lendings = [Lending(*pair, any(v.learns for v in values)) for pair, values in main.parameters.items()]
        schedule = schedule_of(main, plan, microbatches, training=True)
        verify_schedule(schedule, plan.hosts, crossings, lendings, microbatches, trained(main))
        verify_messages(messages_of(main, plan, schedule))


def verify_stage(stage: Analysed, placed: StagePlan, microbatches: int, *, training: bool) -> None:
    """Verify what the ranks of a stage issue for a microbatch. Raises VerificationError."""
    sizes = example_sizes(stage.program, stage.decisions, microbatches, outer=placed.outer)
    _verify(stage.program, stage.rewritten, placed.mesh, placed.rank_of, sizes, backward=training)


def _check_order_of_rows(stage: Analysed, placed: StagePlan, plan: Plan, microbatches: int) -> None:
    inside = placed.row_cuts[len(placed.mesh) if placed.outer is None else placed.outer :]
    part = stage if microbatches == 1 else stage.prologue
    if part is None or plan.microbatches == 1 or all(cut is None for cut in inside):
        return
    if needs_row_order(part.program, part.rewritten):
        raise PlanError(
            "an operator needs the rows of the whole batch in their order, but ranks inside a stage hold them by "
            "microbatches",
            fix="leave out microbatches=, or put the replicate scope around the stages",
        )


def messages_of(main: Pipeline, plan: Plan, schedule: Schedule) -> dict[int, list[Message]]:
    """What each rank sends to and expects of each other one in a step at the example's sizes, in its order."""
    ends = _Ends(main, plan)
    return {
        rank: [message for action in actions if action.op in MESSAGES for message in ends.messages(action, rank)]
        for actions in schedule
        for rank in (plan.stages[actions[0].stage].rank_of if actions else ())
    }


@dataclass
class _Ends:
    """The boundaries of all ranks at the example's sizes."""

    main: Pipeline
    plan: Plan
    shared: dict[Any, dict[Any, Exchanges]] = field(default_factory=dict[Any, dict[Any, Exchanges]])
    """Per boundary, of values or of parameters, which may have the same sizes: a microbatch may have no rows."""
    known: dict[Any, Boundary] = field(default_factory=dict[Any, Boundary])

    @cached_property
    def grids(self) -> list[Grid]:
        """How each stage cuts the rows."""
        return [grid_of(self.plan, stage) for stage in self.plan.stages]

    def messages(self, action: Action, rank: int) -> Iterator[Message]:
        """The messages of one send or receive of a rank; none to itself."""
        assert action.peer is not None
        backward = action.op in ("SEND_B", "RECV_B", "SEND_G", "RECV_G")
        gives = action.op in ("SEND_F", "SEND_P", "RECV_B", "RECV_G")
        pair = (action.stage, action.peer) if gives else (action.peer, action.stage)
        boundary = self._boundary(pair, rank, once=action.op[-1] in "PG")
        here, there = (self._sizes(stage, action.microbatch) for stage in pair)
        key = tuple(here.rows.items()), tuple(there.rows.items())
        traffic = boundary.traffic(key, lambda: (here, there), sum(here.rows.values()))[backward]
        route = traffic.sends if action.op in SENDS else traffic.receives
        for other, parts in route.items():
            if other != rank:
                dtypes = "+".join(dict.fromkeys(str(boundary.dtypes[part.value]) for part in parts))
                yield Message(action, other, sum(part.elements for part in parts), dtypes)

    def _boundary(self, pair: tuple[int, int], rank: int, *, once: bool) -> Boundary:
        key = pair, rank, once
        if key not in self.known:
            crossed = (self.main.parameters if once else self.main.values)[pair]
            shared = self.shared.setdefault((pair, once), {})
            self.known[key] = Boundary.between(self.plan, pair, crossed, self.grids, rank, shared)
        return self.known[key]

    def _sizes(self, stage: int, microbatch: int | None) -> StepSizes:
        """Of a microbatch; none for what crosses once per step."""
        if microbatch is None:
            return StepSizes({}, {}, {(): 0})
        program, grid = self.main.stages[0].program, self.grids[stage]
        symbols = batch_symbols(program.captured)
        rows = grid.microbatch(rows_in(program.captured, program.hints), microbatch)
        return sizes_of_microbatch(program.hints, symbols, rows, first=microbatch == 0, microbatch=microbatch)


def _verify(
    program: Program,
    rewritten: Rewritten,
    mesh: Sequence[int],
    rank_of: Sequence[int],
    sizes_at: SizesAt,
    *,
    backward: bool,
) -> None:
    verify(collect(rewritten, program, mesh, rank_of, sizes_at, backward=backward))
