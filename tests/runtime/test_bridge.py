from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear

from tests.pool import Pool
from whalepy.runtime.bridge import Move, Type, gradient_kind, move_between, value_kind
from whalepy.runtime.groups import Group, make_groups
from whalepy.runtime.kernels import Kind, Segment, Shard

SHAPE = (8, 6)


def types(first: Any, second: Any) -> list[Type]:
    """Every type; the arguments divide 8 and 3."""
    fused = Shard(SHAPE, 1, 2, (Segment(1, second, 1),), 1)
    return ["R", "B", "P", Shard.along(SHAPE, 0, first), fused]


WORLDS = [
    pytest.param(types((6, 2), (2, 1)), 2, id="3:1"),
    pytest.param(types((4, 4), (0, 3)), 2, id="equal, empty"),
    pytest.param(types((5, 2, 1), (1, 1, 1)), 3, id="5:2:1"),
]


def parts_of(whole: Tensor, kind: Kind, size: int) -> list[Tensor]:
    """What each position holds of a value of small integers."""
    if isinstance(kind, Shard):
        units = torch.arange(whole.shape[kind.dim]).view(kind.lead, -1, kind.trail)
        held = [part.reshape(-1) for part in units.split(kind.segments[0].lengths, 1)]
        return [whole.index_select(kind.dim, part) for part in held]
    if kind == "R":
        return [whole] * size
    others = [torch.randint(-9, 10, whole.shape).to(whole.dtype) for _ in range(size - 1)]
    return [whole - sum(others), *others]


def is_whole(parts: list[Tensor], whole: Tensor, kind: Kind) -> bool:
    """Whether these parts, by position, are `whole` lying as `kind` says."""
    if kind == "P":
        return torch.stack(parts).sum(0).equal(whole)
    return all(part.equal(expected) for part, expected in zip(parts, parts_of(whole, kind, len(parts)), strict=True))


def level() -> Group:
    (group,) = make_groups((dist.get_world_size(),), range(dist.get_world_size()), dist.get_rank())
    return group


Case = tuple[Type, Type, "dict[str, Kind]"]


def moved(cases: list[Any]) -> list[Any]:
    """This rank's value and gradient of each case; `changed` overrides fields of the Move."""
    group, results = level(), []
    for values, gradients, source, target, changed in cases:
        x = values[group.position].clone().requires_grad_()
        move = replace(move_between(source, target, group), **changed)
        y = move(x)
        assert (
            y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() or x.numel() == 0
        ) or not move.is_retype
        y.backward(gradients[group.position])
        results.append((y.detach(), x.grad))
    return results


def faults(workers: Pool, size: int, cases: list[Case]) -> list[str]:
    """The moves, of (source, target, changed fields), whose value or gradient is not what the types say."""
    values = [torch.randint(-9, 10, SHAPE).double() for _ in cases]
    gradients = [torch.randint(-9, 10, SHAPE).double() for _ in cases]
    sent = [
        (parts_of(v, value_kind(case[0]), size), parts_of(g, gradient_kind(case[1]), size), *case)
        for v, g, case in zip(values, gradients, cases, strict=True)
    ]
    ranks, found = workers.run(size, moved, sent), []
    for number, (source, target, _) in enumerate(cases):
        results, grads = zip(*(rank[number] for rank in ranks), strict=True)
        if not is_whole(list(results), values[number], value_kind(target)):
            found.append(f"{source} -> {target}: value")
        if not is_whole(list(grads), gradients[number], gradient_kind(source)):
            found.append(f"{source} -> {target}: gradient")
    return found


@pytest.mark.parametrize(("kinds", "size"), WORLDS)
def test_every_pair_of_types(workers: Pool, kinds: list[Type], size: int) -> None:
    assert faults(workers, size, [(*pair, {}) for pair in product(kinds, kinds)]) == []


@pytest.mark.parametrize(
    ("source", "target", "changed", "expected"),
    [
        # B's gradient is a partial sum, not replicated
        ("R", "B", {"gradient_source": "R"}, ["R -> B: gradient"]),
        ("B", "R", {"gradient_target": "R"}, ["B -> R: gradient"]),
        # P's gradient is replicated, not a partial sum: torch's own all-reduce takes it so
        ("P", "R", {"gradient_target": "P"}, ["P -> R: gradient"]),
        ("P", "R", {"gradient_source": "P"}, ["P -> R: gradient"]),
        ("R", "P", {"target": "R"}, ["R -> P: value"]),
    ],
)
def test_the_checker_notices_a_wrong_move(
    workers: Pool, source: Type, target: Type, changed: dict[str, Kind], expected: list[str]
) -> None:
    assert faults(workers, 2, [(source, target, changed)]) == expected


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> None:
        return None


def odd_gradients() -> tuple[Any, Any, Any]:
    """Gradients that are expanded, transposed, or absent on rank 1 alone."""
    group = level()
    move = move_between("R", "B", group)
    weight = torch.arange(6.0).view(3, 2).requires_grad_()
    (expanded,) = torch.autograd.grad(move(weight).sum(), weight)
    (transposed,) = torch.autograd.grad((move(weight).t() * torch.arange(6.0).view(2, 3)).sum(), weight)
    y = move(weight)
    y = NoGradient.apply(y) if group.position == 1 else y
    (absent,) = torch.autograd.grad(y.sum(), weight, allow_unused=True)
    return expanded.tolist(), transposed.tolist(), absent.tolist()


