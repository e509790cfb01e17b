from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.pool import Pool
from whalepy.errors import VerificationError
from whalepy.runtime.groups import Group, make_groups
from whalepy.runtime.kernels import Kind, Segment, Shard, all_reduce_max, convert

SHAPE = (8, 24, 3)


def shards(first: Any, second: Any, third: Any) -> list[Shard]:
    """Ways to shard SHAPE; the arguments divide 8, 4 and 3."""
    return [
        Shard.along(SHAPE, 0, first),
        Shard.along(SHAPE, 2, third),
        Shard(SHAPE, 1, 3, (Segment(1, first, 1),), 1),  # a fused projection: (3, heads)
        Shard(SHAPE, 1, 1, (Segment(1, first, 1),), 3),  # (heads, 3)
        Shard(SHAPE, 1, 2, (Segment(1, third, 2),), 2),
        Shard(SHAPE, 1, 1, (Segment(1, first, 1), Segment(2, second, 2)), 1),  # parts of unequal width, end to end
        Shard(SHAPE, 1, 2, (Segment(1, second, 1), Segment(2, second, 1)), 1),
    ]


# ranks by position, and the ways to shard over them
WORLDS = [
    pytest.param((0, 1), shards((6, 2), (3, 1), (2, 1)), id="3:1"),
    pytest.param((1, 0), shards((4, 4), (2, 2), (0, 3)), id="equal, ranks swapped"),
    pytest.param((0, 1, 2), shards((5, 2, 1), (2, 1, 1), (1, 1, 1)), id="5:2:1"),
    pytest.param((2, 0, 1), shards((5, 2, 1), (0, 4, 0), (0, 1, 2)), id="ranks permuted, empty positions"),
    pytest.param((0, 1, 2, 3), shards((2, 2, 2, 2), (1, 1, 1, 1), (3, 0, 0, 0)), id="equal"),
    pytest.param((3, 1, 0, 2), shards((5, 0, 2, 1), (3, 0, 0, 1), (0, 1, 1, 1)), id="5:0:2:1"),
]


# The reference: which indices of the dim a position holds, by counting through the definition.


def held(shard: Shard, position: int) -> list[int]:
    index, found = 0, []
    for _ in range(shard.lead):
        for segment in shard.segments:
            low = sum(segment.lengths[:position])
            for _, unit, _ in product(range(segment.pre), range(sum(segment.lengths)), range(segment.post)):
                mine = low <= unit < low + segment.lengths[position]
                found += range(index, index + shard.trail) if mine else []
                index += shard.trail
    assert index == shard.shape[shard.dim]
    return found


def part_of(whole: Tensor, shard: Shard, position: int) -> Tensor:
    return whole.index_select(shard.dim, torch.tensor(held(shard, position), dtype=torch.int64))


def parts_of(whole: Tensor, kind: Kind, size: int) -> list[Tensor]:
    """What each position holds of a value of small integers."""
    if isinstance(kind, Shard):
        return [part_of(whole, kind, position) for position in range(size)]
    if kind == "R":
        return [whole] * size
    if whole.dtype is torch.bool:
        return [whole, *[torch.zeros_like(whole)] * (size - 1)]
    others = [torch.randint(-9, 10, whole.shape).to(whole.dtype) for _ in range(size - 1)]
    return [whole - sum(others), *others]


def wrong(results: list[Tensor], whole: Tensor, kind: Kind) -> str:
    """What is wrong with the parts of `whole`, by position; empty if nothing."""
    if {part.dtype for part in results} != {whole.dtype}:
        return "dtype"
    if kind == "P":
        total = torch.stack(results).sum(0).to(whole.dtype)
        return "" if total.equal(whole) else "the sum"
    expected = parts_of(whole, kind, len(results))
    return ", ".join(f"position {p}" for p, part in enumerate(results) if not part.equal(expected[p]))


def level(rank_of: tuple[int, ...], by_exchange: bool = True) -> Group:
    (group,) = make_groups((len(rank_of),), rank_of, dist.get_rank())
    group.sums_by_exchange = by_exchange
    return group


def converted(rank_of: Any, by_exchange: bool, cases: list[Any], strided: bool) -> tuple[int, list[Tensor]]:
    """This rank's position and its result of each case (parts by position, source, target)."""
    group, results = level(rank_of, by_exchange), []
    for parts, source, target in cases:
        x = parts[group.position]
        x = x.transpose(0, -1).contiguous().transpose(0, -1) if strided else x
        before = x.clone()
        result = convert(x, source, target, group)
        if source == target:
            assert result is x
        else:
            assert result.is_contiguous()
            assert result.numel() == 0 or result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        assert x.equal(before)
        results.append(result)
    return group.position, results


