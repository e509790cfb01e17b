"""Values gathered from parts that the backward pass reads: kept as this rank's part, and gathered again.

Source: Korthikanti et al., arXiv:2205.05198, section 4.2.2.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from whalepy.dryrun.counting import Counter
from whalepy.runtime.bridge import Move


@dataclass
class Gathered:
    """Values that came out of a gather, by the memory they lie in."""

    counter: Counter
    known: dict[int, tuple[Tensor, Move]] = field(default_factory=dict[int, tuple[Tensor, Move]])

    def note(self, whole: Tensor, part: Tensor, move: Move) -> None:
        """Remember what `whole` was gathered from."""
        storage = whole.untyped_storage()
        self.known[id(storage)] = part.detach(), move
        weakref.finalize(storage, self.known.pop, id(storage), None)

    def hooks(self) -> AbstractContextManager[Any]:
        """Inside, autograd keeps the part of a value that is known."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, value: Tensor) -> Any:
        found = self.known.get(id(value.untyped_storage()))
        return value if found is None else (*found, value.shape, value.stride())

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        part, move, shape, stride = packed
        self.counter.collective("all-gather", move.group.level, (move.group.size - 1) * part.nbytes)
        return torch.empty_strided(shape, stride, dtype=part.dtype, device=part.device)
