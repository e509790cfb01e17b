"""Microbatches: a level in time. The loss must be a sum over rows; what divides it is computed beforehand.

Before:  loss = cross_entropy_sum(logits, t) / count(t)            one batch
After:   prologue: n = count(t) of the whole batch
         per microbatch: loss_m = cross_entropy_sum(logits_m, t_m) / n      the loss is their sum
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
from torch import fx
from torch.utils import _pytree as pytree

from whalepy.errors import PlanError
from whalepy.planner.decide import Subject
from whalepy.planner.levels import Assignment, Level, assign
from whalepy.primitives import replicate
from whalepy.program.analysis import Program, producer
from whalepy.program.call import is_tensor, results, sizes_of, tensor_operands
from whalepy.program.capture import Captured, Placeholder
from whalepy.program.dead_code import drop_unused
from whalepy.program.functional_ops import first_only
from whalepy.program.layout import Sharded, operand_type

KERNEL_IN_TIME = "kernel_in_time"
"""In the meta of an operator: the local kernel that it takes because a microbatch is a part of the batch."""
_OF_PARTS = {"global_mean", "batch_statistics"}
"""Kernels that give the part of a whole that some rows make up."""
_COUNTING = {"masked_embedding", "masked_bags", "class_parallel"}
"""Kernels that must know where the rows of a part begin."""
IN_TIME = replicate(2)
"""Owner of the level that microbatches are: every operator is cut along the batch axis, or not at all."""


@dataclass(frozen=True)
class Microbatched:
    """The graph of one microbatch and the graph of what must be known of the whole batch before (None: nothing)."""

    main: Captured
    prologue: Captured | None
    summed: tuple[bool, ...]
    """Per mutated buffer: its new values are summed over microbatches (else those of any microbatch stand)."""


def microbatched(program: Program, subject: Subject) -> Microbatched:
    """Cut a program in time. Raises PlanError, naming the operator, where the loss is not a sum over rows."""
    made, ahead = _assigned(program, subject)
    _check_additive(program, made, ahead)
    _check_draws(program, ahead)
    captured = program.captured
    graph, copies = _copy(captured.graph.graph)
    values = _values_ahead(program, ahead)
    _mask_replicated_terms(program, made, ahead, graph, copies)
    _mark_kernels(program, made, ahead, copies)
    placeholders = list(captured.placeholders)
    for k, node in enumerate(values):
        placeholders.append(_read_from_prologue(program, node, k, graph, copies, ahead))
    drop_unused(graph)
    main = replace(captured, graph=fx.GraphModule({}, graph), placeholders=tuple(placeholders))
    prologue = _prologue(program, values) if values else None
    return Microbatched(main, prologue, _summed(program, made, ahead))


def _assigned(program: Program, subject: Subject) -> tuple[Assignment, set[int]]:
    """How every operator is cut in time, and which are computed ahead."""
    summed: set[tuple[int, int]] = set()
    while True:
        made = assign(subject.operators, _level(program, subject), {}, summed)
        needed = _sums_needed_whole(program, made)
        if needed <= summed:
            return made, _computed_ahead(program, made, {i for i, _ in summed})
        summed |= needed


def _level(program: Program, subject: Subject) -> Level:
    count = len(program.operators)
    return Level(
        index=0,
        size=2,
        owners=(IN_TIME,) * count,
        cuts=(0,) * count,
        row_cut=0,
        input_places=subject.rows,
        outer=(),
        minimum=1,
        received_cut=0,
        copies=True,
    )


def _computed_ahead(program: Program, made: Assignment, summed: set[int]) -> set[int]:
    """Operators without gradient that need the whole batch, those in `summed`, and all that follow from them without
    gradient. What gives the rows of the whole batch, for want of a rule, needs it too."""
    whole = {
        key[0]
        for i, op in enumerate(program.operators)
        if op.kind == "call"
        for k, key in enumerate(op.operands)
        if program.operators[key[0]].kind == "call" and _cuts_whole(program, made, i, k)
    }
    ahead: set[int] = set()
    for i, op in enumerate(program.operators):
        if op.kind != "call" or any(op.result_grad):
            continue
        after = i in summed or i in whole or any(p in ahead for p, _ in op.operands)
        if after or any(_needs_whole(program, made, i, k) for k in range(len(op.operands))):
            ahead.add(i)
    return ahead


def _sums_needed_whole(program: Program, made: Assignment) -> set[tuple[int, int]]:
    """Partial sums without gradient that something with a gradient needs whole: it divides by them, say."""
    return {
        key
        for i, op in enumerate(program.operators)
        if op.kind == "call" and any(op.result_grad)
        for k, key in enumerate(op.operands)
        if made.types[key] == "P" and _needs_whole(program, made, i, k)
        if not any(program.operators[key[0]].result_grad)
    }


def _needs_whole(program: Program, made: Assignment, i: int, k: int) -> bool:
    op = program.operators[i]
    now, want = made.types[op.operands[k]], operand_type(op, made.modes[i], k)
    return (now == "P" or isinstance(now, Sharded)) and want != now


def _check_additive(program: Program, made: Assignment, ahead: set[int]) -> None:
    for i, op in enumerate(program.operators):
        if op.kind != "call" or i in ahead:
            continue
        for k, key in enumerate(op.operands):
            if key[0] in ahead:
                if _has_rows(program, key) and not _takes_rows(program, made, i, k):
                    raise _not_additive(program, i)
            elif _needs_whole(program, made, i, k) or _cuts_whole(program, made, i, k):
                raise _not_additive(program, i)
        if _kernel(made, i) in _COUNTING:
            raise _not_additive(program, i)


def _check_draws(program: Program, ahead: set[int]) -> None:
    """What is drawn for every microbatch cannot be known before them."""
    end = len(program.operators) - 1
    both = _behind(program, ahead, set()) & _behind(program, {end}, ahead)
    for i in sorted(both):
        op = program.operators[i]
        if op.random:
            raise PlanError(
                f"{op.target} draws numbers for each microbatch, and something is computed of those of all of them",
                at=op.where or None,
                fix="leave out microbatches=, or compute it of values without random numbers",
            )


def _behind(program: Program, ends: set[int], beyond: set[int]) -> set[int]:
    """Operators that some others depend on, these included, as far back as `beyond`."""
    found: set[int] = set()
    left = list(ends)
    while left:
        i = left.pop()
        if i not in found:
            found.add(i)
            left.extend(p for p, _ in program.operators[i].operands if p not in beyond)
    return found


def _cuts_whole(program: Program, made: Assignment, i: int, k: int) -> bool:
    """Whether rows would have to be taken from a value that counts over the whole batch.

    Rows counted to index them are the exception: within a microbatch they count from its first row, and so does what
    they index.
    """
    op = program.operators[i]
    if _counts_rows(program, op.operands[k]):
        option = made.modes[i].option
        indexes = option is not None and option.kernel == "local_index"
        return not indexes and "iota" not in program.nodes[i].meta
    now, want = made.types[op.operands[k]], operand_type(op, made.modes[i], k)
    return isinstance(want, Sharded) and not isinstance(now, Sharded)


def _counts_rows(program: Program, key: tuple[int, int]) -> bool:
    """Whether a value counts 0, 1, ... along the batch axis."""
    counted = program.nodes[key[0]].meta.get("iota")
    return counted is not None and program.batch in program.axes.leaves(program.dims[key[0]][key[1]][counted])


def _has_rows(program: Program, key: tuple[int, int]) -> bool:
    dims = program.dims[key[0]][key[1]]
    return any(program.batch in program.axes.leaves(dim) for dim in dims)


def _takes_rows(program: Program, made: Assignment, i: int, k: int) -> bool:
    """Whether an operator takes only its own rows of a value that is computed ahead."""
    op = program.operators[i]
    want, at = operand_type(op, made.modes[i], k), _row_dim(program, op.operands[k])
    return at is not None and isinstance(want, Sharded) and (want.place.dim, want.place.axis) == (at, program.batch)


def _row_dim(program: Program, key: tuple[int, int]) -> int | None:
    """The dim of the rows, if nothing else of a value's shape depends on their number."""
    sizes = [sympy.sympify(size) for size in sizes_of(results(program.nodes[key[0]])[key[1]])]
    dims = [program.axes.leaves(dim) for dim in program.dims[key[0]][key[1]]]
    rows = [d for d, leaves in enumerate(dims) if program.batch in leaves]
    if len(rows) != 1 or dims[rows[0]] != (program.batch,):
        return None
    counted = sizes[rows[0]].free_symbols
    return None if any(size.free_symbols & counted for d, size in enumerate(sizes) if d != rows[0]) else rows[0]


