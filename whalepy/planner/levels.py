"""Which axis each operator is cut along on one level of a virtual device.

Decisions are axis classes, not operators: a scope has an ordered list of classes and an operator takes the first one
that is legal for it. `replicate` has the batch axis only. For `split` the order is searched: compute that stays whole
and bytes that bridges move are weighed against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from whalepy.primitives import Primitive
from whalepy.program.layout import (
    REPLICATED,
    Layout,
    Mode,
    Operator,
    Sharded,
    Type,
    gradient_kind,
    operand_type,
    result_type,
    same_spot,
    value_kind,
)
from whalepy.program.options import Option, Place

STACKABLE = frozenset({"masked_embedding", "masked_bags", "local_index", "global_mean", "batch_statistics"})
"""Kernels that serve several levels at once."""
OFFSET_KERNELS = {"masked_embedding": 0, "masked_bags": 0, "local_index": 0, "class_parallel": 0}
"""Kernels that count from the first element held: the operand whose cut term must be the leading one of its dim."""
FLOPS_PER_BYTE = 20.0
"""Weight of a byte moved against a FLOP computed, where a split is asked for anyway (assumption, low on purpose: a
split that the user wrote down is also about memory)."""
BACKWARD = 3
"""Forward and backward together cost three forwards (two products in the backward of each)."""


@dataclass(frozen=True)
class Operators:
    """The program as the level solver sees it."""

    items: tuple[Operator, ...]
    classes: Mapping[int, str]
    batch: int | None
    leaf_of: Callable[[int, int, Place], int]
    """(operator, result, place) -> the leaf axis there."""
    hint: Callable[[int], int]
    """Size of an axis at the example inputs."""

    @cached_property
    def parameter_only(self) -> tuple[bool, ...]:
        """Whether an operator's ancestors are parameters and constants, at least one a parameter."""
        found: list[bool] = []
        fixed: list[bool] = []  # constants, and what is made of them and of sizes
        for op in self.items:
            sources = [i for i, _ in op.operands]
            plain = op.kind == "call" and not op.random
            fixed.append(op.kind == "constant" or (plain and all(fixed[i] for i in sources)))
            own = plain and any(found[i] for i in sources) and all(found[i] or fixed[i] for i in sources)
            found.append(op.kind == "parameter" or own)
        return tuple(found)


@dataclass(frozen=True)
class Level:
    """One level to solve: who owns it where, how it is cut, and what outer levels have decided."""

    index: int
    size: int
    owners: tuple[Primitive | None, ...]
    """Per operator."""
    cuts: tuple[int, ...]
    """Per operator: the cut its owner uses."""
    row_cut: int | None
    input_places: Mapping[int, Place]
    """Inputs, and values from other stages, that have rows: where."""
    outer: tuple[tuple[Mode, ...], ...]
    """Per outer level, the mode of every operator."""
    minimum: int
    """Fewest units an axis must have to be cut: the positions with a positive weight."""
    received_cut: int | None = None
    """The cut of the rows of what other stages give; None: every position gets it whole."""
    copies: bool = False
    """Whether rows that are made of parameters alone, as copies of one, are cut too: parts of the rows are all there
    is of them in a microbatch."""


@dataclass
class Assignment:
    """Modes of one level, and the type of every value on it."""

    modes: list[Mode] = field(default_factory=list[Mode])
    types: dict[tuple[int, int], Type] = field(default_factory=dict[tuple[int, int], Type])
    parameters: dict[int, Type] = field(default_factory=dict[int, Type])
    """Per parameter operator: the type in which it is read."""
    summed: set[tuple[int, int]] = field(default_factory=set[tuple[int, int]])
    """Partial sums that some operator so far needs whole: for others they are there."""


def assign(
    ops: Operators,
    level: Level,
    orders: Mapping[int, Sequence[str]],
    summed: Collection[tuple[int, int]] = (),
) -> Assignment:
    """The mode of every operator on this level, `orders` giving the classes of each split primitive by its id.

    `summed` are partial sums that are known whole before any operator reads them.
    """
    made = Assignment(summed=set(summed))
    for i, op in enumerate(ops.items):
        mode = _mode(ops, level, orders, made, i) if op.kind == "call" else REPLICATED
        made.modes.append(mode)
        made.summed.update(
            key
            for k, key in enumerate(op.operands)
            if made.types[key] == "P" and operand_type(op, mode, k) in ("R", "B")
        )
        for r in range(len(op.result_grad)):
            made.types[i, r] = _leaf_type(level, i, op) if op.kind != "call" else result_type(op, mode, r)
    _push_gradients_to_parameters(ops, made)
    wanted = wanted_types(ops, made.modes)
    for i, op in enumerate(ops.items):
        if op.kind == "parameter":
            made.parameters[i] = made.types[i, 0] = read_type(op, wanted.get((i, 0), []))
    return made


