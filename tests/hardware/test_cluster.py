from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalepy.hardware.cluster import ClusterSpec
from whalepy.hardware.links import CPU_LATENCY_S, NETWORK_LATENCY_S

# The line as written, as printed, and the devices of each node.
LINES = [
    (
        "8xV100-SXM2-32GB + 8xP100-PCIE-16GB @ 50Gbit/s",
        "8xV100-SXM2-32GB + 8xP100-PCIE-16GB @ 50Gbit/s",
        [8, 8],
    ),
    (
        "4x8xA100-SXM4-80GB + 12x8xV100-SXM2-16GB @ 100Gbit/s",
        "4x8xA100-SXM4-80GB + 12x8xV100-SXM2-16GB @ 100Gbit/s",
        [8] * 16,
    ),
    ("2x4090 + 2x2080Ti", "2xRTX-4090 + 2xRTX-2080-Ti", [4]),
    ("2xcpu + 2xcpu*0.5", "2xcpu + 2xcpu*0.5", [4]),
    ("1x2xT4+1xT4 @ 1GB/s", "2xT4 + 1xT4 @ 8Gbit/s", [2, 1]),
    ("2xT4 @ 1GB/s", "2xT4", [2]),  # nothing lies between the nodes of one node
]


@pytest.mark.parametrize(("line", "printed", "sizes"), LINES)
def test_lines(line: str, printed: str, sizes: list[int]) -> None:
    spec = ClusterSpec.load(line)
    assert str(spec) == printed
    assert [len(node.devices) for node in spec.nodes] == sizes
    assert [device.index for device in spec.devices] == list(range(sum(sizes)))
    assert ClusterSpec.load(printed) == spec


def test_load_gives_a_spec_back() -> None:
    spec = ClusterSpec.load("2xcpu")
    assert ClusterSpec.load(spec) is spec


TYPES = st.sampled_from(["T4", "RTX-3090", "A100-SXM4-80GB"])
ITEMS = st.fixed_dictionaries(
    {"type": TYPES, "count": st.integers(1, 3), "speed": st.sampled_from([1.0, 0.5, 0.3])},
    optional={"memory_gib": st.integers(1, 9)},
)
NODES = st.fixed_dictionaries(
    {"count": st.integers(1, 3), "devices": st.lists(ITEMS, min_size=1, max_size=3)},
    optional={"link": st.integers(1, 10**12)},
)


@settings(max_examples=60, deadline=None)
@given(st.lists(NODES, min_size=1, max_size=3), st.integers(1, 10**12))
def test_to_dict_goes_through_json_and_back(nodes: list[object], bandwidth: int) -> None:
    spec = ClusterSpec.load({"nodes": nodes, "link": bandwidth})
    assert ClusterSpec.load(json.loads(json.dumps(spec.to_dict()))) == spec


