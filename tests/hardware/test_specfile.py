"""Cluster files: what they may say, and every way of saying it wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from whalepy.errors import ClusterError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.hardware.devices import GIB

YAML = """
nodes:
  - count: 2
    devices: 2xA100-SXM4-80GB
  - devices:
      - {type: Own, count: 2, speed: 0.9, memory_gib: 20}
      - 1x3090
    link: 12GB/s
link: {bandwidth: 100Gbit/s, latency_s: 2.0e-5}
profiles:
  Own: {base: RTX-3090, fp32: 3.0e+13}
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_whole_file(tmp_path: Path) -> None:
    spec = ClusterSpec.load(write(tmp_path, "cluster.yaml", YAML))
    types = ["A100-SXM4-80GB"] * 4 + ["Own", "Own", "RTX-3090"]
    assert [(device.index, device.type) for device in spec.devices] == list(enumerate(types))
    assert [device.node for device in spec.devices] == [0, 0, 1, 1, 2, 2, 2]
    own = spec.devices[4]
    assert (own.speed, own.memory_bytes, own.rate()) == (0.9, 20 * GIB, 0.9 * 3e13)
    assert own.profile.fp16 == spec.devices[6].profile.fp16  # from its base
    assert spec.links.intra[2].bandwidth_bytes_per_s == 12e9
    assert spec.inter is not None
    assert (spec.inter.bandwidth_bytes_per_s, spec.inter.latency_s) == (12.5e9, 2e-5)


def test_text_names_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, "cluster", "nodes: [{devices: 2xcpu}]")  # YAML, whatever the ending
    assert ClusterSpec.load(str(path)) == ClusterSpec.load("2xcpu")


def test_a_file_may_hold_the_one_line_form(tmp_path: Path) -> None:
    assert ClusterSpec.load(write(tmp_path, "one.yaml", "2xcpu + 1xcpu*0.5")) == ClusterSpec.load("2xcpu + 1xcpu*0.5")


def test_json(tmp_path: Path) -> None:
    path = write(tmp_path, "cluster.json", '{"nodes": [{"devices": {"type": "T4", "count": 2}}]}')
    assert str(ClusterSpec.load(path)) == "2xT4"


def test_a_type_from_nothing() -> None:
    figures = {"fp32": 1e12, "memory_bandwidth": 1e11, "link_bandwidth": 1e10, "memory_gib": 2}
    device = ClusterSpec.load({"nodes": [{"devices": "1xOwn"}], "profiles": {"Own": figures}}).devices[0]
    assert (device.rate("float16"), device.memory_bytes) == (1e12, 2 * GIB)


def one(**fields: Any) -> dict[str, Any]:
    return {"nodes": [{"devices": [{"type": "cpu"} | fields]}]}


