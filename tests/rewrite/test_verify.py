from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from math import prod
from random import Random
from typing import Any

import pytest

from tests.block import MEGATRON, block
from tests.programs import CASES, built_for, exchanges_of, made_case
from whalepy.errors import VerificationError
from whalepy.rewrite.exchanges import Exchange, group_of
from whalepy.rewrite.verify import verify

Programs = dict[int, tuple[Exchange, ...]]
FIX = "this is a defect of whalepy, not of the model: please report it with str(plan.program(rank)) of these ranks"


@pytest.fixture(scope="module")
def programs() -> Programs:
    return exchanges_of(built_for(*block(), speeds=(1.0,) * 4, orders=MEGATRON))


def test_what_one_block_communicates(programs: Programs) -> None:
    assert [(e.bridge, e.kind, e.level, e.direction) for e in programs[0]] == [
        ("add1_1", "all-reduce", 1, "forward"),  # the residual behind attention
        ("add2_1", "all-reduce", 1, "forward"),  # and behind the MLP
        ("global_mean1_1", "all-reduce", 0, "forward"),  # the loss, over the replicas
        ("add1_1", "all-reduce", 1, "backward"),  # the gradient from the MLP's hidden units
        ("layer_norm1_1", "all-reduce", 1, "backward"),  # and from the heads
    ]


def test_every_rank_issues_the_same_in_its_own_groups(programs: Programs) -> None:
    assert {rank: [e.group for e in issued] for rank, issued in programs.items()} == {
        0: [(0, 1), (0, 1), (0, 2), (0, 1), (0, 1)],
        1: [(0, 1), (0, 1), (1, 3), (0, 1), (0, 1)],
        2: [(2, 3), (2, 3), (0, 2), (2, 3), (2, 3)],
        3: [(2, 3), (2, 3), (1, 3), (2, 3), (2, 3)],
    }


# -- planted bugs


def dropped(programs: Programs, rank: int, index: int) -> Programs:
    issued = programs[rank]
    return {**programs, rank: issued[:index] + issued[index + 1 :]}


def changed(programs: Programs, rank: int, index: int, **changes: Any) -> Programs:
    issued = programs[rank]
    return {**programs, rank: (*issued[:index], replace(issued[index], **changes), *issued[index + 1 :])}


def swapped(programs: Programs, rank: int, index: int) -> Programs:
    one, other = programs[rank][index : index + 2]
    return {**programs, rank: (*programs[rank][:index], other, one, *programs[rank][index + 2 :])}


PLANTED: dict[str, tuple[Callable[[Programs], Programs], str, str]] = {
    "rank 1 has no element of it, and leaves it out": (
        lambda p: dropped(p, 1, 1),
        "the forward all-reduce of add2_1 (level 1) joins ranks 0, 1, but rank 1 never issues it",
        "block.py:26",
    ),
    "rank 3 is missing altogether": (
        lambda p: {rank: issued for rank, issued in p.items() if rank != 3},
        "the forward all-reduce of global_mean1_1 (level 0) joins ranks 1, 3, but rank 3 never issues it",
        "block.py:27",
    ),
    "rank 2 has its groups from another mesh": (
        lambda p: changed(p, 2, 2, group=(2, 3)),
        "the forward all-reduce of global_mean1_1 (level 0) joins ranks 0, 2 for rank 0, but ranks 2, 3 for rank 2",
        "block.py:27",
    ),
    "rank 1 takes part in a group of others": (
        lambda p: changed(p, 1, 2, group=(0, 2)),
        "rank 1 issues the forward all-reduce of global_mean1_1 (level 0) but is not in its group ranks 0, 2",
        "block.py:27",
    ),
    "a bridge is issued twice": (
        lambda p: {**p, 0: (*p[0], p[0][0])},
        "rank 0 issues the forward all-reduce of add1_1 (level 1) twice",
        "block.py:25",
    ),
    "another collective": (
        lambda p: changed(p, 3, 0, kind="all-gather"),
        "the forward all-reduce of add1_1 (level 1) has collective all-reduce on rank 2, but all-gather on rank 3",
        "block.py:25",
    ),
    "another dtype": (
        lambda p: changed(p, 1, 0, dtype="bfloat16"),
        "the forward all-reduce of add1_1 (level 1) has dtype float32 on rank 0, but bfloat16 on rank 1",
        "block.py:25",
    ),
    "other positions": (
        lambda p: changed(p, 1, 0, group=(1, 0)),
        "the forward all-reduce of add1_1 (level 1) has order of ranks (0, 1) on rank 0, but (1, 0) on rank 1",
        "block.py:25",
    ),
    "other shares on one rank": (
        lambda p: changed(p, 1, 3, receives=(256, 320)),
        "in the backward all-reduce of add1_1 (level 1) rank 0 sends 320 elements to rank 1, which expects 256",
        "block.py:25",
    ),
    "two bridges of one group the other way round": (
        lambda p: swapped(p, 1, 0),
        "the ranks would wait for each other: "
        "rank 0 issues the forward all-reduce of add1_1 (level 1) before the forward all-reduce of add2_1 (level 1); "
        "rank 1 issues the forward all-reduce of add2_1 (level 1) before the forward all-reduce of add1_1 (level 1)",
        "block.py:25",
    ),
    "the backward in the order of the forward, on both ranks of a group": (
        lambda p: swapped(swapped(p, 0, 3), 1, 3),
        "rank 0 issues the backward all-reduce of layer_norm1_1 (level 1) before the backward all-reduce of add1_1 "
        "(level 1), but the backward of its program comes to them the other way round",
        "block.py:25",
    ),
    "the forward against the program, on both ranks of a group": (
        lambda p: swapped(swapped(p, 2, 0), 3, 0),
        "rank 2 issues the forward all-reduce of add2_1 (level 1) before the forward all-reduce of add1_1 (level 1), "
        "but the forward of its program comes to them the other way round",
        "block.py:25",
    ),
}


