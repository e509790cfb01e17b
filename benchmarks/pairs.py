"""Two ways of doing a thing, timed in turns: the median of their ratios and its 95 % interval."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from math import comb
from typing import Any

import torch
import torch.distributed as dist

Step = Callable[[], Any]


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Order statistics between which the median lies with at least this probability, whatever the distribution."""
    ordered, n = sorted(values), len(values)
    outside, k = 0.0, 0
    while k < n // 2 and 2 * (outside + comb(n, k) / 2**n) <= 1 - confidence:
        outside += comb(n, k) / 2**n
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else (ordered[0], ordered[-1])


def timed(step: Step, before: Step) -> float:
    """Seconds of a step, of the rank that takes longest; `before` runs untimed."""
    before()
    dist.barrier()
    start = time.perf_counter()
    step()
    took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return float(took)


def in_turns(steps: Sequence[Step], before: Step, pairs: int, warm: int = 3) -> list[list[float]]:
    """Seconds of each way, in as many rounds; who is first changes from round to round. Collective."""
    for _ in range(warm):
        for step in steps:
            timed(step, before)
    found: list[list[float]] = [[] for _ in steps]
    for turn in range(pairs):
        order = [(k + turn) % len(steps) for k in range(len(steps))]
        for k in order:
            found[k].append(timed(steps[k], before))
    return found


def figures(own: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Medians of both, the median of the ratios of pairs, and its 95 % interval."""
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    return {
        "own_ms": round(1e3 * statistics.median(own), 2),
        "other_ms": round(1e3 * statistics.median(other), 2),
        "ratio": round(statistics.median(ratios), 4),
        "interval": [round(edge, 4) for edge in interval(ratios)],
        "pairs": len(ratios),
    }


def machine() -> dict[str, Any]:
    """Where and when this was measured."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "load": [round(load, 2) for load in os.getloadavg()],
    }