def _leaf_type(level: Level, i: int, op: Operator) -> Type:
    cut = {"input": level.row_cut, "received": level.received_cut}.get(op.kind)
    if cut is not None and i in level.input_places:
        return Sharded(level.input_places[i], cut)
    return "R"


def _mode(ops: Operators, level: Level, orders: Mapping[int, Sequence[str]], made: Assignment, i: int) -> Mode:
    op, owner = ops.items[i], level.owners[i]
    ways = [o for o in op.options if is_legal(ops, level, i, o)]
    chosen: Option | None = None
    cut = level.cuts[i]
    if owner is not None and owner.kind == "split":
        for name in orders.get(owner.id, ()):
            fitting = [o for o in ways if ops.classes[o.axis] == name]
            if fitting and (any(op.result_grad) or _best_match(ops, made, op, fitting)[0] > 0):
                chosen = _best_match(ops, made, op, fitting)[1]
                break
    elif owner is not None or any(ops.parameter_only[p] for p, _ in op.operands):
        fitting = [o for o in ways if o.axis == ops.batch]
        if level.copies and ops.parameter_only[i]:
            fitting = [o for o in fitting if _lies_so(made, op, o)]
            chosen = _best_match(ops, made, op, fitting)[1] if fitting else None
        elif fitting and (not ops.parameter_only[i] or _best_match(ops, made, op, fitting)[0] > 0):
            chosen = _best_match(ops, made, op, fitting)[1]
    if chosen is None:
        return _follow(made, op, ways, owner)
    if owner is None:
        cut = _cut_in_use(made, op, chosen, cut)
    return Mode("S", chosen, cut)


def _best_match(ops: Operators, made: Assignment, op: Operator, ways: Sequence[Option]) -> tuple[int, Option]:
    """The option that leaves most operand bytes where they lie (ties: the first), and those bytes."""
    scored = [(_bytes_in_place(ops, made, op, way), -k) for k, way in enumerate(ways)]
    best, at = max(scored)
    return best, ways[-at]


def _bytes_in_place(ops: Operators, made: Assignment, op: Operator, way: Option) -> int:
    total = 0
    for (p, r), place in zip(op.operands, way.inputs, strict=True):
        now = made.types.get((p, r))
        if isinstance(now, Sharded) and place is not None and same_spot(now, Sharded(place, 0)):
            total += ops.items[p].result_bytes[r]
    return total


def _lies_so(made: Assignment, op: Operator, way: Option) -> bool:
    """Whether every operand that an option cuts lies cut there."""
    for key, place in zip(op.operands, way.inputs, strict=True):
        now = made.types.get(key)
        if place is not None and not (isinstance(now, Sharded) and same_spot(now, Sharded(place, 0))):
            return False
    return True


def _cut_in_use(made: Assignment, op: Operator, way: Option, default: int) -> int:
    for key, place in zip(op.operands, way.inputs, strict=True):
        now = made.types.get(key)
        if isinstance(now, Sharded) and place is not None and now.place == place:
            return now.cut
    return default


def _follow(made: Assignment, op: Operator, ways: Sequence[Option], owner: Primitive | None) -> Mode:
    """Partial sums wait through linear operators unless they are summed anyway; outside every scope an operator follows
    its sharded operand."""
    types = [made.types.get(key, "R") for key in op.operands]
    waiting = zip(types, op.operands, strict=True)
    partial = frozenset(k for k, (t, key) in enumerate(waiting) if t == "P" and key not in made.summed)
    for group in op.linear:
        if partial and partial <= group and not op.random:
            return Mode("P", partial=group)
    if owner is None:
        for now, k in sorted(((t, k) for k, t in enumerate(types) if isinstance(t, Sharded)), key=lambda x: x[1]):
            for way in ways:
                if way.inputs[k] == now.place:
                    return Mode("S", way, now.cut)
    return REPLICATED


