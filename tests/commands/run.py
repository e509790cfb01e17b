"""The command, called in this process."""

from __future__ import annotations

import sys

import pytest

from whalepy.cli import main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `whalepy ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["whalepy", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
