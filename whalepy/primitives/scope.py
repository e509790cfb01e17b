"""The four primitives. Each object is one scope, however often it is entered."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import ClassVar, Self, TypeVar

from whalepy.errors import AnnotationError
from whalepy.primitives.arguments import checked_degree, checked_parameter_dim, checked_shares
from whalepy.primitives.callsite import user_line
from whalepy.primitives.chains import extended
from whalepy.primitives.decorate import decorated
from whalepy.primitives.placement import Placement, parse_placement
from whalepy.primitives.recording import Entry, annotation_of, open_chain, open_entries, under_dynamo

T = TypeVar("T")

_ids = itertools.count(1)


def _next_id() -> int:
    return 0 if under_dynamo() else next(_ids)  # a compiled scope is never recorded


@dataclass(frozen=True, eq=False, repr=False)
class Primitive:
    """One scope: a context manager, and a decorator of functions, methods and nn.Module classes.

    `degree` is the degree of a level, or the number of devices of a stage; None where the planner decides.
    `at` is the user's line that made it; `id` is unique in this process.
    Two primitives are never equal: a copy of a model shares the scopes of the original.
    """

    kind: ClassVar[str]

    degree: int | None = None
    shares: tuple[float, ...] | None = None
    on: str | None = None
    placement: Placement | None = None
    at: str = field(default_factory=user_line)
    id: int = field(default_factory=_next_id)

    def __enter__(self) -> Self:
        """Open the scope here. Raises AnnotationError if a scope around it cannot hold it."""
        if under_dynamo():
            return self
        chain = extended(open_chain(), self)
        annotation = annotation_of(chain)
        annotation.__enter__()
        open_entries.set((*open_entries.get(), Entry(self, chain, annotation)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if under_dynamo():
            return
        entries = open_entries.get()
        if not entries or entries[-1].primitive is not self:
            raise self._out_of_order()
        open_entries.set(entries[:-1])
        entries[-1].annotation.__exit__(None, None, None)

    def __call__(self, target: T) -> T:
        """`target` as a part of this scope: a function, a method, or an nn.Module class (changed in place)."""
        return decorated(self, target)

    def __repr__(self) -> str:
        return f"{self.kind}({', '.join(self._written())})"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuilt, (type(self), self.degree, self.shares, self.on, self.placement, self.at)

    def _written(self) -> Iterable[str]:
        if self.degree is not None:
            yield str(self.degree)
        if self.shares is not None:
            yield f"shares=({', '.join(map(_number, self.shares))}{',' if len(self.shares) == 1 else ''})"
        if self.on is not None:
            yield f"on={self.on!r}"
        if self.placement is not None:
            yield str(self.placement)

    def _out_of_order(self) -> AnnotationError:
        chain = open_chain()
        inner = f"{chain[-1]!r} ({chain[-1].at}) inside it is open" if chain else "it is not open"
        return AnnotationError(
            f"{self!r} is left while {inner}", at=self.at, fix="leave scopes in the reverse order of entering them"
        )


class replicate(Primitive):
    """Every device runs the same operators on its own part of the batch.

    `shares`: one weight per device; the degree is then their number.
    """

    kind = "replicate"

    def __init__(self, degree: int | None = None, *, shares: Sequence[float] | None = None) -> None:
        super().__init__(*_level(self.kind, degree, shares))


class split(Primitive):
    """Every device runs its own part of each operator: of its heads, its features, its classes, its sequence.

    `shares`: one weight per device. `on`: split the axis of that parameter dim, like "head.weight:0".
    """

    kind = "split"

    def __init__(
        self, degree: int | None = None, *, shares: Sequence[float] | None = None, on: str | None = None
    ) -> None:
        super().__init__(*_level(self.kind, degree, shares), on=checked_parameter_dim(on, user_line()))


class stage(Primitive):
    """One stage of a pipeline, on `devices` devices of its own."""

    kind = "stage"

    def __init__(self, devices: int | None = None) -> None:
        super().__init__(checked_degree(self.kind, "devices", devices, user_line()))


class cluster(Primitive):
    """Where the virtual devices inside it are placed; the outermost primitive.

    `placement`: "auto", "all", {"average": k}, {"row": n}, {"type": name}, {"node": n}, or rank lists.
    """

    kind = "cluster"

    def __init__(self, placement: str | Mapping[str, int | str] | Sequence[Sequence[int]] | Placement = "auto") -> None:
        super().__init__(placement=parse_placement(placement, user_line()))


def _level(kind: str, degree: object, shares: object) -> tuple[int | None, tuple[float, ...] | None]:
    at = user_line()
    number = checked_degree(kind, "degree", degree, at)
    weights = checked_shares(kind, number, shares, at)
    return (len(weights) if weights is not None else number), weights


def _number(weight: float) -> str:
    return str(int(weight)) if weight.is_integer() else repr(weight)


def resized(primitive: Primitive, degree: int, shares: tuple[float, ...] | None) -> Primitive:
    """Another scope that stands for `primitive`, of a given degree and shares."""
    return _rebuilt(type(primitive), degree, shares, primitive.on, primitive.placement, primitive.at)


def _rebuilt(
    kind: type[Primitive],
    degree: int | None,
    shares: tuple[float, ...] | None,
    on: str | None,
    placement: Placement | None,
    at: str,
) -> Primitive:
    primitive = kind.__new__(kind)
    Primitive.__init__(primitive, degree, shares, on, placement, at)
    return primitive
