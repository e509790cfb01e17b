"""Where in the user's code a node, an error or a guard comes from."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_TORCH = os.path.dirname(torch.__file__) + os.sep
_WHALEPY = str(Path(__file__).parents[1]) + os.sep
_LIBRARIES = (f"{os.sep}transformers{os.sep}",)


def place_of_stack(stack_trace: str | None) -> str | None:
    """`file.py:line` of the innermost frame of the user in a node's stack trace; None without one.

    Frames inside torch and whalepy never count; frames inside transformers only when there are no others.
    """
    return _place((file, int(line)) for file, line in _FRAME.findall(stack_trace or ""))


def place_of_error(error: BaseException) -> str | None:
    """`file.py:line` of the innermost frame of the user below which `error` was raised."""
    return _place((frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__))


def place_of_frame(frame: object) -> str | None:
    """`file.py:line` of one frame (as a shape guard keeps it) if it is the user's."""
    return _place([(frame.filename, frame.lineno or 0)]) if isinstance(frame, traceback.FrameSummary) else None


def _place(frames: Iterable[tuple[str, int]]) -> str | None:
    known = [frame for frame in frames if _is_user_code(frame[0])]
    own = [frame for frame in known if not any(library in frame[0] for library in _LIBRARIES)]
    if not known:
        return None
    file, line = (own or known)[-1]
    return f"{os.path.basename(file)}:{line}"


def _is_user_code(file: str) -> bool:
    return not (file.startswith((_TORCH, _WHALEPY, "<")) or file.startswith(f"torch{os.sep}"))


def code_lines(stack_trace: str | None) -> Iterator[str]:
    """The source lines quoted in a stack trace."""
    for line in (stack_trace or "").splitlines():
        if not line.lstrip().startswith("File "):
            yield line.strip()