def test_to_dict_carries_types_of_the_users_own() -> None:
    spec = ClusterSpec.load({"nodes": [{"devices": "2xOwn"}], "profiles": {"Own": {"base": "T4", "fp32": 1e12}}})
    again = ClusterSpec.load(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert again.devices[0].profile.fp32 == 1e12


def test_to_dict_groups_what_is_alike() -> None:
    assert ClusterSpec.load("2x8xT4 @ 8Gbit/s").to_dict() == {
        "nodes": [{"count": 2, "devices": [{"type": "T4", "count": 8, "speed": 1.0}]}],
        "link": {"bandwidth": 1e9, "latency_s": NETWORK_LATENCY_S, "origin": "given"},
    }


def test_str_shows_brackets_and_changed_memory() -> None:
    nodes = [{"count": 2, "devices": ["2xT4", {"type": "3090", "memory_gib": 20, "speed": 0.5}]}]
    assert str(ClusterSpec.load({"nodes": nodes, "link": "1GB/s"})) == "2x(2xT4 + 1xRTX-3090[20GiB]*0.5) @ 8Gbit/s"


SPEEDS = [
    ("2xcpu + 1xcpu*0.5", "float32", (1.0, 1.0, 0.5)),
    ("1xcpu*3 + 1xcpu*1.5", "float32", (1.0, 0.5)),  # relative to the fastest
    ("1xV100-SXM2-16GB + 1xP100-SXM2-16GB", "float32", (1.0, 10.6 / 15.7)),
    ("1xV100-SXM2-16GB + 1xP100-SXM2-16GB", "float16", (1.0, 21.2 / 125)),
]


@pytest.mark.parametrize(("line", "dtype", "speeds"), SPEEDS)
def test_speeds(line: str, dtype: str, speeds: tuple[float, ...]) -> None:
    assert ClusterSpec.load(line).speeds(dtype) == pytest.approx(speeds)


def test_link_between_devices() -> None:
    spec = ClusterSpec.load("2x2xV100-SXM2-16GB @ 50Gbit/s")
    assert spec.link(0, 1).bandwidth_bytes_per_s == 150e9
    assert spec.link(1, 2) is spec.inter
    assert spec.links.intra == (spec.nodes[0].link, spec.nodes[1].link)


def test_latency_between_nodes_follows_the_kind() -> None:
    latencies = [ClusterSpec.load(line).link(0, 1).latency_s for line in ("2x1xcpu @ 1GB/s", "2x1xT4 @ 1GB/s")]
    assert latencies == [CPU_LATENCY_S, NETWORK_LATENCY_S]


ASSUMPTIONS = [
    ("2xA100-SXM4-80GB", ()),
    (
        "2x3090",
        (
            "RTX-3090: 1.34 x the speed of its figures, as published training runs reached",
            "RTX-3090: a bridge joins pairs at most and is usually absent, PCIe is taken",
            "RTX-3090: link_bandwidth (not looked up)",
        ),
    ),
    ("1xA100-SXM4-80GB + 1xL40S", ("A100-SXM4-80GB and L40S in one node: PCIe is taken between them",)),
    ("1xA4000", ("A4000: memory_bytes (95% of the marketed size)",)),
]


@pytest.mark.parametrize(("line", "sentences"), ASSUMPTIONS)
def test_assumptions(line: str, sentences: tuple[str, ...]) -> None:
    assert tuple(s for s in ClusterSpec.load(line).assumptions if "not measured" not in s) == sentences


def test_what_is_taken_for_devices_that_nobody_measured() -> None:
    taken = [s for s in ClusterSpec.load("1xT4 + 1x3090").assumptions if "not measured" in s]
    assert taken == [
        "NVIDIA devices, not measured: large products reach 71% of the peak of matrix units, less 1.2 waves of "
        "tiles (set on published training runs), 70% without, large elementwise operators 60% of the memory bandwidth, "
        "8 us of the host per operator, 80% of the host link, 1.0 GiB held by libraries"
    ]


SEEN = {"base": "T4", "fp32": 6e12, "marks": [["fp32", "measured"]]}
FIGURES = [
    ("2xT4", "data sheet"),
    ({"nodes": [{"devices": "2xSeen"}], "profiles": {"Seen": SEEN}}, "measured"),
    ({"nodes": [{"devices": ["1xT4", "1xSeen"]}], "profiles": {"Seen": SEEN}}, "mixed"),
]


@pytest.mark.parametrize(("source", "figures"), FIGURES)
def test_where_the_speeds_come_from(source: Any, figures: str) -> None:
    assert ClusterSpec.load(source).figures == figures


def test_nothing_is_taken_for_what_is_given() -> None:
    figures = {
        "base": "T4",
        "product_efficiency": {"float32": [[1e9, 0.5]]},
        "memory_efficiency": [[1e6, 0.7]],
        "host_bandwidth": 1e10,
        "runtime_bytes": 1,
    }
    spec = ClusterSpec.load({"nodes": [{"devices": "1xOwn"}], "profiles": {"Own": figures}})
    taken = [s for s in spec.assumptions if "not measured" in s]
    assert taken == ["NVIDIA devices, not measured: 8 us of the host per operator"]


def test_a_spec_needs_no_torch() -> None:
    code = "import sys, whalepy.hardware.match as m; m.ClusterSpec.load('2xcpu'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
