"""A step of all ranks: a collective starts when its last member arrives."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from whalepy.errors import VerificationError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.cost import LINK_EFFICIENCY, DeviceCost, Network, Route
from whalepy.planner.forecast import REPORT
from whalepy.planner.timeline import Played, play
from whalepy.planner.work import Event, Part, Phase, Rehearsal, Stretch, Wait


def product(flops: float, phase: Phase = "forward") -> Event:
    return Event(phase, "m", int(flops), 0, "float32", 10, 20)


def reduce(level: int, size: int = 0, phase: Phase = "gradient") -> Event:
    return Event(phase, "all-reduce", 0, size, "", 10, 20, "all-reduce", level)


def work(*events: Part) -> Rehearsal:
    return Rehearsal(events, 0, 0, 0, 0, 0)


def played(cluster: ClusterSpec, mesh: tuple[int, ...], works: list[Rehearsal]):
    ranks = range(len(works))
    costs = {rank: DeviceCost(cluster.devices[rank]) for rank in ranks}
    network = Network(cluster, {rank: rank for rank in ranks})
    return play(mesh, tuple(ranks), dict(enumerate(works)), costs, network), costs, network


def test_the_fast_rank_waits_for_the_slow_one() -> None:
    cluster = ClusterSpec.load("1xV100-SXM2-16GB + 1xV100-SXM2-16GB*0.5")
    each = work(product(1e12), reduce(0, 1000), product(1e9, "optimizer"))
    found, costs, network = played(cluster, (2,), [each, each])
    slow, fast = costs[1].seconds(each.events[0]), costs[0].seconds(each.events[0])
    communication = network.seconds(each.events[1], [0, 1])
    assert found.tracks[0].waiting_s == slow - fast and found.tracks[1].waiting_s == 0
    assert found.tracks[0].gradient_s == communication
    assert found.step_s == slow + communication + costs[1].seconds(each.events[2])
    assert [span.kind for span in found.tracks[0].spans] == ["forward", "gradient", "optimizer"]


def test_levels_have_their_own_groups() -> None:
    cluster = ClusterSpec.load("4xV100-SXM2-16GB")
    quick, slow = work(product(1e9), reduce(1)), work(product(1e12), reduce(1))
    found, *_ = played(cluster, (2, 2), [quick, quick, slow, slow])
    assert found.tracks[0].clock == found.tracks[1].clock < found.tracks[2].clock


def test_a_group_across_nodes_shares_the_network_with_those_beside_it() -> None:
    cluster = ClusterSpec.load("2xV100-SXM2-16GB + 2xV100-SXM2-16GB @ 10Gbit/s")
    event = reduce(0, 10**9)
    network = Network(cluster, {rank: rank for rank in range(4)})
    alone, beside = network.seconds(event, [0, 2]), network.seconds(event, [0, 2], beside=2)
    assert beside > 1.9 * alone > 0
    assert network.seconds(event, [0, 1]) < alone / 10


# -- collectives beside operators


def beside(size: int) -> Event:
    return Event("backward", "all-gather", 0, size, "", 10, 20, "all-gather", 0, beside=True)


def alike(cluster: ClusterSpec, *parts: Part) -> Played:
    each = Rehearsal(parts)
    return played(cluster, (len(cluster.devices),), [each] * len(cluster.devices))[0]


PAIR = ClusterSpec.load("2xV100-SXM2-16GB")
SIZE = 10**9


def seconds_of(event: Event) -> tuple[float, float]:
    """As an operator, and as a collective of the pair."""
    return DeviceCost(PAIR.devices[0]).seconds(event), Network(PAIR, {0: 0, 1: 1}).seconds(event, [0, 1])


def test_long_operators_hide_what_runs_beside_them() -> None:
    long = product(1e14)
    found = alike(PAIR, beside(SIZE), long, Wait("backward"))
    assert found.step_s == seconds_of(long)[0] > seconds_of(beside(SIZE))[1]
    assert found.tracks[0].gradient_s == 0 < found.tracks[0].gradient_total_s == seconds_of(beside(SIZE))[1]


def test_short_operators_wait_for_it() -> None:
    short, sent = product(1e9), seconds_of(beside(SIZE))[1]
    found = alike(PAIR, beside(SIZE), short, Wait("backward"), product(1e9))
    assert found.tracks[0].gradient_s == pytest.approx(sent - seconds_of(short)[0])
    assert found.step_s == pytest.approx(sent + seconds_of(short)[0])


def test_a_wait_lets_so_many_go_on() -> None:
    sent = seconds_of(beside(SIZE))[1]
    clocks = [alike(PAIR, beside(SIZE), beside(SIZE), Wait("backward", n)).step_s for n in (0, 1, 2)]
    assert clocks == pytest.approx([2 * sent, sent, 0])


def test_what_runs_beside_does_not_hold_up_what_stops_everybody() -> None:
    """They have streams of their own, and mostly links: parameters between nodes, bridges inside them."""
    found = alike(PAIR, beside(SIZE), reduce(0, SIZE))
    assert found.step_s == max(seconds_of(beside(SIZE))[1], seconds_of(reduce(0, SIZE))[1])


def test_ranks_that_ask_at_different_times_end_together() -> None:
    works = [work(product(f), beside(SIZE), Wait("backward"), reduce(0, 10)) for f in (1e9, 1e13)]
    found, *_ = played(PAIR, (2,), works)
    assert found.tracks[0].clock == found.tracks[1].clock > seconds_of(product(1e13))[0]
    assert found.tracks[0].gradient_s > found.tracks[1].gradient_s > 0


# -- parts that repeat


@pytest.mark.parametrize("size", [10, 10**7, 10**9])
@pytest.mark.parametrize("repeats", [1, 2, 3, 7, 1000])
def test_a_stretch_takes_as_long_as_its_parts_written_out(size: int, repeats: int) -> None:
    rows = (product(1e11), beside(size), product(2e11, "backward"), Wait("backward", 1))
    short = alike(PAIR, beside(size), Stretch(rows, repeats), Wait("gradient"))
    long = alike(PAIR, beside(size), *rows * repeats, Wait("gradient"))
    for name in ("clock", "busy_s", "gradient_s", "gradient_total_s"):
        assert getattr(short.tracks[0], name) == pytest.approx(getattr(long.tracks[0], name), rel=1e-6, abs=1e-12)


def test_a_stretch_inside_another() -> None:
    rows = (product(1e10), reduce(0, 10**6, "forward"))
    inner = Stretch((*rows, Stretch(rows, 6), product(1e9)), 5)
    long = ((*rows, *rows * 6, product(1e9)) * 5)  # fmt: skip
    assert alike(PAIR, inner).step_s == pytest.approx(alike(PAIR, *long).step_s)


@pytest.mark.parametrize("repeats", [1, 5, 4000])
def test_spans_of_a_lane_follow_one_another_and_fill_the_step(repeats: int) -> None:
    rows = (product(1e11), beside(10**8), product(2e11, "backward"), Wait("backward"), reduce(0, 10**6, "forward"))
    track = alike(PAIR, Stretch(rows, repeats), product(1e9, "optimizer")).tracks[0]
    assert all(a.end_s <= b.start_s + 1e-9 for a, b in pairwise(track.spans))
    assert sum(span.end_s - span.start_s for span in track.spans) == pytest.approx(track.clock)
    assert len(track.spans) < 1000


def test_ranks_that_repeat_different_parts_are_a_mistake_of_the_planner() -> None:
    stretches = [work(Stretch((product(1e9),), repeats)) for repeats in (2, 3)]
    with pytest.raises(VerificationError) as raised:
        played(PAIR, (2,), stretches)
    assert str(raised.value) == f"ranks repeat different parts of the step\n  fix: {REPORT}"


# -- routes


def test_a_route_of_one_takes_no_time() -> None:
    assert Route(1, 1, 1e9, 1e-5).seconds("all-reduce", 10**9) == 0


def test_latency_of_a_ring_and_of_a_tree() -> None:
    route = Route(8, 1, 1e9, 1e-5)
    assert route.seconds("all-gather", 0) == pytest.approx(7e-5)
    assert route.seconds("all-reduce", 0) == pytest.approx(2 * 3e-5)  # a tree of depth 3
    assert Route(2, 1, 1e9, 1e-5).seconds("all-reduce", 0) == pytest.approx(2e-5)


def test_the_slower_tier_bounds_long_messages() -> None:
    network = Network(ClusterSpec.load("2x2xV100-SXM2-16GB @ 10Gbit/s"), {rank: rank for rank in range(4)})
    inside, across, alone = (network.route(ranks) for ranks in ([0, 1], [0, 1, 2, 3], [0, 2]))
    assert (inside.nodes, across.nodes, alone.nodes) == (1, 2, 2)
    assert inside.seconds("all-gather", 10**9) < across.seconds("all-gather", 10**9)
    assert alone.inside == math.inf  # one member per node
    assert alone.seconds("all-gather", 10**9) == pytest.approx(10**9 / (1.25e9 * LINK_EFFICIENCY), rel=1e-3)


@pytest.mark.parametrize("kind", ["all-gather", "all-reduce", "reduce-scatter", "all-to-all"])
def test_more_bytes_never_take_less_time(kind: str) -> None:
    route = Route(6, 3, 1e10, 1e-6, 1e9, 1e-5)
    times = [route.seconds(kind, size) for size in (0, 1, 10**3, 10**6, 10**9)]
    assert times == sorted(times) and times[0] > 0


# -- bandwidth-delay products


def _nodes(cluster: str) -> Network:
    spec = ClusterSpec.load(cluster)
    return Network(spec, range(len(spec.devices)))


def test_the_delay_of_a_route_is_what_an_all_reduce_of_nothing_would_have_moved() -> None:
    route = Route(8, 1, 1e9, 1e-5)
    assert route.delay_bytes == 34286  # 6e-5 s of 1e9 bytes/s, of which a byte of gradient takes 2 * 7/8
    total = 10**9
    sent = round(2 * 7 / 8 * total)
    assert route.seconds("all-reduce", sent) == pytest.approx(6e-5 * (1 + total / route.delay_bytes), rel=1e-4)
    assert Route(1, 1, 1e9, 1e-5).delay_bytes == 0


def test_the_delays_of_a_mesh_are_those_of_its_levels() -> None:
    network = _nodes("2x4xA100-SXM4-80GB @ 100Gbit/s")
    between, inside = network.delays((2, 4), range(8))
    assert between == network.route([0, 4], beside=4).delay_bytes  # four pairs share the link of a node
    assert inside == network.route(range(4)).delay_bytes
    assert network.delays((8,), range(8)) == (network.route(range(8)).delay_bytes,)
    assert network.delays((4,), range(4, 8)) == (inside,)
    assert network.delays((), ()) == ()


def test_cpus_do_not_compute_while_collectives_are_under_way() -> None:
    assert _nodes("4xcpu").delays((2, 2), range(4)) == (None, None)
