"""A program cut into stages: every stage decided and rewritten on its own devices, and what crosses between them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from whalepy.errors import PlanError, WhaleError
from whalepy.planner.decide import Decisions, Orders, decide
from whalepy.planner.degrees import Degrees, settled
from whalepy.planner.mesh import Chain, arrange
from whalepy.planner.placing import Arrangement, Need, Place, arrange_stages, selection
from whalepy.primitives import Primitive, scope_by_id
from whalepy.primitives.recording import remember
from whalepy.program.analysis import Program, Value
from whalepy.program.dead_code import drop_unused
from whalepy.program.layout import Layout
from whalepy.program.taskgraphs import Crossing, Lending, Taskgraph, Taskgraphs, crosses_unknown, stages_in, taskgraphs
from whalepy.rewrite.crossing import given_layout, received_layout
from whalepy.rewrite.deferred import deferred
from whalepy.rewrite.microbatches import microbatched
from whalepy.rewrite.rewrite import rewrite
from whalepy.runtime.build import Ahead, Analysed, built, reanalysed, rewritten, row_layouts, subject_of


@dataclass(frozen=True)
class End:
    """A value where it leaves one stage, or comes into another."""

    program: Program
    decisions: Decisions
    key: Value
    """Where it stands in the program of the stage."""
    layout: Layout
    """One owner per element: types R and S."""


@dataclass(frozen=True)
class Crossed:
    """A value that crosses from one stage to another, at both ends."""

    source: End
    target: End
    learns: bool
    name: str
    """What the reading stage calls it: a placeholder, or a parameter."""
    output: int
    """Where it stands among the outputs of the giving stage; -1 for a parameter."""


@dataclass(frozen=True)
class Pipeline:
    """All stages of a program, and what crosses: values per microbatch, borrowed parameters per step."""

    stages: tuple[Analysed, ...]
    arrangement: Arrangement
    values: Mapping[tuple[int, int], tuple[Crossed, ...]]
    """By (giving stage, reading stage)."""
    parameters: Mapping[tuple[int, int], tuple[Crossed, ...]]
    """By (owner, borrower)."""
    owners: Mapping[str, int]
    scopes: tuple[Primitive, ...] = ()
    """Every scope of the program, by order of appearance."""

    @property
    def only(self) -> Analysed:
        """The stage of a program that has one. Raises PlanError for a pipeline."""
        if len(self.stages) != 1:
            raise PlanError(f"the program has {len(self.stages)} stages")
        return self.stages[0]

    @property
    def bases(self) -> tuple[tuple[Chain, ...], ...]:
        """The chains of scopes that made the levels of each stage."""
        return tuple(stage.chains for stage in self.stages)


def arranged(
    program: Program,
    speeds: Sequence[float],
    places: Sequence[Place],
    chunks: int = 1,
    *,
    idle: bool = True,
    loads: Sequence[int] | None = None,
    degrees: Degrees = (),
) -> Arrangement:
    """The devices of every stage of a program; `idle`: without stages too, some may be left out.

    `loads`: by operator, what each takes; its FLOPs where nothing is said. `degrees`: of the scopes that leave them
    open; where none is given, all devices that are left there.

    Raises AnnotationError where the cluster cannot meet the scopes.
    """
    known = settled(scopes_in(program), degrees)

    def own(scope: tuple[int, ...]) -> Chain:
        return tuple(known.get(p, p) for p in map(scope_by_id, scope))

    stages = stages_in(program)
    if not stages:
        chains = {own(op.scope) for op in program.operators if op.kind == "call"}
        clusters = {p for chain in chains for p in chain if p.kind == "cluster"}
        devices = selection([Need(tuple(chains), 1.0)], places)
        whole = Arrangement((), (devices,), dict.fromkeys(clusters), 1, known)
        return replace(whole, devices=(_fitting({whole.chain(chain) for chain in chains}, devices),)) if idle else whole
    if loads is not None:
        weighed = (replace(op, flops=load) for op, load in zip(program.operators, loads, strict=True))
        program = replace(program, operators=tuple(weighed))
    graphs = taskgraphs(program, stages, lambda scope: remember(own(scope)))
    needs = [_need(graph) for graph in graphs.stages]
    return replace(arrange_stages(needs, stages, speeds, places, chunks), settled=known)


def _fitting(chains: Collection[Chain], devices: tuple[int, ...]) -> tuple[int, ...]:
    """As many of the devices, the first ones, as scopes can share; all where no number of them fits."""
    for count in range(len(devices), 0, -1):
        with suppress(WhaleError):
            arrange(chains, count)
            return devices[:count]
    return devices


def _need(graph: Taskgraph) -> Need:
    calls = [op for op in graph.program.operators if op.kind == "call"]
    chains = dict.fromkeys(tuple(map(scope_by_id, op.scope)) for op in calls)
    return Need(tuple(chains), float(sum(op.flops for op in calls)))


def pipelined(
    program: Program,
    arrangement: Arrangement,
    speeds: Sequence[Sequence[float]],
    orders: Sequence[Orders] | None = None,
    *,
    bases: Sequence[tuple[Chain, ...]] = (),
    owners: Mapping[str, int] | None = None,
    keep_rows: bool = False,
    microbatches: int = 1,
    defers: bool = False,
) -> tuple[Pipeline, tuple[Orders, ...]]:
    """Decide and rewrite every stage; the orders of classes that each was decided by. `speeds` are by stage.

    `defers`: weight gradients are computed apart from those of inputs.
    Raises PlanError where the loss is no sum over rows and microbatches are asked for.
    """
    made, found = _pipelined(program, arrangement, speeds, orders, bases, owners, keep_rows, microbatches)
    return (_deferring(made) if defers else made), found


def _deferring(main: Pipeline) -> Pipeline:
    stages: list[Analysed] = []
    for k, stage in enumerate(main.stages):
        later, notes = deferred(stage.rewritten, stage.program)
        told = tuple(f"stage {k}: {note}" for note in notes) if len(main.stages) > 1 else notes
        stages.append(replace(stage, rewritten=later, notes=told))
    return replace(main, stages=tuple(stages))


def _pipelined(
    program: Program,
    arrangement: Arrangement,
    speeds: Sequence[Sequence[float]],
    orders: Sequence[Orders] | None,
    bases: Sequence[tuple[Chain, ...]],
    owners: Mapping[str, int] | None,
    keep_rows: bool,
    microbatches: int,
) -> tuple[Pipeline, tuple[Orders, ...]]:
    scopes = scopes_in(program)
    rescoped = _rescoped(program, arrangement)
    bases = bases or [()] * len(speeds)
    if not arrangement.stages:
        main, found = built(
            rescoped,
            speeds[0],
            orders[0] if orders else None,
            base=bases[0],
            keep_rows=keep_rows,
            microbatches=microbatches,
        )
        return Pipeline((main,), arrangement, {}, {}, dict(owners or {}), scopes), (found,)
    graphs = _cut(program, arrangement, owners)
    found = tuple(
        decide(subject_of(graph.program, base), own, orders[k] if orders else None)[1]
        for k, (graph, base, own) in enumerate(zip(graphs.stages, bases, speeds, strict=True))
    )
    chains = [subject_of(graph.program, base).all_chains for graph, base in zip(graphs.stages, bases, strict=True)]
    summed: dict[str, bool] = {}
    ahead: Program | None = None
    if microbatches > 1:
        cut = microbatched(program, subject_of(program))
        summed = dict(zip(program.captured.mutations, cut.summed, strict=True))
        main_program = reanalysed(program, cut.main)
        ahead = None if cut.prologue is None else reanalysed(program, cut.prologue)
        graphs = _cut(main_program, arrangement, owners)
    stages = tuple(
        _stage(graph, own, found[k], chains[k], keep_rows and k == len(graphs.stages) - 1)
        for k, (graph, own) in enumerate(zip(graphs.stages, speeds, strict=True))
    )
    stages = tuple(
        replace(
            stage,
            summed=tuple(summed.get(name, False) for name in stage.program.captured.mutations),
            prologue=None if ahead is None else _prologue(ahead, arrangement, stage, speeds[k], found[k]),
        )
        for k, stage in enumerate(stages)
    )
    return (
        Pipeline(
            stages,
            arrangement,
            _crossed(graphs, stages, graphs.crossings),
            _lent(graphs, stages, graphs.lendings),
            graphs.owners,
            scopes,
        ),
        found,
    )


def scopes_in(program: Program) -> tuple[Primitive, ...]:
    """Every scope of a program, by order of appearance."""
    return tuple(dict.fromkeys(p for op in program.operators for p in map(scope_by_id, op.scope)))


def with_scopes_of(program: Program, known: Sequence[Primitive]) -> Program:
    """The program inside scopes that are known from another capture of the same model.

    A scope written in the code that runs is another object in every capture. It is the first of the known ones, not yet
    taken, that was made at the same line with the same arguments.
    """
    own = scopes_in(program)
    left = [p for p in known if p not in own]
    same: dict[Primitive, Primitive] = {}
    for scope in own:
        match = next((p for p in left if (p.at, repr(p)) == (scope.at, repr(scope))), None)
        if scope not in known and match is not None:
            same[scope] = match
            left.remove(match)
    if not same:
        return program

    def renamed(scope: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(same.get(p, p).id for p in map(scope_by_id, scope))

    for node in program.captured.graph.graph.nodes:
        if "scope" in node.meta:
            node.meta["scope"] = renamed(node.meta["scope"])
    return replace(program, operators=tuple(replace(op, scope=renamed(op.scope)) for op in program.operators))


def _rescoped(program: Program, arrangement: Arrangement) -> Program:
    """The program with the scopes that a stage's levels are made of."""
    if not arrangement.scopes and not arrangement.settled:
        return program
    operators = tuple(replace(op, scope=_scope_inside(op.scope, arrangement)) for op in program.operators)
    return replace(program, operators=operators)


