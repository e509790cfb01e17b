"""Texts that must not change unnoticed: each is a file in tests/golden."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import unified_diff
from pathlib import Path

import pytest

DIRECTORY = Path(__file__).parent / "golden"
UPDATE = "--update-golden"


@dataclass(frozen=True)
class Golden:
    """`golden(name, text)` compares a text with its file; one call per test. An update writes the file and skips."""

    update: bool
    directory: Path = DIRECTORY

    def __call__(self, name: str, text: str) -> None:
        path = self.directory / f"{name}.txt"
        if self.update:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text + "\n")
            pytest.skip(f"{path.name} is written: read the difference, then run without {UPDATE}")
        if not path.exists():
            pytest.fail(f"{path.name} is not there: run pytest {UPDATE}")
        changes = list(unified_diff(path.read_text().splitlines(), text.splitlines(), path.name, "now", lineterm=""))
        if changes:
            pytest.fail("\n".join(changes))
