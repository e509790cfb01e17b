"""The order in which each group of devices computes: one function per kind of schedule.

Every order here is one in which a chain of stages can run, each waiting for the one before it. A crossing always goes
to a later stage, so whatever the crossings are, what crosses has been computed by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, count, pairwise

from whalepy.errors import PlanError
from whalepy.planner.schedule.actions import Schedule
from whalepy.planner.schedule.hosting import Block, BlockAction, blocks_of, checked_hosts, of_group, spread
from whalepy.planner.schedule.listing import completes, listed

Order = Sequence[BlockAction]


def gpipe(hosts: Sequence[Sequence[int]], microbatches: int) -> Schedule:
    """All forwards, then all backwards. All microbatches are in flight on every stage.

    Source: Huang et al., GPipe (2019), section 2.3; several blocks on a group go one after the other (breadth first:
    Lamy-Poirier, 2022, section 4).
    """
    blocks, groups = _blocks(hosts, microbatches)
    orders: list[Order] = []
    for own in groups:
        forwards = [BlockAction(block, "F", m) for block in own for m in range(microbatches)]
        backwards = [BlockAction(block, "B", m) for block in reversed(own) for m in range(microbatches)]
        orders.append(forwards + backwards)
    return _spread(orders, blocks)


def one_f_one_b(hosts: Sequence[Sequence[int]], microbatches: int) -> Schedule:
    """Forwards until min(M, S - i) microbatches are in flight on stage i of S, then a backward before each forward.

    With several blocks on a group it does what is ready, backward first, and no block has more in flight than that.
    Source: Narayanan et al., PipeDream-2BW (2021), 1F1B with flushes.
    """
    blocks, groups = _blocks(hosts, microbatches)
    if len(blocks) > len(groups):
        return _spread(listed(blocks, microbatches, deferred=False), blocks)
    ahead = [min(microbatches, len(blocks) - index) for index in range(len(blocks))]
    return _spread([_one_by_one(index, ahead[index], microbatches) for index in range(len(blocks))], blocks)


def _one_by_one(block: int, ahead: int, microbatches: int) -> Order:
    forwards = [BlockAction(block, "F", m) for m in range(microbatches)]
    backwards = [BlockAction(block, "B", m) for m in range(microbatches)]
    return _alternating(forwards, backwards, ahead - 1)


def interleaved(hosts: Sequence[Sequence[int]], microbatches: int) -> Schedule:
    """1F1B over several blocks per group: rounds of as many microbatches as groups go through block after block.

    Of G groups, group g with v blocks starts with 2 (G - g - 1) + (v - 1) G forwards; where the last round is
    not full or groups host unlike numbers of blocks, with as many more as it takes that no group waits for ever.
    Source: Narayanan et al., Megatron-LM (2021), section 2.2.2.
    """
    blocks, groups = _blocks(hosts, microbatches)
    if len(blocks) == len(groups):
        return one_f_one_b(hosts, microbatches)
    size = min(len(groups), microbatches)
    ahead = [2 * (len(groups) - g - 1) + (len(own) - 1) * size for g, own in enumerate(groups)]
    for more in count():
        orders = [
            _alternating(
                _in_rounds(own, "F", microbatches, size),
                _in_rounds(own[::-1], "B", microbatches, size),
                ahead[g] + more,
            )
            for g, own in enumerate(groups)
        ]
        if completes(orders, blocks):
            return _spread(orders, blocks)
    raise AssertionError("all forwards before all backwards always completes")


def zero_bubble(hosts: Sequence[Sequence[int]], microbatches: int) -> Schedule:
    """1F1B whose weight gradients wait for a moment when nothing else is ready.

    No stage holds more microbatches than the first one holds under 1F1B, min(M, S).
    Source: Qi et al., Zero Bubble Pipeline Parallelism (2023), section 2.2, ZB-H1.
    """
    blocks, _ = _blocks(hosts, microbatches)
    return _spread(listed(blocks, microbatches, deferred=True), blocks)


def forward_only(hosts: Sequence[Sequence[int]], microbatches: int) -> Schedule:
    """The forwards alone, for an evaluation; several blocks on a group go in rounds."""
    blocks, groups = _blocks(hosts, microbatches)
    size = min(len(groups), microbatches)
    return _spread([_in_rounds(own, "F", microbatches, size) for own in groups], blocks)


def _alternating(forwards: Order, backwards: Order, ahead: int) -> Order:
    """So many forwards, then one forward and one backward in turns, then the rest of the backwards."""
    ahead = min(ahead, len(forwards))
    turns = chain.from_iterable(zip(forwards[ahead:], backwards, strict=False))
    return [*forwards[:ahead], *turns, *backwards[len(forwards) - ahead :]]


def _in_rounds(own: Sequence[int], op: str, microbatches: int, size: int) -> Order:
    return list(_rounds(own, op, microbatches, size))


def _rounds(own: Sequence[int], op: str, microbatches: int, size: int) -> Iterator[BlockAction]:
    starts = [*range(0, microbatches, size), microbatches]
    for first, end in pairwise(starts):
        for block in own:
            for microbatch in range(first, end):
                yield BlockAction(block, "F" if op == "F" else "B", microbatch)


def _blocks(hosts: Sequence[Sequence[int]], microbatches: int) -> tuple[tuple[Block, ...], list[list[int]]]:
    """The blocks, and the indices of those of each group."""
    if microbatches < 1:
        raise PlanError(f"{microbatches} microbatches cannot be scheduled", fix="use at least one")
    checked = checked_hosts(hosts)
    blocks = blocks_of(checked)
    return blocks, [of_group(blocks, group) for group in range(len(checked))]


def _spread(orders: Sequence[Order], blocks: Sequence[Block]) -> Schedule:
    return tuple(spread(order, blocks) for order in orders)