def _scope_inside(scope: tuple[int, ...], arrangement: Arrangement) -> tuple[int, ...]:
    return remember(arrangement.chain(tuple(map(scope_by_id, scope))))


def _cut(program: Program, arrangement: Arrangement, owners: Mapping[str, int] | None) -> Taskgraphs:
    graphs = taskgraphs(program, arrangement.stages, lambda scope: _scope_inside(scope, arrangement), owners)
    for crossing in graphs.crossings:
        if crosses_unknown(program, crossing.value):
            op = program.operators[crossing.value[0]]
            raise PlanError(
                f"{op.target} gives a value whose shape depends on data, and another stage reads it",
                at=op.where or None,
                fix="put the operators that make it and those that read it into one stage",
            )
    return graphs


def _stage(
    graph: Taskgraph, speeds: Sequence[float], orders: Orders, chains: tuple[Chain, ...], keep_rows: bool
) -> Analysed:
    subject = subject_of(graph.program, chains)
    decisions, _ = decide(subject, speeds, orders)
    made = rewrite(graph.program, decisions, _output_layouts(graph, decisions, keep_rows))
    return Analysed(graph.program, decisions, made, subject.all_chains)


def _output_layouts(graph: Taskgraph, decisions: Decisions, keep_rows: bool) -> Any:
    """Results and buffers whole (or by rows); what other stages read with one owner per element."""
    program = graph.program
    first = program.captured.results + len(program.captured.mutations)
    whole: Layout = ("R",) * len(decisions.mesh)
    rows = row_layouts(program, decisions) if keep_rows else {}

    def layout(i: int) -> Layout:
        if i < first:
            return rows.get(i, whole) if i < program.captured.results else whole
        return given_layout(program, decisions, graph.own[graph.given[i - first]])

    return layout


