"""Initial values, one module at a time, so that a model on the meta device never stands whole on any rank."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def initial_values(model: nn.Module, device: torch.device) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """(name, whole value on `device`, whether it is known) of every parameter and buffer; ties once.

    Values on the meta device are made by their module's `reset_parameters` or the model's `_init_weights`, a module at
    a time; what neither sets is zero and not known.
    """
    seen: set[int] = set()
    initialisers = [m for m in model.modules() if hasattr(m, "_init_weights")]
    for path, module in model.named_modules():
        own = {k: v for k, v in (*module._parameters.items(), *module._buffers.items()) if v is not None}
        fresh = [name for name, value in own.items() if id(value) not in seen]
        seen.update(id(own[name]) for name in fresh)
        made = _initialised(module, initialisers, device) if any(_on_meta(own[name]) for name in fresh) else {}
        for name in fresh:
            value = made.get(name, own[name])
            known = not _unset(value) if name in made else True
            whole = value.detach().to(device) if known else torch.zeros_like(value)
            yield (f"{path}.{name}" if path else name), whole, known


def _on_meta(value: torch.Tensor | None) -> bool:
    return value is not None and value.device.type == "meta"


def _initialised(module: nn.Module, initialisers: list[Any], device: torch.device) -> dict[str, torch.Tensor]:
    """Fresh values of a module's own meta parameters and buffers, by its own or its model's initialiser."""
    stand_in = copy.copy(module)
    stand_in.__dict__["_parameters"] = {k: _sentinel(v, device) for k, v in module._parameters.items()}
    stand_in.__dict__["_buffers"] = {k: _sentinel(v, device) for k, v in module._buffers.items()}
    reset = getattr(stand_in, "reset_parameters", None)
    with torch.no_grad():
        if callable(reset):
            reset()
        for model in initialisers:
            model._init_weights(stand_in)
    own = {**stand_in._parameters, **stand_in._buffers}
    return {name: value for name, value in own.items() if value is not None}


def _sentinel(value: torch.Tensor | None, device: torch.device) -> Any:
    """A stand-in for a meta value whose elements say that nobody has set them."""
    if value is None or not _on_meta(value):
        return value
    empty = torch.empty_like(value, device=device)
    with torch.no_grad():
        if value.dtype.is_floating_point or value.dtype.is_complex:
            empty.fill_(float("nan"))
        elif value.dtype is not torch.bool:
            empty.fill_(torch.iinfo(value.dtype).min)
    return nn.Parameter(empty, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else empty


def _unset(value: torch.Tensor) -> bool:
    if value.dtype is torch.bool or not value.numel():
        return False
    if value.dtype.is_floating_point or value.dtype.is_complex:
        return bool(value.isnan().any())
    return bool((value == torch.iinfo(value.dtype).min).any())
