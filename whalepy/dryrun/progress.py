"""What is being done, on a terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable

Progress = Callable[[str], None]
"""Told what is being done; "" at the end."""


class OnTerminal:
    """Says on a terminal what is being done; silent in a pipe."""

    def __init__(self) -> None:
        self.shown = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        """One line, in place of the last one; "" leaves none."""
        if self.shown:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[2K{text[:width]}", end="", file=sys.stderr, flush=True)
