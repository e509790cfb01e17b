"""Taskgraphs: a program cut into its stages, each a program of its own, and the values that cross between them.

Before:  embedding, block 0 | block 1, head, loss          one program, two stage scopes
After:   stage 0 gives block 0's result;  stage 1 takes it as an input of its own and gives the loss

What depends on no parameter (masks, positions) is computed again in every stage that reads it. A parameter belongs to
the first stage that reads it; later ones borrow it for a step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from whalepy.errors import AnnotationError
from whalepy.primitives import Primitive, scope_by_id
from whalepy.program.analysis import Program, Value, producer
from whalepy.program.axes import as_size
from whalepy.program.call import is_tensor, results
from whalepy.program.capture import Placeholder
from whalepy.program.functional_ops import known_size
from whalepy.program.layout import Operator

Rescope = Callable[[tuple[int, ...]], tuple[int, ...]]


@dataclass(frozen=True)
class Taskgraph:
    """The operators of one stage as a program: its outputs are its results, its new buffer values, what it gives."""

    program: Program
    received: Mapping[Value, int]
    """Values of other stages, by where they stand in the whole program -> the operator that stands for them here."""
    given: tuple[Value, ...]
    """Values that other stages read, by where they stand in the whole program, in the order of the outputs."""
    own: Mapping[Value, Value]
    """Where a value of the whole program stands in this one."""


@dataclass(frozen=True)
class Crossing:
    """A value that one stage gives and a later one reads; `learns` where a gradient comes back."""

    source: int
    target: int
    value: Value
    learns: bool


@dataclass(frozen=True)
class Lending:
    """A parameter that a stage owns and another one reads too."""

    owner: int
    borrower: int
    name: str
    learns: bool


@dataclass(frozen=True)
class Taskgraphs:
    """All stages of a program."""

    stages: tuple[Taskgraph, ...]
    crossings: tuple[Crossing, ...]
    lendings: tuple[Lending, ...]
    owners: Mapping[str, int]
    """Per parameter that is read: the stage that keeps it."""


def stages_in(program: Program) -> tuple[Primitive, ...]:
    """The stage scopes in an order in which data flows one way; none where the program is not cut.

    Of those that read nothing of each other comes first which the model enters first; so too of all where they read
    each other in a circle.
    """
    first: dict[Primitive, int] = {}
    for op, turn in zip(program.operators, turns(program), strict=True):
        for p in map(scope_by_id, op.scope if op.kind == "call" else ()):
            if p.kind == "stage":
                first[p] = min(first.get(p, turn), turn)
    entered = sorted(first, key=first.__getitem__)
    return _along_data(entered, _read_before(program, entered))


def _along_data(entered: Sequence[Primitive], reads: Mapping[Primitive, set[Primitive]]) -> tuple[Primitive, ...]:
    """The stages, each behind those that it reads from; as they are where that cannot be."""
    found: list[Primitive] = []
    left = list(entered)
    while left:
        ready = next((stage for stage in left if reads[stage] <= {stage, *found}), None)
        if ready is None:
            return tuple(entered)
        left.remove(ready)
        found.append(ready)
    return tuple(found)


def _read_before(program: Program, stages: Sequence[Primitive]) -> dict[Primitive, set[Primitive]]:
    """Per stage, those whose results it reads, directly or through others."""
    bits = {stage.id: 1 << k for k, stage in enumerate(stages)}
    free = independent(program)
    behind: list[int] = []
    reads = dict.fromkeys(stages, 0)
    for i, op in enumerate(program.operators):
        found = 0
        for k, _ in op.operands:
            found |= behind[k]
        inside = [scope for scope in op.scope if scope in bits] if op.kind == "call" and not free[i] else []
        for scope in inside:
            reads[scope_by_id(scope)] |= found
            found |= bits[scope]
        behind.append(found)
    return {stage: {other for other in stages if mask & bits[other.id]} for stage, mask in reads.items()}


def independent(program: Program, written: Collection[str] = ()) -> list[bool]:
    """Whether an operator depends on nothing but inputs, constants, and buffers that the program does not write.

    `written`: further buffers that are no constants, and parameters, by name.
    """
    written = {*program.captured.mutations, *written}
    found: list[bool] = []
    for i, op in enumerate(program.operators):
        if op.kind == "call":
            found.append(not op.random and all(found[k] for k, _ in op.operands))
        elif op.kind == "buffer":
            found.append(program.placeholder(i).name not in written)
        else:
            found.append(op.kind in ("input", "constant"))
    return found


def turns(program: Program) -> list[int]:
    """When the model ran each operator; one that a pass has made runs with its last operand."""
    found: list[int] = []
    for op, node in zip(program.operators, program.nodes, strict=True):
        found.append(node.meta.get("turn", max((found[i] for i, _ in op.operands), default=0)))
    return found


def taskgraphs(
    program: Program,
    stages: Sequence[Primitive],
    rescope: Rescope,
    owners: Mapping[str, int] | None = None,
) -> Taskgraphs:
    """The stages of a program, in the order of `stages`; `owners`: where parameters are already kept.

    Operators outside every stage belong to the stage before them, leading ones to the first; to an earlier stage that
    reads them, if there is one.
    Raises AnnotationError for a stage that reads from a later one.
    """
    return _Cutter(program, stages, rescope, dict(owners or {})).run()


@dataclass
class _Cutter:
    program: Program
    stages: Sequence[Primitive]
    rescope: Rescope
    owners: dict[str, int]
    read: dict[int, set[int]] = field(default_factory=dict[int, set[int]])
    """Per parameter operator, the stages that read it."""

    def run(self) -> Taskgraphs:
        count = len(self.stages)
        needs: list[_Needed] = []
        for stage in reversed(range(count)):  # a stage computes what those behind it read
            later = {key for need in needs for key in need.taken if self.stage_of[key[0]] == stage}
            needs.insert(0, self._needed(stage, later))
        received = [sorted(need.taken) for need in needs]
        for stage, need in enumerate(needs):
            for key in received[stage]:
                self._check_order(stage, key)
            if not self.owners:  # another program of the same model may do without a stage
                self._check_work(stage, need)
        self._own_parameters()
        given = [
            tuple(sorted({key for keys in received for key in keys if self.stage_of[key[0]] == stage}))
            for stage in range(count)
        ]
        made = tuple(self._taskgraph(s, needs[s], received[s], given[s]) for s in range(count))
        crossings = tuple(
            Crossing(self.stage_of[key[0]], stage, key, key in self.learning)
            for stage, keys in enumerate(received)
            for key in keys
        )
        return Taskgraphs(made, crossings, tuple(self._lendings()), self.owners)

    # -- what belongs where

    @cached_property
    def stage_of(self) -> dict[int, int]:
        """The stage of every operator that is not computed wherever it is read."""
        place = {primitive: k for k, primitive in enumerate(self.stages)}
        when = turns(self.program)
        inside = {
            i: place[p]
            for i, op in enumerate(self.program.operators)
            for p in map(scope_by_id, op.scope if op.kind == "call" else ())
            if p in place
        }
        entered = sorted((when[i], stage) for i, stage in inside.items())
        wanted = self._first_readers(inside)
        found: dict[int, int] = {}
        for i, op in enumerate(self.program.operators):
            if op.kind == "output":
                found[i] = len(self.stages) - 1
            elif op.kind == "call":
                at = bisect_left(entered, (when[i], -1))
                before = min(entered[at - 1][1] if at else 0, wanted[i])
                behind = [found[k] for k, _ in op.operands if k in found and not self.anywhere[k]]
                found[i] = inside.get(i, max([before, *behind]))
        for i, op in enumerate(self.program.operators):
            if op.kind == "buffer" and not self.anywhere[i]:
                found[i] = self._writer(i, found)
        return found

    def _first_readers(self, inside: Mapping[int, int]) -> list[int]:
        """Per operator, the first stage that reads its results, directly or through operators outside every stage."""
        found = [len(self.stages) - 1] * len(self.program.operators)
        for i in reversed(range(len(found))):
            if not self.anywhere[i]:
                for k, _ in self.program.operators[i].operands:
                    found[k] = min(found[k], inside.get(i, found[i]))
        return found

    def _writer(self, buffer: int, found: Mapping[int, int]) -> int:
        """The stage that gives a buffer its new value: where what is written is made."""
        captured, name = self.program.captured, self.program.placeholder(buffer).name
        if name not in captured.mutations:
            return self.owners[name]
        at = captured.results + captured.mutations.index(name)
        source, _ = self._output_keys[at]
        return found.get(source, len(self.stages) - 1)

    @cached_property
    def _output_nodes(self) -> list[Any]:
        return pytree.tree_leaves(self.program.nodes[-1].args)

    @cached_property
    def _output_keys(self) -> dict[int, Value]:
        """The value of each output that is a tensor, by position."""
        return {k: self._key(n) for k, n in enumerate(self._output_nodes) if isinstance(n, fx.Node) and is_tensor(n)}

    def _key(self, node: fx.Node) -> Value:
        source, r = producer(node)
        return self.program.positions[source], r

    @cached_property
    def anywhere(self) -> list[bool]:
        """Whether an operator depends on nothing but inputs and constants: it is computed wherever it is read."""
        return independent(self.program, self.owners)  # what another program writes is kept by its stage

    @cached_property
    def learning(self) -> set[Value]:
        """Values that a gradient of the results comes back to."""
        ops = self.program.operators
        results = range(self.program.captured.results)
        found: set[Value] = {self._output_keys[k] for k in results if k in self._output_keys}
        for i in reversed(range(len(ops))):
            op = ops[i]
            if op.kind == "call" and any((i, r) in found and g for r, g in enumerate(op.result_grad)):
                found.update(key for key, flows in zip(op.operands, op.operand_grad, strict=True) if flows)
        return {(i, r) for i, r in found if ops[i].result_grad[r]}

    def _needed(self, stage: int, given: Collection[Value]) -> _Needed:
        """Nodes that a stage computes, and values that it takes from others."""
        need = _Needed()
        waiting = [n for k, n in enumerate(self._output_nodes) if isinstance(n, fx.Node) and self._gives(k) == stage]
        waiting += [self._node_of(key) for key in given]
        while waiting:
            node = waiting.pop()
            if node in need.nodes:
                continue
            need.nodes.add(node)
            if self._is_known_size(node):
                continue
            if results(node) or is_tensor(node):
                key = self._key(node)
                if self._is_elsewhere(key[0], stage):
                    need.nodes.discard(node)
                    need.taken.setdefault(key, []).append(node)
                    continue
                if self.program.operators[key[0]].kind == "parameter":
                    self.read.setdefault(key[0], set()).add(stage)
            waiting.extend(node.all_input_nodes)
        return need

    def _is_elsewhere(self, i: int, stage: int) -> bool:
        kind = self.program.operators[i].kind
        return kind != "parameter" and not self.anywhere[i] and self.stage_of[i] != stage

    def _is_known_size(self, node: fx.Node) -> bool:
        """Whether a number follows from the sizes of the inputs, which every stage knows."""
        expr = getattr(getattr(node.meta.get("val"), "node", None), "expr", None)
        return node.op == "call_function" and expr is not None and expr.free_symbols <= set(self.program.hints)

    def _gives(self, position: int) -> int:
        """The stage that gives an output: results come from the last one, buffer values from where they are made."""
        last = len(self.stages) - 1
        if position < self.program.captured.results or position not in self._output_keys:
            return last
        source = self._output_keys[position][0]
        return last if self.anywhere[source] else self.stage_of.get(source, last)

    def _check_order(self, stage: int, key: Value) -> None:
        source = self.stage_of[key[0]]
        if source < stage:
            return
        op = self.program.operators[key[0]]
        reader = next(
            (o for i, o in enumerate(self.program.operators) if key in o.operands and self.stage_of.get(i) == stage), op
        )
        raise AnnotationError(
            f"{self.stages[stage]!r} ({self.stages[stage].at}) reads what a later stage, {self.stages[source]!r} "
            f"({self.stages[source].at}), computes ({op.target}, {op.where or 'unknown line'})",
            at=reader.where or self.stages[stage].at,
            fix="let data flow one way: do not enter a stage again after a later one whose results it would read",
        )

    def _check_work(self, stage: int, need: _Needed) -> None:
        """AnnotationError: a stage computes nothing that later ones, or the loss, need of it."""
        if any(n.op == "call_function" and not self._is_known_size(n) for n in need.nodes):
            return
        raise AnnotationError(
            f"{self.stages[stage]!r} has no operators of its own",
            at=self.stages[stage].at,
            fix="put a stage around operators that use parameters and that the loss depends on",
        )

    def _own_parameters(self) -> None:
        for i, stages in self.read.items():
            self.owners.setdefault(self.program.placeholder(i).name, min(stages))

    def _lendings(self) -> Iterable[Lending]:
        for i, stages in sorted(self.read.items()):
            name = self.program.placeholder(i).name
            for stage in sorted(stages - {self.owners[name]}):
                yield Lending(self.owners[name], stage, name, (i, 0) in self.learning)

    # -- one stage as a program

    def _taskgraph(self, stage: int, need: _Needed, received: Sequence[Value], given: Sequence[Value]) -> Taskgraph:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        captured = self.program.captured
        kept = [p for p in captured.placeholders if self._by_name.get(p.node) in need.nodes]
        for place in kept:
            node = self._by_name[place.node]
            copies[node] = graph.node_copy(node)
        places = list(kept)
        for k, key in enumerate(received):
            places.append(_received(graph, need.taken[key], f"received_{k}", copies))
        for node in captured.graph.graph.nodes:
            if node in need.nodes and node.op != "placeholder" and node not in copies:
                copies[node] = self._copied(graph, node, copies)
        outputs, mutations, count = self._outputs(stage, given, copies)
        end = graph.output(tuple(outputs))
        end.meta.update(self.program.nodes[-1].meta)
        module = fx.GraphModule(captured.graph, graph)
        made = replace(captured, graph=module, placeholders=tuple(places), results=count, mutations=mutations)
        return self._program(made, copies, end, need, received, given, stage)

    @cached_property
    def _by_name(self) -> dict[str, fx.Node]:
        return {n.name: n for n in self.program.captured.graph.graph.find_nodes(op="placeholder")}

    def _copied(self, graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
        if self._is_known_size(node):
            new = graph.call_function(known_size)
            new.meta.update(node.meta)
            return new
        for operand in node.all_input_nodes:
            if operand not in copies:
                raise AnnotationError(
                    f"a number that depends on the data of another stage is needed here ({operand.name})",
                    at=node.meta.get("where"),
                    fix="put the operators that compute it and those that use it into one stage",
                )
        return graph.node_copy(node, lambda n: copies[n])

    def _outputs(
        self, stage: int, given: Sequence[Value], copies: Mapping[fx.Node, fx.Node]
    ) -> tuple[list[Any], tuple[str, ...], int]:
        captured = self.program.captured
        last = stage == len(self.stages) - 1

        def own(item: Any) -> Any:
            return copies[item] if isinstance(item, fx.Node) else item

        found = [own(item) for item in self._output_nodes[: captured.results]] if last else []
        count = len(found)
        mutations: list[str] = []
        for k, name in enumerate(captured.mutations, captured.results):
            if self._gives(k) == stage:
                mutations.append(name)
                found.append(own(self._output_nodes[k]))
        found.extend(copies[self._node_of(key)] for key in given)
        return found, tuple(mutations), count

    def _node_of(self, key: Value) -> fx.Node:
        """A node that yields a value."""
        node = self.program.nodes[key[0]]
        if is_tensor(node):
            return node
        return next(user for user in node.users if is_tensor(user) and producer(user) == (node, key[1]))

    def _program(
        self,
        captured: Any,
        copies: Mapping[fx.Node, fx.Node],
        end: fx.Node,
        need: _Needed,
        received: Sequence[Value],
        given: Sequence[Value],
        stage: int,
    ) -> Taskgraph:
        whole = self.program
        leaves = [i for i, n in enumerate(whole.nodes) if n.op == "placeholder" and n in need.nodes]
        calls = [i for i, n in enumerate(whole.nodes) if n.op == "call_function" and n in need.nodes]
        own: dict[Value, Value] = {}
        nodes: list[fx.Node] = []
        operators: list[Operator] = []
        dims: list[Any] = []

        def add(op: Operator, node: fx.Node, value_dims: Any, keys: Iterable[tuple[Value, int]]) -> None:
            own.update({key: (len(operators), r) for key, r in keys})
            operands = tuple(own[key] for key in op.operands)
            operators.append(replace(op, name=node.name, operands=operands, scope=self.rescope(op.scope)))
            nodes.append(node)
            dims.append(value_dims)

        for i in leaves:
            add(whole.operators[i], copies[whole.nodes[i]], whole.dims[i], [((i, 0), 0)])
        taken: dict[Value, int] = {}
        for key in received:
            taken[key] = len(operators)
            op = _leaf(whole.operators[key[0]], key[1])
            add(op, copies[need.taken[key][0]], (whole.dims[key[0]][key[1]],), [(key, 0)])
        for i in calls:
            op = replace(whole.operators[i], scope=self._scope_in(stage, whole.operators[i].scope))
            add(op, copies[whole.nodes[i]], whole.dims[i], [((i, r), r) for r in range(len(op.result_grad))])
        keys = [self._key(n) for n in self._kept_outputs(captured, copies)] + list(given)
        op = replace(whole.operators[-1], operands=tuple(keys), operand_grad=self._flows(keys))
        add(op, end, whole.dims[-1], [])
        made = replace(
            whole,
            captured=captured,
            operators=tuple(operators),
            nodes=tuple(nodes),
            dims=tuple(dims),
            positions={node: k for k, node in enumerate(nodes)},
        )
        return Taskgraph(made, taken, tuple(given), own)

    def _scope_in(self, stage: int, scope: tuple[int, ...]) -> tuple[int, ...]:
        """The scopes of an operator as a stage computes it: another stage's levels are none of its own."""
        foreign = {p.id for k, p in enumerate(self.stages) if k != stage}
        at = next((k for k, own in enumerate(scope) if own in foreign), None)
        return scope if at is None else scope[:at]

    def _kept_outputs(self, captured: Any, copies: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
        """The tensors of the whole program among this stage's results and new buffer values."""
        whole = self.program.captured
        positions = [*range(whole.results)] if captured.results else []
        names = set(captured.mutations)
        positions += [k for k, name in enumerate(whole.mutations, whole.results) if name in names]
        return [self._output_nodes[k] for k in positions if k in self._output_keys]

    def _flows(self, keys: Iterable[Value]) -> tuple[bool, ...]:
        return tuple(self.program.operators[i].result_grad[r] for i, r in keys)


@dataclass
class _Needed:
    nodes: set[fx.Node] = field(default_factory=set[fx.Node])
    taken: dict[Value, list[fx.Node]] = field(default_factory=dict[Value, list[fx.Node]])
    """Values of other stages, and the nodes of the whole graph that stand for them."""


def _received(graph: fx.Graph, nodes: Collection[fx.Node], name: str, copies: dict[fx.Node, fx.Node]) -> Placeholder:
    new = graph.placeholder(name)
    first = next(iter(nodes))
    new.meta.update({key: first.meta[key] for key in ("val", "where") if key in first.meta})
    copies.update(dict.fromkeys(nodes, new))
    return Placeholder(new.name, "received", name, None, None)


def _leaf(op: Operator, r: int) -> Operator:
    """What stands for a value of another stage."""
    return Operator(
        name=op.name,
        target="placeholder",
        kind="received",
        operands=(),
        operand_grad=(),
        result_grad=(op.result_grad[r],),
        options=(),
        additive=frozenset(),
        linear=(),
        result_bytes=(op.result_bytes[r],),
        flops=0,
        scope=(),
        where=op.where,
        has_rule=False,
    )


def crosses_unknown(program: Program, value: Value) -> bool:
    """Whether the shape of a value depends on data."""
    found = results(program.nodes[value[0]])[value[1]]
    return any(getattr(as_size(size), "free_symbols", set()) - set(program.hints) for size in found.shape)
