"""One rank's training step from a description of layers: the record that a rehearsal of a captured model gives too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from math import ceil

import torch
from torch import nn

from whalepy.dryrun.blocks import LEAST_REPEATS
from whalepy.dryrun.counting import Counter
from whalepy.dryrun.rehearse import META, OPTIMIZERS
from whalepy.errors import AnnotationError, PlanError
from whalepy.hardware.devices import DeviceProfile
from whalepy.hardware.layer_profile import LayerEntry, LayerFile
from whalepy.planner.balance import Curve
from whalepy.planner.work import KEPT, Event, Fold, Holdings, Phase, Recorded

BACKWARD = 2
"""Products, and bytes, of a backward pass over those of its forward pass: a gradient of each of two operands."""
_ITEM = {"float16": 2, "bfloat16": 2, "float8": 1, "float64": 8}


def _sent(kind: str, size: float, degree: int) -> int:
    """Bytes that one device sends in a collective over a value of so many: of its part, to each of the others."""
    others = size * (degree - 1) / degree
    return round({"all-reduce": 2 * others, "all-to-all": others / degree}.get(kind, others))


@dataclass(frozen=True)
class Place:
    """Where a rank works: on what, and as one of how many."""

    device: DeviceProfile
    split: int = 1
    split_level: int = -1
    replicas: int = 1
    replica_level: int = -1


@dataclass(frozen=True)
class Kept:
    """How a model is trained: what the optimizer and the backward pass keep."""

    optimizer: str = "adamw"
    foreach: bool = True
    """Whether the optimizer updates all parameters at once."""
    recompute: bool = False
    """Whether each layer keeps its input alone, and runs again in the backward pass."""


@dataclass(frozen=True)
class Described:
    """The layers of a file as blocks: those that repeat often are there three times."""

    file: LayerFile

    @cached_property
    def blocks(self) -> tuple[LayerEntry, ...]:
        """In order; the place of each is its number."""
        return tuple(layer for layer in self.file.layers for _ in range(_run(layer)))

    @cached_property
    def folds(self) -> tuple[Fold, ...]:
        """Which blocks stand for how many."""
        layers = self.file.layers
        starts = [0, *accumulate(_run(layer) for layer in layers)]
        pairs = zip(starts, layers, strict=False)
        return tuple(Fold(first, 1, layer.repeat) for first, layer in pairs if _run(layer) < layer.repeat)


def _run(layer: LayerEntry) -> int:
    return KEPT if layer.repeat >= LEAST_REPEATS else layer.repeat


_FIGURES = ("parameters", "saved_bytes", "output_bytes", "working_bytes", "flops", "bytes", "backward_flops",
            "backward_bytes")  # fmt: skip


def check(file: LayerFile, place: Place) -> None:
    """PlanError for a device that no layer's costs are known on, AnnotationError for a split degree that is not."""
    for layer in file.layers:
        type_, degrees = place.device.name, layer.seconds.get(place.device.name) or layer.seconds.get(place.device.base)
        measured = layer.seconds_on(place.device, place.split)
        if degrees is None and not layer.has_operators:
            fix = f"it has those of {', '.join(layer.seconds)}; add this type, or `flops:` and `bytes:`"
            raise PlanError(f"layer {layer.name!r} has no seconds on {type_}", fix=fix)
        if measured is None and not layer.has_operators:
            known = ", ".join(map(str, sorted(degrees or ())))
            cut = layer.split == "parts"
            raise AnnotationError(
                f"layer {layer.name!r} has no seconds on {type_} at split degree {layer.parts(place.split)}"
                + ("" if cut else ", which a split leaves it at"),
                fix=f"it has those at {known}: {'choose one with --split, or ' if cut else ''}add this degree",
            )
        for name in _FIGURES:
            if layer.on(getattr(layer, name), place.split) is None:
                raise AnnotationError(
                    f"layer {layer.name!r} has no {name} at split degree {place.split}",
                    fix="write the figure of the whole layer, or one for this degree",
                )


def record(described: Described, place: Place, kept: Kept, rows: Sequence[int]) -> Recorded:
    """What a rank does in its second step, in microbatches of so many rows, with the blocks of `described`."""
    walk = _Walk(described, place, kept)
    microbatches = tuple(tuple(walk.microbatch(n, first=k == 0)) for k, n in enumerate(rows))
    gradient = tuple(walk.reductions())
    return Recorded((), microbatches, gradient, tuple(walk.updates()), walk.holdings, 0, 0, kept.foreach)


