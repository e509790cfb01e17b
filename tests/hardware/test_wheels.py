"""Which wheels serve which device."""

from __future__ import annotations

import pytest

from whalepy.hardware.cluster import ClusterSpec
from whalepy.hardware.profiles import known_profiles, profile
from whalepy.hardware.wheels import builds_for, builds_for_all, known_wheels, runs_on

RUNS = [
    ("8.6", ["8.0"], True),  # a kernel runs on later minors of its major
    ("8.0", ["8.6"], False),  # not on earlier ones
    ("9.0", ["8.6"], False),  # nor on another major
    ("12.1", ["12.0"], True),
    ("13.0", ["12.0+PTX"], True),  # compiled at first use
    ("13.0", ["12.0"], False),
    ("9.0", ["12.0+PTX"], False),
    ("10.0", ["8.6", "10.0"], True),  # compared as numbers, not as text
    ("gfx90a", ["gfx908", "gfx90a"], True),
    ("gfx908", ["gfx90a"], False),
    ("", ["8.0"], False),  # nobody said
]


@pytest.mark.parametrize(("capability", "architectures", "runs"), RUNS)
def test_runs_on(capability: str, architectures: list[str], runs: bool) -> None:
    assert runs_on(capability, architectures) is runs


BUILDS = [
    ("V100-SXM2-32GB", "2.13", ("cu126",)),  # Volta left the CUDA 12.8 builds with 2.11
    ("P100-PCIE-16GB", "2.11", ("cu126",)),
    ("T4", "2.11", ("cu126", "cu128", "cu130")),
    ("RTX-4090", "2.13", ("cu126", "cu130", "cu132")),  # 8.9 runs kernels for 8.6
    ("RTX-5090", "2.12", ("cu130", "cu132")),
    ("B200", "2.13", ("cu130", "cu132")),
    ("K80", "2.13", ()),
    ("MI300X", "2.13", ("rocm7.2",)),
    ("cpu", "2.13", ("any",)),
]


@pytest.mark.parametrize(("name", "torch", "builds"), BUILDS)
def test_builds_for(name: str, torch: str, builds: tuple[str, ...]) -> None:
    assert builds_for(profile(name), torch) == builds


def test_only_the_k80_has_no_wheel() -> None:
    assert [row.name for row in known_profiles() if not builds_for(row, "2.13")] == ["K80"]


def test_one_build_for_all() -> None:
    devices = [profile(name) for name in ("T4", "B200", "cpu")]
    assert builds_for_all(devices, "2.13") == ("cu130", "cu132")


def test_a_cluster_that_no_wheel_serves_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whalepy.hardware.assumptions.torch_release", lambda: "2.13")
    said = [s for s in ClusterSpec.load("1xV100-SXM2-32GB + 1xB200 @ 1GB/s").assumptions if "wheel" in s]
    assert said == [
        "no official torch 2.13 wheel has kernels for all devices (B200: cu130 cu132; V100-SXM2-32GB: cu126)"
    ]


def test_every_wheel_has_a_source() -> None:
    assert all(wheel.source and wheel.architectures for wheel in known_wheels())
