"""Ranks that do the same are played once: the clocks are those of every rank played by itself."""

from __future__ import annotations

import math
from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner import timeline
from whalepy.planner.alike import classes
from whalepy.planner.cost import DeviceCost, Network
from whalepy.planner.work import Event, Part, Rehearsal, Stretch, Wait

TEXTS = ("8xV100-SXM2-16GB", "2x4xV100-SXM2-16GB @ 25Gbit/s", "4xV100-SXM2-16GB + 4xT4 @ 10Gbit/s",
         "6xV100-SXM2-16GB + 2xV100-SXM2-16GB*0.5", "1x2xT4 + 3x2xV100-SXM2-16GB @ 10Gbit/s")  # fmt: skip
MESHES = ((8,), (2, 4), (4, 2), (2, 2, 2))


def program(levels: int, sizes: list[int], repeats: int) -> tuple[Part, ...]:
    """Products, collectives that stop everybody, collectives beside them, on every level."""
    rows: list[Part] = []
    for k, size in enumerate(sizes):
        level = k % levels
        rows.append(Event("forward", "m", size * 10**9, 0, "float32", 1, 1))
        rows.append(Event("backward", "all-gather", 0, size * 10**5, "", 1, 1, "all-gather", level, beside=k % 2 == 0))
        rows.append(Wait("backward", k % 3))
    return (*rows, Stretch(tuple(rows), repeats), Wait("gradient"))


@settings(max_examples=200)
@given(
    st.sampled_from(TEXTS),
    st.sampled_from(MESHES),
    st.lists(st.integers(0, 400), min_size=1, max_size=5),
    st.lists(st.integers(0, 1), min_size=8, max_size=8),
    st.integers(1, 4),
)
def test_classes_have_the_clocks_of_their_ranks(
    text: str, mesh: tuple[int, ...], sizes: list[int], which: list[int], repeats: int
) -> None:
    cluster = ClusterSpec.load(text)
    ranks = tuple(range(math.prod(mesh)))
    kinds = [Rehearsal(program(len(mesh), [size * (1 + k) for size in sizes], repeats)) for k in range(2)]
    works = {rank: kinds[which[rank]] for rank in ranks}
    costs = {rank: DeviceCost(cluster.devices[rank]) for rank in ranks}
    network = Network(cluster, {rank: rank for rank in ranks})
    found = timeline.play(mesh, ranks, works, costs, network)
    # Work of its own for every rank: nothing is alike.
    alone = timeline.play(mesh, ranks, {r: Rehearsal(works[r].parts) for r in ranks}, costs, network)
    assert found.step_s == alone.step_s
    for track, own in zip(found.tracks, alone.tracks, strict=True):
        assert (track.clock, track.busy_s, track.waiting_s, track.bridge_s, track.gradient_s) == (
            own.clock, own.busy_s, own.waiting_s, own.bridge_s, own.gradient_s)  # fmt: skip


def found(text: str, mesh: tuple[int, ...], kinds: str | None = None) -> set[int]:
    cluster = ClusterSpec.load(text)
    ranks = range(math.prod(mesh))
    places = dict(zip(ranks, product(*map(range, mesh)), strict=True))
    network = Network(cluster, {rank: rank for rank in ranks})
    return set(classes(places, {r: kinds[r] if kinds else "" for r in ranks}, network).of.values())


def test_one_class_where_all_are_alike() -> None:
    assert found("2x4xV100-SXM2-16GB @ 25Gbit/s", (2, 4)) == {0}
    assert found("8xV100-SXM2-16GB", (2, 2, 2)) == {0}


def test_a_rank_of_its_own_makes_its_groups_differ() -> None:
    # Rank 5 is another kind: its row, its column, and the rest.
    assert found("8xV100-SXM2-16GB", (2, 4), "aaaaabaa") == {0, 1, 4, 5}


def test_groups_across_nodes_differ_from_those_inside() -> None:
    # Pairs (0, 1), (2, 3), (4, 5): the middle one lies over both nodes.
    assert found("2x3xV100-SXM2-16GB @ 25Gbit/s", (3, 2)) != {0}
