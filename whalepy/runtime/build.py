"""From a model to one rank's program: capture, canonicalise, analyse, decide, rewrite."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from whalepy.planner.decide import Decisions, Orders, Subject, decide
from whalepy.planner.levels import Operators
from whalepy.planner.mesh import Chain
from whalepy.primitives import Primitive, scope_by_id
from whalepy.program.analysis import Program, analyse
from whalepy.program.canonicalise import canonicalise
from whalepy.program.capture import Captured, capture
from whalepy.program.capture_wrapper import Wants
from whalepy.program.costs import hint
from whalepy.program.layout import Layout, Sharded
from whalepy.program.options import Place
from whalepy.rewrite.crossing import row_place
from whalepy.rewrite.microbatches import microbatched
from whalepy.rewrite.rewrite import Rewritten, rewrite


@dataclass(frozen=True)
class Recipe:
    """What of compile's arguments decides the captured program."""

    model: nn.Module
    loss_fn: Callable[..., Any] | None = None
    batch_dim: Any = 0
    sync_batchnorm: bool = False


@dataclass(frozen=True)
class Ahead:
    """What microbatches must know of the whole batch: computed before them."""

    program: Program
    decisions: Decisions
    rewritten: Rewritten
    names: tuple[str, ...]
    """What the program of a microbatch calls the results."""


@dataclass(frozen=True)
class Analysed:
    """A program with its axes, its decisions and its rewritten graph."""

    program: Program
    decisions: Decisions
    rewritten: Rewritten
    chains: tuple[Chain, ...] = ()
    prologue: Ahead | None = None
    """What microbatches must know of the whole batch."""
    summed: tuple[bool, ...] = ()
    """Per mutated buffer: its new values are summed over microbatches."""
    notes: tuple[str, ...] = ()
    """What of the schedule it cannot follow."""


def captured_program(
    recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool, wants: Wants
) -> Captured:
    """The canonical captured graph for arguments like these (their values do not matter)."""
    captured = capture(
        recipe.model, args, kwargs, loss_fn=recipe.loss_fn, batch_dim=recipe.batch_dim, training=training, wants=wants
    )
    canonicalise(captured.graph)
    return captured


def analysed(captured: Captured, shapes: list[tuple[int, ...] | None], *, sync_batchnorm: bool = False) -> Program:
    """The axes and operators of a captured graph, costed for inputs of these shapes."""
    program = analyse(captured, captured.bind(shapes))
    return _with_whole_statistics(program) if sync_batchnorm else program


def _with_whole_statistics(program: Program) -> Program:
    """Batch statistics over all rows: no operator that takes them is cut by rows."""
    operators = tuple(
        replace(op, options=tuple(way for way in op.options if way.kernel != "batch_statistics"))
        for op in program.operators
    )
    return replace(program, operators=operators)


def built(
    program: Program,
    speeds: Sequence[float],
    orders: Orders | None,
    *,
    base: tuple[Chain, ...] = (),
    keep_rows: bool = False,
    microbatches: int = 1,
) -> tuple[Analysed, Orders]:
    """Decide and rewrite a program; the orders of classes it was decided by. For microbatches it is cut in time."""
    subject = subject_of(program, base)
    decisions, found = decide(subject, speeds, orders)
    if microbatches == 1:
        graph = rewritten(program, decisions, keep_rows=keep_rows)
        return Analysed(program, decisions, graph, subject.all_chains), found
    cut = microbatched(program, subject)
    main, _ = built(reanalysed(program, cut.main), speeds, found, base=subject.all_chains)
    ahead = None
    if cut.prologue is not None:
        whole, _ = built(reanalysed(program, cut.prologue), speeds, found, base=subject.all_chains, keep_rows=True)
        names = tuple(f"prologue[{k}]" for k in range(cut.prologue.results))
        ahead = Ahead(whole.program, whole.decisions, whole.rewritten, names)
    return replace(main, chains=subject.all_chains, prologue=ahead, summed=cut.summed), found


def reanalysed(program: Program, captured: Captured) -> Program:
    """The analysis of a part of a program, at the same sizes."""
    synchronised = not any(way.kernel == "batch_statistics" for op in program.operators for way in op.options)
    made = analyse(captured, program.hints)
    return _with_whole_statistics(made) if synchronised else made


