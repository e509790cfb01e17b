"""A step of all ranks: a collective starts when its last member arrives."""

from __future__ import annotations

from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.cost import DeviceCost, Network
from whalepy.planner.timeline import play
from whalepy.planner.work import Event, Phase, Rehearsal


def product(flops: float, phase: Phase = "forward") -> Event:
    return Event(phase, "m", int(flops), 0, "float32", 10, 20)


def reduce(level: int, size: int = 0, phase: Phase = "gradient") -> Event:
    return Event(phase, "all-reduce", 0, size, "", 10, 20, "all-reduce", level)


def work(*events: Event) -> Rehearsal:
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
