"""One step on one rank: plays the actions of a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import sympy
import torch
from torch import Tensor, nn

from whalepy.planner.schedule.actions import Action
from whalepy.rewrite.deferring import Queue, deferring
from whalepy.runtime.boundary import Boundary, Receiving, Sending, Traffic
from whalepy.runtime.bridge import Started
from whalepy.runtime.extents import StepSizes
from whalepy.runtime.groups import Pending
from whalepy.runtime.reach import Reach, noting
from whalepy.runtime.reduction import Reduction
from whalepy.runtime.rows import rows_at
from whalepy.runtime.steps import rows_in

if TYPE_CHECKING:
    from whalepy.runtime.captured import CapturedModel, Runnable, StageRun

_KEPT_SIZES = 4096
"""Sizes of microbatches that are kept: lengths repeat from step to step."""

Message = tuple[str, int, int, int | None]
"""(kind, giving stage, reading stage, microbatch)."""


@dataclass
class _Live:
    """What a stage keeps of a microbatch from its forward to its backward."""

    outputs: tuple[Any, ...]
    received: dict[tuple[int, int], dict[int, Tensor]]
    """Per boundary, the values taken from it, as leaves."""
    end: Tensor | None
    """The first output that learns, from which the backward pass reaches what it reaches on any rank."""


class StepRun:
    """Plays one step. `loss` is that of the last stage, None elsewhere; `results` are there if nothing is trained."""

    def __init__(
        self,
        model: CapturedModel,
        runnable: Runnable,
        leaves: Sequence[Any],
        bindings: Mapping[sympy.Symbol, int],
        step: int,
        *,
        training: bool,
    ) -> None:
        self.model = model
        self.runnable = runnable
        self.leaves = leaves
        self.bindings = bindings
        self.step = step
        self.training = training
        self.total = rows_in(runnable.captured, bindings)
        self.at = tuple(bindings.values())
        """The sizes of the step: what was computed for the same ones before is taken again."""
        self.parameters = model._own_parameters()
        self.borrowed: dict[int, dict[str, nn.Parameter]] = {k: {} for k in runnable.stages}
        self.tensors: dict[int, dict[str, Tensor]] = {}
        self.read: dict[int, dict[str, Tensor]] = {}
        self.pieces: dict[int, list[int]] = {}
        """Rows of this rank in each microbatch, by stage."""
        self.learning = {k: self._learning(k) for k in runnable.stages}
        self.reductions: dict[int, Reduction] = {}
        self.live: dict[tuple[int, int], _Live] = {}
        self.defers = any(action.op == "W" for action in runnable.actions)
        self.queues: dict[tuple[int, int], Queue] = {}
        """Weight gradients that wait, by stage and microbatch."""
        self.given_back: dict[Message, list[Tensor | None]] = {}
        self.sending: dict[Message, Sending] = {}
        self.own: dict[Message, Tensor] = {}
        self.receiving: dict[Message, Receiving] = {}
        self.losses: list[Pending] = []
        self.results: tuple[Any, ...] = ()
        self.written: dict[int, list[tuple[Any, ...]]] = {k: [] for k in runnable.stages}

    def loss(self) -> Tensor | None:
        """The loss of all microbatches on ranks of the last stage. Once."""
        if not self.losses:
            return None
        losses = [pending.done() for pending in self.losses]
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def play(self, settle: Callable[[], None] = lambda: None) -> None:
        """Run every action in order, then write buffers and wait for what is still being sent.

        `settle` is called before anything changes that outlives the step.
        """
        borrowers = {borrower for _, borrower in self.runnable.parameters}
        for k in self.runnable.stages.keys() - borrowers:
            self._stage(k)
        for action in self.runnable.actions:
            with self.model._playing(action):
                self._PLAYS[action.op](self, action)
            settle()
        settle()
        if self.training:
            for k, stage in self.runnable.stages.items():
                self.model._write_buffers(stage, self.written[k])
        for sending in self.sending.values():
            sending.done()

    # -- compute

    def _stage(self, k: int) -> StageRun:
        """A stage whose tensors are there; what it must know of the whole batch is computed once."""
        stage = self.runnable.stages[k]
        if k not in self.tensors:
            parameters = {**self.parameters, **self.borrowed[k]}
            self.tensors[k], self.read[k] = self.model._tensors(stage, parameters, grad=self.training)
            if stage.prologue is not None:
                sizes = self._sizes(k, None)
                with torch.no_grad():
                    values = stage.prologue.run(self.tensors[k], self.leaves, sizes, self.step)
                self.tensors[k].update(zip(stage.ahead, values, strict=True))
        return stage

    def _sizes(self, k: int, microbatch: int | None) -> StepSizes:
        kept, key = self.runnable.sizes, (self.at, k, microbatch)
        if key not in kept:
            if len(kept) >= _KEPT_SIZES:
                kept.clear()
            kept[key] = self.model._step_sizes(self.runnable, k, self.bindings, microbatch)
        return kept[key]

    def _forward(self, action: Action) -> None:
        k, m = action.stage, _number(action)
        stage, sizes = self._stage(k), self._sizes(k, m)
        received = {
            pair: self._taken(boundary, ("F", *pair, m), backward=False)
            for pair, boundary in self.runnable.values.items()
            if pair[1] == k
        }
        tensors = dict(self.tensors[k])
        for place in stage.captured.placeholders:
            if place.rows is not None:  # computed ahead, row by row
                tensors[place.name] = rows_at(tensors[place.name], place.rows, [self._piece(k, m)])
        for pair, values in received.items():
            for number, value in values.items():
                crossed = self.runnable.values[pair].crossed[number]
                tensors[crossed.name] = values[number] = value.requires_grad_(self.training and crossed.learns)
        reach = Reach() if self.training and stage.program.leaves_empty(sizes) else None
        queue = Queue(uses_waits=not self.defers) if self.training else None
        with noting(reach), deferring(queue):
            outputs = stage.program.run(tensors, self._rows(k, m), sizes, self.step, m)
        count = stage.captured.results
        if count:
            if not self.training:
                self.results = outputs[:count]
            loss, end = _begun(outputs[0])
            outputs = (end, *outputs[1:])
            self.losses.append(loss)
        first = count + len(stage.captured.mutations)
        self.written[k].append(tuple(value.detach() for value in outputs[count:first]))
        end = self._tied(k, stage, outputs, received, reach) if reach is not None else None
        self.live[k, m] = _Live(outputs, received, end)
        if queue is not None:
            self.queues[k, m] = queue

    def _rows(self, k: int, m: int) -> Sequence[Any]:
        """The leaves of this rank, those with rows cut to the microbatch."""
        if self.runnable.microbatches == 1:
            return self.leaves
        piece = [self._piece(k, m)]
        return [
            rows_at(leaf, dim, piece) if dim is not None and leaf is not None else leaf
            for leaf, dim in zip(self.leaves, self.runnable.captured.batch_inputs, strict=True)
        ]

    def _piece(self, k: int, m: int) -> tuple[int, int]:
        """The rows of a microbatch among those of this rank: first, and how many."""
        if k not in self.pieces:
            grid, place = self.model._grids[k], self.model._places[k]
            self.pieces[k] = [length for _, length in grid.row_pieces(self.total, place.coordinates)]
        lengths = self.pieces[k]
        return sum(lengths[:m]), lengths[m]

    def _learning(self, k: int) -> dict[int, list[tuple[tuple[int, int], int]]]:
        """The outputs of a stage that gradients come back to: (boundary, number of the value) of every reader."""
        found: dict[int, list[tuple[tuple[int, int], int]]] = {}
        for pair, boundary in self.runnable.values.items():
            if pair[0] == k:
                for number in boundary.learning:
                    found.setdefault(boundary.crossed[number].output, []).append((pair, number))
        return found

    def _tied(
        self,
        k: int,
        stage: StageRun,
        outputs: Sequence[Tensor],
        received: Mapping[tuple[int, int], Mapping[int, Tensor]],
        reach: Reach,
    ) -> Tensor | None:
        ends = [*range(min(stage.captured.results, 1)), *self.learning[k]]
        if not ends:
            return None
        leaves = [v for values in received.values() for v in values.values()]
        return reach.tie([outputs[i] for i in ends], [*self.read[k].values(), *leaves], self.model._places[k].host)

    def _backward(self, action: Action) -> None:
        k, m = action.stage, _number(action)
        live = self.live.pop((k, m))
        gradients: dict[tuple[int, int], dict[int, Tensor]] = {
            pair: self._taken(boundary, ("B", *pair, m), backward=True)
            for pair, boundary in self.runnable.values.items()
            if pair[0] == k and boundary.learning
        }
        ends: list[Tensor] = []
        starts: list[Tensor | None] = []
        if self.runnable.stages[k].captured.results:
            ends.append(live.outputs[0])
            starts.append(None)
        for output, readers in self.learning[k].items():
            first, *others = (gradients[pair][number] for pair, number in readers)
            ends.append(live.outputs[output])
            starts.append(sum(others, first))
        if live.end is not None and ends:
            ends[0] = live.end
        pairs = [(end, start) for end, start in zip(ends, starts, strict=True) if end.requires_grad]
        if action in self.runnable.last_backwards:
            self._reduction(k).watch()
        if pairs:
            torch.autograd.backward([end for end, _ in pairs], [start for _, start in pairs])
        if not self.defers:
            self._weights(action)
        for pair, values in live.received.items():
            boundary = self.runnable.values[pair]
            self.given_back["B", *pair, m] = [
                _gradient(values[number]) if crossed.learns else None for number, crossed in enumerate(boundary.crossed)
            ]

    def _weights(self, action: Action) -> None:
        self.queues.pop((action.stage, _number(action))).run()

    def _reduce(self, action: Action) -> None:
        self._reduction(action.stage).finish()

    def _reduction(self, k: int) -> Reduction:
        if k not in self.reductions:
            stage, parameters = self._stage(k), {**self.parameters, **self.borrowed[k]}
            self.reductions[k] = self.model._reduction(stage, self.read[k], parameters, self.runnable.busy)
        return self.reductions[k]

    # -- crossing

    def _traffic(self, boundary: Boundary, pair: tuple[int, int], m: int | None) -> tuple[Traffic, Traffic]:
        """What this rank moves when values of a microbatch cross, forward and backward."""
        if boundary.crossed[0].output < 0:
            nothing = StepSizes({}, {}, {(): 0})
            return boundary.traffic(None, lambda: (nothing, nothing), 0)
        here, there = self._sizes(pair[0], m), self._sizes(pair[1], m)
        total = sum(here.rows.values())
        key = (*here.micro.values(), *here.rows.values(), *there.rows.values(), here.microbatch is None)
        return boundary.traffic(key, lambda: (here, there), total)

    def _send_values(self, action: Action) -> None:
        pair, m = (action.stage, _peer(action)), _number(action)
        boundary = self.runnable.values[pair]
        outputs = self.live[action.stage, m].outputs
        values = [outputs[crossed.output].detach() for crossed in boundary.crossed]
        self._send(boundary, ("F", *pair, m), self._traffic(boundary, pair, m)[0], values, backward=False)

    def _send_gradients(self, action: Action) -> None:
        pair, m = (_peer(action), action.stage), _number(action)
        boundary = self.runnable.values[pair]
        values = self.given_back.pop(("B", *pair, m))
        self._send(boundary, ("B", *pair, m), self._traffic(boundary, pair, m)[1], values, backward=True)

    def _send(
        self, boundary: Boundary, message: Message, traffic: Traffic, values: Sequence[Any], *, backward: bool
    ) -> None:
        sending = boundary.send(traffic, values, backward=backward)
        if sending.own is not None:
            self.own[message], sending.own = sending.own, None
        self.sending[message] = sending

    def _sent(self, action: Action) -> None:
        """What was sent is through: its memory goes."""
        pair = (action.stage, _peer(action)) if action.op == "SENT_F" else (_peer(action), action.stage)
        self.sending.pop((action.op[-1], *pair, _number(action))).done()

    def _receive_values(self, action: Action) -> None:
        self._post("F", (_peer(action), action.stage), _number(action), backward=False)

    def _receive_gradients(self, action: Action) -> None:
        self._post("B", (action.stage, _peer(action)), _number(action), backward=True)

    def _post(self, kind: str, pair: tuple[int, int], m: int | None, *, backward: bool) -> None:
        boundary = (self.runnable.values if kind in "FB" else self.runnable.parameters)[pair]
        traffic = self._traffic(boundary, pair, m)[backward]
        self.receiving[kind, *pair, m] = boundary.receive(traffic, backward=backward)

    def _taken(self, boundary: Boundary, message: Message, *, backward: bool) -> dict[int, Tensor]:
        """The values of a message, once it is there."""
        _, source, target, m = message
        traffic = self._traffic(boundary, (source, target), m)[backward]
        receiving = self.receiving.pop(message, None) or Receiving([], {})
        return boundary.unpacked(traffic, receiving, self.own.pop(message, None), backward=backward)

    # -- borrowed parameters

    def _lend(self, action: Action) -> None:
        pair = (action.stage, _peer(action))
        boundary = self.runnable.parameters[pair]
        stage = self.runnable.stages[action.stage]
        values = [self.model._box(stage, each.name, self.parameters[each.name].detach()) for each in boundary.crossed]
        self._send(boundary, ("P", *pair, None), self._traffic(boundary, pair, None)[0], values, backward=False)

    def _borrow(self, action: Action) -> None:
        pair = (_peer(action), action.stage)
        self._post("P", pair, None, backward=False)
        boundary = self.runnable.parameters[pair]
        values = self._taken(boundary, ("P", *pair, None), backward=False)
        for number, crossed in enumerate(boundary.crossed):
            self.borrowed[pair[1]][crossed.name] = nn.Parameter(values[number], crossed.learns)

    def _give_gradient(self, action: Action) -> None:
        pair = (_peer(action), action.stage)
        boundary = self.runnable.parameters[pair]
        borrowed = self.borrowed[action.stage]
        values = [_gradient(borrowed[crossed.name]) for crossed in boundary.crossed]
        self._send(boundary, ("G", *pair, None), self._traffic(boundary, pair, None)[1], values, backward=True)

    def _take_gradient(self, action: Action) -> None:
        pair = (action.stage, _peer(action))
        self._post("G", pair, None, backward=True)
        boundary = self.runnable.parameters[pair]
        for number, gradient in self._taken(boundary, ("G", *pair, None), backward=True).items():
            parameter = self.parameters[boundary.crossed[number].name]
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    _PLAYS: ClassVar[Mapping[str, Callable[[Any, Action], None]]] = {
        "F": _forward,
        "B": _backward,
        "I": _backward,
        "W": _weights,
        "REDUCE": _reduce,
        "SEND_F": _send_values,
        "RECV_F": _receive_values,
        "SENT_F": _sent,
        "SENT_B": _sent,
        "SEND_B": _send_gradients,
        "RECV_B": _receive_gradients,
        "SEND_P": _lend,
        "RECV_P": _borrow,
        "SEND_G": _give_gradient,
        "RECV_G": _take_gradient,
    }


def _number(action: Action) -> int:
    assert action.microbatch is not None
    return action.microbatch


def _peer(action: Action) -> int:
    assert action.peer is not None
    return action.peer


def _begun(result: Tensor | Started) -> tuple[Pending, Tensor]:
    """A loss, which may be on its way, and what its backward pass begins at."""
    if isinstance(result, Started):
        return result.left()
    value = result.detach()  # the graph behind it goes with its backward pass
    return Pending(None, lambda: value), result


def _gradient(leaf: Tensor) -> Tensor:
    """The gradient of a leaf; zeros where none came."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
