"""Bandwidth and latency between pairs of ranks, one pair at a time within a node.

The branches for CUDA (NCCL) are written after its documentation and have not run yet.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist

_MIB = 2**20
_BYTES = {"cpu": 8 * _MIB, "cuda": 64 * _MIB}
_PINGS, _TRANSFERS = 20, 5
# All pairs of a node up to this many devices: 28 pairs of 8; in larger ones each with the next.
_ALL_PAIRS_UP_TO = 8


@dataclass(frozen=True)
class Pair:
    """What was measured between two ranks."""

    first: int
    second: int
    latency_s: float  # one way
    bandwidth: float  # bytes/s, the mean of both directions


def pairs_to_measure(nodes: Sequence[Sequence[int]]) -> list[list[tuple[int, int]]]:
    """Rounds of pairs of ranks; within a round no node has two pairs, so that none disturbs another.

    Every pair within a node (in large ones each with the next), then the first ranks of every pair of nodes.
    """
    inside = [list(_inside(ranks)) for ranks in nodes]
    rounds = [[pairs[i] for pairs in inside if i < len(pairs)] for i in range(max(map(len, inside), default=0))]
    between = [[(nodes[a][0], nodes[b][0]) for a, b in turn] for turn in _tournament(len(nodes))]
    return [turn for turn in rounds + between if turn]


def measure_pair(mine: int, other: int, device: torch.device) -> Pair:
    """What lies between this rank and another, which calls it at the same time. The lower rank asks."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    small, large = (torch.zeros(size, dtype=torch.uint8, device=device) for size in (1, _BYTES[kind]))
    asks = mine < other
    _there_and_back(small, other, asks, device)  # opens the connection
    latency = min(_there_and_back(small, other, asks, device) for _ in range(_PINGS)) / 2
    _there_and_back(large, other, asks, device)
    seconds = statistics.median(_there_and_back(large, other, asks, device) for _ in range(_TRANSFERS)) / 2
    return Pair(min(mine, other), max(mine, other), latency, large.nbytes / max(seconds - latency, 1e-9))


def measure_pairs(
    rounds: Sequence[Sequence[tuple[int, int]]], rank: int, device: torch.device, meet: Callable[[str], None]
) -> list[Pair]:
    """The pairs that this rank leads (as the lower one). All ranks call it with the same rounds."""
    found: list[Pair] = []
    for index, turn in enumerate(rounds):
        for pair in turn:
            if rank in pair:
                measured = measure_pair(rank, pair[0] if rank == pair[1] else pair[1], device)
                found += [measured] if rank == measured.first else []
        meet(f"links, round {index + 1} of {len(rounds)}")
    return found


def _there_and_back(tensor: torch.Tensor, other: int, asks: bool, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for sends in (asks, not asks):
        (dist.send if sends else dist.recv)(tensor, other)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _inside(ranks: Sequence[int]) -> Iterator[tuple[int, int]]:
    count = len(ranks)
    if count <= _ALL_PAIRS_UP_TO:
        yield from ((ranks[a], ranks[b]) for a in range(count) for b in range(a + 1, count))
    else:
        yield from pairwise(ranks)


def _tournament(count: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair of `count` once, in rounds of disjoint pairs: the circle method."""
    places = list(range(count)) + ([-1] if count % 2 else [])  # -1 sits out
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if min(a, b) >= 0]
        places = [places[0], places[-1], *places[1:-1]]
