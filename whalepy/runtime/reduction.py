"""Gradients of one stage in one step: reduced over their levels in planned order, most during the backward pass.

As in DistributedDataParallel (Li et al., arXiv:2006.15704, section 3.2) gradients share buckets, and a bucket goes on
its way as soon as its last gradient is there; in one order on all ranks, which the graph gives.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isqrt

import torch
from torch import Tensor, nn

from whalepy.runtime.groups import Group, Pending
from whalepy.runtime.kernels import convert, start_sum
from whalepy.runtime.storage import Stored

BUCKET_BYTES = 25 * 2**20
"""Where smaller buckets win nothing: what is summed lies in memory twice (the default of DistributedDataParallel)."""
_LEAST_BYTES = 2**20
"""Smaller buckets cost the host more than they win."""


@dataclass(eq=False)
class Bucket:
    """Parameters whose gradients one collective moves."""

    entries: tuple[Stored, ...]
    groups: tuple[Group, ...]
    missing: set[str] = field(default_factory=set[str])
    """Parameters whose gradients are not there yet, in a backward pass that is watched."""
    summing: Pending | None = None
    parts: list[tuple[nn.Parameter, torch.Size]] = field(default_factory=list[tuple[nn.Parameter, torch.Size]])


class Reduction:
    """Adds the gradients of `leaves` to those of `parameters`; `stored` in the order in which gradients come.

    `delays`: bytes that a group sums in the time that a sum of nothing takes (`StagePlan.delay_bytes`). `early`:
    during the backward pass that `watch` is called ahead of, over groups that are not among `busy`, those that backward
    passes themselves communicate over. Collective.
    """

    def __init__(
        self,
        stored: Sequence[Stored],
        leaves: Mapping[str, Tensor],
        parameters: Mapping[str, nn.Parameter],
        delays: Mapping[Group, int | None],
        *,
        early: bool = False,
        busy: Collection[Group] = (),
    ) -> None:
        self.leaves, self.parameters = leaves, parameters
        learning = [entry for entry in stored if entry.name in leaves and leaves[entry.name].requires_grad]
        plain = [entry for entry in learning if entry.summed_over is not None]
        self.others = [entry for entry in learning if entry.summed_over is None]
        self.buckets = list(self._bucketed(plain, delays))
        self.early = [b for b in self.buckets if early and b.groups and not set(b.groups) & set(busy)]
        self.next = 0
        self.before: dict[str, int | None] | None = None
        """How often each gradient had changed ahead of the backward pass that is watched; None: none is."""
        me = weakref.ref(self)  # Python does not see that a tensor holds its hooks: a ring of both would never go

        def came(bucket: Bucket, name: str, leaf: Tensor) -> None:
            reduction = me()
            before = None if reduction is None else reduction.before
            if reduction is None or before is None or _version(leaf) == before[name]:
                return  # torch calls where no gradient came, too
            reduction._came(bucket, name)

        for bucket in self.early:
            for entry in bucket.entries:
                leaves[entry.name].register_post_accumulate_grad_hook(partial(came, bucket, entry.name))

    def watch(self) -> None:
        """From here on, in the last backward pass of a step, a bucket that is full is reduced at once."""
        for bucket in self.early:
            bucket.missing = {entry.name for entry in bucket.entries}
        self.before = {entry.name: _version(self.leaves[entry.name]) for b in self.early for entry in b.entries}

    def finish(self) -> None:
        """Reduce what is left, and wait for what is on its way.

        On every rank each group sees the same order, whichever gradients came: first the early buckets, then the rest.
        """
        for bucket in self.early[self.next :]:
            self._start(bucket)
        for entry in self.others:
            gradient = self._taken(entry)
            if gradient is not None:
                _add(self.parameters[entry.name], entry.reduced(gradient))
        for bucket in self.buckets:
            if bucket not in self.early:
                self._start(bucket)
            self._end(bucket)
        self.forget()

    def forget(self) -> None:
        """As ahead of a step."""
        self.next, self.before = 0, None
        for bucket in self.buckets:
            bucket.summing = None
            bucket.parts.clear()

    def _came(self, bucket: Bucket, name: str) -> None:
        bucket.missing.discard(name)
        while self.next < len(self.early) and not self.early[self.next].missing:
            self._start(self.early[self.next])
            self.next += 1

    def _start(self, bucket: Bucket) -> None:
        """Put the gradients that are there beside each other, and start their sum over the first level."""
        found = ((self.parameters[entry.name], self._taken(entry)) for entry in bucket.entries)
        own = [(parameter, gradient) for parameter, gradient in found if gradient is not None]
        if not bucket.groups:
            for parameter, gradient in own:
                _add(parameter, gradient)
        elif own:
            flat = torch.cat([gradient.reshape(-1) for _, gradient in own])
            bucket.parts = [(parameter, gradient.shape) for parameter, gradient in own]
            own.clear()  # else what one rank has computed and what all have would lie side by side
            bucket.summing = start_sum(flat, bucket.groups[0])

    def _end(self, bucket: Bucket) -> None:
        if bucket.summing is None:
            return
        flat = bucket.summing.done()
        bucket.summing = None
        for group in bucket.groups[1:]:
            flat = convert(flat, "P", "R", group)
        parts = flat.split([shape.numel() for _, shape in bucket.parts])
        for (parameter, shape), part in zip(bucket.parts, parts, strict=True):
            _add(parameter, part.view(shape))

    def _taken(self, entry: Stored) -> Tensor | None:
        """The gradient of a leaf, which lets go of it; None where nothing gave it one."""
        leaf = self.leaves[entry.name]
        gradient, leaf.grad = leaf.grad, None
        return gradient

    def _bucketed(self, entries: Iterable[Stored], delays: Mapping[Group, int | None]) -> Iterable[Bucket]:
        alike: dict[tuple[tuple[Group, ...], torch.dtype], list[Stored]] = {}
        for entry in entries:
            groups = tuple(g for g in entry.summed_over or () if g.size > 1)
            alike.setdefault((groups, self.leaves[entry.name].dtype), []).append(entry)
        for (groups, _), members in alike.items():
            sizes = [self.leaves[entry.name].nbytes for entry in members]
            most = max((bucket_bytes(sum(sizes), delays[group]) for group in groups), default=BUCKET_BYTES)
            for bucket in _cut(members, sizes, most):
                yield Bucket(tuple(bucket), groups)


def bucket_bytes(total: int, delay: int | None) -> int:
    """The size of buckets of so many bytes of gradients, over links of this bandwidth-delay product.

    Of n equal buckets each waits once, and the last one, of total / n, is moved when the backward pass is over. In
    bytes that links move meanwhile that is n * delay + total / n: least where total / n is the geometric mean of both.
    None: nothing is moved while the backward pass computes.
    """
    return BUCKET_BYTES if delay is None else max(isqrt(total * delay), _LEAST_BYTES)


def _version(leaf: Tensor) -> int | None:
    """How often the gradient of a leaf has changed; None: there is none."""
    return None if leaf.grad is None else leaf.grad._version


def _cut(entries: Sequence[Stored], sizes: Sequence[int], most: int) -> Iterable[list[Stored]]:
    bucket: list[Stored] = []
    held = 0
    for entry, size in zip(entries, sizes, strict=True):
        if bucket and held + size > most:
            yield bucket
            bucket, held = [], 0
        bucket.append(entry)
        held += size
    if bucket:
        yield bucket


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    gradient = gradient.detach().to(parameter.dtype)
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient
