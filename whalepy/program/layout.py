"""Layouts: how a value lies over each level, what an operator's mode asks of its operands, and the way between two."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from whalepy.program.options import Option, Place

REPLICATED_RESULT_KERNELS = frozenset({"class_parallel"})
"""Kernels that communicate inside and give every device the whole result."""


@dataclass(frozen=True)
class Sharded:
    """A shard over one level: where the cut axis stands, and by which weights it is cut."""

    place: Place
    cut: int

    def __str__(self) -> str:
        return f"S({self.place.dim}.{self.place.term})"


Type = Literal["R", "B", "P"] | Sharded
Layout = tuple[Type, ...]
"""One type per level, outermost first."""


@dataclass(frozen=True)
class Mode:
    """How an operator runs on one level: replicated (R or B), sharded by an option (S), or on partial sums (P)."""

    kind: Literal["R", "B", "S", "P"] = "R"
    option: Option | None = None
    cut: int = 0
    partial: frozenset[int] = frozenset()


REPLICATED = Mode()


OperatorKind = Literal["parameter", "buffer", "constant", "input", "received", "call", "output"]


@dataclass(frozen=True)
class Operator:
    """One operator as the planner sees it: shapes, bytes and axes, no tensors."""

    name: str
    target: str
    kind: OperatorKind
    operands: tuple[tuple[int, int], ...]
    """Producer of each tensor operand: (operator index, result index)."""
    operand_grad: tuple[bool, ...]
    """Whether a gradient flows to the operand."""
    result_grad: tuple[bool, ...]
    options: tuple[Option, ...]
    additive: frozenset[int]
    linear: tuple[frozenset[int], ...]
    result_bytes: tuple[int, ...]
    flops: int
    scope: tuple[int, ...]
    where: str
    has_rule: bool
    random: bool = False


def operand_type(op: Operator, mode: Mode, i: int) -> Type:
    """The type operand `i` must have under `mode`."""
    lacking: Type = "B" if op.operand_grad[i] else "R"
    if mode.kind == "S" and mode.option is not None:
        place = mode.option.inputs[i]
        if place is not None:
            return Sharded(place, mode.cut)
        contracted = None in mode.option.outputs and mode.option.kernel not in REPLICATED_RESULT_KERNELS
        if mode.option.kernel in REPLICATED_RESULT_KERNELS:
            return "R"
        return "P" if i in op.additive and contracted else lacking
    if mode.kind == "P":
        return "P" if i in mode.partial or i in op.additive else lacking
    return lacking if mode.kind == "B" else "R"


def result_type(op: Operator, mode: Mode, r: int) -> Type:
    """The type of result `r` under `mode`."""
    if mode.kind == "S" and mode.option is not None:
        place = mode.option.outputs[r]
        if place is not None:
            return Sharded(place, mode.cut)
        return "R" if mode.option.kernel in REPLICATED_RESULT_KERNELS else "P"
    if mode.kind == "P":
        return "P"
    return "B" if mode.kind == "B" and op.result_grad[r] else "R"


def same_spot(one: Type, other: Type) -> bool:
    """Whether two shards cut the same position of the same dim: then they nest, the outer level first."""
    return (
        isinstance(one, Sharded)
        and isinstance(other, Sharded)
        and (one.place.dim, one.place.term) == (other.place.dim, other.place.term)
    )


def path(source: Layout, target: Layout) -> list[tuple[int, Type, Type]]:
    """The changes of one level each that lead from one layout to another: (level, from, to).

    Shards of one position nest, so an outer one is only left or entered while no inner one is there: gathers run inner
    first, cuts outer first.
    """
    now = list(source)
    steps: list[tuple[int, Type, Type]] = []

    def change(level: int, to: Type) -> None:
        if now[level] != to:
            steps.append((level, now[level], to))
            now[level] = to

    def clear_inside(level: int, spot: Type) -> None:
        for inner in reversed(range(level + 1, len(now))):
            if same_spot(now[inner], spot):
                change(inner, "R")

    for level in reversed(range(len(now))):
        if isinstance(now[level], Sharded) and now[level] != target[level]:
            clear_inside(level, now[level])
            clear_inside(level, target[level])
            change(level, target[level] if _free(now, level, target[level]) else "R")
    for level in range(len(now)):
        if now[level] != target[level]:
            clear_inside(level, target[level])
            change(level, target[level])
    return steps


def _free(now: Iterable[Type], level: int, target: Type) -> bool:
    """Whether a shard may move to `target` at once: no outer level is still about to change the same spot."""
    return not any(same_spot(other, target) for i, other in enumerate(now) if i != level)


def value_kind(kind: Type) -> Type:
    """What the value itself is: replicated, partial or a shard."""
    return "R" if kind == "B" else kind


def gradient_kind(kind: Type) -> Type:
    """What the gradient of such a value is."""
    if isinstance(kind, Sharded):
        return kind
    return "P" if kind == "B" else "R"


def communicates(source: Type, target: Type) -> bool:
    """Whether converting a value (not its gradient) from one kind to another moves bytes between devices."""
    source, target = value_kind(source), value_kind(target)
    if source == target or source == "R":
        return False
    return not (isinstance(source, Sharded) and target == "P")
