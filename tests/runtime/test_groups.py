from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.pool import Pool
from whalepy.errors import PlanError
from whalepy.runtime.groups import Blocks, as_bytes, make_groups, start_process_group

# mesh shape, ranks of the mesh (last level fastest), what each rank of four gets: (ranks, position) per level
MESHES = [
    pytest.param((4,), (0, 1, 2, 3), {r: [((0, 1, 2, 3), r)] for r in range(4)}, id="one level"),
    pytest.param(
        (2, 2),
        (0, 1, 2, 3),
        {
            0: [((0, 2), 0), ((0, 1), 0)],
            1: [((1, 3), 0), ((0, 1), 1)],
            2: [((0, 2), 1), ((2, 3), 0)],
            3: [((1, 3), 1), ((2, 3), 1)],
        },
        id="two levels",
    ),
    # the plan may put a higher rank first: positions follow the plan, torch's own order the ranks
    pytest.param(
        (2, 2),
        (3, 0, 2, 1),
        {
            0: [((0, 1), 0), ((3, 0), 1)],
            1: [((0, 1), 1), ((2, 1), 1)],
            2: [((3, 2), 1), ((2, 1), 0)],
            3: [((3, 2), 0), ((3, 0), 0)],
        },
        id="permuted",
    ),
    # ranks outside the mesh still help to create its groups
    pytest.param((1, 2), (3, 1), {0: [], 1: [((1,), 0), ((3, 1), 1)], 2: [], 3: [((3,), 0), ((3, 1), 0)]}, id="part"),
]


def levels_and_order(mesh_shape: tuple[int, ...], rank_of: tuple[int, ...]) -> list[Any]:
    """Per level: ranks, position, and the ranks as an all-gather over the level brings them, by position."""
    rank, seen = dist.get_rank(), []
    for group in make_groups(mesh_shape, rank_of, rank):
        gathered, blocks = group.all_gather(torch.tensor([rank]), (1,) * group.size)
        seen.append((group.ranks, group.position, [int(part) for part in blocks.parts(gathered)]))
    return seen


@pytest.mark.parametrize(("mesh_shape", "rank_of", "expected"), MESHES)
def test_levels_of_a_mesh(workers: Pool, mesh_shape: Any, rank_of: Any, expected: dict[int, Any]) -> None:
    for rank, seen in enumerate(workers.run(4, levels_and_order, mesh_shape, rank_of)):
        assert seen == [(ranks, position, list(ranks)) for ranks, position in expected[rank]]


def test_without_launcher_there_is_no_process_group() -> None:
    host = start_process_group()
    (level,) = make_groups((1,), (0,), 0)
    assert not dist.is_initialized()
    assert (
        (host.process_group, host.size, host.ranks) == (level.process_group, level.size, level.ranks) == (None, 1, (0,))
    )
    x = torch.tensor([1.0, 2.0])
    level.all_reduce(x)
    gathered, blocks = level.all_gather(x, (2,))
    assert gathered.tolist() == [1.0, 2.0] and blocks.in_order
    assert level.reduce_scatter(x, level.scatter_blocks((2,)), x.dtype).tolist() == [1.0, 2.0]
    assert level.sent_bytes == 0


def start_from_environment() -> tuple[bool, Any, int, int, float]:
    before = dist.is_initialized()
    host = start_process_group()
    again = start_process_group()  # a default group that is open is used, not opened again
    total = torch.tensor([float(host.position)])
    again.all_reduce(total)
    return before, dist.get_backend(), host.size, host.position, total.item()


def test_default_group_is_opened_from_the_environment(workers: Pool) -> None:
    results = workers.run(3, start_from_environment, default_group=False)
    assert results == [(False, "gloo", 3, rank, 3.0) for rank in range(3)]


@pytest.mark.parametrize(
    ("mesh_shape", "rank_of", "message"),
    [
        ((2, 2), (0, 1, 2), "a mesh of shape (2, 2) needs 4 different ranks, not [0, 1, 2]"),
        ((2,), (0, 0), "a mesh of shape (2,) needs 2 different ranks, not [0, 0]"),
        (
            (2,),
            (0, 1),
            "the plan uses rank 1, but only 1 rank started\n"
            "  fix: start 2 ranks, for example: torchrun --nproc-per-node=2 train.py",
        ),
    ],
)
def test_mesh_that_does_not_fit(mesh_shape: tuple[int, ...], rank_of: tuple[int, ...], message: str) -> None:
    with pytest.raises(PlanError) as error:
        make_groups(mesh_shape, rank_of, 0)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("starts", "sizes", "total", "in_order"),
    [
        ((0, 3), (3, 2), 5, True),
        ((0, 3), (3, 2), 6, False),  # padding at the end
        ((2, 0), (3, 2), 5, False),  # positions 1, 0
        ((0, 3, 3), (3, 0, 2), 5, True),  # an empty part
    ],
)
def test_blocks_in_order(starts: Any, sizes: Any, total: int, in_order: bool) -> None:
    assert Blocks(starts, sizes, total).in_order is in_order


def bytes_of_collectives() -> list[int]:
    (group,) = make_groups((4,), (0, 1, 2, 3), dist.get_rank())
    counts, sizes = [], (5, 2, 1, 0)

    def count() -> None:
        counts.append(group.sent_bytes)
        group.sent_bytes = 0

    count()  # warming up does not count
    group.all_reduce(torch.zeros(8))
    count()
    group.all_gather(torch.zeros(2), (2, 2, 2, 2))
    count()
    group.all_gather(torch.zeros(sizes[group.position]), sizes)  # padding to 4 x 5 costs more than twice 8
    count()
    group.reduce_scatter(torch.zeros(8), group.scatter_blocks(sizes), torch.float32)
    count()
    return counts


def test_sent_bytes(workers: Pool) -> None:
    assert workers.run(4, bytes_of_collectives) == [
        [0, 2 * 3 * 8, 3 * 8, 3 * size * 4, (8 - size) * 4] for size in (5, 2, 1, 0)
    ]


# The pool itself: a test that cannot fail there would hide everything else.


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise PlanError("no plan", fix="none")
    dist.all_reduce(torch.zeros(1))


def test_error_of_a_rank_is_raised_here_with_its_traceback(workers: Pool) -> None:
    with pytest.raises(PlanError) as error:
        workers.run(3, fail_on, 1)
    assert str(error.value) == "no plan\n  fix: none"
    assert error.value.__notes__[0].startswith("on rank 1 of 3 (failed: [0, 1, 2]):\nTraceback")
    assert "in fail_on" in error.value.__notes__[0]


def wait_for_each_other() -> None:
    dist.recv(torch.zeros(1), 1 - dist.get_rank())


def test_hang_is_killed_and_the_next_run_works(workers: Pool) -> None:
    with pytest.raises(TimeoutError, match="rank 0 hangs: no answer within 2 s") as error:
        workers.run(2, wait_for_each_other, timeout_s=2)
    assert "in wait_for_each_other" in error.value.__notes__[0]
    assert workers.run(2, lambda: dist.get_world_size()) == [2, 2]


def exit_hard(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)


def test_crash_is_reported_and_the_next_run_works(workers: Pool) -> None:
    with pytest.raises(RuntimeError, match="rank 1 died with exit code 7"):
        workers.run(2, exit_hard, 1)
    assert workers.run(2, lambda: int(os.environ["LOCAL_RANK"])) == [0, 1]


def test_bytes_of_one_number() -> None:
    one = torch.arange(8.0)[3:4].as_strided((1,), (8,), 3)
    assert as_bytes(one).view(torch.float32).tolist() == [3.0]
