from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import whalepy
from tests.programs import program_of
from whalepy.program.analysis import Program, mark_iotas, producer
from whalepy.program.call import operator_name
from whalepy.program.layout import Operator

ROWS, LENGTH, WIDTH, HIDDEN = 3, 5, 8, 12


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Two equal layers, positions, a frozen parameter, a buffer, an operator with several results."""

    def __init__(self, scope: Any) -> None:
        super().__init__()
        self.scope = scope
        self.tokens, self.positions = nn.Embedding(11, WIDTH), nn.Embedding(16, WIDTH)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.frozen = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        self.register_buffer("scale", torch.ones(()))
        self.pair = nn.Linear(WIDTH, 8)
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1])) * self.frozen
        with self.scope:
            for layer in self.layers:
                x = layer(x)
        first, second = self.pair(nn.functional.dropout(x, 0.5)).split([3, 5], dim=-1)
        return (self.head(x).mean() + second.sum() + first.detach().sum()) * self.scale


@pytest.fixture(scope="module")
def scope() -> whalepy.replicate:
    return whalepy.replicate(2)


@pytest.fixture(scope="module")
def program(scope: whalepy.replicate) -> Program:
    return program_of(Net(scope), {"tokens": torch.zeros(ROWS, LENGTH, dtype=torch.long)})


def named(program: Program, name: str) -> int:
    """The operator of a parameter, buffer or input."""
    places = {p.name: p.node for p in program.captured.placeholders}
    return next(i for i, op in enumerate(program.operators) if op.name == places[name])


def all_of(program: Program, target: str) -> list[int]:
    return [i for i, op in enumerate(program.operators) if op.target == target]


def leaves(program: Program, operator: int, result: int = 0) -> list[tuple[int, ...]]:
    return [program.axes.leaves(dim) for dim in program.dims[operator][result]]


# -- axes


def test_rows_are_the_batch_axis_throughout(program: Program) -> None:
    assert leaves(program, named(program, "kwargs['tokens']"))[0] == (program.batch,)
    for target in ("aten.linear", "aten.relu", "aten.dropout"):
        assert all(leaves(program, i)[0] == (program.batch,) for i in all_of(program, target)), target


def test_the_width_is_one_axis_and_the_hidden_units_of_each_layer_are_their_own(program: Program) -> None:
    weights = {name: leaves(program, named(program, name)) for name in WEIGHTS}
    (width,) = weights["tokens.weight"][1]
    (first,), (second,) = weights["layers.0.up.weight"][0], weights["layers.1.up.weight"][0]
    (vocabulary,) = weights["tokens.weight"][0]
    assert weights == {
        "tokens.weight": [(vocabulary,), (width,)],
        "layers.0.up.weight": [(first,), (width,)],
        "layers.0.down.weight": [(width,), (first,)],
        "layers.1.up.weight": [(second,), (width,)],
        "layers.1.down.weight": [(width,), (second,)],
    }
    assert len({width, first, second, vocabulary}) == 4


WEIGHTS = ("tokens.weight", *(f"layers.{i}.{name}.weight" for i in range(2) for name in ("up", "down")))


@pytest.mark.parametrize(
    ("name", "dim", "of_class"),
    [
        ("kwargs['tokens']", 0, "kwargs['tokens']:0"),
        ("tokens.weight", 0, "tokens.weight:0"),
        ("tokens.weight", 1, "frozen:0"),  # the first parameter that has an axis names it
        ("layers.0.up.weight", 0, "layers.*.up.weight:0"),
        ("layers.1.up.weight", 0, "layers.*.up.weight:0"),  # blocks fold
        ("layers.1.up.weight", 1, "frozen:0"),
        ("positions.weight", 0, "positions.weight:0"),
    ],
)
def test_classes_of_axes(program: Program, name: str, dim: int, of_class: str) -> None:
    (axis,) = leaves(program, named(program, name))[dim]
    assert program.classes[axis] == of_class


def test_a_part_of_a_dim_is_named_by_its_place_in_it() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).split(8, dim=-1)
            heads = [part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k, v)]
            return nn.functional.scaled_dot_product_attention(*heads).sum()

    program = program_of(Fused(), (torch.zeros(2, 5, 8),))
    parts = leaves(program, named(program, "qkv.weight"))[0]
    assert [program.axes.size(axis) for axis in parts] == [3, 2, 4]
    assert [program.classes[axis] for axis in parts] == ["qkv.weight:0", "qkv.weight:0.1", "qkv.weight:0.2"]


def test_a_dim_that_comes_apart_in_unequal_parts_is_their_concatenation(program: Program) -> None:
    ((whole,),) = leaves(program, named(program, "pair.bias"))
    parts = program.axes.parts(whole)
    assert parts is not None
    assert [program.axes.size(axis) for part in parts for axis in part] == [3, 5]
    assert whole not in program.classes  # no axis stands in both parts: it cannot be cut
    assert program.axes.shardable_inside(whole) == ()


# -- operators


def test_operators_are_the_nodes_that_yield_tensors_and_the_output(program: Program) -> None:
    assert [op.name for op in program.operators] == [node.name for node in program.nodes]
    assert [program.positions[node] for node in program.nodes] == list(range(len(program.nodes)))
    assert program.operators[-1].kind == "output"
    (loss,) = program.operators[-1].operands
    assert program.operators[loss[0]].target == "aten.mul"
    assert not any(op.target.endswith("getitem") for op in program.operators)


def test_a_tied_parameter_is_one_operator(program: Program) -> None:
    parameters = [program.placeholder(i).name for i, op in enumerate(program.operators) if op.kind == "parameter"]
    assert "head.weight" not in parameters
    assert len(parameters) == len(set(parameters)) == 5 + 2 * 4


def test_operands_name_their_producer_and_its_result(program: Program) -> None:
    (split,) = all_of(program, "aten.split_with_sizes")
    ((source, result),) = program.operators[split].operands
    assert (program.nodes[source], result) == (program.nodes[split].args[0], 0)
    assert program.operators[source].target == "aten.linear"
    assert len(program.dims[split]) == 2
    users = {r: op.target for op in program.operators for i, r in op.operands if i == split}
    assert users == {0: "aten.detach", 1: "aten.sum"}


def test_producer_looks_through_getitem(program: Program) -> None:
    items = [node for node in program.captured.graph.graph.nodes if operator_name(node.target).endswith("getitem")]
    (split,) = all_of(program, "aten.split_with_sizes")
    assert sorted(producer(item)[1] for item in items) == [0, 1]
    assert {producer(item)[0] for item in items} == {program.nodes[split]}
    assert producer(program.nodes[split]) == (program.nodes[split], 0)


FLOWS = [
    ("tokens.weight", True),
    ("frozen", False),  # takes no gradient
    ("scale", False),  # nor does a buffer
    ("kwargs['tokens']", False),
]


@pytest.mark.parametrize(("name", "flows"), FLOWS)
def test_gradients_of_leaves(program: Program, name: str, flows: bool) -> None:
    assert program.operators[named(program, name)].result_grad == (flows,)


@pytest.mark.parametrize(
    ("target", "operands", "results"),
    [
        ("aten.linear", (True, True, True), (True,)),
        ("aten.embedding", (True, False), (True,)),  # indices take none
        ("aten.split_with_sizes", (True,), (True, True)),
        ("aten.detach", (True,), (False,)),  # ends here
        ("aten.arange", (), (False,)),
    ],
)
def test_gradients_of_operators(
    program: Program, target: str, operands: tuple[bool, ...], results: tuple[bool, ...]
) -> None:
    op = program.operators[all_of(program, target)[0]]
    assert (op.operand_grad, op.result_grad) == (operands, results)


def test_costs_are_those_of_the_example(program: Program) -> None:
    op = program.operators[all_of(program, "aten.linear")[0]]
    assert op.result_bytes == (ROWS * LENGTH * HIDDEN * 4,)
    assert op.flops == 2 * ROWS * LENGTH * WIDTH * HIDDEN
    assert sorted(program.hints.values()) == [ROWS, LENGTH]


def options_of(program: Program, op: Operator) -> dict[str, tuple[list[int | None], list[int | None]]]:
    """By class: the dim that is cut in each operand and result."""
    return {
        program.classes[way.axis]: tuple([p and p.dim for p in places] for places in (way.inputs, way.outputs))
        for way in op.options
    }  # type: ignore[return-value]


def test_an_operator_can_be_cut_along_each_of_its_axes(program: Program) -> None:
    up = options_of(program, program.operators[all_of(program, "aten.linear")[0]])
    assert up.pop("frozen:0") == ([2, 1, None], [None])  # contracted: a partial sum
    assert up.pop("layers.*.up.weight:0") == ([None, 0, 0], [2])
    assert up.pop("kwargs['tokens']:0") == ([0, None, None], [0])
    assert list(up.values()) == [([1, None, None], [1])]  # the sequence


def test_additive_and_random_operators(program: Program) -> None:
    assert program.operators[all_of(program, "aten.linear")[0]].additive == {2}
    assert {op.target for op in program.operators if op.random} == {"aten.dropout"}


def test_operators_know_their_scope_and_line(program: Program, scope: whalepy.replicate) -> None:
    inside = [op for op in program.operators if op.scope]
    assert {op.scope for op in inside} == {(scope.id,)}
    assert [op.target for op in inside] == ["aten.linear", "aten.relu", "aten.linear", "aten.add"] * 2
    assert {op.where.partition(":")[0] for op in program.operators if op.kind == "call"} == {"test_analysis.py"}
    assert {op.where for op in program.operators if op.kind == "parameter"} == {""}


def test_an_operator_without_a_rule_has_no_options() -> None:
    program = program_of(_Unruled(), (torch.zeros(4, 3),))
    op = program.operators[all_of(program, "whalepy_analysis.halved")[0]]
    assert (op.has_rule, op.options) == (False, ())
    # nothing says that its rows are those of the input
    assert leaves(program, all_of(program, "whalepy_analysis.halved")[0])[0] != (program.batch,)


@torch.library.custom_op("whalepy_analysis::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    return x / 2


@halved.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class _Unruled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return (halved(x) * self.weight).sum()


# -- values that count

COUNTS: list[tuple[Callable[[], Tensor], int | None]] = [
    (lambda: torch.arange(6), 0),
    (lambda: torch.arange(0, 6, 1), 0),
    (lambda: torch.arange(1, 6), None),  # does not begin at its index
    (lambda: torch.arange(0, 12, 2), None),
    (lambda: torch.arange(6.0), None),  # a float indexes nothing
    (lambda: torch.arange(6).float(), None),
    (lambda: torch.arange(6).int(), 0),
    (lambda: torch.arange(6).unsqueeze(0), 1),
    (lambda: torch.arange(6).unsqueeze(1), 0),
    (lambda: torch.arange(6).view(1, 1, 6, 1), 2),
    (lambda: torch.arange(6).view(2, 3), None),
    (lambda: torch.arange(6).unsqueeze(0).squeeze(0), 0),
    (lambda: torch.arange(6) + 0, 0),
    (lambda: torch.arange(6) + 1, None),
    (lambda: torch.arange(6) * 2, None),
    (lambda: torch.zeros(6, dtype=torch.long), None),
]


@pytest.mark.parametrize(("make", "dim"), COUNTS)
def test_what_counts_along_a_dim(make: Callable[[], Tensor], dim: int | None) -> None:
    graph = make_fx(make, tracing_mode="fake")().graph
    mark_iotas(graph)
    (result,) = graph.find_nodes(op="output")[0].all_input_nodes
    assert result.meta.get("iota") == dim