NUMBER = "write a figure"
SOURCE = "give the path of a YAML or JSON file, a dict, or one line such as '8xT4'"
ERRORS: list[tuple[Any, str]] = [
    (one(spede=2), "nodes[0].devices[0].spede is not a known field\n  fix: did you mean speed?"),
    (one(speed=0), "nodes[0].devices[0].speed is 0\n  fix: write a figure above 0"),
    (one(speed=-1.5), "nodes[0].devices[0].speed is -1.5\n  fix: write a figure above 0"),
    (one(speed=float("inf")), "nodes[0].devices[0].speed is inf\n  fix: write a finite figure"),
    (one(count=0), "nodes[0].devices[0].count is 0\n  fix: write a figure of at least 1"),
    (one(memory_gib=0), "nodes[0].devices[0].memory_gib is 0\n  fix: write a figure above 0"),
    (
        one(speed="fast"),
        f"nodes[0].devices[0].speed is 'fast'\n  fix: {NUMBER}",
    ),
    ({"nodes": [{"devices": [{"count": 2}]}]}, "nodes[0].devices[0].type is missing\n  fix: add `type:`"),
    ({"nodes": [{"device": "2xcpu"}]}, "nodes[0].devices is missing\n  fix: add `devices:`"),
    ({"nodes": [{"devices": []}]}, "nodes[0].devices is []\n  fix: list at least one"),
    ({"nodes": []}, "nodes is []\n  fix: list at least one"),
    ({}, "nodes is missing\n  fix: add `nodes:`"),
    (
        {"nodes": [{"devices": "2xcpu"}], "links": 1},
        "links is not a known field\n  fix: did you mean link?",
    ),
    (
        {"nodes": [{"devices": "2xcpu"}], "link": {"bandwith": 1}},
        "link.bandwidth is missing\n  fix: add `bandwidth:`",
    ),
    (
        {"nodes": [{"devices": "2xcpu", "link": {"bandwidth": 1, "latency": 1}}]},
        "nodes[0].link.latency is not a known field\n  fix: did you mean latency_s?",
    ),
    (
        {"nodes": [{"devices": "2x2xcpu"}]},
        "devices of one node: '2x2xcpu' says nodes too\n  fix: write how many nodes as `count:`",
    ),
    (
        {"nodes": [{"count": 2, "devices": "2xcpu"}]},
        "several nodes, but no bandwidth between them\n"
        "  fix: add `@ 100Gbit/s` to the line, or `link: 100Gbit/s` to the file",
    ),
    (
        {"nodes": [{"devices": "1xOwn"}], "profiles": {"Own": {"fp32": 1e12}}},
        "profiles.Own.memory_bandwidth is missing\n  fix: add it in SI units, or name a known type as `base:`",
    ),
    (
        {"nodes": [{"devices": "1xOwn"}], "profiles": {"Own": {"base": "T4", "fp23": 1}}},
        "profiles.Own.fp23 is not a known field\n  fix: did you mean fp32?",
    ),
    (
        {"nodes": [{"devices": ["1xT4", "1xMI210"]}]},
        "AMD and NVIDIA devices cannot work in one cluster: no collective library joins them\n"
        "  fix: describe one cluster per vendor",
    ),
    (
        {"nodes": [{"devices": ["1xT4", "1xcpu"]}]},
        "CPU and NVIDIA devices cannot work in one cluster: a process group serves cards or CPUs, not both\n"
        "  fix: describe one cluster per vendor",
    ),
    (
        7,
        f"7 does not describe a cluster\n  fix: {SOURCE}",
    ),
]


@pytest.mark.parametrize(("source", "message"), ERRORS)
def test_errors(source: Any, message: str) -> None:
    with pytest.raises(ClusterError) as error:
        ClusterSpec.load(source)
    assert str(error.value) == message


FILES = [
    ("a.yaml", "nodes:\n  - devices: [2xcpu\n", "broken YAML: expected ',' or ']', but got '<stream end>'", ":3"),
    ("a.json", '{"nodes":\n oops}', "broken JSON: Expecting value", ":2"),
    ("a.yaml", "nodes: [{devices: 2xcpuu}]", "unknown device 'cpuu'", ""),  # found after the file was read
    ("a.yaml", "nodes: [{devices: 0xcpu}]", "cluster term '0xcpu': 0 is not a number of devices", ""),
    ("a.yaml", "", "the cluster file is empty", ""),
    ("a.yaml", "2xcpu @ fast", "'fast' is not a bandwidth", ""),
]


@pytest.mark.parametrize(("name", "text", "what", "line"), FILES)
def test_errors_say_which_file(tmp_path: Path, name: str, text: str, what: str, line: str) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(ClusterError) as error:
        ClusterSpec.load(path)
    assert (error.value.what, error.value.at) == (what, f"{path}{line}")


def test_no_such_file() -> None:
    with pytest.raises(ClusterError) as error:
        ClusterSpec.load("none.yaml")
    assert error.value.what == "cannot read the cluster file 'none.yaml': No such file or directory"
