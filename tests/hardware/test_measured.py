"""From measured kernels to the profile of a type, and to a link."""

from __future__ import annotations

import pytest

from whalepy.hardware.cluster import ClusterSpec
from whalepy.hardware.match import RankReport, match_ranks, spec_from_reports
from whalepy.hardware.measured import Measured, Point, fit_link, refined
from whalepy.hardware.profiles import profile

SEEN = Measured(
    products={"float32": (Point(1e6, 1e-3), Point(1e9, 0.25)), "bfloat16": (Point(1e9, 0.5),)},
    memory={
        "add": (Point(3e3, 3e-6), Point(3e6, 3e-3)),
        "softmax": (Point(2e3, 4e-6), Point(2e6, 4e-3)),
        "copy": (Point(2e3, 2e-6), Point(2e6, 2e-3)),
    },
    launch_s=1e-6,
)


def test_measured_figures_take_the_place_of_the_data_sheet() -> None:
    t4 = refined(profile("T4"), SEEN)
    assert (t4.fp32, t4.bf16, t4.fp16) == (4e9, 2e9, 65e12)  # float16 was not measured
    assert dict(t4.product_efficiency) == {"float32": ((1e6, 0.25), (1e9, 1.0)), "bfloat16": ((1e9, 1.0),)}
    assert t4.memory_bandwidth == pytest.approx(1e9)  # elementwise operators, at the largest size
    assert t4.memory_efficiency == ((2.5e3, pytest.approx(1.0)), (2.5e6, pytest.approx(1.0)))
    assert (t4.launch_seconds, t4.host_link) == (1e-6, profile("T4").host_link)


def test_what_is_measured_is_told_from_the_data_sheet() -> None:
    cpu = refined(profile("cpu"), SEEN)
    marks = dict(cpu.marks)
    assert marks["fp32"] == marks["memory_bandwidth"] == marks["launch_s"] == "measured"
    assert marks["link_bandwidth"] == "assumed"
    assert len(marks) == len(cpu.marks)


def test_times_come_back_out_of_the_curves() -> None:
    cpu = refined(profile("cpu"), SEEN)
    assert cpu.product_seconds(1e9) == pytest.approx(0.25)
    assert cpu.product_seconds(1e6) == pytest.approx(1e-3)
    assert cpu.memory_seconds(2e6) == pytest.approx(2e-3)


def test_a_dip_is_levelled() -> None:
    noisy = Measured({"float32": (Point(1e6, 2e-3), Point(1e7, 1e-3), Point(1e9, 0.1))})
    cpu = refined(profile("cpu"), noisy)
    assert cpu.product_seconds(1e7) == pytest.approx(2e-3)  # no faster than the smaller one


def test_nothing_measured_changes_nothing_but_the_source() -> None:
    assert refined(profile("T4"), Measured({})).marks == profile("T4").marks


def test_ranks_that_measured_make_the_spec() -> None:
    slower = Measured({"float32": (Point(1e9, 0.5),)})
    reports = [
        RankReport("a", "cpu", 2**30, 0, SEEN.rate(), SEEN),
        RankReport("a", "cpu", 2**30, 1, slower.rate(), slower),
    ]
    spec = spec_from_reports(reports)
    assert [device.rate() for device in spec.devices] == [4e9, 2e9]
    assert spec.devices[0].profile == refined(profile("cpu"), SEEN)
    assert ClusterSpec.load(spec.to_dict()) == spec
    assert match_ranks(spec, reports) == (0, 1)


def test_an_unknown_card_is_what_it_was_measured_to_be() -> None:
    spec = spec_from_reports([RankReport("a", "NVIDIA Future 1", 2**30, 0, SEEN.rate(), SEEN)])
    future = spec.devices[0].profile
    assert (future.fp32, future.memory_bandwidth, future.torch_name) == (4e9, pytest.approx(1e9), "NVIDIA Future 1")
    assert ClusterSpec.load(spec.to_dict()) == spec


LINKS = [
    (2, 1e9, 1e-4),
    (4, 2.5e10, 3e-6),
    (8, 1.25e9, 0.0),
]


@pytest.mark.parametrize(("ranks", "bandwidth", "latency"), LINKS)
def test_a_link_is_found_again(ranks: int, bandwidth: float, latency: float) -> None:
    steps = 2 * (ranks - 1)
    sizes = [2.0**exponent for exponent in range(12, 27, 2)]
    points = [Point(size, steps * (latency + size / ranks / bandwidth)) for size in sizes]
    assert fit_link(points, ranks) == pytest.approx((bandwidth, latency), rel=1e-6, abs=1e-12)


def test_times_that_fall_with_the_size_still_give_a_bandwidth() -> None:
    bandwidth, latency = fit_link([Point(1e3, 2e-3), Point(1e6, 1e-3)], 2)
    assert bandwidth > 0
    assert latency > 0
