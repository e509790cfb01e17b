"""Branches of the user's code on a size, which the capture decides as if every free size were at least 2."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import sympy
from torch.fx.experimental.sym_node import SymNode

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
def branches_noted(branches: Branches) -> Generator[None]:
    """Note each `if` on a size: export keeps no guard for those that only a size of 0 or 1 would answer otherwise."""
    decide = SymNode.bool_

    def noted(node: Any) -> bool:
        condition = node.expr
        outcome: bool = decide(node)
        asking = sys._getframe(2)  # below SymBool.__bool__
        place = place_of_frames([(asking.f_code.co_filename, asking.f_lineno)])
        if place is not None:
            branches.note(condition, outcome, place)
        return outcome

    with mock.patch.object(SymNode, "bool_", noted):
        yield
