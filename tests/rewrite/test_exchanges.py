"""What is collected for a rank is what its program does: it runs here alone, on groups that only take notes."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from tests import models
from tests.block import block
from tests.fuzz import random_decisions
from tests.programs import CASES, ResidualWithLoss, exchanges_of, made_case, program_of
from whalepy.rewrite.exchanges import SUMMED_IN, Exchange, group_of, placements
from whalepy.rewrite.rewrite import rewrite
from whalepy.rewrite.sizes import Held, local_shape
from whalepy.rewrite.terms import terms_of
from whalepy.rewrite.verify import verify
from whalepy.runtime.build import Analysed, subject_of
from whalepy.runtime.extents import Binder, Extents, Grid
from whalepy.runtime.groups import Blocks, Group, Pending
from whalepy.runtime.kernels import _REDUCED_IN, Segment, Shard, _shared
from whalepy.runtime.programs import example_sizes
from whalepy.runtime.reach import Reach, noting

Note = tuple[int, str, str, tuple[int, ...], tuple[int, ...]]  # level, collective, dtype, sends, receives


@dataclass(eq=False)
class NotingGroup(Group):
    """Nothing moves: what arrives is zero. Every collective is noted as this rank issues it."""

    level: int = 0
    notes: list[Note] = field(default_factory=list[Note])

    @property
    def slots(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(range(self.size))

    def start_all_reduce(self, x: Tensor, op: Any = None) -> Pending:
        if x.numel():
            self._note("all-reduce", x, (x.numel(),) * self.size, (x.numel(),) * self.size)
        return Pending(None, lambda: x)

    def start_all_gather(self, flat: Tensor, sizes: Any) -> tuple[Pending, Blocks]:
        self._note("all-gather", flat, (flat.numel(),) * self.size, tuple(sizes))
        return Pending(None, lambda: flat.new_zeros(sum(sizes))), self.blocks(sizes)

    def start_reduce_scatter(self, buffer: Tensor, blocks: Blocks, dtype: torch.dtype) -> Pending:
        own = blocks.sizes[self.position]
        self._note("reduce-scatter", buffer, blocks.sizes, (own,) * self.size)
        return Pending(None, lambda: buffer.new_zeros(own, dtype=dtype))

    def start_exchange(self, buffer: Tensor, sends: Blocks, receives: Blocks) -> Pending:
        self._note("all-to-all", buffer, sends.sizes, receives.sizes)
        return Pending(None, lambda: buffer.new_zeros(receives.total))

    def _note(self, kind: str, x: Tensor, sends: tuple[int, ...], receives: tuple[int, ...]) -> None:
        self.notes.append((self.level, kind, str(x.dtype).removeprefix("torch."), sends, receives))


class Checked(fx.Interpreter):
    """Runs a program; every value has the shape that its layout says."""

    def __init__(self, graph: fx.GraphModule, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__(graph)
        self.shapes = shapes

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.shapes:
            assert tuple(value.shape) == self.shapes[n.name], n.name
        return value


def notes_of(made: Analysed, coordinates: tuple[int, ...]) -> list[Note]:
    """What the rank at these coordinates issues in a forward and a backward."""
    decisions, program = made.decisions, made.program
    mesh, ranks = decisions.mesh, range(prod(decisions.mesh))
    notes: list[Note] = []
    groups = [
        NotingGroup(None, size, at, group_of(level, coordinates, mesh, ranks), level=level, notes=notes)
        for level, (size, at) in enumerate(zip(mesh, coordinates, strict=True))
    ]
    sizes = example_sizes(program, decisions)(coordinates)
    assert isinstance(sizes, Extents)
    shapes = {
        name: local_shape(terms_of(program, key, layout), sizes)
        for name, (key, layout) in placements(made.rewritten).items()
    }
    nodes = list(made.rewritten.graph.graph.find_nodes(op="placeholder"))
    leading = [
        place.value if place.kind == "constant" else _value(node.meta["val"], shapes[node.name], place)
        for node, place in zip(nodes, program.captured.placeholders, strict=False)
    ]
    binder = Binder(Grid(mesh, decisions.cuts, decisions.row_cuts), coordinates, groups, 0)
    values = binder.values(made.rewritten.bindings, sizes.sizes)
    reach = Reach() if binder.leaves_empty(made.rewritten.bindings, sizes.sizes) else None
    with noting(reach):
        loss = pytree.tree_leaves(Checked(made.rewritten.graph, shapes).run(*leading, *values))[0]
    (loss if reach is None else _reaching_all(loss, reach)).backward()
    return notes


def _reaching_all(loss: Tensor, reach: Reach) -> Tensor:
    """As `Reach.tie` makes it where another rank reaches every bridge."""
    return sum((nothing.sum().to(loss.dtype) for _, nothing in reach.ends), loss)


def _value(like: Tensor, shape: tuple[int, ...], place: Any) -> Tensor:
    if not like.dtype.is_floating_point:
        return torch.zeros(shape, dtype=like.dtype)
    trained = place.value is not None and place.value.requires_grad
    return torch.rand(shape, dtype=like.dtype, requires_grad=trained)


def as_note(exchange: Exchange) -> Note:
    return exchange.level, exchange.kind, exchange.dtype, exchange.sends, exchange.receives


@pytest.mark.parametrize("name", CASES)
def test_a_rank_issues_what_is_collected_for_it(name: str) -> None:
    made = made_case(name)
    collected = exchanges_of(made)
    for rank, coordinates in enumerate(product(*map(range, made.decisions.mesh))):
        assert notes_of(made, coordinates) == [as_note(exchange) for exchange in collected[rank]]


MESHES = [(2,), (3,), (2, 2), (2, 3)]
FUZZED = {
    "block": (lambda: (block()[0], [block()[1]]), range(16)),
    "gpt2": (lambda: models.gpt2(layers=1), range(12)),
    "bert": (lambda: models.bert(layers=1), range(12)),
    "channels": (lambda: (ResidualWithLoss(), models.residual()[1]), range(12)),
}
SLOW = {"gpt2", "bert", "channels"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in FUZZED])
def test_random_plans_issue_what_is_collected(name: str) -> None:
    make, seeds = FUZZED[name]
    model, batches = make()
    program = program_of(model, batches[0])
    subject = subject_of(program)
    kinds: set[str] = set()
    for seed in seeds:
        mesh = MESHES[seed % len(MESHES)]
        decisions, _ = random_decisions(mesh, seed)(subject, [1.0] * prod(mesh))
        made = Analysed(program, decisions, rewrite(program, decisions))
        collected = exchanges_of(made)
        verify(collected)
        for rank, coordinates in enumerate(product(*map(range, mesh))):
            assert notes_of(made, coordinates) == [as_note(exchange) for exchange in collected[rank]], (seed, rank)
        kinds.update(exchange.kind for exchange in collected[0])
    assert kinds == {"all-reduce", "all-gather", "reduce-scatter", "all-to-all"}


def test_reductions_are_counted_in_the_dtype_they_run_in() -> None:
    assert SUMMED_IN == _REDUCED_IN


# -- counts of what positions share, against those of the kernels

FUSED = ((1, (2, 1), 4), (2, (2, 1), 2))  # two parts of unequal size, each with the cut axis of size 3
SHARDS = [
    Held((6, 24), 0, 1, ((1, (4, 2), 1),), 1),
    Held((6, 24), 0, 1, ((1, (1, 5), 1),), 1),
    Held((6, 24), 0, 2, ((1, (3, 0), 1),), 1),
    Held((6, 24), 1, 1, FUSED, 1),
    Held((6, 24), 1, 2, ((1, (3, 1), 1),), 3),
    Held((6, 24), 1, 1, ((1, (5, 3), 1),), 3),
]


@pytest.mark.parametrize(("one", "other"), list(product(SHARDS, SHARDS)))
def test_what_two_positions_share(one: Held, other: Held) -> None:
    a, b = (Shard(h.shape, h.dim, h.lead, tuple(Segment(*s) for s in h.segments), h.trail) for h in (one, other))
    for position, elsewhere in product(range(2), range(2)):
        assert one.elements(position) == a.sizes[position]
        if one.dim == other.dim:
            slab = prod(one.shape) // one.shape[one.dim]
            assert one.shared(position, other, elsewhere) == slab * len(_shared(a, position, b, elsewhere))
        else:
            along = a.local_shape(position)[one.dim] * b.local_shape(elsewhere)[other.dim]
            assert one.shared(position, other, elsewhere) == along


@pytest.mark.parametrize(
    ("level", "coordinates", "group"),
    [(0, (1, 2), (2, 5)), (1, (1, 0), (4, 3, 5)), (1, (0, 2), (1, 0, 2))],  # ranks of a mesh that is not in order
)
def test_groups_of_a_mesh(level: int, coordinates: tuple[int, ...], group: tuple[int, ...]) -> None:
    assert group_of(level, coordinates, (2, 3), (1, 0, 2, 4, 3, 5)) == group