@dataclass
class _Walk:
    """One rank as it goes through a step; `held` is what lies in memory."""

    described: Described
    place: Place
    kept: Kept
    held: int = field(init=False)

    def __post_init__(self) -> None:
        self.held = sum(own.parameters + own.optimizer + own.copies for own in self.holdings.values())

    @cached_property
    def holdings(self) -> dict[int, Holdings]:
        """By block."""
        file, state = self.described.file, state_bytes(self.kept.optimizer)
        item = _ITEM.get(file.dtype, 4)
        master = file.master and item < 4
        found: dict[int, Holdings] = {}
        for block, layer in enumerate(self.described.blocks):
            n = round(layer.on(layer.parameters, self.place.split) or 0)
            own, copies = (4 * n, item * n) if master else (item * n, 0)
            found[block] = Holdings(own, copies, item * n, own, round(state * own))
        return found

    def microbatch(self, rows: int, *, first: bool) -> Iterator[Event]:
        """Forward and backward; `first`: gradients are not there yet."""
        blocks = list(enumerate(self.described.blocks))
        for block, layer in blocks:
            whole = self._bytes(layer, "saved_bytes", rows)
            keeps = self._input(block, rows) if self.kept.recompute else whole
            yield from self._pass("forward", block, layer, rows, most=whole, gains=keeps)
        for block, layer in reversed(blocks):
            whole = self._bytes(layer, "saved_bytes", rows)
            if self.kept.recompute:
                again = whole - self._input(block, rows)
                yield from self._pass("backward", block, layer, rows, most=again, gains=again, forward=True)
            gradients = self.holdings[block].first_gradients
            working = whole if layer.working_bytes is None else self._bytes(layer, "working_bytes", rows)
            gains = (gradients if first else 0) - whole
            yield from self._pass("backward", block, layer, rows, most=working + gradients, gains=gains)

    def _pass(
        self, phase: Phase, block: int, layer: LayerEntry, rows: int, *, most: int, gains: int, forward: bool = False
    ) -> Iterator[Event]:
        """The operators of a layer one way, then its exchanges; `most` bytes are added while they run."""
        forward = forward or phase == "forward"
        events = self._costs(phase, block, layer, rows, forward=forward)
        peak = self.held + most
        for event in events[:-1]:
            yield replace(event, memory=self.held, peak=peak)
        self.held += gains
        yield replace(events[-1], memory=self.held, peak=max(peak, self.held))

    def _costs(self, phase: Phase, block: int, layer: LayerEntry, rows: int, *, forward: bool) -> list[Event]:
        measured = layer.seconds_on(self.place.device, self.place.split)
        flops = self._of_operators(layer, "flops", rows, forward=forward)
        plain = Event(phase, layer.name, 0, 0, self.described.file.dtype, 0, 0, block=block)
        if measured is not None:
            curve = seconds_of(measured.rows, measured.forward_s if forward else measured.backward_s)
            return [replace(plain, flops=flops, seconds=curve(ceil(self._share(layer, rows))))]
        products = layer.products * (1 if forward else BACKWARD)
        others = layer.operators * (1 if forward else BACKWARD)
        traffic = self._of_operators(layer, "bytes", rows, forward=forward)
        events = [replace(plain, flops=round(flops / products))] * products if flops else []
        events += [replace(plain, bytes=round(traffic / others))] * others if traffic or not flops else []
        return [*events, *self._exchanges(plain, layer, rows)]

    def _exchanges(self, plain: Event, layer: LayerEntry, rows: int) -> Iterator[Event]:
        split = self.place.split
        for one in layer.exchanges if split > 1 else ():
            sent = _sent(one.kind, one.bytes * rows, split)
            yield replace(plain, name=one.kind, bytes=sent, collective=one.kind, level=self.place.split_level)

    def _of_operators(self, layer: LayerEntry, name: str, rows: int, *, forward: bool) -> int:
        """FLOPs or bytes of a pass over so many rows."""
        own = None if forward else getattr(layer, f"backward_{name}")
        if own is not None:
            return round((layer.on(own, self.place.split) or 0.0) * self._share(layer, rows))
        return self._bytes(layer, name, rows) * (1 if forward else BACKWARD)

    def _bytes(self, layer: LayerEntry, name: str, rows: int) -> int:
        """Of the rows that this device works on; also FLOPs."""
        return round((layer.on(getattr(layer, name), self.place.split) or 0.0) * self._share(layer, rows))

    def _share(self, layer: LayerEntry, rows: int) -> float:
        """Of the rows of a split, those that this device works on."""
        return rows / self.place.split if layer.split == "rows" else rows

    def _input(self, block: int, rows: int) -> int:
        """Bytes that the block before hands over; at most what this one saves."""
        blocks = self.described.blocks
        given = self._bytes(blocks[block - 1], "output_bytes", rows) if block else 0
        return min(given, self._bytes(blocks[block], "saved_bytes", rows))

    def reductions(self) -> Iterator[Event]:
        """Gradients in the type that the optimizer reads, and summed over the replicas."""
        for block, own in self.holdings.items():
            dtype = "float32" if own.copies else self.described.file.dtype
            plain = Event("gradient", "gradients", 0, 0, dtype, self.held, self.held, block=block)
            if own.copies:
                self.held += own.gradients - own.first_gradients
                yield replace(plain, bytes=own.gradients + own.first_gradients, memory=self.held, peak=self.held)
            for degree, level in self._reduced(self.described.blocks[block]) if own.gradients else ():
                sent = _sent("all-reduce", own.gradients, degree)
                yield replace(plain, name="all-reduce", bytes=sent, collective="all-reduce", level=level,
                              memory=self.held, peak=self.held)  # fmt: skip
        self.held -= sum(own.copies for own in self.holdings.values())

    def _reduced(self, layer: LayerEntry) -> Iterator[tuple[int, int]]:
        """Degrees and levels over which gradients of a layer are summed."""
        if layer.split == "rows" and self.place.split > 1:
            yield self.place.split, self.place.split_level
        if self.place.replicas > 1:
            yield self.place.replicas, self.place.replica_level

    def updates(self) -> list[Event]:
        """What the optimizer does, as torch runs it on parameters of so many elements."""
        elements = [own.parameters // _ITEM.get(self.described.file.dtype, 4) for own in self.holdings.values()]
        if any(own.copies for own in self.holdings.values()):
            elements = [own.parameters // 4 for own in self.holdings.values()]
        made = updates_of(self.kept.optimizer, tuple(elements), foreach=self.kept.foreach)
        moved = [replace(e, memory=e.memory + self.held, peak=e.peak + self.held) for e in made]
        seconds = self._update_seconds()
        if seconds is None or not moved:
            return moved
        return [replace(event, seconds=seconds if k == 0 else 0.0) for k, event in enumerate(moved)]

    def _update_seconds(self) -> float | None:
        """Of the blocks that are run, so that those of all blocks come out as they grow with the parameters."""
        each: list[float] = []
        for layer in self.described.file.layers:
            measured = layer.seconds_on(self.place.device, self.place.split)
            if measured is None or measured.update_s is None:
                return None
            each.append(layer.repeat * measured.update_s)
        run = sum(own.parameters for own in self.holdings.values())
        more = sum((f.repeats - KEPT) * self.holdings[f.first].parameters for f in self.described.folds)
        return sum(each) * run / (run + more) if run else sum(each)


def seconds_of(rows: Sequence[int], seconds: Sequence[float]) -> Callable[[int], float]:
    """Seconds by rows, which never fall with more rows: straight lines between those given, and beyond them.

    Small microbatches are often measured slower than larger ones: the host was busy with the measuring. No device takes
    longer for fewer rows, so the least of a number of rows and all larger ones is taken. Below the smallest number they
    fall in proportion at most.
    """
    least = list(accumulate(reversed(seconds), min))[::-1]
    curve = Curve(tuple(rows), tuple(least))
    return lambda n: max(curve(n), least[0] * min(n / rows[0], 1.0)) if n else 0.0


# -- the optimizer


@lru_cache
def state_bytes(optimizer: str) -> float:
    """Bytes of an optimizer's state over those of its parameters."""
    parameter, update = _stepped(optimizer, (_ELEMENTS,), foreach=True)
    state = update.state.get(parameter[0], {}).values()
    return sum(v.numel() for v in state if isinstance(v, torch.Tensor) and v.numel() > 1) / _ELEMENTS


_ELEMENTS = 1024


@lru_cache
def updates_of(optimizer: str, elements: tuple[int, ...], *, foreach: bool) -> tuple[Event, ...]:
    """The operators of one update of parameters of so many elements; memory beside what lies there before."""
    trained = [n for n in elements if n]
    if not trained:
        return ()
    parameters, update = _stepped(optimizer, trained, foreach=foreach)
    counter = Counter()
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    with counter:
        for parameter in parameters:
            for value in (parameter, parameter.grad, *update.state[parameter].values()):
                if isinstance(value, torch.Tensor):
                    counter.hold(value)
        before = counter.memory
        counter.events.clear()
        with counter.during("optimizer"):
            update.step()
    return tuple(replace(e, memory=e.memory - before, peak=e.peak - before) for e in counter.events)


def _stepped(
    optimizer: str, elements: Sequence[int], *, foreach: bool
) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """Parameters and an optimizer that has stepped once."""
    parameters = [nn.Parameter(torch.empty(n, device=META)) for n in elements]
    update = OPTIMIZERS[optimizer](parameters, foreach=foreach)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    update.step()
    update.zero_grad()
    return parameters, update
