"""Parameters as ranks keep them: boxes of the local model's values, what the program reads, and gradients back."""

from __future__ import annotations

from collections.abc import Sequence
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
