"""Where in the user's code a node, an error or a guard comes from."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FrameType

import torch

PLACE_KEY = "whalepy_place"  # in node.meta["custom"]

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_TORCH = os.path.dirname(torch.__file__) + os.sep
_WHALEPY = str(Path(__file__).parents[1]) + os.sep
_LIBRARIES = (f"{os.sep}transformers{os.sep}",)

Frame = tuple[str, int]  # file and line


def place_of_stack(stack_trace: str | None) -> str | None:
    """`file.py:line` of the innermost frame of the user in a node's stack trace; None without one.

    Frames inside torch and whalepy never count; frames inside transformers only when there are no others.
    """
    frames = [(file, int(line)) for file, line in _FRAME.findall(stack_trace or "")]
    return place_of_frames(reversed(frames))


def place_of_error(error: BaseException) -> str | None:
    """`file.py:line` of the innermost frame of the user below which `error` was raised, and `, in file.py:line` of the
    library's where that is further in: it is the library's line that cannot be captured."""
    frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    frames = [frame for frame in reversed(frames) if _is_user_code(frame[0])]
    place = place_of_frames(frames)
    innermost = place_of_frames(frames[:1])
    return place if innermost in (place, None) else f"{place}, in {innermost}"


def place_of_frame(frame: object) -> str | None:
    """`file.py:line` of one frame (as a shape guard keeps it) if it is the user's."""
    return place_of_frames([(frame.filename, frame.lineno or 0)]) if isinstance(frame, traceback.FrameSummary) else None


def frames_within(frame: FrameType | None, outermost: CodeType) -> Iterator[Frame]:
    """The frames from `frame` outwards, innermost first, up to the one that runs `outermost`."""
    while frame is not None and frame.f_code is not outermost:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


def place_of_frames(frames: Iterable[Frame]) -> str | None:
    """The first of the frames, innermost first, that is the user's; failing that, the first of a known library."""
    known = [frame for frame in frames if _is_user_code(frame[0])]
    own = (frame for frame in known if not any(library in frame[0] for library in _LIBRARIES))
    chosen = next(own, known[0] if known else None)
    return None if chosen is None else f"{os.path.basename(chosen[0])}:{chosen[1]}"


def _is_user_code(file: str) -> bool:
    return not file.startswith((_TORCH, _WHALEPY, "<", f"torch{os.sep}"))
