"""One step of a schedule, and what crosses from stage to stage.

How a runtime plays the list of one group of devices: compute actions and REDUCE run in order. A send never blocks. A
receive is *posted* where it stands and does not block there either: the first compute action that needs the value waits
for it. Only RECV_G, which no compute action follows, waits where it stands. Messages between two groups arrive in the
order of their sends, and their receives are posted in that order. What SEND_F and SEND_B send keeps its memory until
SENT, which waits for the other side to have posted its receive; what SEND_P and SEND_G send to the end of the step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeGuard, get_args

from whalepy.errors import PlanError

Op = Literal[
    "F", "B", "I", "W", "SEND_F", "RECV_F", "SENT_F", "SEND_B", "RECV_B", "SENT_B",
    "SEND_P", "RECV_P", "SEND_G", "RECV_G", "REDUCE",
]  # fmt: skip
"""F forward, B whole backward, I gradient of the inputs only, W the weight gradients that I left.

SENT_F, SENT_B: what SEND_F, SEND_B sent has arrived, and its memory goes.

SEND_P, RECV_P: a parameter that another stage owns, once at the start of the step. SEND_G, RECV_G: its gradient, back
to the owner at the end. REDUCE: the gradient collectives of a stage, at the end.
"""

OPS: tuple[Op, ...] = get_args(Op)
COMPUTES: frozenset[Op] = frozenset(("F", "B", "I", "W"))
SENDS: frozenset[Op] = frozenset(("SEND_F", "SEND_B", "SEND_P", "SEND_G"))
RECEIVES: frozenset[Op] = frozenset(("RECV_F", "RECV_B", "RECV_P", "RECV_G"))
MESSAGES = SENDS | RECEIVES
SENT: Mapping[Op, Op] = {"SENT_F": "SEND_F", "SENT_B": "SEND_B"}
"""The send that each is about."""
ONCE: frozenset[Op] = frozenset(("SEND_P", "RECV_P", "SEND_G", "RECV_G", "REDUCE"))
"""Once per step, without a microbatch."""
PARTNER: dict[Op, Op] = {
    "SEND_F": "RECV_F", "SEND_B": "RECV_B", "SEND_P": "RECV_P", "SEND_G": "RECV_G",
    "RECV_F": "SEND_F", "RECV_B": "SEND_B", "RECV_P": "SEND_P", "RECV_G": "SEND_G",
}  # fmt: skip

_FORM = re.compile(r"(\d+)([A-Z_]+)(\d+)?(?:([<>])(\d+))?")
_FIX = "write 2F0, 0SEND_F3>2, 2RECV_F3<0, 0SEND_P>3 or 2REDUCE"


class Action(NamedTuple):
    """One step of a schedule: what `stage` does. `2F0`; `0SEND_F3>2` sends values of microbatch 3 to stage 2.

    A tuple because lists of many thousands are hashed and compared, again and again.
    """

    stage: int
    op: Op
    microbatch: int | None = None
    """None for what happens once per step."""
    peer: int | None = None
    """The other stage of a send or a receive."""

    def __str__(self) -> str:
        microbatch = "" if self.microbatch is None else self.microbatch
        peer = "" if self.peer is None else f"{_arrow(self.op)}{self.peer}"
        return f"{self.stage}{self.op}{microbatch}{peer}"


Schedule = tuple[tuple[Action, ...], ...]
"""The actions of each group of devices, in order."""


@dataclass(frozen=True)
class Crossing:
    """Values that go from one stage to a later one, next to it or not; `backward`: their gradients come back."""

    source: int
    target: int
    backward: bool


@dataclass(frozen=True)
class Lending:
    """A parameter of one stage that another one uses too; `backward`: it is trained, so its gradient comes back."""

    owner: int
    borrower: int
    backward: bool


def parse(text: str) -> Action:
    """The action that prints as `text`. Raises PlanError for anything else."""
    if (match := _FORM.fullmatch(text.strip())) is None:
        raise PlanError(f"{text!r} is not an action of a schedule", fix=_FIX)
    stage, op, microbatch, arrow, peer = match.groups()
    if not _known(op):
        raise PlanError(f"{text!r} is not an action of a schedule: there is no {op}", fix=f"one of {', '.join(OPS)}")
    if arrow != _arrow(op) or (microbatch is None) != (op in ONCE):
        raise PlanError(f"{text!r} is not an action of a schedule", fix=_FIX)
    return Action(int(stage), op, _number(microbatch), _number(peer))


def partner(action: Action) -> Action:
    """The receive of a send, or the send of a receive."""
    if action.peer is None:
        raise PlanError(f"{action} has no other side")
    return Action(action.peer, PARTNER[action.op], action.microbatch, action.stage)


def _known(op: str) -> TypeGuard[Op]:
    return op in OPS


def _arrow(op: Op) -> str | None:
    return ">" if op in SENDS or op in SENT else "<" if op in RECEIVES else None


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)
