"""The backward pass goes through the same bridges on all ranks, even on those that hold nothing.

torch drops the way back to an operand where a result has no elements (attention forgets its mask, an index its source),
so a rank without rows would leave out bridges, or gradients of parameters, on which the other ranks wait.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from whalepy.runtime.groups import Group

End = tuple[Any, torch.Tensor]
"""What the backward pass runs for a value, and none of its elements, which does not hold the value."""


@dataclass
class Reach:
    """The bridges of one forward pass, in order: as many on every rank."""

    ends: list[End] = field(default_factory=list[End])

    def note(self, result: torch.Tensor) -> None:
        """The result of a bridge; it may go as soon as nothing else needs it."""
        self.ends.append(_end(result))

    def tie(self, outputs: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor], host: Group) -> torch.Tensor:
        """The first of the outputs, from which the backward pass reaches, beside what it reaches from all outputs, what
        it reaches on any rank of the host group. Collective.

        Ways that this rank lacks are added with a gradient of zeros.
        """
        ends = [*self.ends, *(_end(leaf) for leaf in leaves if leaf.requires_grad)]
        seen = _before(outputs)
        mine = torch.tensor([function in seen for function, _ in ends], dtype=torch.int64)
        buffer, blocks = host.all_gather(mine, [len(ends)] * host.size)
        anywhere = torch.stack(blocks.parts(buffer)).amax(0)
        wanted = zip(ends, anywhere.tolist(), mine.tolist(), strict=True)
        lacking = [nothing for (_, nothing), any_has, has in wanted if any_has > has]
        return sum((nothing.sum().to(outputs[0].dtype) for nothing in lacking), outputs[0])


_REACH: ContextVar[Reach | None] = ContextVar("reach", default=None)


def current_reach() -> Reach | None:
    """What notes the bridges of this forward pass; None where no rank holds nothing."""
    return _REACH.get()


@contextmanager
def noting(reach: Reach | None) -> Generator[None]:
    """Note the bridges that are crossed inside."""
    token = _REACH.set(reach)
    try:
        yield
    finally:
        _REACH.reset(token)


def _end(value: torch.Tensor) -> End:
    return _function(value), _nothing_of(value)


def _function(value: torch.Tensor) -> Any:
    """What the backward pass runs for a value: of a leaf, what accumulates its gradient."""
    return torch.autograd.graph.get_gradient_edge(value).node


def _before(outputs: Sequence[torch.Tensor]) -> set[Any]:
    """Every function of the backward pass that starts at these values."""
    found: set[Any] = set()
    waiting = [_function(output) if output.requires_grad else None for output in outputs]
    while waiting:
        function = waiting.pop()
        if function is not None and function not in found:
            found.add(function)
            waiting.extend(before for before, _ in function.next_functions)
    return found


def _nothing_of(value: torch.Tensor) -> torch.Tensor:
    real = torch.view_as_real(value) if value.is_complex() else value
    return torch.slice_copy(real if real.ndim else real.unsqueeze(0), 0, 0, 0)