def is_legal(ops: Operators, level: Level, i: int, way: Option) -> bool:
    """Whether an operator may be cut this way on this level, given outer levels."""
    op = ops.items[i]
    if ops.hint(way.axis) < level.minimum and way.axis != ops.batch:
        return False
    if way.kernel in OFFSET_KERNELS and not _leads(ops, i, op, way):
        return False
    for modes in level.outer:
        other = modes[i].option
        if other is None or modes[i].kind != "S":
            continue
        if way.kernel and other.kernel and (way.kernel != other.kernel or way.kernel not in STACKABLE):
            return False
        if any(
            _clashes(a, b) for a, b in zip((*way.inputs, *way.outputs), (*other.inputs, *other.outputs), strict=True)
        ):
            return False
        if other.axis == way.axis and ops.hint(way.axis) < level.minimum * 2 and way.axis != ops.batch:
            return False
    return True


def _leads(ops: Operators, i: int, op: Operator, way: Option) -> bool:
    place = way.inputs[OFFSET_KERNELS[way.kernel or ""]]
    if place is None:
        return True
    source, r = op.operands[OFFSET_KERNELS[way.kernel or ""]]
    return place.term == 0 and ops.leaf_of(source, r, place) == place.axis


def _clashes(one: Place | None, other: Place | None) -> bool:
    """Whether two levels would cut one sum along different axes."""
    return (
        one is not None
        and other is not None
        and (one.dim, one.term) == (other.dim, other.term)
        and one.axis != other.axis
    )


def _push_gradients_to_parameters(ops: Operators, made: Assignment) -> None:
    """Operators on parameters alone hand the partial gradient through, so that it is reduced once, at the parameter."""
    wanted = wanted_types(ops, made.modes)
    for i in reversed(range(len(ops.items))):
        op = ops.items[i]
        if op.kind != "call" or not ops.parameter_only[i] or made.modes[i].kind != "R":
            continue
        if any("B" in wanted.get((i, r), []) for r in range(len(op.result_grad))):
            made.modes[i] = Mode("B")
            for r in range(len(op.result_grad)):
                made.types[i, r] = result_type(op, made.modes[i], r)
            for k, key in enumerate(op.operands):
                wanted.setdefault(key, []).append(operand_type(op, made.modes[i], k))


def wanted_types(ops: Operators, modes: Sequence[Mode]) -> dict[tuple[int, int], list[Type]]:
    """For every value, the types its uses want."""
    wanted: dict[tuple[int, int], list[Type]] = {}
    for op, mode in zip(ops.items, modes, strict=False):
        for k, key in enumerate(op.operands):
            wanted.setdefault(key, []).append(operand_type(op, mode, k))
    return wanted


def wanted_of(ops: Sequence[Operator], modes: Sequence[Sequence[Mode]], key: tuple[int, int]) -> list[Layout]:
    """The layouts in which the uses of one value want it, a type per level."""
    return [
        tuple(operand_type(op, mode, k) for mode in own)
        for op, own in zip(ops, modes, strict=True)
        for k, operand in enumerate(op.operands)
        if operand == key
    ]


def read_type(op: Operator, wanted: Sequence[Type]) -> Type:
    """One type for all uses of a parameter: the shard they agree on, else B if any use wants it, else R."""
    distinct = {"R" if t == "P" else t for t in wanted}
    if len(distinct) == 1 and isinstance(only := next(iter(distinct)), Sharded):
        return only
    return "B" if "B" in distinct and op.result_grad[0] else "R"


# -- cost of an assignment


def bridge_bytes(source: Type, target: Type, size: int, degree: int) -> float:
    """Bytes one device sends to convert a value (not its gradient) of `size` bytes when whole."""
    source, target = value_kind(source), value_kind(target)
    if source == target or source == "R" or (isinstance(source, Sharded) and target == "P"):
        return 0.0
    rest = (degree - 1) / degree
    if source == "P":
        return (2.0 if target == "R" else 1.0) * rest * size
    return rest * size if target == "R" else rest * size / degree


def round_trip_bytes(source: Type, target: Type, size: int, degree: int, grad: bool) -> float:
    """Bytes of a bridge, forward and backward."""
    forward = bridge_bytes(source, target, size, degree)
    if not grad:
        return forward
    return forward + bridge_bytes(gradient_kind(target), gradient_kind(source), size, degree)


