"""The compiled model of one rank on the meta device: its groups and boundaries send nothing and are counted."""

from __future__ import annotations

from collections import Counter as Counted
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from whalepy.dryrun.blocks import Blocks
from whalepy.dryrun.counting import Counter
from whalepy.dryrun.silent import SilentBoundary, SilentGroup
from whalepy.planner.plan import Plan
from whalepy.planner.schedule.actions import Action, Op
from whalepy.planner.work import Phase
from whalepy.runtime.agreement import Told, agree
from whalepy.runtime.arguments import Arguments, Shape, leaf_names
from whalepy.runtime.boundary import Boundary
from whalepy.runtime.build import Recipe
from whalepy.runtime.captured import CapturedModel, Runnable, StageRun
from whalepy.runtime.extents import grid_of
from whalepy.runtime.groups import Group
from whalepy.runtime.norms import Placement
from whalepy.runtime.pipeline import Crossed, Pipeline

META = torch.device("meta")


@dataclass(frozen=True)
class Mark:
    """Where an action of a step begins and ends among the events, and the bytes that are held then."""

    action: Action
    start: int
    stop: int
    before: int
    after: int


class RehearsedModel(CapturedModel):
    """The compiled model of one rank without the other ranks."""

    def __init__(
        self,
        recipe: Recipe,
        main: Pipeline,
        plan: Plan,
        rank: int,
        counter: Counter,
        blocks: Blocks,
        *,
        master: bool,
    ) -> None:
        host = SilentGroup(-1, plan.devices, rank, None)
        # Reductions after the backward pass, where their events are told apart; they are played during it.
        super().__init__(recipe, META, host, lambda _: (plan, main), off=("early-reduction",))
        self._counter = counter
        self._blocks = blocks
        self._master = master
        self._dtypes: dict[str, torch.dtype] = {}
        self.only: Collection[int] | None = None
        """The microbatches that are run; None: all."""
        self.marks: list[Mark] = []
        self.reads: dict[int, int] = {}
        """By stage, where the events end that make the tensors that it reads."""
        self.copies: dict[str, int] = {}
        """Bytes of what the program reads of a parameter."""

    def _take_place(self, plan: Plan) -> None:
        self._plan = plan
        rank = self._host.position
        self._grids = [grid_of(plan, stage) for stage in plan.stages]
        for k in plan.stages_of(rank):
            stage = plan.stages[k]
            coordinates = stage.coordinates_of(rank)
            groups = tuple(
                SilentGroup(level, size, at, self._counter)
                for level, (size, at) in enumerate(zip(stage.mesh, coordinates, strict=True))
            )
            host = SilentGroup(-1, len(stage.rank_of), stage.rank_of.index(rank), None)
            self._places[k] = Placement(META, host, groups, coordinates)

    def _boundaries(self, crossed: Mapping[tuple[int, int], tuple[Crossed, ...]]) -> dict[tuple[int, int], Boundary]:
        return {pair: SilentBoundary.of(boundary) for pair, boundary in super()._boundaries(crossed).items()}

    def _overlapping(self, main: Pipeline, *, training: bool) -> Pipeline:
        """As it is: bridges are said to be waited for."""
        return main

    def _runnable(self, main: Pipeline, *, training: bool) -> Runnable:
        """Of the actions those of the microbatches that are run."""
        made = super()._runnable(main, training=training)
        run = self.only
        if run is None:
            return made
        kept = (action for action in made.actions if action.microbatch is None or action.microbatch in run)
        return replace(made, actions=tuple(kept))

    def _store_parameters(self) -> None:
        model = self._recipe.model
        for name, value in chain(model.named_parameters(), model.named_buffers()):
            self._dtypes[name] = value.dtype
            is_parameter = isinstance(value, nn.Parameter)
            if is_parameter and not self._keeps(name):
                continue
            entry = self._stored.get(name)
            whole = torch.empty_like(value, device=META)
            box = whole if entry is None else entry.box(whole)
            kept = torch.float32 if self._master and is_parameter and box.is_floating_point() else box.dtype
            box = torch.empty(box.shape, dtype=kept, device=META)
            self._attach(name, nn.Parameter(box, value.requires_grad) if is_parameter else box)
        if not any(True for _ in self.parameters()):  # optimizers refuse an empty list
            name, value = next(iter(model.named_parameters()))
            self._attach(name, nn.Parameter(value.new_empty((0,) * value.ndim, device=META), value.requires_grad))

    @property
    def rank(self) -> int:
        """The rank that it is rehearsed for."""
        return self._host.position

    def stage_of(self, name: str) -> int:
        """The stage of this rank that keeps a parameter; its first one for what it keeps for want of any."""
        own = self.plan.stages_of(self.rank)
        return self._owners[name] if self._owners[name] in own else own[0]

    def in_parts(self, name: str) -> bool:
        """Whether every replica keeps a part of a parameter of its own, and reads just that: nothing reduces it."""
        entry = self._stored.get(name)
        if entry is None or self._plan is None:
            return False
        row_cuts = self._plan.stages[self.stage_of(name)].row_cuts
        groups = [move.group for move in entry.reading]
        return not any(isinstance(group, SilentGroup) and row_cuts[group.level] is not None for group in groups)

    def _tensors(
        self, stage: StageRun, parameters: Mapping[str, nn.Parameter], *, grad: bool
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        found = super()._tensors(stage, parameters, grad=grad)
        self._counter.block = -1
        self.reads[stage.index] = len(self._counter.events)
        return found

    def _read(self, stage: StageRun, name: str, box: torch.Tensor) -> torch.Tensor:
        """What the program reads, in the type it computes with."""
        self._counter.block = self._blocks.of(name)
        value = super()._read(stage, name, box).to(self._dtypes[name])
        self.copies[name] = 0 if value.dtype == box.dtype else value.nbytes
        return value

    def _agree(
        self, example: Arguments, key: tuple[Any, ...], agree: Callable[[Group, Told], list[Told]] = agree
    ) -> tuple[list[Any], tuple[int | None, ...], list[Shape]]:
        """The shapes of the whole step are the example's."""
        leaves = pytree.tree_leaves(example)
        dims = tuple(self._row_dim(name, leaf) for name, leaf in zip(leaf_names(example), leaves, strict=True))
        return leaves, dims, self.whole_shapes

    @contextmanager
    def _playing(self, action: Action) -> Generator[None]:
        counter = self._counter
        if self.only is not None:  # actions are put in another order: what was held before one is not its peak
            counter.settle()
            counter.leave_blocks()
        start, before = len(counter.events), counter.memory
        with counter.during(_PHASES.get(action.op, "forward")):
            yield
        self.marks.append(Mark(action, start, len(counter.events), before, counter.memory))

    def _told_to_all(self, runnable: Runnable, loss: torch.Tensor | None) -> torch.Tensor:
        return torch.zeros((), device=META) if loss is None else loss

    whole_shapes: list[Shape]

    @property
    def borrowed_bytes(self) -> dict[int, int]:
        """By stage, bytes of gradients that it reduces for the stages that keep their parameters."""
        found: Counted[int] = Counted()
        trained = {name: p for name, p in self._recipe.model.named_parameters() if p.requires_grad}
        for runnable in self._runnables.values():
            for k, stage in runnable.stages.items():
                for name in stage.stored.keys() & trained.keys() - set(stage.owned):
                    whole = torch.empty_like(trained[name], device=META)
                    found[k] += stage.stored[name].box(whole).nbytes
        return dict(found)

    @property
    def sent_bytes(self) -> dict[tuple[int, int], int]:
        """Bytes sent to other ranks, forward and backward, by the stages that they cross between."""
        found: Counted[tuple[int, int]] = Counted()
        for runnable in self._runnables.values():
            for pair, boundary in (*runnable.values.items(), *runnable.parameters.items()):
                found[pair] += boundary.sent_bytes
        return dict(found)


_PHASES: Mapping[Op, Phase] = {"REDUCE": "gradient", "B": "backward", "I": "backward", "W": "backward"}