def faults(workers: Pool, rank_of: Any, cases: list[Any], by_exchange: bool = True, strided: bool = False) -> list[str]:
    """The conversions, of (whole, source, target), that come out wrong."""
    size = len(rank_of)
    sent = [(parts_of(whole, source, size), source, target) for whole, source, target in cases]
    answers = dict(workers.run(size, converted, rank_of, by_exchange, sent, strided))
    found = []
    for number, (whole, source, target) in enumerate(cases):
        reason = wrong([answers[position][number] for position in range(size)], whole, target)
        found += [f"{source} -> {target}: {reason}"] if reason else []
    return found


def some(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randint(0, 2 if dtype is torch.bool else 60, shape).to(dtype)


@pytest.mark.parametrize(("by_exchange", "strided"), [(True, False), (False, True)])
@pytest.mark.parametrize(("rank_of", "ways"), WORLDS)
def test_every_pair(workers: Pool, rank_of: Any, ways: list[Shard], by_exchange: bool, strided: bool) -> None:
    kinds: list[Kind] = ["R", "P", *ways]
    cases = [(some(SHAPE, torch.float32), *pair) for pair in product(kinds, kinds)]
    assert faults(workers, rank_of, cases, by_exchange, strided) == []


# float16 and bfloat16 hold these integers and their sums exactly
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int16, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("by_exchange", [True, False])
def test_every_dtype(workers: Pool, by_exchange: bool) -> None:
    kinds: list[Kind] = ["R", "P", *shards((5, 2, 1), (2, 1, 1), (1, 1, 1))[1:3]]
    cases = [(some(SHAPE, dtype), *pair) for dtype in DTYPES for pair in product(kinds, kinds)]
    assert faults(workers, (0, 1, 2), cases, by_exchange) == []


@pytest.mark.parametrize("by_exchange", [True, False])
def test_values_without_elements(workers: Pool, by_exchange: bool) -> None:
    kinds: list[Kind] = [
        "R",
        "P",
        Shard.along((0, 4, 3), 0, (0, 0, 0)),
        Shard.along((0, 4, 3), 1, (3, 0, 1)),
        Shard((0, 4, 3), 1, 2, (Segment(1, (0, 1, 1), 1),), 1),
    ]
    cases = [(some((0, 4, 3), torch.float32), *pair) for pair in product(kinds, kinds)]
    assert faults(workers, (0, 1, 2), cases, by_exchange) == []


def test_scalars(workers: Pool) -> None:
    cases = [(some((), torch.float32), *pair) for pair in product("RP", "RP")]
    assert faults(workers, (1, 0), cases) == []


def test_the_checker_notices_a_wrong_layout(workers: Pool) -> None:
    """Negative control: parts given as 3:1 but declared in another order of the fused dim."""
    fused, plain = Shard(SHAPE, 1, 3, (Segment(1, (6, 2), 1),), 1), Shard.along(SHAPE, 1, (18, 6))
    whole = some(SHAPE, torch.float32)
    answers = dict(workers.run(2, converted, (0, 1), True, [(parts_of(whole, fused, 2), plain, "R")], False))
    assert wrong([answers[0][0], answers[1][0]], whole, "R") == "position 0, position 1"


def sums_of_halves(dtype: torch.dtype, by_exchange: bool) -> tuple[Any, Any]:
    group = level((0, 1, 2, 3), by_exchange)
    x = torch.tensor([2048.0 if group.position == 0 else 1.0] * 4, dtype=torch.float32).to(dtype)
    split = Shard.along((4,), 0, (2, 2, 0, 0))
    return convert(x, "P", "R", group).tolist(), convert(x, "P", split, group).tolist()


@pytest.mark.parametrize("by_exchange", [True, False])
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        # 2051 to the nearest multiple of 2, ties to even; adding 1 at a time in float16 stays at 2048
        (torch.float16, 2052.0),
        (torch.float32, 2051.0),
    ],
)
def test_half_precision_is_summed_in_float32(
    workers: Pool, dtype: torch.dtype, expected: float, by_exchange: bool
) -> None:
    results = workers.run(4, sums_of_halves, dtype, by_exchange)
    assert [whole for whole, _ in results] == [[expected] * 4] * 4
    assert [part for _, part in results] == [[expected] * 2] * 2 + [[]] * 2


