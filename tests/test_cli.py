"""The command as a whole: unknown commands, the version, and that it answers without torch."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

from tests.commands.run import run


def test_an_unknown_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "device") == 2
    assert "No such command 'device'" in capsys.readouterr().err


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"whalepy {version('whalepy')}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["devices"], ["devices", "--help"]])
def test_answers_without_heavy_imports(arguments: list[str]) -> None:
    """Half a second is what a person waits for help; torch alone takes more."""
    code = f"""
import sys
from whalepy.cli import main
sys.argv = ["whalepy", *{arguments!r}]
try:
    main()
except SystemExit as stop:
    assert not stop.code
heavy = {{"torch", "numpy", "networkx", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_runs_as_a_module() -> None:
    told = subprocess.run([sys.executable, "-m", "whalepy", "--version"], check=True, capture_output=True, text=True)
    assert told.stdout == f"whalepy {version('whalepy')}\n"