def test_odd_gradients(workers: Pool) -> None:
    expected = ([[2.0] * 2] * 3, [[0.0, 6.0], [2.0, 8.0], [4.0, 10.0]], [[1.0] * 2] * 3)
    assert workers.run(2, odd_gradients) == [expected] * 2


def traffic() -> list[tuple[int, int]]:
    group, counts = level(), []
    rows = Shard.along((4, 2), 0, (3, 1))
    for source, target in [("R", "B"), ("P", "R"), ("R", rows), (rows, "R"), ("B", rows), ("B", "P"), (rows, "B")]:
        x = torch.zeros(value_shape(source, group)).requires_grad_()
        group.sent_bytes = 0
        y = move_between(source, target, group)(x)
        forward = group.sent_bytes
        y.sum().backward()
        counts.append((forward, group.sent_bytes - forward))
    return counts


def value_shape(kind: Any, group: Group) -> tuple[int, ...]:
    return kind.local_shape(group.position) if isinstance(kind, Shard) else (4, 2)


def test_each_direction_communicates_once_or_not_at_all(workers: Pool) -> None:
    whole, long, short = 4 * 2 * 4, 3 * 2 * 4, 1 * 2 * 4  # bytes; a gather pads to the long part
    assert workers.run(2, traffic) == [
        [(0, whole), (whole, 0), (0, long), (long, 0), (0, 0), (0, 0), (long, mine)] for mine in (short, long)
    ]


def test_retype_shares_memory_and_records_only_what_it_must() -> None:
    group = Group(None, 2, 0, (0, 1))
    x = torch.ones(3, requires_grad=True)
    to_b, same = move_between("R", "B", group), move_between("R", "R", group)
    assert (to_b.is_retype, move_between("R", "P", group).is_retype) == (True, False)
    assert to_b(x).data_ptr() == x.data_ptr() and to_b(x).requires_grad and to_b(x) is not x
    assert same(x) is x and to_b(x.detach()) is not None and not to_b(x.detach()).requires_grad
    with torch.no_grad():
        assert to_b(x) is x
    ids = torch.tensor([1, 2, 3])
    assert move_between("R", Shard.along((3,), 0, (2, 1)), group)(ids).tolist() == [1, 2]


def test_group_of_one_returns_its_argument() -> None:
    group, x = Group(None, 1, 0, (0,)), torch.ones(3, requires_grad=True)
    kinds: list[Type] = ["R", "B", "P", Shard.along((3,), 0, (3,))]
    assert all(move_between(*pair, group)(x) is x for pair in product(kinds, kinds))


def test_second_derivatives_are_refused() -> None:
    move = Move(Group(None, 2, 0, (0, 1)), "R", "R", "R", "P")
    x = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad((move(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# Whole layers under each primitive, with unequal shares, against one process: written by hand as a program would be.


def mlp(x: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    return (linear(linear(x, up).relu(), down, bias) ** 2).sum()


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(8, 5), (4, 5), (3, 4), (3,)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def replicated(rows: tuple[int, ...]) -> list[Tensor]:
    """Data parallel: parameters R -> B, rows cut by share, the loss a partial sum."""
    group, (x, *parameters) = level(), tensors()
    mine = move_between("R", Shard.along((8, 5), 0, rows), group)(x)
    loss = mlp(mine, *(move_between("R", "B", group)(parameter) for parameter in parameters))
    return results(move_between("P", "R", group)(loss), [x, *parameters])


def split(hidden: tuple[int, ...]) -> list[Tensor]:
    """Tensor parallel: the hidden axis is cut; x R -> B in front, the contraction P -> R behind, the bias R -> P."""
    group, (x, up, down, bias) = level(), tensors()
    up_shard = move_between("R", Shard.along((4, 5), 0, hidden), group)(up)
    down_shard = move_between("R", Shard.along((3, 4), 1, hidden), group)(down)
    y = linear(linear(move_between("R", "B", group)(x), up_shard).relu(), down_shard)
    y = move_between("P", "R", group)(y + move_between("R", "P", group)(bias))
    return results((y**2).sum(), [x, up, down, bias])


def stored_sharded(rows: tuple[int, ...]) -> list[Tensor]:
    """As `replicated`, the first parameter gathered in front of its use (S -> B), the rows moved to the hidden axis."""
    group, (x, up, down, bias) = level(), tensors()
    size, by_rows = group.size, Shard.along((8, 4), 0, rows)
    stored = Shard.along((4, 5), 0, (4, *[0] * (size - 1)))
    up_used = move_between(stored, "B", group)(move_between("R", stored, group)(up))
    hidden = linear(move_between("R", Shard.along((8, 5), 0, rows), group)(x), up_used).relu()
    cut = (1, 3, *[0] * (size - 2))
    hidden = move_between(by_rows, Shard.along((8, 4), 1, cut), group)(hidden)
    y = linear(hidden, move_between("R", Shard.along((3, 4), 1, cut), group)(down))
    y = move_between("P", Shard.along((8, 3), 0, rows), group)(y) + move_between("R", "B", group)(bias)
    return results(move_between("P", "R", group)((y**2).sum()), [x, up, down, bias])


def results(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize(
    ("program", "shares"),
    [
        (replicated, (6, 2)),
        (replicated, (5, 0, 3)),
        (split, (3, 1)),
        (split, (1, 0, 3)),
        (stored_sharded, (6, 2)),
        (stored_sharded, (5, 2, 1)),
    ],
)
def test_programs_agree_with_one_process(workers: Pool, program: Any, shares: tuple[int, ...]) -> None:
    expected = results(mlp(*(leaves := tensors())), leaves)
    for result in workers.run(len(shares), program, shares):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12 * expected[0].item())