@pytest.mark.parametrize(("plant", "what", "at"), PLANTED.values(), ids=PLANTED)
def test_planted_bugs_are_found(programs: Programs, plant: Callable[[Programs], Programs], what: str, at: str) -> None:
    verify(programs)
    with pytest.raises(VerificationError) as caught:
        verify(plant(programs))
    assert str(caught.value) == f"{what}\n  at:  {at}\n  fix: {FIX}"


# -- programs of real models


@pytest.mark.parametrize("name", CASES)
def test_programs_of_models_are_verified(name: str) -> None:
    programs = exchanges_of(made_case(name))
    assert all(programs.values())
    verify(programs)
    for index in range(len(programs[1])):
        with pytest.raises(VerificationError):
            verify(dropped(programs, 1, index))


# -- random programs, against ranks that really wait

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")


def random_programs(random: Random) -> Programs:
    """Bridges in one common order on a random mesh with random sizes; some of them communicate in one pass only."""
    mesh = tuple(random.choice((1, 2, 2, 3)) for _ in range(random.randint(1, 3)))
    rank_of = random.sample(range(prod(mesh)), prod(mesh))
    bridges = [
        (position, random.randrange(len(mesh)), [random.choice(KINDS) if random.random() < 0.7 else None for _ in "fb"])
        for position in range(random.randint(1, 8))
    ]
    table = {
        (position, backward, group): [[random.randrange(9) for _ in group] for _ in group]
        for position, level, _ in bridges
        for backward in (False, True)
        for group in {group_of(level, at, mesh, rank_of) for at in product(*map(range, mesh))}
    }
    programs: Programs = {}
    for at, rank in zip(product(*map(range, mesh)), rank_of, strict=True):
        issued: list[Exchange] = []
        for backward in (False, True):
            for position, level, kinds in reversed(bridges) if backward else bridges:
                group = group_of(level, at, mesh, rank_of)
                if (kind := kinds[backward]) is None or len(group) == 1:
                    continue
                sizes, me = table[position, backward, group], group.index(rank)
                sent, expected = tuple(sizes[me]), tuple(row[me] for row in sizes)
                name = f"x{position}"
                issued.append(Exchange(name, position, level, group, kind, "float32", sent, expected, backward))
        programs[rank] = tuple(issued)
    return programs


def finishes(programs: Programs) -> bool:
    """Whether all ranks get through when each waits in every exchange for the others of its group."""
    left = {rank: list(issued) for rank, issued in programs.items()}
    while any(left.values()):
        ready = {
            rank: (issued[0].bridge, issued[0].backward, issued[0].group) for rank, issued in left.items() if issued
        }
        going = [rank for rank, key in ready.items() if all(ready.get(other) == key for other in key[2])]
        if not going:
            return False
        for rank in going:
            left[rank].pop(0)
    return True


def test_500_random_programs_are_verified() -> None:
    for seed in range(500):
        verify(random_programs(Random(seed)))


def test_random_bugs_are_found() -> None:
    found = 0
    for seed in range(500):
        random = Random(seed)
        programs = random_programs(random)
        at = [(rank, index) for rank, issued in programs.items() for index in range(len(issued))]
        if not at:
            continue
        rank, index = random.choice(at)
        one = programs[rank][index]
        position = random.randrange(len(one.group))
        sends = tuple(count + (place == position) for place, count in enumerate(one.sends))
        for broken in (dropped(programs, rank, index), changed(programs, rank, index, sends=sends)):
            with pytest.raises(VerificationError):
                verify(broken)
            found += 1
    assert found > 800


def orders(message: str) -> bool:
    return message.startswith("the ranks would wait for each other")


def test_a_cycle_is_found_exactly_where_ranks_would_wait_for_ever() -> None:
    waiting = going = 0
    for seed in range(500):
        random = Random(seed)
        programs = {rank: _shuffled(issued, random) for rank, issued in random_programs(random).items()}
        if finishes(programs):
            going += 1
            assert not orders(_finding(programs))
        else:
            waiting += 1
            assert orders(_finding(programs))
    assert min(waiting, going) > 50


def _shuffled(issued: Iterable[Exchange], random: Random) -> tuple[Exchange, ...]:
    """The same with two neighbours swapped, or none."""
    order = list(issued)
    if len(order) > 1 and random.random() < 0.5:
        at = random.randrange(len(order) - 1)
        order[at], order[at + 1] = order[at + 1], order[at]
    return tuple(order)


def _finding(programs: Programs) -> str:
    try:
        verify(programs)
    except VerificationError as error:
        return error.what
    return ""
