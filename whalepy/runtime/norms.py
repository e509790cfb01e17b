"""The norm of the whole gradient: each element counted by one owner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from whalepy.errors import WhaleError
from whalepy.runtime.groups import Group
from whalepy.runtime.kernels import Shard
from whalepy.runtime.storage import Stored


@dataclass(frozen=True)
class Placement:
    """Where this rank stands in a stage: its device, the host group of the stage's ranks, its levels, its place."""

    device: torch.device
    host: Group
    groups: tuple[Group, ...]
    coordinates: tuple[int, ...]


def gradient_norm(
    parameters: Mapping[str, nn.Parameter],
    stored: Mapping[str, Stored],
    place_of: Callable[[str], Placement],
    host: Group,
    norm_type: float,
) -> torch.Tensor:
    """The norm over all elements of all gradients of the ranks of `host`, f64 in summing; `place_of` a parameter.

    Raises WhaleError for a norm below or at zero.
    """
    if not norm_type > 0:
        raise WhaleError(f"norm_type must be positive, not {norm_type}")
    power = torch.zeros((), dtype=torch.float64)
    for name, parameter in parameters.items():
        if parameter.grad is None or not _owns(stored.get(name), place_of(name)):
            continue
        gradient = parameter.grad.detach().double().abs()
        if norm_type == float("inf"):
            power = torch.maximum(power, gradient.max().cpu()) if gradient.numel() else power
        else:
            power = power + gradient.pow(norm_type).sum().cpu()
    wide = any(p.grad is not None and p.grad.dtype == torch.float64 for p in parameters.values())
    powers, blocks = host.all_gather(torch.stack([power, torch.tensor(float(wide)).double()]), [2] * host.size)
    found = torch.stack(blocks.parts(powers))
    total = found[:, 0].amax() if norm_type == float("inf") else found[:, 0].sum().pow(1.0 / norm_type)
    return total.to(torch.float64 if found[:, 1].any() else torch.float32)


def _owns(entry: Stored | None, placement: Placement) -> bool:
    """Whether this rank counts its box: it stands first on every level on which the box is whole."""
    cut = set() if entry is None else {id(m.group) for m in entry.cut if isinstance(m.target, Shard)}
    return all(group.position == 0 for group in placement.groups if id(group) not in cut)