def cost(ops: Operators, level: Level, made: Assignment) -> float:
    """FLOPs of one step as one device sees it, bytes moved counted as `FLOPS_PER_BYTE` each."""
    total = 0.0
    seen: set[tuple[int, int, Type]] = set()
    for i, op in enumerate(ops.items):
        mode = made.modes[i]
        passes = BACKWARD if any(op.result_grad) else 1
        if op.flops > sum(op.result_bytes):  # products; what only moves or combines elements follows them
            total += passes * op.flops / (level.size if mode.kind == "S" else 1)
        for k, key in enumerate(op.operands):
            want = operand_type(op, mode, k)
            now = made.types[key]
            if want != now and (*key, want) not in seen:
                seen.add((*key, want))
                source = ops.items[key[0]]
                grad = source.result_grad[key[1]] and source.kind != "parameter"
                total += FLOPS_PER_BYTE * round_trip_bytes(now, want, source.result_bytes[key[1]], level.size, grad)
    for i, kind in made.parameters.items():
        if kind == "B":
            total += FLOPS_PER_BYTE * bridge_bytes("P", "R", ops.items[i].result_bytes[0], level.size)
    return total


def choose_order(
    ops: Operators,
    level: Level,
    primitives: Sequence[Primitive],
    orders: Mapping[int, Sequence[str]],
    allowed: Sequence[str],
    last: Sequence[str] = (),
) -> tuple[str, ...]:
    """The best order of classes for split primitives that share one, grown by one class at a time; ties: the earlier.

    At least one class is taken where one is legal. Classes in `last` come behind all others: they are those that cut
    no parameter, such as the sequence, and a split that the user wrote down is to cut parameters first.
    """
    best: tuple[float, tuple[str, ...]] = (float("inf"), ())
    for names, ends in ((allowed, (0, None)), (last, (None,))):
        while True:
            grown = best
            for name in names:
                if name in best[1]:
                    continue
                for at in sorted({len(best[1]) if end is None else end for end in ends}):
                    order = (*best[1][:at], name, *best[1][at:])
                    made = assign(ops, level, {**orders, **{p.id: order for p in primitives}})
                    value = cost(ops, level, made)
                    if value < grown[0] * (1 - 1e-9):
                        grown = (value, order)
            if grown == best:
                break
            best = grown
    return _pruned(ops, level, primitives, orders, best)


_SMALL = 0.01
"""Part of the parameters that a class may leave whole without being missed."""


def _pruned(
    ops: Operators,
    level: Level,
    primitives: Sequence[Primitive],
    orders: Mapping[int, Sequence[str]],
    best: tuple[float, tuple[str, ...]],
) -> tuple[str, ...]:
    """The order without classes that later ones have made needless: it costs less, and as many parameters are cut."""

    def whole(made: Assignment) -> int:
        return sum(ops.items[i].result_bytes[0] for i, kind in made.parameters.items() if not isinstance(kind, Sharded))

    allowance = _SMALL * sum(op.result_bytes[0] for op in ops.items if op.kind == "parameter")
    value, order = best
    most = whole(assign(ops, level, {**orders, **{p.id: order for p in primitives}})) + allowance
    for name in order:
        rest = tuple(other for other in order if other != name)
        if not rest:
            break
        made = assign(ops, level, {**orders, **{p.id: rest for p in primitives}})
        if (without := cost(ops, level, made)) < value and whole(made) <= most:
            value, order = without, rest
    return order


def candidate_classes(ops: Operators, level: Level, primitive: Primitive) -> list[str]:
    """Classes that `primitive` may cut: axes of its parameters where there are any, else any axis but the batch."""
    weighted: dict[str, int] = {}
    others: dict[str, int] = {}
    for i, op in enumerate(ops.items):
        if op.kind != "call" or level.owners[i] is not primitive:
            continue
        for way in op.options:
            if way.axis == ops.batch or not is_legal(ops, level, i, way):
                continue
            table = weighted if _touches_parameter(ops, op, way) else others
            name = ops.classes[way.axis]
            table[name] = table.get(name, 0) + op.flops
    return sorted(weighted or others)


def _touches_parameter(ops: Operators, op: Operator, way: Option) -> bool:
    return any(
        place is not None and ops.parameter_only[p] for (p, _), place in zip(op.operands, way.inputs, strict=True)
    )
