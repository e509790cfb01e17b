"""Which pairs are measured, when, and what is measured between two processes."""

from __future__ import annotations

from collections import Counter
from itertools import chain, combinations

import pytest
import torch
import torch.distributed as dist

from tests.pool import Pool
from whalepy.runtime import measure_pairs
from whalepy.runtime.measure_pairs import Pair, pairs_to_measure

ROUNDS = [
    ([[0]], []),  # nobody to talk to
    ([[0, 1]], [[(0, 1)]]),
    ([[0, 1], [2, 3]], [[(0, 1), (2, 3)], [(0, 2)]]),  # nodes at once, then between them
    ([[0, 1, 2]], [[(0, 1)], [(0, 2)], [(1, 2)]]),  # one pair of a node at a time
    ([[3], [1]], [[(3, 1)]]),  # nodes in the order of the spec, whatever the ranks
]


@pytest.mark.parametrize(("nodes", "rounds"), ROUNDS)
def test_rounds(nodes: list[list[int]], rounds: list[list[tuple[int, int]]]) -> None:
    assert pairs_to_measure(nodes) == rounds


@pytest.mark.parametrize("count", range(1, 10))
def test_every_two_nodes_meet_once_and_no_node_twice_in_a_round(count: int) -> None:
    rounds = pairs_to_measure([[node] for node in range(count)])
    for turn in rounds:
        assert max(Counter(chain.from_iterable(turn)).values()) == 1
    assert sorted(chain.from_iterable(rounds)) == list(combinations(range(count), 2))
    assert len(rounds) == (0 if count == 1 else count - 1 + count % 2)


def test_a_large_node_is_a_chain() -> None:
    assert pairs_to_measure([list(range(10))]) == [[(i, i + 1)] for i in range(9)]


def measured_here() -> list[Pair]:
    measure_pairs._BYTES = {"cpu": 2**16}  # type: ignore[misc]

    def meet(name: str) -> None:
        dist.barrier()

    rounds = pairs_to_measure([[2, 1], [0]])
    return measure_pairs.measure_pairs(rounds, dist.get_rank(), torch.device("cpu"), meet)


def test_the_lower_rank_tells(workers: Pool) -> None:
    told = workers.run(3, measured_here)
    assert [[(pair.first, pair.second) for pair in pairs] for pairs in told] == [[(0, 2)], [(1, 2)], []]
    assert all(pair.latency_s > 0 and pair.bandwidth > 0 for pair in chain.from_iterable(told))
