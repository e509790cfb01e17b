"""Parameters as ranks keep them: boxes of the local model's values, what the program reads, and gradients back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from whalepy.planner.decide import Decisions
from whalepy.program.analysis import Program
from whalepy.program.layout import Layout
from whalepy.rewrite.terms import moves, terms_of
from whalepy.runtime.bridge import Move
from whalepy.runtime.extents import Binder, Extents, StepSizes
from whalepy.runtime.groups import Group
from whalepy.runtime.kernels import convert

BUCKET_BYTES = 25 * 2**20
"""Gradients that are reduced over the same levels share buffers of this size (DistributedDataParallel's default)."""


@dataclass(frozen=True)
class Stored:
    """One parameter of the local model on this rank."""

    name: str
    shape: tuple[int, ...]
    cut: tuple[Move, ...]
    """From the whole to this rank's box."""
    reading: tuple[Move, ...]
    """From the box to what the program reads; gradients take the way back."""

    def box(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of the whole value; no communication."""
        for move in self.cut:
            whole = convert(whole, move.source, move.target, move.group)
        return whole

    def whole(self, box: torch.Tensor) -> torch.Tensor:
        """The whole value from every rank's box. Collective."""
        for move in reversed(self.cut):
            box = convert(box, move.target, move.source, move.group)
        return box

    def read(self, box: torch.Tensor) -> torch.Tensor:
        """What the program reads. Collective where the box is not read as it is stored."""
        for move in self.reading:
            box = convert(box, move.source, move.target, move.group)
        return box

    def reduced(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the box from this rank's gradient of what it read. Collective."""
        for move in reversed(self.reading):
            gradient = convert(gradient, move.gradient_source, move.gradient_target, move.group)
        return gradient

    @property
    def summed_over(self) -> tuple[Group, ...] | None:
        """The groups over which the gradient is summed, if that is all there is to do; None otherwise."""
        plain = all(m.gradient_source == "P" and m.gradient_target == "R" for m in self.reading)
        return tuple(m.group for m in reversed(self.reading)) if plain else None


def store(program: Program, decisions: Decisions, binder: Binder, name: str, operator: int) -> Stored:
    """How the parameter behind an operator is kept and read."""
    extents = Extents(binder.grid, binder.coordinates, StepSizes({}, {}, {(): 0}))
    key = (operator, 0)
    whole: Layout = ("R",) * len(decisions.mesh)
    stored, read = decisions.stored[name], decisions.read[name]

    def between(source: Layout, target: Layout) -> tuple[Move, ...]:
        return tuple(binder.move(binding, extents) for _, binding in moves(program, key, source, target))

    shape = tuple(extents.dim_size(dim) for dim in terms_of(program, key, whole))
    return Stored(name, shape, between(whole, stored), between(stored, read))


def reduce_gradients(
    stored: Sequence[Stored], leaves: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter]
) -> None:
    """Reduce this step's gradients over their levels, in planned order, and add them to `.grad`."""
    buckets: dict[tuple[object, ...], list[Stored]] = {}
    for entry in stored:
        gradient = leaves[entry.name].grad if entry.name in leaves else None
        if gradient is None:
            continue
        groups = entry.summed_over
        if groups is None:
            _add(parameters[entry.name], entry.reduced(_taken(leaves[entry.name])))
            continue
        buckets.setdefault((*map(id, groups), gradient.dtype), []).append(entry)
    for members in buckets.values():
        for bucket in _bucketed(members, leaves):
            _reduce_bucket(bucket, leaves, parameters)


def _bucketed(members: Iterable[Stored], leaves: Mapping[str, torch.Tensor]) -> Iterable[list[Stored]]:
    bucket: list[Stored] = []
    size = 0
    for entry in members:
        gradient = leaves[entry.name].grad
        assert gradient is not None
        if bucket and size + gradient.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(entry)
        size += gradient.nbytes
    if bucket:
        yield bucket


def _reduce_bucket(
    bucket: Sequence[Stored], leaves: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter]
) -> None:
    own = [(parameters[entry.name], _taken(leaves[entry.name])) for entry in bucket]
    groups = [g for g in bucket[0].summed_over or () if g.size > 1]
    if not groups:
        for parameter, gradient in own:
            _add(parameter, gradient)
        return
    flat = torch.cat([gradient.reshape(-1) for _, gradient in own])
    shapes = [(parameter, gradient.shape) for parameter, gradient in own]
    own.clear()  # else what one rank has computed and what all have would lie side by side
    for group in groups:
        flat = convert(flat, "P", "R", group)
    for (parameter, shape), part in zip(shapes, flat.split([shape.numel() for _, shape in shapes]), strict=True):
        _add(parameter, part.view(shape))


def _taken(leaf: torch.Tensor) -> torch.Tensor:
    """The gradient of a leaf, which lets go of it."""
    gradient, leaf.grad = leaf.grad, None
    assert gradient is not None
    return gradient


def _add(parameter: nn.Parameter, gradient: torch.Tensor) -> None:
    gradient = gradient.detach().to(parameter.dtype)
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient


def broadcast(host: Group, value: torch.Tensor) -> torch.Tensor:
    """Rank 0's tensor on every rank, moved over the default group."""
    if host.size > 1:
        value = value.detach().clone().contiguous()
        dist.broadcast(value, src=0)
    return value


def reduce_over(
    group: Group, gradients: Sequence[torch.Tensor | None], parameters: Sequence[nn.Parameter]
) -> list[torch.Tensor | None]:
    """Sums over one level of gradients that some ranks may lack, dense; None where no rank has one. Collective."""
    if not parameters:
        return []
    present = torch.tensor([g is not None for g in gradients], dtype=torch.int64, device=parameters[0].device)
    anywhere = convert(present, "P", "R", group).tolist() if group.size > 1 else present.tolist()
    return [
        convert(torch.zeros_like(p) if g is None else g.to_dense(), "P", "R", group) if here else None
        for g, p, here in zip(gradients, parameters, anywhere, strict=True)
    ]
