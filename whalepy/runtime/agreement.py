"""The small host-side agreement of every step: if any rank is wrong, all raise one error and none hangs."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from whalepy.errors import BatchError, WhaleError
from whalepy.runtime.groups import Group

Shape = tuple[int, ...] | None
_WIDTH = 96
"""int64 words that each rank tells: enough for the shapes of some thirty inputs; longer ones go the slow way."""


@dataclass(frozen=True)
class Told:
    """What one rank says at the start of a step."""

    step: int
    structure: int
    """Hash of the structure of the arguments; 0: this rank was given none."""
    shapes: tuple[Shape, ...]
    error: str | None = None


def agree(host: Group, told: Told) -> list[Told]:
    """What every rank said, by rank. Raises BatchError on all ranks if any rank has an error."""
    return start_agreeing(host, told)()


def start_agreeing(host: Group, told: Told) -> Callable[[], list[Told]]:
    """The same on its way: what waits for it."""
    if host.size == 1:
        return lambda: _checked(host, [told])
    words = _words(told)
    mine = torch.tensor(words if words is not None else [1, *[0] * (_WIDTH - 1)], dtype=torch.int64)
    pending, blocks = host.start_all_gather(mine, [_WIDTH] * host.size)

    def wait() -> list[Told]:
        parts = [part.tolist() for part in blocks.parts(pending.done())]
        slow = any(part[0] for part in parts)  # somebody has an error or too much to say
        return _checked(host, gather_objects(host, told) if slow else [_told(part) for part in parts])

    return wait


class Otherwise(Exception):
    """Ranks have said otherwise than was assumed: what every rank said."""

    def __init__(self, everyone: list[Told]) -> None:
        super().__init__()
        self.everyone = everyone


class Agreement:
    """That of one step, on its way while the step begins: every rank is assumed to say the same as in the last one.

    `last`: what every rank said then; None: nothing is assumed. `everyone`: what they have said of this step already.
    """

    def __init__(self, last: list[Told] | None = None, *, everyone: list[Told] | None = None) -> None:
        self._last = last
        self.said = everyone
        """What every rank says, or is assumed to."""
        self._wait: Callable[[], list[Told]] | None = None

    def agree(self, host: Group, told: Told) -> list[Told]:
        """As `agree`; where it is assumed, `settle` has to be called before anybody is told of it."""
        if self.said is not None:
            return self.said
        wait = start_agreeing(host, told)
        assumed = None if self._last is None else [replace(one, step=told.step) for one in self._last]
        if assumed is None or assumed[host.position] != told:
            self.said = wait()
        else:
            self.said, self._wait = assumed, wait
        return self.said

    def settle(self) -> None:
        """Wait for what every rank says. Raises BatchError as `agree`, and Otherwise where it is not as assumed."""
        if self._wait is None:
            return
        wait, self._wait = self._wait, None  # what waits communicates itself
        everyone = wait()
        if everyone != self.said:
            raise Otherwise(everyone)


def _checked(host: Group, everyone: list[Told]) -> list[Told]:
    errors = {rank: other.error for rank, other in enumerate(everyone) if other.error is not None}
    if errors:
        rank, message = next(iter(errors.items()))
        raise BatchError(message if host.size == 1 else f"rank {rank}: {message}")
    steps = {other.step for other in everyone}
    if len(steps) > 1:
        raise BatchError(f"ranks are at different steps: {[other.step for other in everyone]}")
    return everyone


def _words(told: Told) -> list[int] | None:
    """0, step, structure, then per shape its length + 1 (0: no tensor) and sizes; None where it does not fit."""
    words = [0, told.step, told.structure, len(told.shapes)]
    for shape in told.shapes:
        words.extend([0] if shape is None else [len(shape) + 1, *shape])
    if told.error is not None or len(words) > _WIDTH:
        return None
    return words + [0] * (_WIDTH - len(words))


def _told(words: Sequence[int]) -> Told:
    shapes: list[Shape] = []
    at = 4
    for _ in range(words[3]):
        length = words[at]
        shapes.append(None if length == 0 else tuple(words[at + 1 : at + length]))
        at += max(length, 1)
    return Told(words[1], words[2], tuple(shapes))


def gather_objects(host: Group, value: Any) -> list[Any]:
    """The value of every rank, by rank. For messages outside the step, or about an error."""
    if host.size == 1:
        return [value]
    found: list[Any] = [None] * host.size
    dist.all_gather_object(found, value, group=host.process_group)
    return found


def raise_together(host: Group, error: BaseException | None) -> None:
    """Raise on all ranks if any rank has an error: its own there, the same message elsewhere."""
    told = gather_objects(host, None if error is None else (str(error), _pickled(error)))
    if error is not None:
        raise error
    for rank, other in enumerate(told):
        if other is not None:
            text, whale = other
            if whale is not None:
                raise pickle.loads(whale)
            raise WhaleError(f"rank {rank} failed: {text}")


def _pickled(error: BaseException) -> bytes | None:
    return pickle.dumps(error) if isinstance(error, WhaleError) else None


def broadcast_object(host: Group, value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if host.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=host.process_group)
    return box[0]
