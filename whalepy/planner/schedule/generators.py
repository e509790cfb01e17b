"""The order in which each group of devices computes: one function per kind of schedule.

Every order here is one in which a chain of stages can run, each waiting for the one before it. A crossing always goes
to a later stage, so whatever the crossings are, what crosses has been computed by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, count, pairwise

from whalepy.errors import PlanError
from whalepy.planner.schedule.actions import Op, Schedule
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
    """1F1B over several blocks per group: rounds of at least as many microbatches as groups, block after block.

    There are as many rounds as are full with one microbatch per group, as equal as they come, larger ones first. Of G
    groups, group g with v blocks starts with 2 (G - g - 1) + (v - 1) R forwards, where R is the size of the first
    round; where groups host unlike numbers of blocks, with as many more as it takes that no group waits for ever.
    Source: Narayanan et al., Megatron-LM (2021), section 2.2.2, for rounds of G.
    """
    blocks, groups = _blocks(hosts, microbatches)
    if len(blocks) == len(groups):
        return one_f_one_b(hosts, microbatches)
    ends = _rounds(microbatches, len(groups))
    ahead = [2 * (len(groups) - g - 1) + (len(own) - 1) * ends[0] for g, own in enumerate(groups)]
    for more in count():
        orders = [
            _alternating(_in_rounds(own, "F", ends), _in_rounds(own[::-1], "B", ends), ahead[g] + more)
            for g, own in enumerate(groups)
        ]
        if completes(orders, blocks):
            return _spread(orders, blocks)
    raise AssertionError("all forwards before all backwards always completes")


def zero_bubble(hosts: Sequence[Sequence[int]], microbatches: int) -> Schedule:
    """1F1B whose backward is in two parts: the weight gradients of stage i come i microbatches behind.

    No stage holds more microbatches than the first one holds under 1F1B, min(M, S). With several blocks on a group it
    does what is ready, weight gradients last, and no block holds more than that.
    Source: Qi et al., Zero Bubble Pipeline Parallelism (2023), section 2.1, ZB-H1.
    """
    blocks, groups = _blocks(hosts, microbatches)
    if len(blocks) > len(groups):
        return _spread(listed(blocks, microbatches, deferred=True), blocks)
    ahead = [min(microbatches, len(blocks) - index) for index in range(len(blocks))]
    return _spread([list(_weights_behind(index, ahead[index], microbatches)) for index in range(len(blocks))], blocks)


def _weights_behind(block: int, ahead: int, microbatches: int) -> Iterator[BlockAction]:
    """The forwards ahead, then turns of inputs, of weights `block` microbatches before, and of one more forward."""
    yield from (BlockAction(block, "F", m) for m in range(ahead))
    for microbatch in range(microbatches):
        yield BlockAction(block, "I", microbatch)
        if microbatch >= block:
            yield BlockAction(block, "W", microbatch - block)
        if microbatch + ahead < microbatches:
            yield BlockAction(block, "F", microbatch + ahead)
    yield from (BlockAction(block, "W", m) for m in range(max(microbatches - block, 0), microbatches))


def forward_only(hosts: Sequence[Sequence[int]], microbatches: int) -> Schedule:
    """The forwards alone, for an evaluation; several blocks on a group go in rounds."""
    blocks, groups = _blocks(hosts, microbatches)
    ends = _rounds(microbatches, len(groups))
    return _spread([_in_rounds(own, "F", ends) for own in groups], blocks)


def _alternating(forwards: Order, backwards: Order, ahead: int) -> Order:
    """So many forwards, then one forward and one backward in turns, then the rest of the backwards."""
    ahead = min(ahead, len(forwards))
    turns = chain.from_iterable(zip(forwards[ahead:], backwards, strict=False))
    return [*forwards[:ahead], *turns, *backwards[len(forwards) - ahead :]]


def _rounds(microbatches: int, groups: int) -> tuple[int, ...]:
    """Where each round ends: M // G of them, at least one, as equal as they come, larger ones first."""
    rounds = max(1, microbatches // groups)
    least, larger = divmod(microbatches, rounds)
    return tuple(accumulate(least + (index < larger) for index in range(rounds)))


def _in_rounds(own: Sequence[int], op: Op, ends: Sequence[int]) -> Order:
    rounds = list(pairwise((0, *ends)))
    return [BlockAction(block, op, m) for first, end in rounds for block in own for m in range(first, end)]


def _blocks(hosts: Sequence[Sequence[int]], microbatches: int) -> tuple[tuple[Block, ...], list[list[int]]]:
    """The blocks, and the indices of those of each group."""
    if microbatches < 1:
        raise PlanError(f"{microbatches} microbatches cannot be scheduled", fix="use at least one")
    checked = checked_hosts(hosts)
    blocks = blocks_of(checked)
    return blocks, [of_group(blocks, group) for group in range(len(checked))]


def _spread(orders: Sequence[Order], blocks: Sequence[Block]) -> Schedule:
    return tuple(spread(order, blocks) for order in orders)
