"""`whalepy plan layers:FILE` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands.run import run

TARGET = "layers:examples/opt-350m.yaml"


def planned(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the forecast."""
    out = folder / "forecast.json"
    return run(monkeypatch, "plan", TARGET, *arguments, "--json", str(out)), json.loads(out.read_text())


def test_a_forecast_of_unequal_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    html = tmp_path / "page.html"
    arguments = ("--batch-size", "16", "--microbatches", "8", "--html", str(html))
    code, found = planned(monkeypatch, tmp_path, "--cluster", "2xRTX-3090 + 2xTitan-RTX", *arguments)
    assert code == 0
    assert found["step_time_s"] < found["equal_shares_step_time_s"]
    assert [device["batch_share"] for device in found["devices"]] == [5, 5, 3, 3]
    assert found["assumptions"][0] == "costs of layers: eth-easl/sailor@cf2c8e3, profiles of OPT-350"
    assert [module["path"] for module in found["modules"]] == ["", "embedding", "first block", "block", "head"]
    assert "head" in html.read_text()


def test_what_does_not_fit_is_recomputed_or_kept_in_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, found = planned(monkeypatch, tmp_path, "--cluster", "2xRTX-3090", "--batch-size", "64")
    assert code == 0
    assert found["microbatches"] > 1 or "recompute full" in found["strategy"]
    code, found = planned(monkeypatch, tmp_path, "--cluster", "1xTitan-RTX", "--batch-size", "8", "--zero", "0",
                          "--recompute", "none", "--microbatches", "1")  # fmt: skip
    assert code == 3


MISTAKES = [
    (
        ("--seq-len", "1024"),
        "--seq-len needs a configuration\n  fix: describe the layers for rows of the length you want",
    ),
    (("--save", "x.plan"), "layers without code have no program\n  fix: leave out --save and --program"),
    (("--stages", "2"), "--stages 2 needs the model itself\n  fix: leave it out: layers are replicated and split"),
    (("--schedule", "gpipe"), "--schedule gpipe is for stages, of which there are none\n  fix: leave it out"),
    (
        ("--precision", "fp16"),
        "--precision fp16: the layers are described in float32\n"
        "  fix: leave it out, or describe them in that type (`dtype:`)",
    ),
    (
        ("--recompute", "selective"),
        "--recompute selective needs the model itself\n  fix: choose none or full: whole layers run again",
    ),
    (
        ("--batch-size", "8", "--microbatches", "9"),
        "9 microbatches cannot be cut from 8 rows\n  fix: choose fewer microbatches, or a larger batch",
    ),
    (
        ("--split", "2"),
        "layer 'embedding' has no seconds on RTX-3090 at split degree 2\n"
        "  fix: it has those at 1: choose one with --split, or add this degree",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[arguments[0] for arguments, _ in MISTAKES])
def test_mistakes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert run(monkeypatch, "plan", TARGET, "--cluster", "2xRTX-3090", *arguments) == 2
    assert capsys.readouterr().err.strip() == f"whalepy: {message}"


def test_figures_of_operators_need_no_measured_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layer = {"name": "block", "repeat": 40, "parameters": 5e7, "flops": 2e11, "products": 6, "bytes": 5e8,
             "saved_bytes": 1e8, "output_bytes": 1e7,
             "exchanges": [{"kind": "all-reduce", "bytes": 1e7}] * 2}  # fmt: skip
    file, out = tmp_path / "layers.yaml", tmp_path / "out.json"
    file.write_text(yaml.safe_dump({"name": "stand-in", "tokens": 1024, "dtype": "fp16", "layers": [layer]}))
    cluster = "4x8xV100-SXM2-32GB @ 50Gbit/s"
    assert (
        run(monkeypatch, "plan", f"layers:{file}", "--cluster", cluster, "--batch-size", "256", "--json", str(out)) == 0
    )
    found = json.loads(out.read_text())
    assert 0 < found["mfu"] < 1
