"""Microbatches: a level in time. The loss must be a sum over rows; what divides it is computed beforehand.

Before:  loss = cross_entropy_sum(logits, t) / count(t)            one batch
After:   prologue: n = count(t) of the whole batch
         per microbatch: loss_m = cross_entropy_sum(logits_m, t_m) / n      the loss is their sum
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx
from torch.utils import _pytree as pytree

from whalepy.errors import PlanError
from whalepy.planner.decide import Subject
from whalepy.planner.levels import Assignment, Level, assign
from whalepy.primitives import replicate
from whalepy.program.analysis import Program, producer
from whalepy.program.call import is_tensor, tensor_operands
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
    made = assign(subject.operators, _level(program, subject), {})
    ahead = _computed_ahead(program, made)
    _check_additive(program, made, ahead)
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
    prologue = _prologue(captured, values) if values else None
    return Microbatched(main, prologue, _summed(program, made))


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
    )


def _computed_ahead(program: Program, made: Assignment) -> set[int]:
    """Operators without gradient that need the whole batch, and all that follow from them without gradient."""
    ahead: set[int] = set()
    for i, op in enumerate(program.operators):
        if op.kind != "call" or any(op.result_grad):
            continue
        after = any(p in ahead for p, _ in op.operands)
        if after or any(_needs_whole(program, made, i, k) for k in range(len(op.operands))):
            ahead.add(i)
    return ahead


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
                if _has_rows(program, key):
                    raise _not_additive(program, i)
            elif _needs_whole(program, made, i, k) or _cuts_whole(program, made, i, k):
                raise _not_additive(program, i)
        if _kernel(made, i) in _COUNTING:
            raise _not_additive(program, i)


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
    """A term that does not depend on rows counts once, not once per microbatch."""
    for i, op in enumerate(program.operators):
        node = program.nodes[i]
        if op.kind == "call" and i not in ahead:
            for k, operand in enumerate(tensor_operands(node)):
                added = operand_type(op, made.modes[i], k) == "P"
                if added and made.types[op.operands[k]] in ("R", "B"):
                    _wrap(graph, copies[node], copies[operand], operand)
    output = program.nodes[-1]
    loss = next(n for n in pytree.tree_leaves(output.args) if isinstance(n, fx.Node))
    source, r = producer(loss)
    if made.types[program.positions[source], r] in ("R", "B") and program.positions[source] not in ahead:
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
    for user in list(copies[node].users):
        original = next(n for n, c in copies.items() if c is user)
        if program.positions.get(original) not in ahead:
            user.replace_input_with(copies[node], new)
    return Placeholder(new.name, "input", f"prologue[{k}]", None, None)


def _prologue(captured: Captured, values: list[fx.Node]) -> Captured:
    graph, copies = _copy(captured.graph.graph)
    output = graph.find_nodes(op="output")[0]
    output.args = (tuple(copies[node] for node in values),)
    drop_unused(graph)
    return replace(captured, graph=fx.GraphModule({}, graph), results=len(values), mutations=())


def _summed(program: Program, made: Assignment) -> tuple[bool, ...]:
    outputs = [n for n in pytree.tree_leaves(program.nodes[-1].args) if isinstance(n, fx.Node) and is_tensor(n)]
    found: list[bool] = []
    for node in outputs[program.captured.results :]:
        source, r = producer(node)
        found.append(made.types[program.positions[source], r] == "P")
    return tuple(found)
