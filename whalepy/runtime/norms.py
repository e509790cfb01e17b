"""The norm of the whole gradient: each element counted by one owner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from whalepy.errors import WhaleError
from whalepy.runtime.groups import Group
from whalepy.runtime.kernels import Shard, all_reduce_max, convert
from whalepy.runtime.storage import Stored


@dataclass(frozen=True)
class Placement:
    """Where this rank stands: its device, the host group of all ranks, the levels, and its coordinates on them."""

    device: torch.device
    host: Group
    groups: tuple[Group, ...]
    coordinates: tuple[int, ...]


def gradient_norm(
    parameters: Mapping[str, nn.Parameter], stored: Mapping[str, Stored], placement: Placement, norm_type: float
) -> torch.Tensor:
    """The norm over all elements of all gradients, f64 in summing. Raises WhaleError for a norm below or at zero."""
    if not norm_type > 0:
        raise WhaleError(f"norm_type must be positive, not {norm_type}")
    power = torch.zeros((), dtype=torch.float64, device=placement.device)
    for name, parameter in parameters.items():
        if parameter.grad is None or not _owns(stored.get(name), placement):
            continue
        gradient = parameter.grad.detach().double().abs()
        if norm_type == float("inf"):
            power = torch.maximum(power, gradient.max()) if gradient.numel() else power
        else:
            power = power + gradient.pow(norm_type).sum()
    for group in placement.groups:
        power = all_reduce_max(power, group) if norm_type == float("inf") else convert(power, "P", "R", group)
    total = power if norm_type == float("inf") else power.pow(1.0 / norm_type)
    dtypes = {p.grad.dtype for p in parameters.values() if p.grad is not None}
    return total.to(torch.float64 if torch.float64 in dtypes else torch.float32)


def _owns(entry: Stored | None, placement: Placement) -> bool:
    """Whether this rank counts its box: it stands first on every level on which the box is whole."""
    cut = set() if entry is None else {id(m.group) for m in entry.cut if isinstance(m.target, Shard)}
    return all(group.position == 0 for group in placement.groups if id(group) not in cut)
