"""How fast this rank computes while all ranks do: what they share, such as a core, each then has its part of."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from whalepy.runtime.agreement import gather_objects
from whalepy.runtime.groups import Group

WINDOW_S = 0.2
"""Long beside the turns in which a system lets processes share a core (some milliseconds)."""
WINDOWS = 3
"""The middle one counts: what else ran for a moment does not."""
# Rows, width and hidden units of what is trained: some ten milliseconds a step on a core, some on a card.
_SIZES = {"cpu": (128, 256, 1024), "cuda": (4096, 1024, 4096)}


def speed_together(device: torch.device, host: Group, window_s: float = WINDOW_S) -> float:
    """FLOP/s of small training steps, in windows in which every rank computes from end to end. Collective.

    A kernel timed alone (`measure_device`) takes the best of short windows: that hides what others take now and then,
    and, where a rank has half a core, also that it has only half of one.
    """
    rows, width, hidden = _SIZES[device.type]
    block = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)).to(device)
    x = torch.rand(rows, width, device=device, requires_grad=True)
    _trained(block, x)  # first use: libraries load, caches fill
    gather_objects(host, None)
    steps_per_s = statistics.median(_steps_per_s(block, x, window_s) for _ in range(WINDOWS))
    return _PASSES * 2 * rows * width * hidden * 2 * steps_per_s


def _steps_per_s(block: nn.Module, x: torch.Tensor, window_s: float) -> float:
    start = time.perf_counter()
    steps, now = 0, start
    while now - start < window_s:
        _trained(block, x)
        steps, now = steps + 1, time.perf_counter()
    return steps / (now - start)


_PASSES = 3
"""Products of a step: forward, and a gradient of each of two operands; of two layers, with an add for each multiply."""


def _trained(block: nn.Module, x: torch.Tensor) -> None:
    block(x).sum().backward()
    block.zero_grad()
    x.grad = None
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
