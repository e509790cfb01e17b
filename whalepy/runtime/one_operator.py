"""One operator as a program of its own, run on every position of small levels within one process.

Each tensor argument is a leaf that comes in the very layout the operator's mode asks for; results leave in the layout
the mode gives. So no bridge runs: what is compared with the whole operator is its rule and its local kernel alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from threading import Barrier
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from whalepy.planner.decide import Cut, Decisions
from whalepy.program.analysis import Program, analyse
from whalepy.program.capture import Captured
from whalepy.program.capture_placeholders import Placeholder
from whalepy.program.layout import REPLICATED, Layout, Mode, Operator, gradient_kind, operand_type, result_type
from whalepy.rewrite.bindings import MoveBinding
from whalepy.rewrite.rewrite import Rewritten, rewrite
from whalepy.rewrite.terms import moves
from whalepy.runtime.extents import Binder, Coordinates, Extents, Grid, StepSizes
from whalepy.runtime.groups import Pending
from whalepy.runtime.kernels import Shard, convert

Parts = dict[Coordinates, Tensor]
SIZES = StepSizes({}, {}, {})


class Meeting:
    """Where the threads that play one level lay down a tensor each and take up all of them."""

    def __init__(self, size: int) -> None:
        self.barrier = Barrier(size)
        self.table: dict[int, Tensor] = {}

    def gather(self, position: int, x: Tensor) -> Tensor:
        """What every position brought, stacked."""
        self.table[position] = x
        self.barrier.wait(timeout=60)
        everyone = torch.stack([self.table[p] for p in sorted(self.table)])
        self.barrier.wait(timeout=60)
        return everyone


@dataclass(frozen=True)
class Seat:
    """One position of a level: what a group offers to kernels, over the threads of this process."""

    position: int
    size: int
    meeting: Meeting

    @property
    def ranks(self) -> tuple[int, ...]:
        """The positions."""
        return tuple(range(self.size))

    def all_reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        """Reduce `x` in place over the positions."""
        self.start_all_reduce(x, op)

    def start_all_reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM) -> Pending:
        """The same, done at once."""
        everyone = self.meeting.gather(self.position, x.clone())
        x.copy_(everyone.amax(0) if op == dist.ReduceOp.MAX else everyone.sum(0))
        return Pending(None, lambda: x)


@dataclass(frozen=True)
class OneOperator:
    """The program of one call, and the values of its leaves."""

    program: Program
    values: tuple[Tensor, ...]

    @property
    def index(self) -> int:
        """Index of the call among the operators."""
        return next(i for i, op in enumerate(self.program.operators) if op.kind == "call")

    @property
    def operator(self) -> Operator:
        """The call as the planner sees it."""
        return self.program.operators[self.index]

    @property
    def outputs(self) -> tuple[tuple[int, int], ...]:
        """(operator, result) of every output of the graph."""
        return self.program.operators[-1].operands


def one_operator(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> OneOperator:
    """The program of one call. Every tensor is a leaf; those that require a gradient get one."""
    graph = fx.Graph()
    leaves: list[tuple[fx.Node, Tensor]] = []
    mode = FakeTensorMode()

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(f"x{len(leaves)}")
        node.meta["val"] = mode.from_tensor(value.detach())
        leaves.append((node, value))
        return node

    fx_args, fx_kwargs = pytree.tree_map(leaf, (tuple(args), dict(kwargs)))
    call = graph.call_function(target, fx_args, fx_kwargs)
    fake_args, fake_kwargs = map_arg((fx_args, fx_kwargs), lambda node: node.meta["val"])
    with mode, torch.no_grad():
        call.meta["val"] = target(*fake_args, **fake_kwargs)
    graph.output(tuple(_members(graph, call)))
    program = analyse(_captured(graph, leaves), {})
    return OneOperator(program, tuple(value.detach() for _, value in leaves))


def _members(graph: fx.Graph, call: fx.Node) -> Iterator[fx.Node]:
    value = call.meta["val"]
    if isinstance(value, Tensor):
        yield call
        return
    for i, member in enumerate(value):
        if isinstance(member, Tensor):
            item = graph.call_function(_member, (call, i))
            item.meta["val"] = member
            yield item


def _member(values: Any, i: int) -> Any:
    return values[i]


_member.__name__ = "getitem"


def _captured(graph: fx.Graph, leaves: Sequence[tuple[fx.Node, Tensor]]) -> Captured:
    output = next(iter(graph.find_nodes(op="output")))
    return Captured(
        fx.GraphModule({}, graph),
        tuple(Placeholder(node.name, "parameter", node.name, value, None) for node, value in leaves),
        results=len(output.all_input_nodes),
        mutations=(),
        in_spec=pytree.tree_structure(()),
        output=None,
        ties={},
        batch_inputs=(),
        inputs=(),
        guards=(),
        warnings=(),
    )


@dataclass(frozen=True)
class Trial:
    """One operator in chosen modes at chosen shares."""

    one: OneOperator
    shares: tuple[tuple[float, ...], ...]
    """Per level: weights by position."""
    modes: tuple[Mode, ...]
    """Per level; the cut of level i is cut i."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Positions per level."""
        return tuple(map(len, self.shares))

    @property
    def coordinates(self) -> tuple[Coordinates, ...]:
        """Every position, outer level first."""
        return tuple(product(*map(range, self.sizes)))

    @cached_property
    def cuts(self) -> tuple[Cut, ...]:
        """The cut of each level."""
        return tuple(Cut(level, weights, True) for level, weights in enumerate(self.shares))

    @cached_property
    def rewritten(self) -> Rewritten:
        """The program that all positions run."""
        program, one = self.one.program, self.one
        whole = (REPLICATED,) * len(self.shares)
        modes = tuple(self.modes if i == one.index else whole for i in range(len(program.operators)))
        read = {op.name: self.leaf_layout(i) for i, op in enumerate(program.operators) if op.kind == "parameter"}
        decisions = Decisions(
            mesh=self.sizes, cuts=self.cuts, modes=modes, read=read, stored=read, row_cuts=(None,) * len(self.shares)
        )
        return rewrite(program, decisions, lambda i: self.result_layout(one.outputs[i][1]))

    def leaf_layout(self, leaf: int) -> Layout:
        """The layout in which the operator wants a leaf."""
        op = self.one.operator
        k = [producer for producer, _ in op.operands].index(leaf)
        return tuple(operand_type(op, mode, k) for mode in self.modes)

    def result_layout(self, r: int) -> Layout:
        """The layout of a result."""
        return tuple(result_type(self.one.operator, mode, r) for mode in self.modes)

    def binder(self, at: Coordinates, meetings: Mapping[tuple[int, Coordinates], Meeting] | None = None) -> Binder:
        """Evaluates the bindings of one position."""
        seats: list[Any] = [
            Seat(position, self.sizes[level], meetings[level, at[:level] + at[level + 1 :]] if meetings else Meeting(1))
            for level, position in enumerate(at)
        ]
        return Binder(Grid(self.sizes, self.cuts, (None,) * len(self.shares)), at, seats, seed=0)

    def meetings(self) -> dict[tuple[int, Coordinates], Meeting]:
        """One meeting per level and coordinates on the others."""
        return {
            (level, at[:level] + at[level + 1 :]): Meeting(self.sizes[level])
            for at in self.coordinates
            for level in range(len(self.shares))
        }

    def distribute(self, value: Tensor, key: tuple[int, int], layout: Layout) -> Parts:
        """What each position holds of a value: slices, copies, or random addends of it."""
        parts = dict.fromkeys(self.coordinates, value)
        for _, binding in moves(self.one.program, key, ("R",) * len(layout), layout):
            parts = {at: self._part(part, binding, at) for at, part in parts.items()}
        return parts

    def _part(self, value: Tensor, binding: MoveBinding, at: Coordinates) -> Tensor:
        binder = self.binder(at)
        target = binder.move(binding, _extents(binder)).target
        if target == "P":
            return addend(value, at[binding.level], self.sizes[binding.level], binding.level)
        return convert(value, "R", target, binder.groups[binding.level])

    def combine(self, parts: Parts, key: tuple[int, int], layout: Layout) -> Parts:
        """The whole value as each position would come to see it: shards end to end, partial sums summed."""
        for _, binding in moves(self.one.program, key, layout, ("R",) * len(layout)):
            addends = {at: self._addend(part, binding, at) for at, part in parts.items()}
            parts = {at: self._sum(addends, binding.level, at) for at in parts}
        return parts

    def _sum(self, addends: Parts, level: int, at: Coordinates) -> Tensor:
        line = [addends[(*at[:level], p, *at[level + 1 :])] for p in range(self.sizes[level])]
        return torch.stack(line).sum(0, dtype=line[0].dtype if line[0].dtype != torch.bool else None).to(line[0].dtype)

    def _addend(self, part: Tensor, binding: MoveBinding, at: Coordinates) -> Tensor:
        """A shard as a zero-padded whole value; a partial sum as it is."""
        binder = self.binder(at)
        source = binder.move(binding, _extents(binder)).source
        return convert(part, source, "P", binder.groups[binding.level]) if isinstance(source, Shard) else part


def _extents(binder: Binder) -> Extents:
    return Extents(binder.grid, binder.coordinates, SIZES)


def gradients_of(layout: Layout) -> Layout:
    """How the gradient of a value in this layout lies."""
    return tuple(gradient_kind(kind) for kind in layout)


def addend(value: Tensor, position: int, count: int, seed: int) -> Tensor:
    """One of `count` random tensors that add up to `value`."""

    def noise(p: int) -> Tensor:
        generator = torch.Generator().manual_seed(97 * seed + p)
        return torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)

    return noise(position) if position else value - sum((noise(p) for p in range(1, count)), torch.zeros_like(value))
