"""Slow devices on one machine: ranks that get a fixed part of a core, whatever the others do meanwhile.

Ranks that share a core are no such thing: while one waits, the other has all of it. A control group's quota (Linux;
needs the right to make one) is: in every few milliseconds a rank may compute for its part, and then has to wait.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

PERIOD_US = 5000
_FIRST, _SECOND = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
"""Where the two versions of control groups are mounted."""


@contextmanager
def groups(parts: Sequence[float]) -> Generator[list[Path]]:
    """A control group for each of these parts of a core, gone at the end. Raises OSError where none can be made."""
    made = [_root() / f"ranks-{os.getpid()}-{k}" for k in range(len(parts))]
    try:
        for folder, part in zip(made, parts, strict=True):
            folder.mkdir()
            _limit(folder, round(PERIOD_US * part))
        yield made
    finally:
        for folder in made:
            if folder.exists():
                folder.rmdir()


def enter(group: Path) -> None:
    """Move this process into a group."""
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _root() -> Path:
    return _FIRST if _FIRST.is_dir() else _SECOND


def _limit(group: Path, quota_us: int) -> None:
    if (group / "cpu.max").exists():
        (group / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
        return
    (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
    (group / "cpu.cfs_quota_us").write_text(str(quota_us))
