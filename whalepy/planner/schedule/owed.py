"""What a schedule owes: the messages of its crossings and lendings, and what must stand before what in one group."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from whalepy.errors import VerificationError
from whalepy.planner.schedule import findings
from whalepy.planner.schedule.actions import RECEIVES, Action, Crossing, Lending, Op, partner
from whalepy.planner.schedule.hosting import Hosts, group_of
from whalepy.planner.schedule.waits import send_of


@dataclass(frozen=True)
class Owed:
    """What all groups together have to do."""

    microbatches: int
    trained: frozenset[int]
    sends: Mapping[Action, None]
    """In a fixed order."""
    forward_from: Mapping[int, Sequence[int]]
    """Stages whose values a stage reads."""
    backward_from: Mapping[int, Sequence[int]]
    lenders: Mapping[int, Sequence[int]]
    """Owners of parameters that a stage borrows."""
    local: frozenset[tuple[int, int]]
    """Pairs of stages on one group."""


class Rule(NamedTuple):
    """`first` has to stand before the action that the rule is for."""

    first: Action
    finding: type[VerificationError]
    why: str


def owed(
    hosts: Hosts,
    crossings: Sequence[Crossing],
    lendings: Sequence[Lending],
    microbatches: int,
    trained: Collection[int] | None,
) -> Owed:
    """What stages on these groups owe; a gradient is owed only between stages that are trained (None: all are)."""
    groups = group_of(hosts)
    backward = frozenset(groups if trained is None else trained)
    forward = sorted({(each.source, each.target) for each in crossings})
    back = sorted({(each.source, each.target) for each in crossings if each.backward and each.target in backward})
    lent = sorted({(each.owner, each.borrower) for each in lendings})
    returned = sorted({(each.owner, each.borrower) for each in lendings if each.backward and backward})
    sends = [Action(owner, "SEND_P", None, borrower) for owner, borrower in lent]
    sends += [Action(source, "SEND_F", m, target) for source, target in forward for m in range(microbatches)]
    sends += [Action(target, "SEND_B", m, source) for source, target in back for m in range(microbatches)]
    sends += [Action(borrower, "SEND_G", None, owner) for owner, borrower in returned]
    return Owed(
        microbatches,
        backward,
        dict.fromkeys(sends),
        {stage: [a for a, b in forward if b == stage] for stage in groups},
        {stage: [b for a, b in back if a == stage] for stage in groups},
        {stage: [a for a, b in lent if b == stage] for stage in groups},
        frozenset((a, b) for a in groups for b in groups if groups[a] == groups[b]),
    )


def rules(action: Action, due: Owed) -> Iterator[Rule]:
    """What has to stand before this action in the list of its own group, if it is there at all."""
    stage, microbatch = action.stage, action.microbatch
    match action.op:
        case "F":
            yield from _received(action, "RECV_F", due.forward_from[stage])
            for owner in due.lenders[stage]:
                lent = Action(stage, "RECV_P", None, owner)
                yield Rule(lent, findings.ParameterBeforeReceived, "the parameter is not there yet")
        case "B" | "I":
            forward = Action(stage, "F", microbatch)
            yield Rule(forward, findings.BackwardBeforeForward, "there is nothing to go back through yet")
            yield from _received(action, "RECV_B", due.backward_from[stage])
        case "W":
            inputs = Action(stage, "I", microbatch)
            yield Rule(inputs, findings.WeightsBeforeInputs, "nothing has been left for it yet")
        case "SEND_F":
            yield Rule(Action(stage, "F", microbatch), findings.SentBeforeComputed, "there is nothing to send yet")
        case "SEND_B":
            for op in _BACKWARDS:
                yield Rule(Action(stage, op, microbatch), findings.SentBeforeComputed, "there is nothing to send yet")
        case "SENT_F" | "SENT_B":
            yield Rule(send_of(action), findings.SentBeforeComputed, "it has not been sent yet")
        case "REDUCE":
            yield from _reduced(action, due)
        case "SEND_G" | "RECV_G":
            why = "the gradient of the stage itself is not whole yet"
            yield Rule(Action(stage, "REDUCE"), findings.GradientTooEarly, why)
        case _:
            pass
    if action.op in RECEIVES and (stage, action.peer) in due.local:
        yield Rule(partner(action), findings.WaitCycle, "a group cannot wait for itself")


_BACKWARDS: tuple[Op, Op] = ("B", "I")


def _received(action: Action, op: Op, peers: Sequence[int]) -> Iterator[Rule]:
    for peer in peers:
        receive = Action(action.stage, op, action.microbatch, peer)
        yield Rule(receive, findings.UsedBeforeReceived, "what it needs is not there yet")


def _reduced(action: Action, due: Owed) -> Iterator[Rule]:
    for microbatch in range(due.microbatches):
        for op in ("B", "W"):
            last = Action(action.stage, op, microbatch)
            yield Rule(last, findings.ReduceTooEarly, "its gradients are not whole yet")
