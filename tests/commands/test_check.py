"""`whalepy check` among real processes, one of which may never come."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tests.commands.run import run
from tests.pool import Pool


def test_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert run(monkeypatch, "check") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1xcpu")
    assert lines[-1] == "all checks passed"


def test_alone_for_two(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert run(monkeypatch, "check", "--cluster", "2xcpu") == 2
    assert capsys.readouterr().err.splitlines()[0] == "whalepy: the ranks do not match the cluster"


def test_a_bad_cluster_is_found_before_anybody_waits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "check", "--cluster", "2xcpuu") == 2
    assert "did you mean cpu?" in capsys.readouterr().err


def check_here(cluster: str | None, absent: tuple[int, ...], timeout: float) -> tuple[int, str]:
    """The exit code and what is said, as `whalepy` would; -1 for a rank that stays away."""
    import contextlib
    import io

    from whalepy.commands import check as command
    from whalepy.errors import WhaleError
    from whalepy.runtime import measure_pairs

    measure_pairs._BYTES = {"cpu": 2**16}  # type: ignore[misc]
    if int(os.environ["RANK"]) in absent:
        return -1, ""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        try:
            command.check(cluster, timeout)
        except typer.Exit as stop:
            return stop.exit_code, shown.getvalue()
        except WhaleError as error:
            return 2, str(error)
    return 0, shown.getvalue()


def test_two_ranks(workers: Pool) -> None:
    (code, shown), other = workers.run(2, check_here, "2xcpu", (), 30.0, default_group=False)
    assert (code, other) == (0, (0, ""))  # one speaks
    lines = [line.split() for line in shown.splitlines()]
    assert lines[0][:6] == ["2xcpu:", "2", "ranks", "on", "1", "host,"]
    assert [line[0] for line in lines[2:4]] == ["0", "1"]
    assert lines[5][:6] == ["0", "-", "1", "inside", "a", "node"]
    assert lines[-1] == ["all", "checks", "passed"]


def test_a_link_slower_than_said(workers: Pool) -> None:
    cluster = "1xcpu + 1xcpu @ 100Tbit/s"
    (code, shown), other = workers.run(2, check_here, cluster, (), 30.0, default_group=False)
    assert (code, other) == (3, (3, ""))
    assert "not as the cluster says: ranks 0 and 1: " in shown


def test_another_cluster_than_the_ranks(workers: Pool) -> None:
    told = workers.run(2, check_here, "3xcpu", (), 30.0, default_group=False)
    assert [code for code, _ in told] == [2, 2]
    assert told[0][1].startswith("the ranks do not match the cluster\n  spec:  node 0: 3xcpu\n  ranks: ")
    assert told[1][1] == ""


def test_a_rank_that_never_comes(workers: Pool) -> None:
    workers.run(3, check_here, "3xcpu", (0, 1, 2), 1.0, default_group=False)  # processes start, modules load
    told = workers.run(3, check_here, "3xcpu", (1,), 4.0, default_group=False)
    assert [code for code, _ in told] == [2, -1, 2]
    assert told[0][1].startswith("rank 1 of 3 did not reach 'start' within 4 s; there: 0 (")
    assert told[2][1] == ""


@pytest.mark.slow
def test_under_torchrun(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "whalepy", "check", "--cluster", "2xcpu"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("all checks passed") == 1
