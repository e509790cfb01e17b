"""Conversions of one value between the ways it can lie over one level: replicated, partial sum, sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from whalepy.errors import VerificationError
from whalepy.runtime.groups import Blocks, Group, Pending


@dataclass(frozen=True)
class Segment:
    """A stretch of a dim in which the sharded term appears once: `pre` x sum(lengths) x `post` elements.

    `lengths` are the sizes of the term at each position of the level; zeros are legal.
    """

    pre: int
    lengths: tuple[int, ...]
    post: int

    @property
    def size(self) -> int:
        """Elements of the whole segment."""
        return self.pre * sum(self.lengths) * self.post

    def local(self, position: int) -> Segment:
        """What `position` holds of the segment, as the whole segment of a level of one."""
        return replace(self, lengths=(self.lengths[position],))

    def interval(self, position: int) -> tuple[int, int]:
        """Start and length of what `position` holds of the term."""
        return sum(self.lengths[:position]), self.lengths[position]


@dataclass(frozen=True)
class Shard:
    """How a value lies over a level when `dim` is sharded on it.

    The dim, when whole on this level, is lead x (the segments end to end) x trail; each position holds its interval of
    the sharded term in every segment. Raises VerificationError if the numbers do not multiply to `shape[dim]`.
    """

    shape: tuple[int, ...]
    dim: int
    lead: int
    segments: tuple[Segment, ...]
    trail: int

    def __post_init__(self) -> None:
        if self.shape[self.dim] != self.lead * self._middle * self.trail:
            raise VerificationError(
                f"dim {self.dim} of shape {list(self.shape)} is not {self.lead} x {self._middle} x {self.trail}"
            )
        if len({len(segment.lengths) for segment in self.segments}) != 1:
            raise VerificationError("the segments of a dim must be sharded over the same positions")

    @classmethod
    def along(cls, shape: tuple[int, ...], dim: int, lengths: tuple[int, ...]) -> Shard:
        """The ordinary case: position r holds `lengths[r]` consecutive elements of the dim."""
        return cls(shape, dim, 1, (Segment(1, lengths, 1),), 1)

    def local_shape(self, position: int) -> tuple[int, ...]:
        """The shape of what `position` holds."""
        return self._local_shapes[position]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Elements that each position holds."""
        return tuple(prod(shape) for shape in self._local_shapes)

    @cached_property
    def is_range(self) -> bool:
        """Whether each position holds consecutive elements of the dim."""
        return self.lead == 1 and len(self.segments) == 1 and self.segments[0].pre == 1

    @cached_property
    def end_to_end(self) -> bool:
        """Whether the contiguous parts end to end are the contiguous whole."""
        return self.is_range and prod(self.shape[: self.dim]) == 1

    def alone(self, position: int) -> Shard:
        """What `position` holds, as the whole of a level of one."""
        segments = tuple(segment.local(position) for segment in self.segments)
        return replace(self, shape=self.local_shape(position), segments=segments)

    @property
    def _middle(self) -> int:
        return sum(segment.size for segment in self.segments)

    @cached_property
    def _local_shapes(self) -> tuple[tuple[int, ...], ...]:
        before, after = self.shape[: self.dim], self.shape[self.dim + 1 :]
        positions = range(len(self.segments[0].lengths))
        middles = [sum(segment.local(position).size for segment in self.segments) for position in positions]
        return tuple((*before, self.lead * middle * self.trail, *after) for middle in middles)


Kind: TypeAlias = Literal["R", "P"] | Shard


@torch.no_grad()
def convert(x: Tensor, source: Kind, target: Kind, group: Group) -> Tensor:
    """This rank's part of the value as `target`, given its part `x` of it as `source`.

    "R": every position holds the value; "P": the sum over positions is the value; a Shard: each holds its part.
    Returns `x` itself if nothing is to be done (source equals target, or a group of one), otherwise fresh contiguous
    memory. Half precision is summed in float32. Never recorded by autograd. Collective over the group wherever data
    crosses ranks, except for a value of no elements. Raises VerificationError if `x` is not what `source` says.
    """
    return start_convert(x, source, target, group).done()


@torch.no_grad()
def start_convert(x: Tensor, source: Kind, target: Kind, group: Group) -> Pending:
    """The same on its way."""
    if source == target or group.size == 1:
        return Pending(None, lambda: x)
    shape = source.shape if isinstance(source, Shard) else tuple(x.shape)
    _check_shape(x, _local_shape(source, shape, group), group)
    if isinstance(target, Shard) and target.shape != shape:
        raise VerificationError(f"a value of shape {list(shape)} cannot become one of shape {list(target.shape)}")
    if 0 in shape:
        nothing = x.new_empty(_local_shape(target, shape, group))
        return Pending(None, lambda: nothing)
    return _KERNELS[_letter(source) + _letter(target)](x, source, target, group)


@torch.no_grad()
def start_sum(x: Tensor, group: Group) -> Pending:
    """Start to add `x`, contiguous, up over the group; its memory is taken over. Half precision as in `convert`."""
    dtype = x.dtype
    return group.start_all_reduce(x.to(_reduced_in(x))).then(lambda found: found.to(dtype))


@torch.no_grad()
def all_reduce_max(x: Tensor, group: Group) -> Tensor:
    """The elementwise maximum over the group, in fresh memory; `x` itself in a group of one."""
    return x if group.size == 1 else _reduce(x, dist.ReduceOp.MAX, group).done()


def _letter(kind: Kind) -> str:
    return "S" if isinstance(kind, Shard) else kind


def _local_shape(kind: Kind, shape: tuple[int, ...], group: Group) -> tuple[int, ...]:
    return kind.local_shape(group.position) if isinstance(kind, Shard) else shape


def _check_shape(x: Tensor, expected: tuple[int, ...], group: Group) -> None:
    if tuple(x.shape) != expected:
        rank = group.ranks[group.position]
        raise VerificationError(f"rank {rank} holds a value of shape {list(x.shape)}; its layout says {list(expected)}")


# Reductions run in these dtypes: half precision for exactness, the others because a backend lacks them.
_REDUCED_IN = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.bool: torch.uint8,
    torch.int16: torch.int32,
}


def _reduced_in(x: Tensor) -> torch.dtype:
    return _REDUCED_IN.get(x.dtype, x.dtype)


def _reduce(x: Tensor, op: Any, group: Group) -> Pending:
    dtype, buffer = x.dtype, x.to(_reduced_in(x), copy=True, memory_format=torch.contiguous_format)
    return group.start_all_reduce(buffer, op).then(lambda found: found.to(dtype))


def _all_reduce(x: Tensor, source: Kind, target: Kind, group: Group) -> Pending:
    return _reduce(x, dist.ReduceOp.SUM, group)


def _keep_on_first(x: Tensor, source: Kind, target: Kind, group: Group) -> Pending:
    kept = x.clone(memory_format=torch.contiguous_format) if group.position == 0 else x.new_zeros(x.shape)
    return Pending(None, lambda: kept)


def _slice(x: Tensor, source: Kind, target: Shard, group: Group) -> Pending:
    part = x.new_empty(target.local_shape(group.position))
    for inside, own in _views(x, part, target, group.position):
        own.copy_(inside)
    return Pending(None, lambda: part)


def _pad(x: Tensor, source: Shard, target: Kind, group: Group) -> Pending:
    whole = x.new_zeros(source.shape)
    for inside, own in _views(whole, x, source, group.position):
        inside.copy_(own)
    return Pending(None, lambda: whole)


def _all_gather(x: Tensor, source: Shard, target: Kind, group: Group) -> Pending:
    pending, blocks = group.start_all_gather(x.contiguous().view(-1), source.sizes)
    return pending.then(lambda buffer: _join(buffer, blocks, source))


def _reduce_scatter(x: Tensor, source: Kind, target: Shard, group: Group) -> Pending:
    dtype, blocks = x.dtype, group.scatter_blocks(target.sizes)
    pending = group.start_reduce_scatter(_cut(x, target, blocks), blocks, _reduced_in(x))
    return pending.then(lambda part: part.to(dtype).view(target.local_shape(group.position)))


def _all_to_all(x: Tensor, source: Shard, target: Shard, group: Group) -> Pending:
    if source.dim == target.dim:
        return _reshard(x, source, target, group)
    outgoing = replace(target, shape=source.local_shape(group.position))
    incoming = replace(source, shape=target.local_shape(group.position))
    sends, receives = group.blocks(outgoing.sizes), group.blocks(incoming.sizes)
    pending = group.start_exchange(_cut(x, outgoing, sends), sends, receives)
    return pending.then(lambda buffer: _join(buffer, receives, incoming))