def _prologue(
    ahead: Program, arrangement: Arrangement, stage: Analysed, speeds: Sequence[float], orders: Orders
) -> Ahead | None:
    """What of the whole batch this stage must know before its microbatches."""
    names = [p.name for p in stage.program.captured.placeholders if p.name.startswith("prologue[")]
    if not names:
        return None
    wanted = [int(name[len("prologue[") : -1]) for name in names]
    captured = _with_results(ahead.captured, wanted)
    program = reanalysed(ahead, captured)
    graphs = taskgraphs(program, arrangement.stages[:1], lambda scope: _scope_inside(scope, arrangement))
    own = graphs.stages[0].program
    kept = {p.name for p in stage.program.captured.placeholders}
    foreign = [
        op
        for i, op in enumerate(own.operators)
        if op.random or (op.kind == "parameter" and own.placeholder(i).name not in kept)
    ]
    if foreign:
        raise PlanError(
            "microbatches need to know of the whole batch what depends on another stage",
            at=foreign[0].where or None,
            fix="leave out microbatches=, or compute it in the stage that uses it",
        )
    decisions, _ = decide(subject_of(own, stage.chains), speeds, orders)
    return Ahead(own, decisions, rewritten(own, decisions, keep_rows=True), tuple(names))


def _with_results(captured: Any, wanted: Sequence[int]) -> Any:
    """A captured graph that gives some of its results."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    flat: Any = graph.graph_copy(captured.graph.graph, copies)
    graph.output(tuple(flat[k] for k in wanted))
    drop_unused(graph)
    rows = tuple(captured.result_rows[k] for k in wanted)
    return replace(captured, graph=fx.GraphModule(captured.graph, graph), results=len(wanted), result_rows=rows)


def _crossed(
    graphs: Taskgraphs, stages: Sequence[Analysed], crossings: Sequence[Crossing]
) -> dict[tuple[int, int], tuple[Crossed, ...]]:
    found: dict[tuple[int, int], list[Crossed]] = {}
    for crossing in crossings:
        source, target = graphs.stages[crossing.source], graphs.stages[crossing.target]
        giver, reader = stages[crossing.source], stages[crossing.target]
        key = source.own[crossing.value]
        there = target.received[crossing.value]
        arrives = received_layout(reader.program, reader.decisions, there)
        program = giver.program
        first = program.captured.results + len(program.captured.mutations)
        found.setdefault((crossing.source, crossing.target), []).append(
            Crossed(
                End(program, giver.decisions, key, given_layout(program, giver.decisions, key)),
                End(reader.program, reader.decisions, (there, 0), arrives),
                crossing.learns,
                reader.program.placeholder(there).name,
                first + source.given.index(crossing.value),
            )
        )
    return {pair: tuple(values) for pair, values in found.items()}


def _lent(
    graphs: Taskgraphs, stages: Sequence[Analysed], lendings: Sequence[Lending]
) -> dict[tuple[int, int], tuple[Crossed, ...]]:
    found: dict[tuple[int, int], list[Crossed]] = {}
    for lending in lendings:
        ends = [_parameter_end(stages[k], lending.name) for k in (lending.owner, lending.borrower)]
        if ends[0] is None or ends[1] is None:
            raise PlanError(
                f"stage {lending.borrower} reads {lending.name} here; stage {lending.owner}, which keeps it, does not",
                fix="read the parameter in the same stages in training and in evaluation",
            )
        crossed = Crossed(ends[0], ends[1], lending.learns, lending.name, -1)
        found.setdefault((lending.owner, lending.borrower), []).append(crossed)
    return {pair: tuple(values) for pair, values in found.items()}


def _parameter_end(stage: Analysed, name: str) -> End | None:
    for i, op in enumerate(stage.program.operators):
        if op.kind == "parameter" and stage.program.placeholder(i).name == name:
            return End(stage.program, stage.decisions, (i, 0), stage.decisions.stored[name])
    return None
