"""Checks of values: an `assert`, or an `if` that raises, on values in tensors.

A capture cannot know values. But where one answer leads straight to a `raise` that ends the forward, the model goes
on only with the other. That nobody catches the error is tried out: the forward is traced with that answer.
"""

from __future__ import annotations

import dis
from dataclasses import dataclass, field
from types import CodeType, FrameType, TracebackType

from whalepy.program.capture_places import frames_within, place_of_frames

Asker = tuple[tuple[CodeType, int], ...]
"""The calls around a question, innermost first: code and position in it. They determine who would catch an error."""


class UnansweredError(BaseException):
    """A trial came past the check that it tries: its error was caught. No handler of the model catches this one."""


@dataclass
class Checks:
    """The answers that lead past the checks of a forward, as far as they are known, and the trial under way."""

    outermost: CodeType  # frames from here outwards are the caller's, not the model's
    passed: list[str] = field(default_factory=list[str])  # the lines of checks that this trace left out
    refused: Exception | None = None  # the first question of this trace without an answer: the model may catch it
    _answers: dict[Asker, bool | None] = field(default_factory=dict[Asker, bool | None])  # None: there is none
    _tried: tuple[Asker, bool] | None = None  # the check on trial, and the answer that should raise

    def begin(self) -> None:
        """Before each trace."""
        self.passed.clear()
        self.refused = None
        self._tried = None

    def answer(self, frame: FrameType) -> bool | None:
        """What leads past a check that `frame` makes here, or on trial what does not; None if it is no check."""
        asker = _asker(frame, self.outermost)
        if asker not in self._answers:
            if self._tried is not None:
                raise UnansweredError
            failing = _failing(frame.f_code, frame.f_lasti)
            self._tried = None if failing is None else (asker, failing)
            return failing
        if self._answers[asker] is not None:
            self.passed.append(_place(frame, self.outermost))
        return self._answers[asker]

    def on_trial(self, error: BaseException | None) -> bool:
        """Whether the trace that ended with `error`, None for success, was a trial, from which this learns."""
        if self._tried is None:
            return False
        asker, failing = self._tried
        self._answers[asker] = not failing if _raised_by(error, asker[0][0]) else None
        return True


def _asker(frame: FrameType | None, outermost: CodeType) -> Asker:
    calls: list[tuple[CodeType, int]] = []
    while frame is not None and frame.f_code is not outermost:
        calls.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(calls)


def _place(frame: FrameType, outermost: CodeType) -> str:
    return place_of_frames(frames_within(frame, outermost)) or "the model"


def _failing(code: CodeType, position: int) -> bool | None:
    """The truth value with which the branch at `position` leads straight to a raise; None if it is no such branch."""
    instructions = list(dis.get_instructions(code))
    at = {instruction.offset: index for index, instruction in enumerate(instructions)}
    index = at.get(position, 0)
    if instructions[index].opname == "TO_BOOL":  # Python 3.13 and later ask here, and branch next
        index += 1
    branch = instructions[index]
    truth = next((truth for suffix, truth in _BRANCHES.items() if branch.opname.endswith(suffix)), None)
    if truth is None or branch.argval not in at:
        return None
    for start, value in ((at[branch.argval], truth), (index + 1, not truth)):
        if _raises(instructions[start:]):
            return value
    return None


_BRANCHES = {"JUMP_IF_TRUE": True, "JUMP_FORWARD_IF_TRUE": True, "JUMP_IF_FALSE": False, "JUMP_FORWARD_IF_FALSE": False}
_JUMPS = frozenset((*dis.hasjrel, *dis.hasjabs))


def _raises(instructions: list[dis.Instruction]) -> bool:
    """Whether they come to a raise without a branch before it."""
    for instruction in instructions:
        if instruction.opname == "RAISE_VARARGS":
            return True
        if instruction.opcode in _JUMPS or instruction.opname.startswith(("RETURN", "YIELD", "RERAISE")):
            return False
    return False


def _raised_by(error: BaseException | None, code: CodeType) -> bool:
    """Whether a raise in that code ended the forward."""
    last: TracebackType | None = None if error is None else error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or last.tb_frame.f_code is not code:
        return False
    return dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
