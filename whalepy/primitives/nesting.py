"""Which primitive may stand inside which, as one table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whalepy.errors import AnnotationError

if TYPE_CHECKING:
    from whalepy.primitives.scope import Primitive

# Holds for every pair along a chain, not only for neighbours: a stage inside a replicate inside a stage is still
# a stage inside a stage. Plain operators may stand anywhere.
MAY_HOLD: dict[str, tuple[str, ...]] = {
    "cluster": ("replicate", "stage", "split"),
    "replicate": ("stage", "replicate", "split"),
    "stage": ("replicate", "split"),
    "split": (),
}


def nesting_error(outer: Primitive, inner: Primitive, place: str = "") -> AnnotationError:
    """The error for `inner` inside `outer`; `place` says which module `inner` was put on."""
    return AnnotationError(
        f"{inner.kind}{place} cannot stand inside {outer.kind} ({outer.at})", at=inner.at, fix=_fix(outer, inner)
    )


def _fix(outer: Primitive, inner: Primitive) -> str:
    if inner.kind == "cluster":
        return "cluster is the outermost primitive: put everything else inside it"
    held = MAY_HOLD[outer.kind]
    allowed = f"{', '.join(held)} and plain operators" if held else "plain operators"
    return f"inside {outer.kind} only {allowed} may appear"
