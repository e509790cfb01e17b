"""What is checked before a run: builds against cards, and links against the spec."""

from __future__ import annotations

from dataclasses import replace

import pytest

from whalepy.errors import ClusterError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.hardware.links import Link
from whalepy.hardware.match import RankReport
from whalepy.runtime import preflight
from whalepy.runtime.measure_pairs import Pair
from whalepy.runtime.preflight import Build, CheckedLink, Preflight, architecture, check_builds

V100 = Build("2.13.0+cu126", "Tesla V100-SXM2-32GB", "7.0", ("5.0", "6.0", "7.0", "7.5"), "GPU-1")
B200 = Build("2.13.0+cu126", "NVIDIA B200", "10.0", ("5.0", "6.0", "7.0", "9.0"), "GPU-2")
K80 = Build("2.13.0+cu126", "Tesla K80", "3.7", ("5.0",), "GPU-3")
CPU = Build("2.13.0+cpu", "cpu", "", (), "")


@pytest.fixture(autouse=True)
def release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "torch_release", lambda: "2.13")


def reports(*hosts: str) -> list[RankReport]:
    return [RankReport(host, "any", 1, 0) for host in hosts]


FOUND = [
    # A card newer than the build: the wheels that serve it.
    (
        [V100, B200],
        ["a", "b"],
        "rank 1: torch 2.13.0+cu126 has no kernels for NVIDIA B200 (10.0)\n  fix: install torch 2.13 from "
        "https://download.pytorch.org/whl/cu130, https://download.pytorch.org/whl/cu132",
    ),
    # One that no wheel serves.
    (
        [K80],
        ["a"],
        "rank 0: torch 2.13.0+cu126 has no kernels for Tesla K80 (3.7)\n  fix: build torch from source for it",
    ),
    (
        [V100, replace(V100, torch="2.12.1+cu126", uuid="x")],
        ["a", "b"],
        "ranks have different versions of torch: 2.12.1 on rank 1, 2.13.0 on rank 0\n"
        "  fix: install one version everywhere",
    ),
    (
        [V100, V100],
        ["a", "a"],
        "ranks 0 and 1 drive the same card of a\n"
        "  fix: start one rank per card, and let CUDA_VISIBLE_DEVICES show each rank its own or all of them",
    ),
]


@pytest.mark.parametrize(("builds", "hosts", "message"), FOUND)
def test_what_is_wrong_with_builds(builds: list[Build], hosts: list[str], message: str) -> None:
    with pytest.raises(ClusterError) as error:
        check_builds(builds, reports(*hosts), None)
    assert str(error.value) == message


def test_builds_that_serve() -> None:
    check_builds([V100, replace(V100, uuid="GPU-9")], reports("a", "a"), None)
    check_builds([V100, replace(V100, torch="2.13.0+cu130")], reports("a", "b"), None)  # other builds of one version
    check_builds([CPU, CPU], reports("a", "a"), ClusterSpec.load("2xcpu"))


def test_cards_that_torch_does_not_see() -> None:
    with pytest.raises(ClusterError) as error:
        check_builds([CPU, CPU], reports("a", "a"), ClusterSpec.load("2xT4"))
    assert str(error.value) == (
        "the cluster has cards, but torch 2.13.0+cpu sees none on any rank\n"
        "  fix: install a torch build for them, and check the driver"
    )


NAMES = [
    ("sm_86", "8.6"),
    ("sm_120", "12.0"),
    ("compute_120", "12.0+PTX"),
    ("sm_90a", "9.0"),
    ("gfx90a", "gfx90a"),
    ("new", "new"),
]


@pytest.mark.parametrize(("name", "written"), NAMES)
def test_architectures_as_torch_names_them(name: str, written: str) -> None:
    assert architecture(name) == written


def with_link(bandwidth: float, origin: str) -> Preflight:
    link = CheckedLink(Pair(0, 1, 1e-4, bandwidth), Link(2e9, 1e-4, origin), same_node=True)
    spec = ClusterSpec.load("2xcpu")
    return Preflight(spec, (CPU, CPU), tuple(reports("a", "a")), (0, 1), (link,))


FINDINGS = [
    (1.1e9, "given", ()),  # more than half
    (0.5e9, "given", ("ranks 0 and 1: 0.5 GB/s, 25% of the spec",)),
    (0.5e9, "measured", ("ranks 0 and 1: 0.5 GB/s, 25% of the spec",)),
    (0.5e9, "profile", ()),  # nobody promised
    (0.5e9, "assumed", ()),
]


@pytest.mark.parametrize(("bandwidth", "origin", "findings"), FINDINGS)
def test_findings(bandwidth: float, origin: str, findings: tuple[str, ...]) -> None:
    assert with_link(bandwidth, origin).findings == findings


def test_more_ranks_than_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(preflight.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ClusterError) as error:
        preflight._device()
    assert str(error.value) == (
        "local rank 2 has no card: torch sees 2 on its host\n  fix: start at most 2 ranks there"
    )
