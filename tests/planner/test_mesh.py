"""Levels from scopes: the coarsest grid in which every primitive takes whole levels."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from whalepy.errors import AnnotationError, PlanError
from whalepy.planner.decide import _shares_of_level
from whalepy.planner.mesh import Chain, arrange
from whalepy.primitives import replicate, split

Chains = Callable[[], list[Chain]]


def kinds(sizes: tuple[int, ...], owners: tuple[object, ...]) -> str:
    return " > ".join(f"{getattr(o, 'kind', 'implicit')} {n}" for n, o in zip(sizes, owners, strict=True))


CASES: list[tuple[str, Chains, int, list[str]]] = [
    ("no scope: one implicit level", lambda: [()], 3, ["implicit 3"]),
    ("a degree left open takes all devices", lambda: [(replicate(),)], 6, ["implicit 6", "replicate 6"]),
    ("what is outside the inner scope is replicated over its level", lambda: nested(2, 2), 4,
     ["implicit 2 > implicit 2", "replicate 2 > implicit 2", "replicate 2 > split 2"]),
    ("more devices than asked for: the whole is replicated", lambda: [(split(2),)], 4,
     ["implicit 2 > implicit 2", "implicit 2 > split 2"]),
    ("an open replicate leaves what the inner degree needs", lambda: nested(None, 2), 8,
     ["implicit 4 > implicit 2", "replicate 4 > implicit 2", "replicate 4 > split 2"]),
    ("siblings of other degrees share a finer grid", lambda: [(replicate(4),), (split(2),)], 4,
     ["implicit 2 > implicit 2", "replicate 2 > replicate 2", "implicit 2 > split 2"]),
]  # fmt: skip


def nested(outer: int | None, inner: int) -> list[Chain]:
    around = replicate(outer)
    return [(around,), (around, split(inner))]


@pytest.mark.parametrize(("why", "chains", "devices", "expected"), CASES, ids=[case[0] for case in CASES])
def test_levels(why: str, chains: Chains, devices: int, expected: list[str]) -> None:
    mesh = arrange(chains(), devices)
    assert [kinds(mesh.sizes, owners) for owners in mesh.owners.values()] == expected, why


def test_a_degree_that_does_not_fit_names_its_line() -> None:
    with pytest.raises(AnnotationError) as caught:
        arrange([(replicate(3),)], 4)
    what, at, fix = str(caught.value).splitlines()
    assert what == "replicate(3) and what is inside it need 3 devices; 4 of 4 are there for it"
    assert at.startswith("  at:  test_mesh.py:")
    assert fix == "  fix: choose degrees whose product divides 4, or give a cluster of another size"


def test_degrees_of_which_none_divides_the_other_cannot_share_devices() -> None:
    with pytest.raises(PlanError, match=r"^scopes that share 6 devices cut them into 2 and into 3 groups\n"):
        arrange([(split(2),), (split(3),)], 6)


def test_speed_of_a_position_is_that_of_its_devices() -> None:
    mesh = arrange(nested(2, 2), 4)
    assert mesh.weights(0, [1, 1, 0.5, 0.5]) == (2, 1)
    assert mesh.weights(1, [1, 1, 0.5, 0.5]) == (1.5, 1.5)


def test_shares_over_a_finer_grid_are_met_or_refused() -> None:
    fine, unmet = split(4, shares=[4, 2, 2, 1]), split(4, shares=[4, 3, 2, 1])
    mesh = arrange([*nested(2, 2), (fine,), (unmet,)], 4)
    assert [_shares_of_level(mesh, level, fine) for level in (0, 1)] == [(6, 3), (6, 3)]
    with pytest.raises(AnnotationError, match=r"cannot be met on 2 x 2 devices, the grid of the scopes beside it\n"):
        _shares_of_level(mesh, 0, unmet)
