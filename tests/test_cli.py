"""The command: what it lists, how it fails, and that it answers without torch."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

from whalepy.cli import LEGEND, main
from whalepy.hardware.profiles import known_profiles


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["whalepy", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_devices_lists_every_type(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "devices") == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:-1]]
    assert listed == [row.name for row in known_profiles()]


ROWS = [
    # Unit conversion: GiB, GB/s, TFLOP/s; a device without fp8 units; a link nobody looked up.
    ("3090", "RTX-3090 8.6 24 936 35.6 35.6 71.2 71.2 - 56.2* NVLink 3 bridge (pairs only; else PCIe 4.0)"),
    # Estimated memory, and figures on which sources disagree.
    ("RTX 4070 Ti", "RTX-4070-Ti 8.9 11.4~ 504 40.1 40.1? 80.2? 80.2? 160? 31.5 PCIe 4.0 x16"),
    # No compute capability; every figure assumed.
    ("cpu", "cpu - 4~ 10~ 0.05~ - - - - 2~ gloo over shared memory or loopback"),
]


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_a_row(name: str, row: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "devices", name, name) == 0  # named twice, listed once
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in lines[2:]] == [row, " ".join(LEGEND.split())]


def test_an_unknown_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "devices", "V100-64GB") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == (
        "whalepy: unknown device 'V100-64GB'\n"
        "  fix: did you mean V100-PCIE-16GB or V100-SXM2-16GB? "
        "`whalepy devices` lists the known types; others go under `profiles:` in a cluster file\n"
    )


def test_an_unknown_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "device") == 2
    assert "No such command 'device'" in capsys.readouterr().err


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"whalepy {version('whalepy')}\n"


def test_answers_without_torch() -> None:
    code = """
import sys
from whalepy.cli import main
sys.argv = ["whalepy", "devices"]
try:
    main()
except SystemExit as stop:
    assert not stop.code
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
