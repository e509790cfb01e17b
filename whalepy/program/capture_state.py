"""What the forward assigns to attributes of the model, and what becomes of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from whalepy.errors import CaptureError

_PLAIN = (torch.Tensor, bool, int, float, str, type(None))


@dataclass(frozen=True)
class State:
    """The buffers of a model, and its attributes that hold tensors or plain values, by qualified name."""

    buffers: dict[str, Any]
    attributes: dict[str, Any]


def state_of(model: nn.Module) -> State:
    """The state at this moment."""
    attributes = {
        f"{path}.{name}" if path else name: value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN)
    }
    return State(dict(model.named_buffers()), attributes)


def assigned_buffers(before: State, after: State) -> tuple[str, ...]:
    """The buffers that hold another tensor than before. CaptureError: one of another shape or dtype."""
    names = tuple(name for name, old in before.buffers.items() if after.buffers.get(name) is not old)
    for name in names:
        old, new = before.buffers[name], after.buffers.get(name)
        if new is None or list(new.shape) != list(old.shape) or new.dtype != old.dtype:
            raise CaptureError(
                f"the forward assigns to the buffer {name} a value of another shape or dtype",
                fix="keep the buffer's shape and dtype, or keep such a value out of the model's state",
            )
    return names


def assigned_attributes(before: State, after: State) -> tuple[str, ...]:
    """The attributes, and buffers that were None, which the forward gave another value."""
    changed = [name for name, new in after.attributes.items() if not _same(before.attributes.get(name), new)]
    return (*changed, *(name for name in after.buffers if name not in before.buffers))


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, torch.Tensor) or isinstance(new, torch.Tensor):
        return old is new
    return type(old) is type(new) and (old == new or old != old)


def check_attributes(names: Sequence[str], read: Collection[str]) -> None:
    """CaptureError: the forward reads a tensor attribute and gives it a new value, which the graph cannot keep."""
    for name in names:
        if name in read:
            raise unregistered(name)


def unregistered(name: str, at: str | None = None) -> CaptureError:
    """The error for a write to a tensor that is an attribute and no buffer."""
    return CaptureError(
        f"the forward writes to the attribute {name}, which is a tensor but no buffer",
        at=at,
        fix=f"register it: self.register_buffer({name.rpartition('.')[2]!r}, ..., persistent=False)",
    )
