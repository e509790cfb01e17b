"""Where nothing fits, the first suggestion of `whalepy plan`, pasted behind the command, does."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.commands.run import run

# What is short of memory, and why.
QUICK = {
    "state of one card": "layers:examples/opt-350m.yaml --cluster 1xRTX-3090 --batch-size 64 --microbatches 1 --zero 0",
}
SLOW = {
    "activations of one card": "gpt2 --cluster 1xK80 --batch-size 64 --seq-len 256 --recompute none --microbatches 1",
    "one type of two": "gpt2 --cluster '1xRTX-3090 + 1xK80' --batch-size 64 --shares 1:1 --microbatches 1",
    "stages": "gpt2 --cluster 2xK80 --stages 2 --schedule gpipe --batch-size 96 --microbatches 2 --recompute none",
}


def planned(monkeypatch: pytest.MonkeyPatch, folder: Path, arguments: list[str]) -> tuple[int, dict[str, Any]]:
    """The exit code of the command, and what it says."""
    out = folder / "forecast.json"
    out.unlink(missing_ok=True)
    code = run(monkeypatch, "plan", *arguments, "--json", str(out))
    return code, json.loads(out.read_text()) if out.exists() else {}


def holds(monkeypatch: pytest.MonkeyPatch, folder: Path, command: str) -> None:
    arguments = shlex.split(command)
    code, told = planned(monkeypatch, folder, arguments)
    assert code == 3 and told["verdict"] == "no"
    way = told["ways_out"][0]
    code, told = planned(monkeypatch, folder, [*arguments, *shlex.split(way)])
    assert code == 0 and told["fits"], way


@pytest.mark.parametrize("command", QUICK.values(), ids=QUICK)
def test_the_first_suggestion_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str) -> None:
    holds(monkeypatch, tmp_path, command)


@pytest.mark.slow
@pytest.mark.parametrize("command", SLOW.values(), ids=SLOW)
def test_the_first_suggestion_fits_for_larger_models(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    holds(monkeypatch, tmp_path, command)
