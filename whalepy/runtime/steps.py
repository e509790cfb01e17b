"""One rewritten program on one rank: its arguments for a step, and its run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx

from whalepy.program.axes import evaluate
from whalepy.program.capture import Captured
from whalepy.rewrite.bindings import Stream
from whalepy.rewrite.rewrite import Rewritten
from whalepy.runtime.extents import Binder, Coordinates, StepSizes
from whalepy.runtime.pieces import EAGER, in_pieces

_KEPT_SIZES = 64
"""Sizes for which the arguments of a program are kept: lengths repeat from step to step."""


@dataclass
class StepProgram:
    """A rewritten program and the extra arguments it takes at the sizes seen so far."""

    captured: Captured
    rewritten: Rewritten
    binder: Binder
    backend: str = EAGER
    kept: dict[tuple[Any, ...], tuple[list[Any], bool]] = field(default_factory=dict[Any, tuple[list[Any], bool]])

    def arguments(self, sizes: StepSizes, step: int, microbatch: int) -> list[Any]:
        """One value per binding for this microbatch."""
        values, _ = self._bound(sizes)
        return [self.binder.stream(v, step, microbatch) if isinstance(v, Stream) else v for v in values]

    def leaves_empty(self, sizes: StepSizes) -> bool:
        """Whether any rank may hold a part without elements, of anything."""
        return self._bound(sizes)[1]

    def _bound(self, sizes: StepSizes) -> tuple[list[Any], bool]:
        key = (*sizes.step.values(), *sizes.rows.values(), *sizes.micro.values(), sizes.first)
        if key not in self.kept:
            if len(self.kept) >= _KEPT_SIZES:
                self.kept.pop(next(iter(self.kept)))
            bindings = self.rewritten.bindings
            self.kept[key] = self.binder.values(bindings, sizes), self.binder.leaves_empty(bindings, sizes)
        return self.kept[key]

    def run(
        self,
        tensors: Mapping[str, torch.Tensor],
        inputs: Sequence[Any],
        sizes: StepSizes,
        step: int,
        microbatch: int = 0,
    ) -> tuple[Any, ...]:
        """The outputs of the program: results, then new buffer values.

        `tensors` holds parameters, buffers and constants by name, `inputs` the leaves of the step's arguments.
        """
        leading = [
            inputs[place.leaf] if place.leaf is not None else tensors[place.name]
            for place in self.captured.placeholders
        ]
        # What tensors without elements want is known operator by operator alone (kernels.Guarded, reach.py).
        graph = self.rewritten.graph if self.leaves_empty(sizes) else self.compiled
        return graph(*leading, *self.arguments(sizes, step, microbatch))

    @cached_property
    def compiled(self) -> fx.GraphModule:
        """The program as the backend has it."""
        return self.rewritten.graph if self.backend == EAGER else in_pieces(self.rewritten, self.backend)


def place_on(graph: fx.GraphModule, device: torch.device) -> None:
    """Make every device literal of a graph name this rank's device: it may have been captured on another."""

    def placed(value: Any) -> Any:
        if isinstance(value, torch.device):
            return device
        if isinstance(value, list | tuple):
            return type(value)(placed(item) for item in value)
        return value

    for node in graph.graph.nodes:
        if node.op == "call_function":
            node.args = placed(node.args)
            node.kwargs = {name: placed(value) for name, value in node.kwargs.items()}
    graph.recompile()


def batch_symbols(captured: Captured) -> frozenset[sympy.Symbol]:
    """The free sizes that count rows."""
    found: set[sympy.Symbol] = set()
    for sizes in captured.inputs:
        rows = captured.batch_inputs[sizes.leaf]
        if rows is not None:
            found |= sizes.shape[rows].free_symbols
    return frozenset(found)


def sizes_of_microbatch(
    bindings: Mapping[sympy.Symbol, int],
    rows_symbols: frozenset[sympy.Symbol],
    rows: Mapping[Coordinates, int],
    *,
    first: bool,
    microbatch: int | None = None,
) -> StepSizes:
    """Sizes of a microbatch with these rows per coordinates."""
    total = sum(rows.values())
    micro = {symbol: total if symbol in rows_symbols else value for symbol, value in bindings.items()}
    return StepSizes(dict(bindings), micro, dict(rows), first, microbatch)


def rows_in(captured: Captured, bindings: Mapping[sympy.Symbol, int]) -> int:
    """Rows of the global batch at these sizes; 0 where no input has rows."""
    for sizes in captured.inputs:
        dim = captured.batch_inputs[sizes.leaf]
        if dim is not None:
            return evaluate(sizes.shape[dim], bindings)
    return 0
