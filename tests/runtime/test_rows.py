"""Rows by rank: slices of a batch, and the batch sampler."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from whalepy.errors import BatchError
from whalepy.planner.decide import Cut
from whalepy.runtime.extents import Grid, chunk
from whalepy.runtime.rows import Pieces, RowSampler, local_rows


def flat(*weights: float) -> Grid:
    return Grid((len(weights),), (Cut(0, weights),), (0,))


def pieces(grid: Grid, *coordinates: int) -> Pieces:
    return lambda total: grid.row_pieces(total, coordinates)


# replicate by 2:1, inside it a split of two that cuts no rows, inside it a replicate by 1:1
NEST = Grid((2, 2, 2), (Cut(0, (2, 1)), Cut(2, (1, 1))), (0, None, 1))
BATCH = {"x": torch.arange(8).view(8, 1), "y": torch.arange(8), "alpha": torch.tensor(3.0)}
DIMS = (None, 0, 0)  # in the order of the leaves: alpha, x, y


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [
        ((1, 1), 8, [4, 4]),
        ((3, 1), 8, [6, 2]),
        ((5, 2, 1), 8, [5, 2, 1]),
        ((1, 1), 5, [3, 2]),  # a tie goes to the lower position
        ((5, 2, 1), 1, [1, 0, 0]),
        ((5, 2, 1), 0, [0, 0, 0]),
        ((1, 0, 1), 4, [2, 0, 2]),  # a weight of 0 gets nothing
    ],
)
def test_rows_follow_the_shares(weights: tuple[float, ...], total: int, expected: list[int]) -> None:
    assert list(flat(*weights).rows(total).values()) == expected


def test_the_outer_level_cuts_first() -> None:
    assert NEST.rows(9) == {(0, 0): 3, (0, 1): 3, (1, 0): 2, (1, 1): 1}


def test_intervals_tile_the_batch_and_ranks_of_a_split_level_share_theirs() -> None:
    intervals = [NEST.row_pieces(9, (a, b, c))[0] for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    assert intervals == [(0, 3), (3, 3), (0, 3), (3, 3), (6, 2), (8, 1), (6, 2), (8, 1)]


def test_a_slice_keeps_the_structure_and_what_has_no_rows() -> None:
    cut = local_rows(BATCH, (0, 0, None), pieces(flat(3, 1), 1))
    assert list(cut) == ["x", "y", "alpha"]
    assert cut["x"].tolist() == [[6], [7]]
    assert cut["y"].tolist() == [6, 7]
    assert cut["alpha"] is BATCH["alpha"]


@pytest.mark.parametrize(
    ("arguments", "dims", "message"),
    [
        (
            (torch.zeros(4), torch.zeros(3)),
            (0, 0),
            "inputs disagree on the number of rows: [3, 4]\n"
            "  fix: give every input its rows, or say with batch_dim= which dim counts them",
        ),
        (
            (torch.zeros(4),),
            (None,),
            "no input has a batch dim\n  fix: give every input its rows, or say with batch_dim= which dim counts them",
        ),
    ],
)
def test_no_one_number_of_rows(arguments: Any, dims: tuple[int | None, ...], message: str) -> None:
    with pytest.raises(BatchError) as error:
        local_rows(arguments, dims, pieces(flat(1, 1), 0))
    assert str(error.value) == message


@pytest.mark.parametrize(("rows", "count", "expected"), [(8, 3, [(0, 3), (3, 3), (6, 2)]), (1, 2, [(0, 1), (1, 0)])])
def test_microbatches_are_as_equal_as_possible(rows: int, count: int, expected: list[tuple[int, int]]) -> None:
    assert [chunk(rows, count, m) for m in range(count)] == expected


# -- sampler


def samplers(length: int, batch_size: int, *, shuffle: bool = False, seed: int = 0) -> list[RowSampler]:
    return [RowSampler(range(length), [flat(3, 1)], pieces(flat(3, 1), at), batch_size, shuffle, seed) for at in (0, 1)]


def steps(length: int, batch_size: int, **options: Any) -> list[list[list[int]]]:
    """Per step, the rows of each rank."""
    ranks = samplers(length, batch_size, **options)
    assert len({len(rank) for rank in ranks}) == 1
    return [list(step) for step in zip(*ranks, strict=True)]


def test_a_sampler_deals_each_batch_by_the_shares() -> None:
    # the last batch is short and is cut by the same shares
    assert steps(12, 8) == [[[0, 1, 2, 3, 4, 5], [6, 7]], [[8, 9, 10], [11]]]


def test_every_row_comes_once_in_an_epoch() -> None:
    dealt = Counter(row for step in steps(20, 8, shuffle=True) for rank in step for row in rank)
    assert dealt == Counter(range(20))


def test_a_last_batch_too_short_for_every_rank_is_left_out() -> None:
    with pytest.warns(UserWarning, match="^the last 1 rows are too few for every rank and are left out$"):
        assert steps(9, 8) == [[[0, 1, 2, 3, 4, 5], [6, 7]]]


def test_a_batch_size_that_never_serves_every_rank() -> None:
    with pytest.raises(BatchError) as error:
        samplers(2, 1)
    assert str(error.value) == (
        "batch_size 1 leaves some rank without a row, and a DataLoader cannot collate nothing\n"
        "  fix: give a larger batch_size, or more even shares; parallel.local_batch(global_batch) feeds any batch"
    )


def test_iterations_reshuffle_and_set_epoch_repeats() -> None:
    one, other = samplers(12, 4, shuffle=True)
    first, second = list(one), list(one)
    assert first != second
    assert len(list(other)) == len(first)
    one.set_epoch(0)
    assert list(one) == first
    assert one.epoch == 1


@pytest.mark.parametrize("seed", [0, 7])
def test_ranks_shuffle_alike(seed: int) -> None:
    order = [row for step in steps(8, 4, shuffle=True, seed=seed) for rank in step for row in rank]
    assert sorted(order) == list(range(8))
    assert order != list(range(8))


def test_a_batch_size_below_one() -> None:
    with pytest.raises(BatchError) as error:
        samplers(4, 0)
    assert str(error.value) == "batch_size must be at least 1, not 0"
