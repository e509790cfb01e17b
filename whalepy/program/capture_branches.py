"""Branches of the user's code on a size, which the capture decides as if every free size were at least 2."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from unittest import mock

import sympy
import torch
from torch.fx.experimental import sym_node
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from whalepy.program.capture_checks import Checks
from whalepy.program.capture_places import place_of_frames


@dataclass
class Branches:
    """Conditions on sizes that the user's code asked, as they were decided, each with its line."""

    decided: dict[Any, str] = field(default_factory=dict[Any, str])

    def note(self, condition: Any, outcome: bool, place: str) -> None:
        """A condition may be a sympy relation or already a truth value."""
        predicate = sympy.sympify(condition) if outcome else sympy.Not(condition)
        if predicate.free_symbols:
            self.decided.setdefault(predicate, place)


@contextlib.contextmanager
def branches_noted(branches: Branches, checks: Checks) -> Generator[None]:
    """Note each `if` on a size: export keeps no guard for those that only a size of 0 or 1 would answer otherwise.

    One on a value is answered where it is a check.
    """
    decide = SymNode.bool_

    def noted(node: Any) -> bool:
        condition = node.expr
        asking = sys._getframe(2)  # below SymBool.__bool__
        place = _place_of_question(asking)
        outcome = answered(checks, asking, lambda: bool(decide(node)))
        if place is not None:
            branches.note(condition, outcome, place)
        return outcome

    with mock.patch.object(SymNode, "bool_", noted):
        yield


def _place_of_question(asking: FrameType | None) -> str | None:
    """The user's line that asks, itself or by making a number of the answer: `int(n > 1)`, `(n > 1) * x`."""
    while asking is not None and asking.f_code.co_filename in _NUMBER_FILES:
        asking = asking.f_back
    return None if asking is None else place_of_frames([(asking.f_code.co_filename, asking.f_lineno)])


_NUMBER_FILES = (torch.__file__, sym_node.__file__)


def answered(checks: Checks, asking: FrameType, decide: Callable[[], bool]) -> bool:
    """What `decide` says; for a value, which it does not know, what leads past the check that `asking` makes."""
    try:
        return decide()
    except GuardOnDataDependentSymNode as error:
        if place_of_frames([(asking.f_code.co_filename, asking.f_lineno)]) is None:
            raise  # torch has handlers for what it asks
        answer = checks.answer(asking)
        if answer is None:
            checks.refused = checks.refused or error
            raise
        return answer
