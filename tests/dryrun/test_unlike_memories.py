"""Devices of which some have less memory: rows by room, suggestions that can be met, devices that are left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands.run import run

GIB = 2**30


class Case:
    """Layers of so many GiB of parameters and so many kept per row, on V100 of given memories in GiB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.monkeypatch, self.folder = monkeypatch, folder

    def planned(
        self, held: float, saved: float, memories: list[float], *options: str, rows: int = 8
    ) -> tuple[int, dict[str, Any]]:
        """The exit code, and what is said where it is no mistake."""
        layer = {"name": "block", "repeat": 8, "parameters": held * GIB / 8 / 16, "flops": 1e11, "bytes": 1e8,
                 "saved_bytes": saved * GIB / 8, "output_bytes": 1e4}  # fmt: skip
        file, cluster, out = (self.folder / name for name in ("layers.json", "cluster.json", "out.json"))
        file.write_text(json.dumps({"name": "drawn", "rows": rows, "layers": [layer]}))
        devices = [{"type": "V100-SXM2-32GB", "memory_gib": size} for size in memories]
        cluster.write_text(json.dumps({"nodes": [{"devices": devices}]}))
        out.unlink(missing_ok=True)
        arguments = (f"layers:{file}", "--cluster", str(cluster), *options, "--json", str(out))
        return run(self.monkeypatch, "plan", *arguments), json.loads(out.read_text()) if out.exists() else {}


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Case:
    return Case(monkeypatch, tmp_path)


def test_rows_go_by_memory_where_devices_are_of_one_type(case: Case) -> None:
    code, told = case.planned(2, 1, [30, 6], "--zero", "0", "--microbatches", "1", "--replicate", "2")
    assert code == 0
    first, second = told["devices"]
    assert first["batch_share"] > second["batch_share"] > 0
    assert second["peak_memory_bytes"] <= 6 * GIB


def test_a_device_that_holds_no_copy_is_left_out(case: Case) -> None:
    """Nothing splits ten GiB so that two hold its half."""
    code, told = case.planned(20, 0.1, [30, 2])
    assert code == 0 and told["strategy"].startswith("1 x V100-SXM2-32GB[30GiB] alone")
    assert "idle: device 1 (1 x V100-SXM2-32GB[2GiB]), with which it does not fit" in told["assumptions"]


def test_no_batch_is_suggested_where_not_even_the_parameters_fit(case: Case) -> None:
    code, told = case.planned(20, 0.1, [30, 2], "--replicate", "2", "--zero", "0")
    assert code == 3
    assert not any("--batch-size" in way for way in told["ways_out"])


@pytest.mark.parametrize("balance", ["exact", "equal", "whale"])
def test_a_suggestion_leaves_a_forced_balance_alone(case: Case, balance: str) -> None:
    forced = ("--balance", balance, "--zero", "0", "--recompute", "none", "--microbatches", "1")
    code, told = case.planned(2, 4, [8, 8], *forced)
    assert code == 3
    code, told = case.planned(2, 4, [8, 8], *forced, *told["ways_out"][0].split())
    assert code == 0 and told["fits"]


def test_why_no_degree_can_be_met(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """Of more devices than rows all are one split, whose figures the file lacks."""
    layer = {"name": "block", "parameters": {1: 1e6, 2: 5e5}, "bytes": 1e8, "saved_bytes": 1e6}
    file = case.folder / "layers.json"
    file.write_text(json.dumps({"name": "drawn", "rows": 2, "layers": [layer]}))
    assert run(case.monkeypatch, "plan", f"layers:{file}", "--cluster", "5xT4", "--shares", "equal") == 2
    assert "layer 'block' has no parameters at split degree 5" in capsys.readouterr().err
