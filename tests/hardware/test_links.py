from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whalepy.errors import ClusterError
from whalepy.hardware.links import (
    CPU_LATENCY_S,
    NVLINK_LATENCY_S,
    PCIE_LATENCY_S,
    format_bandwidth,
    link_inside,
    parse_bandwidth,
)
from whalepy.hardware.profiles import profile

BANDWIDTHS = [
    ("50Gbit/s", 6.25e9),
    (" 12.5 GB/s ", 12.5e9),
    ("1e3Mbit/s", 125e6),
    ("8bit/s", 1.0),
    ("3TB/s", 3e12),
    ("64kB/s", 64e3),
]


@pytest.mark.parametrize(("text", "bytes_per_s"), BANDWIDTHS)
def test_parse_bandwidth(text: str, bytes_per_s: float) -> None:
    assert parse_bandwidth(text) == bytes_per_s


# Gb/s and Gbps are read as bits by some and as bytes by others; a bandwidth of zero or below is none.
@pytest.mark.parametrize(
    "text", ["50Gb/s", "50Gbps", "50", "0Gbit/s", "-1GB/s", "nanGB/s", "1GiB/s", "e9B/s", "1Kbit/s", ""]
)
def test_not_a_bandwidth(text: str) -> None:
    with pytest.raises(ClusterError) as error:
        parse_bandwidth(text)
    assert str(error.value) == (
        f"{text!r} is not a bandwidth\n"
        "  fix: write a positive figure with its unit: 100Gbit/s (bits) or 12.5GB/s (bytes)"
    )


@given(st.integers(1, 10**14))
def test_format_bandwidth_reads_back(bytes_per_s: int) -> None:
    assert parse_bandwidth(format_bandwidth(bytes_per_s)) == pytest.approx(bytes_per_s, rel=1e-14)


INSIDE = [
    (["V100-SXM2-16GB"] * 2, 150e9, NVLINK_LATENCY_S),
    (["RTX-3090"] * 2, 31.5e9, PCIE_LATENCY_S),  # the bridge is usually absent
    (["T4"] * 2, 15.75e9, PCIE_LATENCY_S),
    (["A100-SXM4-80GB", "V100-SXM2-16GB"], 15.75e9, PCIE_LATENCY_S),  # no NVLink between types; the slower slot
    (["cpu"] * 2, 2e9, CPU_LATENCY_S),
]


@pytest.mark.parametrize(("types", "bandwidth", "latency"), INSIDE)
def test_link_inside(types: list[str], bandwidth: float, latency: float) -> None:
    link = link_inside([profile(name) for name in types])
    assert (link.bandwidth_bytes_per_s, link.latency_s, link.origin) == (bandwidth, latency, "profile")
