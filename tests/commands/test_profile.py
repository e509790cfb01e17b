"""`whalepy profile`: a file that a cluster may be, or may name; links under a launcher; bad targets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.commands.run import run
from tests.pool import Pool
from whalepy.hardware.cluster import ClusterSpec
from whalepy.runtime import measure
from whalepy.runtime.measure import Effort

TINY = Effort(0.002, (16, 64), ("float32",), (2**12, 2**16))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "EFFORTS", {("cpu", True): TINY, ("cpu", False): TINY})


@pytest.mark.parametrize("name", ["own.yaml", "own.json"])
def test_the_file_is_a_cluster(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "profile", "--quick", "--output", str(tmp_path / name)) == 0
    spec = ClusterSpec.load(tmp_path / name)
    (device,) = spec.devices
    marks = dict(device.profile.marks)
    assert (device.type, device.speed, device.profile.base) == ("cpu", 1.0, "cpu")
    assert [marks[field] for field in ("fp32", "memory_bandwidth", "launch_s", "memory_bytes")] == ["measured"] * 4
    assert device.memory_bytes == device.profile.memory_bytes > 2**28
    assert device.profile.product_fraction(2 * 64**3) <= 1.0
    assert ClusterSpec.load(spec.to_dict()) == spec


def test_another_cluster_file_may_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "measured").mkdir()
    run(monkeypatch, "profile", "--quick", "-o", str(tmp_path / "measured" / "slow.yaml"))
    (tmp_path / "cluster.yaml").write_text(
        "nodes:\n"
        "  - devices: [{type: measured/slow.yaml, count: 2}, 1xMine]\n"
        "profiles:\n"
        "  Mine: {file: measured/slow.yaml, memory_gib: 3}\n"
    )
    spec = ClusterSpec.load(tmp_path / "cluster.yaml")  # paths are relative to the file that names them
    assert [device.type for device in spec.devices] == ["slow", "slow", "Mine"]
    assert spec.devices[2].memory_bytes == 3 * 2**30
    assert len({device.rate() for device in spec.devices}) == 1
    assert ClusterSpec.load(json.loads(json.dumps(spec.to_dict()))) == spec


def test_without_a_file_it_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "profile", "--quick") == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["devices", "fp32", "TFLOP/s"]
    figures = row.split()
    assert figures[:2] == ["0", "cpu"]
    assert figures[3:5] == ["-", "-"]  # not measured in these dtypes
    assert figures[7].startswith("(")  # the link to the host is taken, not measured


TARGETS = [
    (
        "x.txt",
        "'x.txt' is not the name of a profile file\n  fix: end it in .yaml, .yml or .json",
    ),
    (
        "none/x.yaml",
        "cannot write 'none/x.yaml': there is no folder 'none'\n  fix: name a file in a folder that exists",
    ),
    ("folder.yaml", "cannot write 'folder.yaml': it is a folder\n  fix: name a file in a folder that exists"),
]


@pytest.mark.parametrize(("target", "message"), TARGETS)
def test_a_bad_target_is_refused_before_anything_is_measured(
    target: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.yaml").mkdir()
    monkeypatch.setattr(measure, "measure_device", lambda *_, **__: pytest.fail("measured"))
    assert run(monkeypatch, "profile", "--output", target) == 2
    assert capsys.readouterr().err == f"whalepy: {message}\n"


def profile_here(path: str) -> bool:
    from whalepy.commands.profile import profile
    from whalepy.runtime import measure as here
    from whalepy.runtime import measure_links as links

    here.EFFORTS = {("cpu", True): Effort(0.002, (16, 64), ("float32",), (2**12, 2**16))}  # type: ignore[misc]
    links.MESSAGES = {("cpu", True): (2**10, 2**16)}  # type: ignore[misc]
    profile(Path(path), quick=True)
    return os.path.exists(path)


def test_ranks_measure_the_link_between_them(workers: Pool, tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    workers.run(2, profile_here, str(path), default_group=False)
    spec = ClusterSpec.load(path)
    (node,) = spec.nodes
    assert len(node.devices) == 2
    assert node.link.origin == "measured"
    assert node.link.bandwidth_bytes_per_s > 0
    assert not [said for said in spec.assumptions if "link_bandwidth" in said]
