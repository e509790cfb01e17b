"""Two ways of doing a thing, timed in turns: the median of their ratios and its 95 % interval."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from math import comb
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Step = Callable[[], Any]
# Share of all cores that others may take in a round: on a machine without others, this came to 0.5 to 0.9 %.
OTHERS = 0.05


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Order statistics between which the median lies with at least this probability, whatever the distribution."""
    ordered, n = sorted(values), len(values)
    outside, k = 0.0, 0
    while k < n // 2 and 2 * (outside + comb(n, k) / 2**n) <= 1 - confidence:
        outside += comb(n, k) / 2**n
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else (ordered[0], ordered[-1])


def timed(step: Step, before: Step = lambda: None) -> float:
    """Seconds of a step, of the rank that takes longest; `before` runs untimed. Collective."""
    before()
    dist.barrier()
    start = time.perf_counter()
    step()
    took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return float(took)


def in_turns(
    steps: Sequence[Callable[[], float]],
    pairs: int,
    *,
    warm: int = 3,
    others: float = OTHERS,
    limit_s: float = 400.0,
    cpu_s: Callable[[], float] = time.process_time,
) -> tuple[list[list[float]], int]:
    """Seconds of each way, as its step tells them, in as many rounds, and how many rounds were repeated. Collective.

    Who is first changes from round to round. A round is repeated where others than the ranks, for which cores have
    worked `cpu_s`, took more than `others` of the cores meanwhile, until there are enough or the time is up. Raises
    ValueError without a round.
    """
    for _ in range(warm):
        for step in steps:
            step()
    found: list[list[float]] = [[] for _ in steps]
    repeated, end = 0, time.monotonic() + limit_s
    while len(found[0]) < pairs and not _any(time.monotonic() > end):
        turn = len(found[0]) + repeated
        order = [(k + turn) % len(steps) for k in range(len(steps))]
        start, busy = time.perf_counter(), busy_of_others_s(cpu_s())
        took = {k: steps[k]() for k in order}
        share = (busy_of_others_s(cpu_s()) - busy) / ((time.perf_counter() - start) * (os.cpu_count() or 1))
        if _any(dist.get_rank() == 0 and share > others):
            repeated += 1
            continue
        for k, seconds in took.items():
            found[k].append(seconds)
    if not found[0]:
        raise ValueError(f"other processes were busy in all {repeated} rounds")
    return found, repeated


def _any(said: bool) -> bool:
    """Whether any rank says so."""
    told = torch.tensor(int(said))
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told)


def busy_of_others_s(own_s: float) -> float:
    """Seconds that the cores of this machine have worked for others than the ranks (Linux). Collective."""
    own = torch.tensor(own_s, dtype=torch.float64)
    dist.all_reduce(own)
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - float(own)


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