def sum_of_noise() -> Tensor:
    group = level((0, 1, 2, 3))
    torch.manual_seed(group.position)
    return convert(torch.randn(1001), "P", "R", group)


def test_sums_have_the_same_bits_on_every_rank_and_every_time(workers: Pool) -> None:
    first, *others = [*workers.run(4, sum_of_noise), *workers.run(4, sum_of_noise)]
    assert all(other.equal(first) for other in others)


def maxima() -> list[Any]:
    group = level((1, 2, 0))
    r = float(group.position)
    inputs = [torch.tensor([r, -r, -float("inf")]).to(d) for d in (torch.float32, torch.bfloat16)]
    return [all_reduce_max(x, group).tolist() for x in [*inputs, torch.tensor([[5], [-int(r)]]).t()]]


def test_all_reduce_max(workers: Pool) -> None:
    row = [2.0, 0.0, -float("inf")]
    assert workers.run(3, maxima) == [[row, row, [[5, 0]]]] * 3


def test_group_of_one_returns_its_argument() -> None:
    group, x = Group(None, 1, 0, (0,)), torch.ones(2, 3)
    kinds: list[Kind] = ["R", "P", Shard.along((2, 3), 0, (2,))]
    assert all(convert(x, *pair, group) is x for pair in product(kinds, kinds))
    assert all_reduce_max(x, group) is x


def test_a_value_that_becomes_partial_stays_on_the_first_position() -> None:
    x = torch.tensor([1.0, 2.0])
    kept = [convert(x, "R", "P", Group(None, 3, position, (0, 1, 2))).tolist() for position in range(3)]
    assert kept == [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]


def test_nothing_is_recorded() -> None:
    x = torch.ones(4, requires_grad=True)
    assert not convert(x, "R", Shard.along((4,), 0, (3, 1)), Group(None, 2, 0, (0, 1))).requires_grad


@pytest.mark.parametrize(
    ("shape", "source", "target", "message"),
    [
        (
            (2, 5),
            Shard.along((4, 5), 0, (3, 1)),
            "R",
            "rank 7 holds a value of shape [2, 5]; its layout says [3, 5]",
        ),
        (
            (4, 5),
            "R",
            Shard.along((5, 5), 0, (3, 2)),
            "a value of shape [4, 5] cannot become one of shape [5, 5]",
        ),
    ],
)
def test_a_value_that_is_not_what_its_layout_says(shape: Any, source: Kind, target: Kind, message: str) -> None:
    with pytest.raises(VerificationError) as error:
        convert(torch.zeros(shape), source, target, Group(None, 2, 0, (7, 8)))
    assert str(error.value) == message


def test_a_shard_whose_numbers_do_not_fit() -> None:
    with pytest.raises(VerificationError) as error:
        Shard((4, 24), 1, 3, (Segment(1, (5, 2), 1),), 1)
    assert str(error.value) == "dim 1 of shape [4, 24] is not 3 x 7 x 1"
    with pytest.raises(VerificationError) as error:
        Shard((4, 4), 1, 1, (Segment(1, (1, 1), 1), Segment(2, (1,), 1)), 1)
    assert str(error.value) == "the segments of a dim must be sharded over the same positions"


@st.composite
def any_shard(draw: Any) -> Shard:
    small = st.integers(1, 3)
    lengths = st.tuples(*[st.integers(0, 3)] * draw(small))
    segments = tuple(Segment(draw(small), draw(lengths), draw(small)) for _ in range(draw(small)))
    lead, trail, middle = draw(small), draw(small), sum(segment.size for segment in segments)
    before, after = draw(st.lists(small, max_size=2)), draw(st.lists(small, max_size=2))
    return Shard((*before, lead * middle * trail, *after), len(before), lead, segments, trail)


@settings(max_examples=150, deadline=None)
@given(any_shard())
def test_slicing_and_padding_any_shard(shard: Shard) -> None:
    whole, size = torch.randn(shard.shape), len(shard.segments[0].lengths)
    groups = [Group(None, size, position, tuple(range(size))) for position in range(size)]
    parts = [convert(whole, "R", shard, group) for group in groups]
    assert all(part.equal(part_of(whole, shard, position)) for position, part in enumerate(parts))
    assert [shard.local_shape(position) for position in range(size)] == [tuple(part.shape) for part in parts]
    padded = [convert(part, shard, "P", group) for part, group in zip(parts, groups, strict=True)]
    assert torch.stack(padded).sum(0).equal(whole)