def subject_of(program: Program, base: tuple[Chain, ...] = ()) -> Subject:
    """What the planner sees of a program; `base` are the chains of the training program, for another one."""
    axes = program.axes

    def leaf_of(operator: int, result: int, place: Place) -> int:
        return axes.leaves(program.dims[operator][result][place.dim])[place.term]

    operators = Operators(
        program.operators,
        program.classes,
        program.batch,
        leaf_of,
        lambda axis: hint(axes.size(axis), program.hints),
    )
    names = {i: program.placeholder(i).name for i, op in enumerate(program.operators) if op.kind == "parameter"}
    return Subject(
        operators=operators,
        chains=tuple(_chain(op.scope) for op in program.operators),
        names=names,
        rows=_row_places(program),
        parameter_dims={
            name: tuple(_dim_classes(program, dim) for dim in program.dims[i][0]) for i, name in names.items()
        },
        base=base,
    )


def _chain(scope: tuple[int, ...]) -> tuple[Primitive, ...]:
    return tuple(scope_by_id(i) for i in scope)


def _dim_classes(program: Program, dim: tuple[int, ...]) -> tuple[str, ...]:
    axes = program.axes
    return tuple(
        dict.fromkeys(program.classes[axis] for leaf in axes.leaves(dim) for axis in axes.shardable_inside(leaf))
    )


def _row_places(program: Program) -> dict[int, Place]:
    """Where the rows stand in each input, and each value from another stage, that has them."""
    leaves = (i for i, op in enumerate(program.operators) if op.kind in ("input", "received"))
    return {i: place for i in leaves if (place := row_place(program, i)) is not None}


def rewritten(program: Program, decisions: Decisions, *, keep_rows: bool = False) -> Rewritten:
    """The program that all ranks run; `keep_rows` leaves the results cut by rows as the inputs are."""
    if not keep_rows:
        return rewrite(program, decisions)
    layouts = row_layouts(program, decisions)
    return rewrite(program, decisions, layouts.__getitem__)


def row_layouts(program: Program, decisions: Decisions) -> Mapping[int, Layout]:
    """The layout of each output that has rows, cut as the rows of the inputs are."""
    whole: Layout = ("R",) * len(decisions.mesh)
    output = len(program.operators) - 1
    found: dict[int, Layout] = {}
    for i, (operator, result) in enumerate(program.operators[output].operands):
        found[i] = whole
        dims = program.dims[operator][result]
        for d, dim in enumerate(dims):
            if program.batch is not None and program.axes.leaves(dim) == (program.batch,):
                place = Place(d, 0, program.batch)
                found[i] = tuple("R" if cut is None else Sharded(place, cut) for cut in decisions.row_cuts)
                break
    return found


_COPIES = ("aten.clone", "aten.contiguous")


def fingerprint(program: Program) -> tuple[str, ...]:
    """One line per operator; two ranks run the same program exactly if theirs are equal.

    Copies that change nothing but the order in memory are left out: attention has another order on each kind of device,
    so that a model on the meta device has copies where the same model on a CPU has none.
    """
    scopes: dict[int, int] = {}
    lines: list[str] = []
    source: dict[int, int] = {}
    """Operators to the lines that stand for them."""
    for i, (op, node, dims) in enumerate(zip(program.operators, program.nodes, program.dims, strict=True)):
        operands = tuple((source[k], result) for k, result in op.operands)
        if op.target in _COPIES and len(operands) == 1:
            source[i] = operands[0][0]
            continue
        source[i] = len(lines)
        chain = [scopes.setdefault(scope, len(scopes)) for scope in op.scope] if op.kind == "call" else []
        sizes = [[[str(program.axes.size(axis)) for axis in dim] for dim in value] for value in dims]
        constants = [a for a in node.args if isinstance(a, int | float | bool | str)]
        lines.append(f"{op.name} {op.target} {operands} {sizes} {op.result_grad} {chain} {constants}")
    return tuple(lines)


def identity(program: Program) -> str:
    """What a plan knows its program by: the fingerprint without the names of operators, which count copies too."""
    lines = [line.partition(" ")[2] for line in fingerprint(program)]
    return hashlib.blake2b(repr(lines).encode(), digest_size=8).hexdigest()
