"""Boxes between two stages: every element a place wants comes once, from a place that holds it."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
import torch

from whalepy.planner.decide import Cut
from whalepy.rewrite.bindings import Term
from whalepy.runtime.boundary import (
    Holding,
    _as_index,  # pyright: ignore[reportPrivateUsage]
    _in_a_row,  # pyright: ignore[reportPrivateUsage]
    _put,  # pyright: ignore[reportPrivateUsage]
    _row_indices,  # pyright: ignore[reportPrivateUsage]
    _take,  # pyright: ignore[reportPrivateUsage]
    routes,
)
from whalepy.runtime.extents import Extents, Grid, StepSizes

SHAPE = (5, 6)


def holdings(draw: random.Random, first_rank: int) -> list[tuple[int, Holding]]:
    """Ranks that hold a value of SHAPE: each dim cut into parts, in any order, and the whole of it perhaps twice."""
    cuts: list[list[np.ndarray]] = []
    for size in SHAPE:
        order = np.array(draw.sample(range(size), size)) if draw.random() < 0.5 else np.arange(size)
        edges = sorted(draw.sample(range(size + 1), draw.randrange(3)))
        cuts.append(np.split(order, edges))
    boxes = list(product(*cuts)) * draw.choice((1, 2))
    draw.shuffle(boxes)
    ways = (tuple(map(_in_a_row, box)) if draw.random() < 0.5 else box for box in boxes)
    return [(first_rank + k, box) for k, box in enumerate(ways)]


@pytest.mark.parametrize("seed", range(60))
def test_every_element_comes_once(seed: int) -> None:
    draw = random.Random(seed)
    givers = holdings(draw, 0)
    takers = holdings(draw, draw.choice((0, 3, len(givers))))  # perhaps on ranks that give as well
    whole = torch.arange(30).view(SHAPE)
    values = {rank: _take(whole, [_as_index(index) for index in box]) for rank, box in givers}
    for rank, box in takers:
        got = torch.full([len(index) for index in box], -1)
        times = torch.zeros_like(got)
        for giver, taker, where in routes(givers, takers):
            if taker != rank:
                continue
            _put(got, where.taker, _take(values[giver], where.giver))
            _put(times, where.taker, _take(times, where.taker) + 1)
        assert torch.equal(got, _take(whole, [_as_index(index) for index in box]))
        assert (times == 1).all()


def test_holders_of_the_same_take_turns_and_a_rank_takes_from_itself() -> None:
    box = (np.arange(4),)
    givers, takers = [(0, box), (1, box)], [(k, box) for k in (2, 3, 4, 1)]
    senders = {taker: giver for giver, taker, _ in routes(givers, takers)}
    assert senders == {2: 0, 3: 1, 4: 0, 1: 1}


# replicate 2:1 around the stage, 1:1 inside it
GRID = Grid((2, 2), (Cut(0, (2, 1)), Cut(1, (1, 1))), (0, 1), outer=1, microbatches=3)


def test_rows_of_a_step_stand_as_the_pieces_of_its_microbatches() -> None:
    chain = ((0, 0), (1, 1))
    sizes = StepSizes({}, {}, GRID.rows(9))
    found = [
        list(_row_indices(Term(9, chain, True, 9), Extents(GRID, at, sizes), 9)) for at in product(range(2), range(2))
    ]
    # 6 rows of the outer first position in microbatches of 2, 3 of the second in microbatches of 1
    assert found == [[0, 2, 4], [1, 3, 5], [6, 7, 8], []]


def test_rows_of_a_microbatch_count_from_its_first() -> None:
    chain = ((0, 0), (1, 1))
    sizes = StepSizes({}, {}, GRID.microbatch(9, 1), microbatch=1)
    found = [
        list(_row_indices(Term(3, chain, True, 3), Extents(GRID, at, sizes), 3)) for at in product(range(2), range(2))
    ]
    assert found == [[0], [1], [2], []]


def test_gathered_rows_stand_as_the_places_hold_them() -> None:
    sizes = StepSizes({}, {}, GRID.rows(9))
    whole = list(_row_indices(Term(9, (), True, 9), Extents(GRID, (0, 0), sizes), 9))
    assert whole == [0, 2, 4, 1, 3, 5, 6, 7, 8]