def _reshard(x: Tensor, source: Shard, target: Shard, group: Group) -> Pending:
    """All-to-all within one dim, by the indices of it that a sender holds and a receiver wants."""
    dim, me, positions = source.dim, group.position, range(group.size)
    outgoing = [_shared(source, me, target, position).to(x.device) for position in positions]
    incoming = [_shared(target, me, source, position).to(x.device) for position in positions]
    slab = prod(source.shape) // source.shape[dim]
    sends = group.blocks([len(index) * slab for index in outgoing])
    receives = group.blocks([len(index) * slab for index in incoming])
    before, after, buffer = x.shape[:dim], x.shape[dim + 1 :], x.new_empty(sends.total)
    for index, part in zip(outgoing, sends.parts(buffer), strict=True):
        part.copy_(x.index_select(dim, index).view(-1))

    def joined(received: Tensor) -> Tensor:
        result = received.new_empty(target.local_shape(me))
        for index, part in zip(incoming, receives.parts(received), strict=True):
            result.index_copy_(dim, index, part.view(*before, len(index), *after))
        return result

    return group.start_exchange(buffer, sends, receives).then(joined)


_KERNELS: dict[str, Callable[[Tensor, Any, Any, Group], Pending]] = {
    "RS": _slice,
    "RP": _keep_on_first,
    "SR": _all_gather,
    "SS": _all_to_all,
    "SP": _pad,
    "PR": _all_reduce,
    "PS": _reduce_scatter,
}


def _cut(whole: Tensor, shard: Shard, blocks: Blocks) -> Tensor:
    """The parts of `whole`, contiguous, in one buffer; `whole` itself where that is its memory already."""
    if shard.end_to_end and blocks.in_order:
        return whole.contiguous().view(-1)
    buffer = whole.new_empty(blocks.total)  # padding is never used
    for position, part in enumerate(blocks.parts(buffer)):
        for inside, own in _views(whole, part.view(shard.local_shape(position)), shard, position):
            own.copy_(inside)
    return buffer


def _join(buffer: Tensor, blocks: Blocks, shard: Shard) -> Tensor:
    """The whole, given the parts in one buffer."""
    if shard.end_to_end and blocks.in_order:
        return buffer.view(shard.shape)
    whole = buffer.new_empty(shard.shape)
    for position, part in enumerate(blocks.parts(buffer)):
        for inside, own in _views(whole, part.view(shard.local_shape(position)), shard, position):
            inside.copy_(own)
    return whole


def _views(whole: Tensor, part: Tensor, shard: Shard, position: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of equal shape into the whole and into what `position` holds of it, a pair per segment."""
    if shard.is_range:
        start, length = shard.segments[0].interval(position)
        unit = shard.segments[0].post * shard.trail
        yield whole.narrow(shard.dim, start * unit, length * unit), part
        return
    in_whole, in_part = _segments(whole, shard), _segments(part, shard.alone(position))
    for segment, inside, own in zip(shard.segments, in_whole, in_part, strict=True):
        yield inside.narrow(shard.dim + 2, *segment.interval(position)), own


def _segments(x: Tensor, shard: Shard) -> Iterator[Tensor]:
    """Views [..., lead, pre, term, post, trail, ...] of each segment."""
    sizes = [segment.size for segment in shard.segments]
    middle = x.unflatten(shard.dim, (shard.lead, sum(sizes), shard.trail))
    for segment, stretch in zip(shard.segments, middle.split(sizes, shard.dim + 1), strict=True):
        yield stretch.unflatten(shard.dim + 1, (segment.pre, sum(segment.lengths), segment.post))


@lru_cache(maxsize=256)
def _shared(mine: Shard, position: int, theirs: Shard, other: int) -> Tensor:
    """Where, along the dim of what `position` holds under `mine`, lies what `other` holds under `theirs`."""
    return torch.isin(_held(mine, position), _held(theirs, other)).nonzero().view(-1)


def _held(shard: Shard, position: int) -> Tensor:
    """The indices of the whole dim that `position` holds; ascending, so that both ends agree on the order."""
    size = shard.shape[shard.dim]
    line = replace(shard, shape=(size,), dim=0)
    part = torch.empty(line.local_shape(position), dtype=torch.int64)
    for inside, own in _views(torch.arange(size), part, line, position):
        own.copy_(inside)
    return part