def _not_additive(program: Program, i: int) -> PlanError:
    op = program.operators[i]
    return PlanError(
        f"the loss is not a sum over rows: {op.target} needs all rows at once, so microbatches would change it",
        at=op.where or None,
        fix="leave out microbatches=, or make the loss a sum or a mean over rows",
    )


def _values_ahead(program: Program, ahead: set[int]) -> list[fx.Node]:
    """Nodes of the captured graph that the prologue computes and others read."""
    found: dict[fx.Node, None] = {}
    for node in program.captured.graph.graph.nodes:
        if node.op not in ("call_function", "output") or program.positions.get(node) in ahead:
            continue
        for operand in tensor_operands(node):
            if program.positions[producer(operand)[0]] in ahead and not _is_getitem(node):
                found.setdefault(operand)
    return list(found)


def _is_getitem(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _copy(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = new.node_copy(node, lambda n: copies[n])
    return new, copies


def _mask_replicated_terms(
    program: Program, made: Assignment, ahead: set[int], graph: fx.Graph, copies: dict[fx.Node, fx.Node]
) -> None:
    """A term that does not depend on rows, or is known of all of them, counts once, not once per microbatch."""

    def whole(key: tuple[int, int]) -> bool:
        return key[0] in ahead or made.types[key] in ("R", "B")

    for i, op in enumerate(program.operators):
        node = program.nodes[i]
        if op.kind == "call" and i not in ahead:
            for k, operand in enumerate(tensor_operands(node)):
                if operand_type(op, made.modes[i], k) == "P" and whole(op.operands[k]):
                    _wrap(graph, copies[node], copies[operand], operand)
    output = program.nodes[-1]
    loss = next(n for n in pytree.tree_leaves(output.args) if isinstance(n, fx.Node))
    source, r = producer(loss)
    if whole((program.positions[source], r)):
        _wrap(graph, copies[output], copies[loss], loss)


def _mark_kernels(program: Program, made: Assignment, ahead: set[int], copies: dict[fx.Node, fx.Node]) -> None:
    """A mean over rows divides by those of the whole batch, also where a microbatch is whole on every level."""
    for i, node in enumerate(program.nodes):
        kernel = _kernel(made, i)
        if i not in ahead and kernel in _OF_PARTS:
            copies[node].meta[KERNEL_IN_TIME] = kernel


def _kernel(made: Assignment, i: int) -> str | None:
    option = made.modes[i].option
    return None if option is None else option.kernel


def _wrap(graph: fx.Graph, user: fx.Node, operand: fx.Node, original: fx.Node) -> None:
    with graph.inserting_before(user):
        masked = graph.call_function(first_only, (operand,))
    masked.meta.update({k: v for k, v in original.meta.items() if k != "iota"})
    user.replace_input_with(operand, masked)


def _read_from_prologue(
    program: Program, node: fx.Node, k: int, graph: fx.Graph, copies: dict[fx.Node, fx.Node], ahead: set[int]
) -> Placeholder:
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        new = graph.placeholder(f"prologue_{k}")
    new.meta["val"] = node.meta["val"]
    computed = {copies[other] for other, i in program.positions.items() if i in ahead}
    for user in list(copies[node].users):
        if user not in computed:
            user.replace_input_with(copies[node], new)
    return Placeholder(new.name, "input", f"prologue[{k}]", None, None, _rows_of(program, node))


def _rows_of(program: Program, node: fx.Node) -> int | None:
    source, r = producer(node)
    return _row_dim(program, (program.positions[source], r))


def _prologue(program: Program, values: list[fx.Node]) -> Captured:
    captured = program.captured
    graph, copies = _copy(captured.graph.graph)
    output = graph.find_nodes(op="output")[0]
    output.args = (tuple(copies[node] for node in values),)
    drop_unused(graph)
    rows = tuple(_rows_of(program, node) for node in values)
    module = fx.GraphModule({}, graph)
    return replace(captured, graph=module, results=len(values), mutations=(), result_rows=rows)


def _summed(program: Program, made: Assignment, ahead: set[int]) -> tuple[bool, ...]:
    outputs = [n for n in pytree.tree_leaves(program.nodes[-1].args) if isinstance(n, fx.Node) and is_tensor(n)]
    found: list[bool] = []
    for node in outputs[program.captured.results :]:
        source, r = producer(node)
        i = program.positions[source]
        found.append(made.types[i, r] == "P" and i not in ahead)
    return tuple(found)
