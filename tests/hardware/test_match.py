"""Ranks to devices: by type and node, never by rank number."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whalepy.errors import ClusterError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.hardware.devices import GIB
from whalepy.hardware.match import RankReport, match_ranks, spec_from_reports

V, P = "V100-SXM2-16GB", "P100-SXM2-16GB"


def ranks(*rows: tuple[str, str, int] | tuple[str, str, int, float]) -> list[RankReport]:
    """Rows of (host, type, local rank[, measured speed])."""
    return [RankReport(row[0], row[1], 8 * GIB, row[2], row[3] if len(row) > 3 else None) for row in rows]


CASES = [
    # one type, one node: local-rank order
    (f"3x{V}", ranks(("a", V, 0), ("a", V, 1), ("a", V, 2)), (0, 1, 2)),
    # rank numbers say nothing, local ranks do
    (f"3x{V}", ranks(("a", V, 2), ("a", V, 0), ("a", V, 1)), (2, 0, 1)),
    # types of one node, started in another order than the spec lists them
    (f"1x{V} + 1x{P}", ranks(("a", P, 0), ("a", V, 1)), (1, 0)),
    # hosts stand for the nodes with their types
    (f"1x{V} + 1x{P} @ 1GB/s", ranks(("b", P, 0), ("a", V, 0)), (1, 0)),
    # ... and sizes
    (f"1x{V} + 2x{V} @ 1GB/s", ranks(("a", V, 0), ("b", V, 0), ("a", V, 1)), (1, 0, 2)),
    # among nodes alike, the first host meets the first node; rank numbers may alternate
    (f"2x2x{V} @ 1GB/s", ranks(("b", V, 0), ("a", V, 0), ("b", V, 1), ("a", V, 1)), (0, 2, 1, 3)),
    # no local rank (no launcher): rank order
    ("2xcpu", ranks(("a", "cpu", 0), ("a", "cpu", 0)), (0, 1)),
    # faster meets faster
    ("1xcpu*0.5 + 1xcpu", ranks(("a", "cpu", 0, 90.0), ("a", "cpu", 1, 50.0)), (1, 0)),
    # a difference within the noise says nothing: spec order meets local-rank order
    ("1xcpu*0.5 + 1xcpu", ranks(("a", "cpu", 0, 95.0), ("a", "cpu", 1, 91.0)), (0, 1)),
    # one rank did not measure: neither does it
    ("1xcpu*0.5 + 1xcpu", ranks(("a", "cpu", 0, 90.0), ("a", "cpu", 1)), (0, 1)),
    # the faster host stands for the faster node
    (f"1x{V}*0.5 + 1x{V} @ 1GB/s", ranks(("a", V, 0, 90.0), ("b", V, 0, 40.0)), (1, 0)),
    # CPU ranks of one host play several nodes
    ("2x2xcpu @ 1GB/s", ranks(*[("a", "cpu", i) for i in (1, 0, 3, 2)]), (1, 0, 3, 2)),
    # CPU ranks on real hosts
    ("2x1xcpu @ 1GB/s", ranks(("a", "cpu", 0), ("b", "cpu", 0)), (0, 1)),
]


@pytest.mark.parametrize(("line", "reports", "devices"), CASES)
def test_match(line: str, reports: list[RankReport], devices: tuple[int, ...]) -> None:
    assert match_ranks(ClusterSpec.load(line), reports) == devices


def test_a_type_of_the_users_own_stands_for_the_card_torch_names() -> None:
    spec = ClusterSpec.load({"nodes": [{"devices": ["1xT4", "1xOwn"]}], "profiles": {"Own": {"base": V, "fp32": 1e12}}})
    assert match_ranks(spec, ranks(("a", V, 0), ("a", "T4", 1))) == (1, 0)


MISMATCHES = [
    (f"2x{V}", ranks(("a", V, 0)), f"node 0: 2x{V}", f"a: 1x{V}"),  # too few
    (f"1x{V}", ranks(("a", V, 0), ("a", V, 1)), f"node 0: 1x{V}", f"a: 2x{V}"),  # too many
    (f"1x{V}", ranks(("a", "T4", 0)), f"node 0: 1x{V}", "a: 1xT4"),
    # the types fit, the nodes do not
    (f"2x1x{V} @ 1GB/s", ranks(("a", V, 0), ("a", V, 1)), f"node 0: 1x{V}; node 1: 1x{V}", f"a: 2x{V}"),
    (f"1x{V} + 1x{P}", ranks(("a", V, 0), ("b", P, 0)), f"node 0: 1x{P} + 1x{V}", f"a: 1x{V}; b: 1x{P}"),
    # CPU nodes on one host, but not as many
    ("2x2xcpu @ 1GB/s", ranks(("a", "cpu", 0)), "node 0: 2xcpu; node 1: 2xcpu", "a: 1xcpu"),
]


@pytest.mark.parametrize(("line", "reports", "spec_side", "rank_side"), MISMATCHES)
def test_no_match_lists_both_sides(line: str, reports: list[RankReport], spec_side: str, rank_side: str) -> None:
    with pytest.raises(ClusterError) as error:
        match_ranks(ClusterSpec.load(line), reports)
    assert str(error.value) == (
        f"the ranks do not match the cluster\n  spec:  {spec_side}\n  ranks: {rank_side}\n"
        "  fix: start one rank per device of the spec, on hosts with the same types as its nodes, or change the spec"
    )


ROWS = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from([V, P, "T4"]), st.integers(0, 3), st.floats(1e9, 1e13)),
    min_size=1,
    max_size=8,
)


@given(ROWS)
def test_ranks_match_the_spec_they_describe(rows: list[tuple[str, str, int, float]]) -> None:
    reports = ranks(*rows)
    spec = spec_from_reports(reports)
    found = match_ranks(spec, reports)
    assert sorted(found) == list(range(len(reports)))  # every device once
    assert [spec.devices[index].type for index in found] == [report.type for report in reports]
    nodes = {(report.host, spec.devices[index].node) for report, index in zip(reports, found, strict=True)}
    assert len(nodes) == len({report.host for report in reports})  # one node per host


def test_spec_from_reports() -> None:
    spec = spec_from_reports(ranks(("b", "T4", 1), ("a", V, 0), ("b", P, 0)))
    assert str(spec) == f"(1x{P}[8GiB] + 1xT4[8GiB]) + 1x{V}[8GiB] @ 10Gbit/s"
    assert "between nodes: 10Gbit/s is assumed, nobody gave or measured it" in spec.assumptions
    assert ClusterSpec.load(spec.to_dict()) == spec


SPEED_FACTORS = [
    ([50e9, 49e9, 46e9], [1.0, 1.0, 1.0]),  # noise
    ([50e9, 25e9, 24e9], [1.0, 0.5, 0.5]),
    ([10e9, 40e9, 40e9], [0.25, 1.0, 1.0]),  # scaled to the fastest, whatever the profile says
    ([10e9, 40e9, None], [1.0, 1.0, 1.0]),  # one did not measure
]


@pytest.mark.parametrize(("measured", "factors"), SPEED_FACTORS)
def test_measured_speeds_become_factors(measured: list[float | None], factors: list[float]) -> None:
    reports = [RankReport("a", "cpu", GIB, i, speed) for i, speed in enumerate(measured)]
    assert [device.speed for device in spec_from_reports(reports).devices] == factors


def test_factors_are_relative_to_each_type() -> None:
    spec = spec_from_reports(ranks(("a", V, 0, 15.7e12 * 0.8), ("a", P, 1, 10.6e12 * 0.4)))
    assert [device.speed for device in spec.devices] == [1.0, 0.5]


def test_free_memory_is_rounded_down() -> None:
    reports = [RankReport("a", "cpu", GIB + 12345, 0), RankReport("a", "cpu", 12345, 1)]
    assert [device.memory_bytes for device in spec_from_reports(reports).devices] == [GIB, 12345]


def test_an_unknown_type_is_taken_as_measured() -> None:
    spec = spec_from_reports(ranks(("a", "NVIDIA Future 1", 0, 3e13), ("a", "NVIDIA Future 1", 1, 1.5e13)))
    assert [device.rate() for device in spec.devices] == [3e13, 1.5e13]
    assert ClusterSpec.load(spec.to_dict()) == spec
    assert tuple(s for s in spec.assumptions if "not measured" not in s) == (
        "NVIDIA Future 1: memory_bandwidth (assumed), link_bandwidth (assumed), pcie_bandwidth (assumed)",
    )


def test_an_unknown_type_without_speed() -> None:
    with pytest.raises(ClusterError) as error:
        spec_from_reports(ranks(("a", "NVIDIA Future 1", 0)))
    assert error.value.what == "unknown device 'NVIDIA Future 1', and no rank measured its speed"


MIXED = [("T4", "MI210", "AMD and NVIDIA"), ("T4", "cpu", "CPU and NVIDIA"), ("AMD Radeon X", "T4", "AMD and NVIDIA")]


@pytest.mark.parametrize(("first", "second", "vendors"), MIXED)
def test_ranks_that_nothing_joins_are_no_cluster(first: str, second: str, vendors: str) -> None:
    with pytest.raises(ClusterError, match=f"^{vendors} devices cannot work in one cluster"):
        spec_from_reports(ranks(("a", first, 0, 1e12), ("b", second, 0, 1e12)))
