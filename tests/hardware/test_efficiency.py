"""What devices make of their peaks, measured and taken."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from whalepy.dryrun.counting import UNALIGNED
from whalepy.hardware.devices import GIB, DeviceProfile, known_profiles
from whalepy.hardware.efficiency import PRACTICE, default_curve, fraction_at
from whalepy.hardware.profiles import profile

CURVE = ((100.0, 0.2), (10_000.0, 0.6))

FRACTIONS = [
    (100, 0.2),
    (10_000, 0.6),
    (5_050, 5_050 / ((100 / 0.2 + 10_000 / 0.6) / 2)),  # half way: half way in time too
    (50, 0.1),  # below the first point a kernel takes as long as at it
    (1e9, 0.6),  # above the last, the last
]


@pytest.mark.parametrize(("size", "fraction"), FRACTIONS)
def test_fraction_at(size: float, fraction: float) -> None:
    assert fraction_at(CURVE, size) == pytest.approx(fraction)


def test_the_default_curve_is_a_constant_and_a_rate() -> None:
    curve = default_curve(peak=1e12, fraction=0.8, fill_s=5e-6)
    seconds = [size / (1e12 * fraction) for size, fraction in curve]
    assert seconds == pytest.approx([5e-6 + size / 0.8e12 for size, _ in curve])


@pytest.mark.parametrize("row", known_profiles(), ids=lambda row: row.name)
def test_no_kernel_is_faster_for_more_work(row: DeviceProfile) -> None:
    for seconds in (row.product_seconds, row.memory_seconds):
        times = [seconds(10.0**n) for n in range(1, 16)]
        assert all(more >= less * (1 - 1e-9) for less, more in pairwise(times))


LARGE = [
    ("A100-SXM4-80GB", "bfloat16", 0.71),
    ("A100-SXM4-80GB", "float32", 0.70),  # no matrix units in float32
    ("MI300X", "bfloat16", 0.49),
    ("cpu", "float32", 1.0),
]


@pytest.mark.parametrize(("name", "dtype", "fraction"), LARGE)
def test_large_products_reach_what_is_taken_for_the_vendor(name: str, dtype: str, fraction: float) -> None:
    assert profile(name).product_fraction(1e13, dtype) == pytest.approx(fraction, rel=0.01)


WAVE = 108 * 128 * 256
"""Elements of a result that the multiprocessors of an A100 make at a time."""


PARTS = [(WAVE // 64, 1 / 4), (WAVE, 1 / 4), (8 * WAVE, 1 / 8), (64 * WAVE, 1 / 64)]


@pytest.mark.parametrize(("outputs", "part"), PARTS)
def test_products_lose_part_of_a_wave(outputs: int, part: float) -> None:
    """Small results are made in smaller tiles."""
    a100, lost = profile("A100-SXM4-80GB"), PRACTICE["NVIDIA"].waves_lost
    flops = 2 * 4096 * outputs
    whole = a100.product_seconds(flops, "bfloat16")
    assert a100.product_seconds(flops, "bfloat16", "", outputs) == pytest.approx(whole * (1 + lost * part))


@pytest.mark.parametrize("name", ["A100-SXM4-80GB", "T4", "MI300X", "cpu"])
def test_no_product_is_faster_for_more_rows(name: str) -> None:
    row = profile(name)
    times = [row.product_seconds(2 * 1024 * 4096 * rows, "float16", "", 4096 * rows) for rows in range(1, 8192, 64)]
    assert all(more >= less for less, more in pairwise(times))


def test_waves_are_those_of_matrix_units_and_of_no_measured_curve() -> None:
    t4 = profile("T4")
    own = replace(t4, product_efficiency=(("float16", ((1.0, 0.5),)),))
    for row, dtype, kind in ((own, "float16", ""), (t4, "float32", ""), (t4, "float16", UNALIGNED)):
        assert row.product_seconds(1e9, dtype, kind, 10**5) == row.product_seconds(1e9, dtype, kind)


def test_a_type_of_which_nobody_says_how_many_multiprocessors_it_has() -> None:
    known, unknown = profile("A100-SXM4-80GB"), replace(profile("A100-SXM4-80GB"), multiprocessors=0)
    assert unknown.product_seconds(1e12, "float16", "", 10**8) == pytest.approx(
        known.product_seconds(1e12, "float16", "", 10**8), rel=0.01
    )


def test_a_measured_curve_wins_and_stands_for_dtypes_alike() -> None:
    own = replace(profile("T4"), product_efficiency=(("float32", ((1.0, 0.9),)), ("float16", ((1.0, 0.5),))))
    assert [own.product_fraction(1e9, name) for name in ("float32", "tf32", "float64", "float16", "bfloat16")] == [
        0.9, 0.9, 0.9, 0.5, 0.5,
    ]  # fmt: skip


TAKEN = [
    ("T4", 15.75e9 * 0.8, 8e-6, GIB),
    ("GB200", 450e9 * 0.8, 8e-6, GIB),  # its host link is NVLink-C2C
    ("cpu", 5e9, 2e-6, int(0.44 * GIB)),  # a copy reads and writes
]


@pytest.mark.parametrize(("name", "host", "launch", "runtime"), TAKEN)
def test_what_is_taken_where_nothing_is_measured(name: str, host: float, launch: float, runtime: int) -> None:
    row = profile(name)
    assert (row.host_link, row.launch_seconds, row.runtime_memory) == (host, launch, runtime)


def test_what_is_given_wins() -> None:
    own = replace(profile("T4"), host_bandwidth=1.0, launch_s=0.0, runtime_bytes=0)
    assert (own.host_link, own.launch_seconds, own.runtime_memory) == (1.0, 0.0, 0)


def test_a_measured_rate_does_not_change_what_utilisation_refers_to() -> None:
    own = replace(profile("T4"), base="T4", fp16=30e12)
    assert (own.rate("float16"), own.sheet_rate("float16")) == (30e12, 65e12)
