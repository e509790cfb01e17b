"""The way from one layout to another, one level at a time."""

from __future__ import annotations

from itertools import product

from whalepy.program.layout import Layout, Sharded, Type, path, same_spot
from whalepy.program.options import Place

KINDS: tuple[Type, ...] = ("R", "P", Sharded(Place(0, 0, 0), 0), Sharded(Place(1, 0, 1), 0))
LAYOUTS: list[Layout] = list(product(KINDS, repeat=3))


def test_every_way_arrives_and_leaves_no_shard_inside_another_that_moves() -> None:
    """Gathers run inner first and cuts outer first: nothing cut inside a shard is there while that one changes."""
    for source, target in product(LAYOUTS, repeat=2):
        now = list(source)
        for level, before, after in path(source, target):
            assert now[level] == before != after
            inside = now[level + 1 :]
            assert not any(same_spot(inner, kind) for inner in inside for kind in (before, after)), (source, target)
            now[level] = after
        assert tuple(now) == target


def test_a_change_of_one_level_is_one_step() -> None:
    """But for a shard that comes to nest in an outer one: it is gathered first."""
    for source in LAYOUTS:
        for kind in KINDS:
            target = (*source[:2], kind)
            if any(same_spot(outer, kind) for outer in source[:2]):
                continue
            assert len(path(source, target)) == (source != target)
