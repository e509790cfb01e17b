"""The analysed program: axes of every value, and every operator with the ways in which it can be sharded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from whalepy.program.axes import Axes, Dim, Size, as_size
from whalepy.program.call import Call, results, sizes_of, tensor_operands
from whalepy.program.capture import Captured, Placeholder
from whalepy.program.capture_gradients import SHAPED_ALIKE
from whalepy.program.costs import flops_of, hinted, with_unknown
from whalepy.program.draws import draws
from whalepy.program.layout import Operator, OperatorKind
from whalepy.program.options import Dims, options, unify
from whalepy.program.rule_table import rule_of

Value = tuple[int, int]
"""(operator index, result index)."""


@dataclass(frozen=True)
class Program:
    """A captured graph with its axes and operators: the nodes that yield tensors, and the output, in order."""

    captured: Captured
    axes: Axes
    operators: tuple[Operator, ...]
    nodes: tuple[fx.Node, ...]
    """The graph node of each operator."""
    dims: tuple[tuple[Dims, ...], ...]
    """Per operator, per result, per dim."""
    batch: int | None
    """The batch axis."""
    classes: Mapping[int, str]
    """The class name of each axis: axes of repeated blocks share one."""
    hints: Mapping[sympy.Symbol, int]
    """Sizes in the example inputs."""
    positions: Mapping[fx.Node, int]
    """The operator index of each node."""

    def placeholder(self, operator: int) -> Placeholder:
        """The placeholder that a leaf operator stands for."""
        name = self.operators[operator].name
        return next(p for p in self.captured.placeholders if p.node == name)


def analyse(captured: Captured, hints: Mapping[sympy.Symbol, int]) -> Program:
    """The axes and operators of a captured graph, costed at the sizes of `hints`. The graph is read, not changed."""
    graph = captured.graph.graph
    mark_iotas(graph)
    axes = Axes(hints)
    likely = with_unknown(graph, hints)
    batch, dims = _leaf_dims(captured, axes)
    calls = [Call(node) for node in graph.nodes if node.op == "call_function" and not _is_getitem(node)]
    for node in graph.nodes:
        if node not in dims:
            dims[node] = _dims_of(node, dims, axes)
    if batch is not None:
        _match_rows(captured, batch, dims, axes)
    _unify_all(axes, calls, dims)
    nodes = tuple(n for n in graph.nodes if (results(n) and not _is_getitem(n)) or n.op == "output")
    place = {node: i for i, node in enumerate(nodes)}
    grads = _gradients(graph, captured)
    operators = tuple(_operator(node, axes, dims, place, grads, captured, hints, likely) for node in nodes)
    batch = None if batch is None else axes.find(batch)
    all_dims = tuple(dims[node] for node in nodes)
    classes = axis_classes(axes, operators, all_dims, captured)
    return Program(captured, axes, operators, nodes, all_dims, batch, classes, hints, place)


def _is_getitem(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def producer(node: fx.Node) -> tuple[fx.Node, int]:
    """The operator node and result index behind a tensor node (through getitem)."""
    if _is_getitem(node):
        source, index = node.args
        assert isinstance(source, fx.Node) and isinstance(index, int)
        members = source.meta["val"]
        return source, sum(isinstance(m, torch.Tensor) for m in members[:index])
    return node, 0


def mark_iotas(graph: fx.Graph) -> None:
    """Tag integer values that count 0, 1, ... along one dim, constant along the others: meta["iota"] is the dim."""
    for node in graph.nodes:
        counted = _iota_dim(node)
        if counted is not None:
            node.meta["iota"] = counted


_KEEPS_COUNTING = {"aten.to", "aten._to_copy", "aten.contiguous", "aten.clone", "aten.detach", "aten.alias"}
_MOVES_ONES = {"aten.unsqueeze", "aten.view", "aten.reshape", "aten._unsafe_view", "aten.squeeze"}


def _iota_dim(node: fx.Node) -> int | None:
    if node.op != "call_function":
        return None
    call = Call(node)
    if call.name == "aten.arange":
        start, step = call["start"] or 0, call["step"] or 1
        return 0 if start == 0 and step == 1 and not node.meta["val"].dtype.is_floating_point else None
    source = call.operands[0] if call.operands else None
    if source is None or "iota" not in source.meta or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    before, after = sizes_of(source.meta["val"]), sizes_of(node.meta["val"])
    if node.meta["val"].dtype.is_floating_point:
        return None
    if call.name in _KEEPS_COUNTING and before == after:
        return source.meta["iota"]
    if call.name == "aten.add" and len(call.operands) == 1 and call["other"] == 0:
        return source.meta["iota"]
    size = before[source.meta["iota"]]
    only = [d for d, s in enumerate(after) if s != 1]
    if call.name in _MOVES_ONES and [s for s in before if s != 1] == [size] and len(only) == 1:
        return only[0]
    return None


def _leaf_dims(captured: Captured, axes: Axes) -> tuple[int | None, dict[fx.Node, tuple[Dims, ...]]]:
    batch: int | None = None
    found: dict[fx.Node, tuple[Dims, ...]] = {}
    by_name = {p.node: p for p in captured.placeholders}
    for node in captured.graph.graph.find_nodes(op="placeholder"):
        values = results(node)
        if not values:
            found[node] = ()
            continue
        dims = [axes.dim(size) for size in sizes_of(values[0])]
        place = by_name[node.name]
        rows = captured.batch_inputs[place.leaf] if place.kind == "input" and place.leaf is not None else place.rows
        if rows is not None and dims[rows]:
            if batch is None:
                batch = dims[rows][0]
                axes.fix(batch)
            axes.match(dims[rows], (batch,))
        found[node] = (tuple(dims),)
    return batch, found


def _match_rows(captured: Captured, batch: int, dims: Mapping[fx.Node, tuple[Dims, ...]], axes: Axes) -> None:
    """Results that are read by rows have the batch axis there, even where no operator of this graph says so."""
    results = tensor_operands(captured.graph.graph.output_node())
    for node, rows in zip(results, captured.result_rows, strict=False):
        if rows is not None:
            source, r = producer(node)
            axes.match(dims[source][r][rows], (batch,))


def _dims_of(node: fx.Node, dims: Mapping[fx.Node, tuple[Dims, ...]], axes: Axes) -> tuple[Dims, ...]:
    if _is_getitem(node) and isinstance(node.meta.get("val"), torch.Tensor):
        source, index = producer(node)
        return (dims[source][index],)
    return tuple(tuple(axes.dim(size) for size in sizes_of(value)) for value in results(node))


def _unify_all(axes: Axes, calls: Iterable[Call], dims: Mapping[fx.Node, tuple[Dims, ...]]) -> None:
    """Apply every rule until nothing changes: a later operator may refine what an earlier one saw."""
    ruled = [(call, rule, {}) for call in calls if call.results and (rule := rule_of(call)) is not None]
    seen = -1
    while seen != axes.version:
        seen = axes.version
        for call, rule, counted in ruled:
            unify(axes, rule, [dims[operand][0] for operand in call.operands], dims[call.node], counted)


_CUTS_GRADIENTS = SHAPED_ALIKE | {"aten.detach", "aten.argmax"}


def _gradients(graph: fx.Graph, captured: Captured) -> dict[fx.Node, bool]:
    """Whether a gradient flows through each node."""
    trainable = {
        p.node for p in captured.placeholders if p.kind == "parameter" and p.value is not None and p.value.requires_grad
    }
    flows: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            flows[node] = node.name in trainable
            continue
        floating = any(v.dtype.is_floating_point or v.dtype.is_complex for v in results(node))
        cut = node.op == "call_function" and Call(node).name in _CUTS_GRADIENTS
        flows[node] = floating and not cut and any(flows[n] for n in node.all_input_nodes)
    return flows


def _operator(
    node: fx.Node,
    axes: Axes,
    dims: Mapping[fx.Node, tuple[Dims, ...]],
    place: Mapping[fx.Node, int],
    grads: Mapping[fx.Node, bool],
    captured: Captured,
    hints: Mapping[sympy.Symbol, int],
    likely: Mapping[sympy.Symbol, int],
) -> Operator:
    call = Call(node)
    sources = [producer(operand) for operand in call.operands]
    rule = rule_of(call) if node.op == "call_function" and _sizes_known(call, hints) else None
    ways = options(axes, rule, [dims[o][0] for o in call.operands], dims[node]) if rule is not None else ()
    values = call.results
    kinds: dict[str, OperatorKind] = {p.node: p.kind for p in captured.placeholders}
    kind: OperatorKind = "call" if node.op == "call_function" else kinds.get(node.name, "output")
    return Operator(
        name=node.name,
        target=call.name if node.op == "call_function" else node.op,
        kind=kind,
        operands=tuple((place[source], index) for source, index in sources),
        operand_grad=tuple(grads[operand] for operand in call.operands),
        result_grad=tuple(grads[node] and (v.dtype.is_floating_point or v.dtype.is_complex) for v in values),
        options=ways,
        additive=rule.additive if rule is not None else frozenset(),
        linear=rule.linear if rule is not None else (),
        result_bytes=tuple(hinted(sizes_of(v), likely) * v.element_size() for v in values)
        if node.op != "output"
        else (),
        flops=flops_of(call, likely) if node.op == "call_function" else 0,
        scope=tuple(node.meta.get("scope", ())),
        where=str(node.meta.get("where") or ""),
        has_rule=rule is not None,
        random=node.op == "call_function" and draws(call),
    )


def _sizes_known(call: Call, hints: Mapping[sympy.Symbol, int]) -> bool:
    """Whether the sizes of inputs tell those of all operands and results: where only the data do, nothing is cut."""
    sizes = [size for value in call.results for size in sizes_of(value)]
    sizes += [size for k in range(len(call.operands)) for size in call.sizes(k)]
    return all(isinstance(size, int) or size.free_symbols <= hints.keys() for size in sizes)


def axis_classes(
    axes: Axes, operators: Iterable[Operator], dims: Iterable[tuple[Dims, ...]], captured: Captured
) -> dict[int, str]:
    """A name per axis, from the first parameter or input that has it; numbers in paths become `*`, so blocks fold."""
    names = {p.node: p.name for p in captured.placeholders}
    ordered = sorted(zip(operators, dims, strict=True), key=lambda item: _KIND_ORDER.get(item[0].kind, 9))
    classes: dict[int, str] = {}
    for op, values in ordered:
        base = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", names.get(op.name, op.target))
        for value in values:
            for d, dim in enumerate(value):
                for t, axis in _named_axes(axes, dim):
                    classes.setdefault(axis, f"{base}:{d}" + (f".{t}" if t else ""))
    return classes


_KIND_ORDER = {"parameter": 0, "input": 1, "buffer": 2, "constant": 3}


def _named_axes(axes: Axes, dim: Dim) -> Iterable[tuple[int, int]]:
    for t, leaf in enumerate(axes.leaves(dim)):
        for axis in axes.shardable_inside(leaf):
            yield t, axis


def size_of(axes: Axes, axis: int) -> Size:
    """Size of an axis."""
    return as_size(axes.size(axis))
