"""Where in the user's code a node, an error or a guard comes from."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch.fx import traceback as fx_traceback
from torch.overrides import TorchFunctionMode

from whalepy.errors import CaptureError

PLACE_KEY = "whalepy_place"  # in node.meta["custom"]

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_TORCH = os.path.dirname(torch.__file__) + os.sep
_WHALEPY = str(Path(__file__).parents[1]) + os.sep
_CHECKPOINT = os.path.join(_TORCH, "utils", "checkpoint.py")
_LIBRARIES = (f"{os.sep}transformers{os.sep}",)

_HOOKS = (torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook)

Frame = tuple[str, int]  # file and line


class PlaceRecorder(TorchFunctionMode):
    """Notes on every exported node the user's line that called the operator, and which lines brought guards.

    torch's own stack traces keep only the frames of functions named `forward`.
    """

    def __init__(self, outermost: CodeType, shape_env: Any) -> None:
        super().__init__()
        self._outermost = outermost  # frames from here outwards are the caller's, not the model's
        self._shape_env = shape_env  # None if the model has no tensor input
        self.guards: dict[int, str] = {}  # position in shape_env.guards -> the line whose operator brought it
        self.checkpoints: set[str] = set()  # lines that ran inside torch.utils.checkpoint

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_dynamo_compiling():  # the branches of torch.cond; there are no frames to walk
            return func(*args, **(kwargs or {}))
        frames = list(self._frames())
        place = _place(frames)
        if place is None:
            return func(*args, **(kwargs or {}))
        if func in _HOOKS:
            raise CaptureError(
                "the forward registers a gradient hook, which is lost in the capture",
                at=place,
                fix="make it part of the forward: a torch.library.custom_op with register_autograd",
            )
        if any(file == _CHECKPOINT for file, _ in frames):
            self.checkpoints.add(place)
        with self._guards_noted(place), fx_traceback.annotate({PLACE_KEY: place}):
            return func(*args, **(kwargs or {}))

    def _frames(self) -> Iterator[Frame]:
        """The frames inside the model, innermost first."""
        frame = sys._getframe(2)
        while frame is not None and frame.f_code is not self._outermost:
            yield frame.f_code.co_filename, frame.f_lineno
            frame = frame.f_back

    @contextlib.contextmanager
    def _guards_noted(self, place: str) -> Generator[None]:
        before = self._count()
        try:
            yield
        finally:
            for position in range(before, self._count()):
                self.guards.setdefault(position, place)

    def _count(self) -> int:
        return 0 if self._shape_env is None else len(self._shape_env.guards)


def place_of_stack(stack_trace: str | None) -> str | None:
    """`file.py:line` of the innermost frame of the user in a node's stack trace; None without one.

    Frames inside torch and whalepy never count; frames inside transformers only when there are no others.
    """
    frames = [(file, int(line)) for file, line in _FRAME.findall(stack_trace or "")]
    return _place(reversed(frames))


def place_of_error(error: BaseException) -> str | None:
    """`file.py:line` of the innermost frame of the user below which `error` was raised."""
    frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    return _place(reversed(frames))


def place_of_frame(frame: object) -> str | None:
    """`file.py:line` of one frame (as a shape guard keeps it) if it is the user's."""
    return _place([(frame.filename, frame.lineno or 0)]) if isinstance(frame, traceback.FrameSummary) else None


def _place(frames: Iterable[Frame]) -> str | None:
    """The first of the frames, innermost first, that is the user's; failing that, the first of a known library."""
    known = [frame for frame in frames if _is_user_code(frame[0])]
    own = (frame for frame in known if not any(library in frame[0] for library in _LIBRARIES))
    chosen = next(own, known[0] if known else None)
    return None if chosen is None else f"{os.path.basename(chosen[0])}:{chosen[1]}"


def _is_user_code(file: str) -> bool:
    return not file.startswith((_TORCH, _WHALEPY, "<", f"torch{os.sep}"))
