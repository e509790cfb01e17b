"""What is noted about each torch call while the model is exported."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Generator
from types import CodeType
from typing import Any

import torch
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode

from whalepy.errors import CaptureError
from whalepy.program.capture_branches import Branches, answered
from whalepy.program.capture_checks import Checks
from whalepy.program.capture_places import PLACE_KEY, frames_within, place_of_frames
from whalepy.program.capture_scalars import Scalars
from whalepy.program.capture_small_sizes import settled

_CHECKPOINT = os.path.join(os.path.dirname(torch.__file__), "utils", "checkpoint.py")
_HOOKS = (torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook)

# Operators in one condition on sizes. Models with text or images of any size have up to 8; windows over images have
# hundreds, at which a capture takes minutes.
_LONGEST_CONDITION = 64
# The same over all conditions: language models have about 10, convolutions with a stride some tens for each resolution;
# at 700 a capture takes five times as long as with fixed sizes.
_MOST_OPERATORS = 300


class SizesTooComplexError(BaseException):
    """Conditions on free sizes grow so long that export would take minutes. No handler of the model catches it."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.place = place


class Recorder(TorchFunctionMode):
    """Notes on every exported node the user's line that called the operator, and which lines brought guards.

    torch's own stack traces keep only the frames of functions named `forward`.
    CaptureError: a gradient hook. SizesTooComplexError: see there.
    """

    def __init__(
        self, outermost: CodeType, shape_env: Any, checks: Checks, branches: Branches, *, bounded: bool = True
    ) -> None:
        super().__init__()
        self._checks = checks
        self._branches = branches
        self._bounded = bounded  # whether conditions may grow too long: not where all but the rows are numbers
        self._operators = 0  # in all conditions so far
        self._outermost = outermost  # frames from here outwards are the caller's, not the model's
        self._shape_env = shape_env  # None if the model has no tensor input
        self.guards: dict[int, str] = {}  # position in shape_env.guards -> the line whose operator brought it
        self._scalars = Scalars()
        self.checkpoints: set[str] = set()  # lines that ran inside torch.utils.checkpoint

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_dynamo_compiling():  # the branches of torch.cond; there are no frames to walk
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.__bool__:
            return answered(self._checks, sys._getframe(1), lambda: func(*args))
        func = _REPLACED.get(func, func)
        frames = list(frames_within(sys._getframe(1), self._outermost))
        place = place_of_frames(frames)
        if place is None:
            return self._scalars(func, args, kwargs or {})
        if func in _HOOKS:
            raise _hook(place)
        if any(file == _CHECKPOINT for file, _ in frames):
            self.checkpoints.add(place)
        with self._guards_noted(place), fx_traceback.annotate({PLACE_KEY: place}):
            try:
                result = self._scalars(func, args, kwargs or {})
            except GuardOnDataDependentSymNode as error:
                self._checks.refused = self._checks.refused or error
                raise
            for condition in settled(func, args, kwargs or {}, result):
                self._branches.note(condition, True, place)
            return result

    @contextlib.contextmanager
    def _guards_noted(self, place: str) -> Generator[None]:
        before = self._count()
        yield
        for position in range(before, self._count()):
            self.guards.setdefault(position, place)
            operators = self._shape_env.guards[position].expr.count_ops()
            self._operators += operators
            if self._bounded and (operators > _LONGEST_CONDITION or self._operators > _MOST_OPERATORS):
                raise SizesTooComplexError(place)

    def _count(self) -> int:
        return 0 if self._shape_env is None else len(self._shape_env.guards)


def _hook(place: str) -> CaptureError:
    return CaptureError(
        "the forward registers a gradient hook, which is lost in the capture",
        at=place,
        fix="make it part of the forward: a torch.library.custom_op with register_autograd",
    )


# Export takes what `x.data` returns for a constant.
_DATA: Any = torch.Tensor.data
_REPLACED: dict[Any, Callable[..., Any]] = {_DATA.__get__: torch.Tensor.detach}
