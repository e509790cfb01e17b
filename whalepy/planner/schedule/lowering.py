"""From what each group computes to what it also sends, receives and reduces."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from whalepy.errors import PlanError
from whalepy.planner.schedule.actions import Action, Crossing, Lending, Op, Schedule, partner

Computes = Sequence[Sequence[Action]]


def lowered(
    computes: Computes,
    crossings: Sequence[Crossing],
    lendings: Sequence[Lending] = (),
    trained: Collection[int] | None = None,
) -> Schedule:
    """The actions of each group, with communication.

    Before: 0F0 0F1 0B0 0B1                                     | 1F0 1B0 1F1 1B1
    After:  0F0 0SEND_F0>1 0RECV_B0<1 0F1 0SEND_F1>1 0B0 ...    | 1RECV_F0<0 1F0 1RECV_F1<0 1B0 1SEND_B0>0 1F1 ...

    Parameters that are lent come first, then the microbatches, then the REDUCE of each stage in the order in which
    their backwards end, then gradients of what was lent. A receive stands one compute action ahead of the one that
    needs it; earlier only where it would else stand behind the receive of a later message of the same group; and
    directly before it if the sender is in its own group. `trained`: the stages that run a backward (None: all); the
    others lose theirs, and their REDUCE. Several crossings or lendings of the same two stages share one message.

    Raises PlanError for a crossing that does not go to a later stage, and for a gradient that comes from or goes to a
    stage without a backward.
    """
    kept = [[action for action in own if _kept(action, trained)] for own in computes]
    backward = {action.stage for own in kept for action in own if action.op in ("B", "I")}
    stages = {action.stage for own in kept for action in own}
    traffic = _traffic(crossings, lendings, stages, backward)
    drafts = [_Draft(own) for own in kept]
    groups = {action.stage: group for group, own in enumerate(kept) for action in own}
    for draft in drafts:
        _add_sends(draft, traffic)
    for draft in drafts:
        _add_receives(draft, traffic, groups, drafts)
    return tuple(tuple(_written(draft, traffic)) for draft in drafts)


@dataclass(frozen=True)
class _Traffic:
    """Messages by stage: where values go, where gradients come from, what is lent."""

    targets: Mapping[int, Sequence[int]]
    sources: Mapping[int, Sequence[int]]
    gradients_from: Mapping[int, Sequence[int]]
    gradients_to: Mapping[int, Sequence[int]]
    lent: Sequence[tuple[int, int]]
    """(owner, borrower)."""
    returned: Sequence[tuple[int, int]]


@dataclass
class _Draft:
    """The computes of a group; sends stand behind one, receives before one."""

    computes: list[Action]

    def __post_init__(self) -> None:
        self.sends: list[list[Action]] = [[] for _ in self.computes]
        self.receives: list[list[Action]] = [[] for _ in self.computes]

    def sent_to(self, stages: Collection[int]) -> Iterator[Action]:
        """Its messages to those stages, in the order in which it sends them."""
        return (send for sends in self.sends for send in sends if send.peer in stages)


def _kept(action: Action, trained: Collection[int] | None) -> bool:
    return action.op == "F" or trained is None or action.stage in trained


def _traffic(
    crossings: Sequence[Crossing], lendings: Sequence[Lending], stages: Collection[int], backward: Collection[int]
) -> _Traffic:
    """Raises PlanError as `lowered` does."""
    for crossing in crossings:
        _check_crossing(crossing, stages, backward)
    for lending in lendings:
        _check_lending(lending, stages, backward)
    forward = sorted({(each.source, each.target) for each in crossings})
    back = sorted({(each.source, each.target) for each in crossings if each.backward and each.target in backward})
    return _Traffic(
        {stage: [target for source, target in forward if source == stage] for stage in stages},
        {stage: [source for source, target in forward if target == stage] for stage in stages},
        {stage: [target for source, target in back if source == stage] for stage in stages},
        {stage: [source for source, target in back if target == stage] for stage in stages},
        sorted({(each.owner, each.borrower) for each in lendings}),
        sorted({(each.owner, each.borrower) for each in lendings if each.backward and backward}),
    )


def _check_crossing(crossing: Crossing, stages: Collection[int], backward: Collection[int]) -> None:
    source, target = crossing.source, crossing.target
    if source not in stages or target not in stages:
        raise PlanError(f"values cross from stage {source} to stage {target}, but the stages are {sorted(stages)}")
    if source >= target:
        fix = "order the stages so that values only go to later ones"
        raise PlanError(f"values cross from stage {source} back to stage {target}", fix=fix)
    if crossing.backward and (source in backward) != (target in backward):
        without = source if target in backward else target
        raise PlanError(
            f"gradients cross from stage {target} to stage {source}, but stage {without} runs no backward",
            fix=f"name stage {without} as trained, or cross without gradients",
        )


def _check_lending(lending: Lending, stages: Collection[int], backward: Collection[int]) -> None:
    owner, borrower = lending.owner, lending.borrower
    if owner not in stages or borrower not in stages or owner == borrower:
        raise PlanError(f"stage {owner} lends to stage {borrower}, but the stages are {sorted(stages)}")
    if lending.backward and backward and borrower not in backward:
        fix = f"name stage {borrower} as trained, or lend without gradients"
        raise PlanError(f"stage {borrower} owes stage {owner} a gradient, but runs no backward", fix=fix)


def _add_sends(draft: _Draft, traffic: _Traffic) -> None:
    for position, compute in enumerate(draft.computes):
        op, peers = _sending(compute, traffic)
        draft.sends[position] = [Action(compute.stage, op, compute.microbatch, peer) for peer in peers]


def _sending(compute: Action, traffic: _Traffic) -> tuple[Op, Sequence[int]]:
    if compute.op == "F":
        return "SEND_F", traffic.targets[compute.stage]
    return "SEND_B", traffic.gradients_to[compute.stage] if compute.op in ("B", "I") else ()


def _receiving(compute: Action, traffic: _Traffic) -> tuple[Op, Sequence[int]]:
    if compute.op == "F":
        return "RECV_F", traffic.sources[compute.stage]
    return "RECV_B", traffic.gradients_from[compute.stage] if compute.op in ("B", "I") else ()


def _add_receives(draft: _Draft, traffic: _Traffic, groups: Mapping[int, int], drafts: Sequence[_Draft]) -> None:
    """Each receive one compute ahead, and the receives from one group in the order of its sends."""
    wanted: dict[Action, int] = {}
    for position, compute in enumerate(draft.computes):
        op, peers = _receiving(compute, traffic)
        wanted.update({Action(compute.stage, op, compute.microbatch, peer): position for peer in peers})
    own = {compute.stage for compute in draft.computes}
    for sender in [drafts[group] for group in sorted({groups[receive.peer or 0] for receive in wanted})]:
        sent = [partner(send) for send in sender.sent_to(own)]
        for receive, position in zip(sent, _positions(sent, wanted, sender is draft), strict=True):
            draft.receives[position].append(receive)


def _positions(sent: Sequence[Action], wanted: Mapping[Action, int], local: bool) -> list[int]:
    """Before which compute each receive stands: none behind one of a later message."""
    if local:
        return [wanted[receive] for receive in sent]
    positions = [max(wanted[receive] - 1, 0) for receive in sent]
    for index in range(len(positions) - 2, -1, -1):
        positions[index] = min(positions[index], positions[index + 1])
    return positions


def _written(draft: _Draft, traffic: _Traffic) -> Iterator[Action]:
    own = {compute.stage for compute in draft.computes}
    yield from (Action(owner, "SEND_P", None, other) for owner, other in traffic.lent if owner in own)
    yield from (Action(other, "RECV_P", None, owner) for owner, other in traffic.lent if other in own)
    for position, compute in enumerate(draft.computes):
        yield from draft.receives[position]
        yield compute
        yield from draft.sends[position]
    ended = dict.fromkeys(compute.stage for compute in reversed(draft.computes) if compute.op != "F")
    yield from (Action(stage, "REDUCE") for stage in reversed(ended))
    yield from (Action(other, "SEND_G", None, owner) for owner, other in traffic.returned if other in own)
    yield from (Action(owner, "RECV_G", None, other) for owner, other in traffic.returned if owner in own)
