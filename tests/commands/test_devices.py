"""`whalepy devices`: what it lists, and how it fails."""

from __future__ import annotations

import pytest

from tests.commands.run import run
from whalepy.commands.devices import LEGEND, WHEELS
from whalepy.hardware.profiles import known_profiles
from whalepy.hardware.wheels import known_wheels


@pytest.fixture(autouse=True)
def release(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch is installed."""
    monkeypatch.setattr("whalepy.commands.devices.torch_release", lambda: "2.13")


def test_every_type_is_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "devices") == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:-2]]
    assert listed == [row.name for row in known_profiles()]


ROWS = [
    # Unit conversion: GiB, GB/s, TFLOP/s; a device without fp8 units; a link nobody looked up.
    (
        "3090",
        "RTX-3090 8.6 24 936 35.6 35.6 71.2 71.2 - 56.2* cu126 cu130 cu132 NVLink 3 bridge (pairs only; else PCIe 4.0)",
    ),
    # Estimated memory, and figures on which sources disagree.
    ("RTX 4070 Ti", "RTX-4070-Ti 8.9 11.4~ 504 40.1 40.1? 80.2? 80.2? 160? 31.5 cu126 cu130 cu132 PCIe 4.0 x16"),
    # Too old for every wheel.
    ("K80", "K80 3.7 11.2 241 4.37 - - - - 15.8 none PCIe 3.0 x16"),
    # By gfx name.
    ("MI100", "MI100 gfx908 30.4~ 1229 23.1 - 185 92.3 - 138 rocm7.2 Infinity Fabric bridge (3 links, hive of 4; else"),
    # No compute capability; every figure assumed.
    ("cpu", "cpu - 4~ 10~ 0.05~ - - - - 2~ any gloo over shared memory or loopback"),
]


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_a_row(name: str, row: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "devices", name, name) == 0  # named twice, listed once
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[2].startswith(row)
    assert lines[3:] == [" ".join(LEGEND.split()), WHEELS.format(torch="2.13")]


def test_an_unknown_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "devices", "V100-64GB") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == (
        "whalepy: unknown device 'V100-64GB'\n"
        "  fix: did you mean V100-PCIE-16GB or V100-SXM2-16GB? "
        "`whalepy devices` lists the known types; others go under `profiles:` in a cluster file\n"
    )


def test_the_release_shown_is_known() -> None:
    assert {"2.11", "2.12", "2.13"} <= {wheel.torch for wheel in known_wheels()}
