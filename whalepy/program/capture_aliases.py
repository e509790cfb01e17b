"""Tensors that share memory in the captured program, and the node which holds the value of each at this point."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from whalepy.program.capture_scatter import Emit, Step, carried, scatter


@dataclass(eq=False)
class Storage:
    """One piece of memory: the tensors seen in it, and how many writes it has had."""

    version: int = 0
    tensors: list[Alias] = field(default_factory=list["Alias"])


@dataclass(eq=False)
class Alias:
    """One tensor of the captured program: a view of another tensor of its storage, or (no parent) the whole."""

    fake: torch.Tensor  # the tensor of the replay: same memory, same fake storage
    storage: Storage
    node: fx.Node | None = None  # holds its value at `version`
    version: int = 0
    parent: Alias | None = None
    step: Step | None = None

    def current(self, emit: Emit) -> fx.Node:
        """The node of its value now: views of memory that was written to since are taken again."""
        stale: list[Alias] = []
        alias = self
        while alias.node is None or alias.version != alias.storage.version:
            stale.append(alias)
            assert alias.parent is not None, "the whole of a storage is always up to date"
            alias = alias.parent
        for alias in reversed(stale):
            assert alias.parent is not None and alias.parent.node is not None and alias.step is not None
            again, old = alias.step.apply(emit, alias.parent.node), alias.node
            # What is detached keeps a gradient of its own, which writes that it does not see leave alone.
            alias.node = carried(emit, old, again) if alias.step.detaches and old is not None else again
            alias.version = alias.storage.version
        assert self.node is not None
        return self.node

    def write(self, emit: Emit, value: fx.Node) -> None:
        """Makes `value` its value, and that of every tensor in the storage what it then reads."""
        chain: list[tuple[Alias, fx.Node]] = []
        alias: Alias | None = self
        while alias is not None:
            chain.append((alias, alias.current(emit)))
            alias = alias.parent
        self.storage.version += 1
        for (alias, _), (_, before) in zip(chain, [*chain[1:], chain[-1]], strict=True):
            alias.node, alias.version = value, alias.storage.version
            if alias.step is not None:
                value = scatter(emit, alias.step, before, value)

    def become(self, step: Step) -> None:
        """Turns this tensor into a view of what it was (`transpose_`, `detach_`): the others keep seeing the old."""
        old = Alias(self.fake.detach(), self.storage, self.node, self.version, self.parent, self.step)
        for other in self.storage.tensors:
            if other.parent is self:
                other.parent = old
        self.storage.tensors.append(old)
        self.parent, self.step, self.node = old, step, None


def fresh(fake: torch.Tensor, node: fx.Node) -> Alias:
    """A tensor in memory of its own."""
    return _joined(Alias(fake, Storage(), node))


def view(fake: torch.Tensor, node: fx.Node | None, parent: Alias, step: Step) -> Alias:
    """A tensor in the memory of `parent`; `node` is None until somebody reads it."""
    return _joined(Alias(fake, parent.storage, node, parent.storage.version, parent, step))


def _joined(alias: Alias) -> Alias:
    alias.storage.tensors.append(alias)
    return alias


def share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two fake tensors lie in the same memory."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata
