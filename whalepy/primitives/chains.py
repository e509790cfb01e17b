"""Chains of primitives, outermost first: what surrounds one operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whalepy.primitives.nesting import MAY_HOLD, nesting_error

if TYPE_CHECKING:
    from whalepy.primitives.scope import Primitive


def extended(chain: tuple[Primitive, ...], inner: Primitive, place: str = "") -> tuple[Primitive, ...]:
    """`chain` with `inner` inside it; unchanged if `inner` is in it already, for one object is one scope.

    Raises AnnotationError, naming the nearest primitive of the chain that may not hold `inner`.
    """
    if inner in chain:
        return chain
    for outer in reversed(chain):
        if inner.kind not in MAY_HOLD[outer.kind]:
            raise nesting_error(outer, inner, place)
    return (*chain, inner)


def check_chain(chain: tuple[Primitive, ...]) -> None:
    """Raise AnnotationError at the first primitive of `chain` that cannot stand inside those before it."""
    checked: tuple[Primitive, ...] = ()
    for primitive in chain:
        checked = extended(checked, primitive)
