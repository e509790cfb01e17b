"""The captured graph of a model with more of its equal blocks, or with scopes on them, made without another capture.

Before:  embed, block 0, block 1, block 2, head               three of the blocks that repeat
After:   embed, block 0, 4 x block 1, block 2, head           as many as are asked for, inside their scopes
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from whalepy.dryrun.blocks import Blocks, module_of
from whalepy.dryrun.study import Study
from whalepy.planner.work import Fold
from whalepy.primitives import Primitive
from whalepy.primitives.recording import remember
from whalepy.program.capture import Captured, Placeholder
from whalepy.runtime.arguments import leaf_shapes
from whalepy.runtime.build import analysed

Scopes = Mapping[str, Sequence[Primitive]]
"""What stands on modules, by path."""


def grown(study: Study, wanted: Blocks, scopes: Scopes) -> Study | None:
    """The study of the same model with other of its blocks left, inside these scopes.

    None where its blocks hand on values in another way than each to the next one, or are not alike.
    """
    captured = study.program.captured
    grower = _Grower(captured, study.blocks, wanted, scopes)
    if not grower.can:
        return None
    try:
        made = grower.run()
    except _NoRepeat:
        return None
    program = analysed(made, leaf_shapes(study.example), sync_batchnorm=study.recipe.sync_batchnorm)
    return replace(study, program=program, blocks=wanted, cuts={})


class _NoRepeat(Exception):
    """A value is not handed from each block to the next."""


_Copy = tuple[fx.Node, int]
"""A node of the graph as captured, and the number of the block that it stands in now; -1 outside all."""


@dataclass(frozen=True)
class _Grower:
    """The graph as captured, with the blocks that it has and those that are wanted."""

    captured: Captured
    blocks: Blocks
    wanted: Blocks
    scopes: Scopes

    @property
    def can(self) -> bool:
        """Whether the whole model is the same, and nothing is tied to a block or written in one."""
        tied = (*self.captured.ties, *self.captured.ties.values(), *self.captured.mutations)
        same = self.blocks.whole == self.wanted.whole and len(self.sources) == len(self.wanted.paths)
        return same and bool(self.blocks.whole) and all(self.blocks.of(name) < 0 for name in tied)

    @cached_property
    def sources(self) -> list[int]:
        """By number of a wanted block, the number of the one that it is like."""
        number = dict(zip(self.blocks.whole, self.blocks.stand_ins, strict=True))
        return [number[paths[0]] for paths in self.wanted.stand_for]

    @cached_property
    def fold_of(self) -> Mapping[int, Fold]:
        """The fold that a block belongs to."""
        return {b: fold for fold in self.blocks.folds for repeat in range(3) for b in fold.blocks(repeat)}

    @cached_property
    def places(self) -> Mapping[str, Placeholder]:
        """By the name of their nodes."""
        return {place.node: place for place in self.captured.placeholders}

    @cached_property
    def block_of(self) -> Mapping[fx.Node, int]:
        """The block that a node belongs to; -1 outside all, as for literals, which are equal in all blocks."""
        found: dict[fx.Node, int] = {}
        for node in self.captured.graph.graph.nodes:
            place = self.places.get(node.name) if node.op == "placeholder" else None
            path = module_of(node) if place is None else place.name
            if place is not None and place.kind in ("input", "constant"):
                found[node] = -1
            elif path is None:  # what a pass has made lies where its operands do
                found[node] = max((found[n] for n in node.all_input_nodes if n.op != "placeholder"), default=-1)
            else:
                found[node] = self.blocks.of(path)
        return found

    @cached_property
    def members(self) -> Mapping[int, Sequence[fx.Node]]:
        """The nodes of each block: placeholders, then operators, in order."""
        found: dict[int, list[fx.Node]] = {}
        for node, block in self.block_of.items():
            found.setdefault(block, []).append(node)
        return found

    @cached_property
    def index_of(self) -> Mapping[fx.Node, int]:
        """Where a node stands among those of its block."""
        return {node: k for nodes in self.members.values() for k, node in enumerate(nodes)}

    # -- which copy reads which

    def reads(self, copy: _Copy, operand: fx.Node) -> _Copy:
        """The copy of an operand that a copy of its reader reads. _NoRepeat where that is not plain."""
        node, at = copy
        own, other = self.block_of[node], self.block_of[operand]
        if other < 0:
            return operand, -1
        if own == other:
            return operand, at
        if own >= 0 and self.fold_of.get(own) == self.fold_of.get(other) is not None:
            there = at - (own - other)
            if there < 0:
                raise _NoRepeat
            return self._like(operand, self.sources[there]), there
        copies = [k for k, source in enumerate(self.sources) if source == other]
        if len(copies) != 1:
            raise _NoRepeat
        return operand, copies[0]

    def _like(self, node: fx.Node, block: int) -> fx.Node:
        """The node of a block that is like one of another block."""
        index, found = self.index_of[node], self.members.get(block, ())
        if index >= len(found) or (found[index].op, _target(found[index])) != (node.op, _target(node)):
            raise _NoRepeat
        return found[index]

    def check(self) -> None:
        """_NoRepeat: the middle one of the repeats of a fold does something else than the last one."""
        for fold in self.blocks.folds:
            for a, b in zip(fold.blocks(1), fold.blocks(2), strict=True):
                one, other = self.members.get(a, ()), self.members.get(b, ())
                if len(one) != len(other) or any(map(self._differ, one, other)):
                    raise _NoRepeat

    def _differ(self, one: fx.Node, other: fx.Node) -> bool:
        if one.op != other.op or _target(one) != _target(other):
            return True
        return one.op != "placeholder" and self._form(one) != self._form(other)

    def _form(self, node: fx.Node) -> list[object]:
        """The arguments of an operator, others of its block and of blocks before by how they lie to it."""
        own = self.block_of[node]

        def operand(n: fx.Node) -> Any:
            block = self.block_of[n]
            return _Operand(n if block < 0 else (own - block, self.index_of[n]))

        return pytree.tree_leaves(fx.map_arg((node.args, node.kwargs), operand))

    # -- the graph

    def run(self) -> Captured:
        """The graph with the wanted blocks, every operator just before its first reader."""
        self.check()
        nodes = list(self.captured.graph.graph.nodes)
        end = (nodes[-1], -1)
        calls = [copy for copy in self._by_first_reader(end) if copy[0].op != "placeholder"]
        leaves = sorted(self._leaves(), key=self._rank({n: k for k, n in enumerate(nodes)}))
        turns = self._turns(calls)
        graph = fx.Graph()
        made: dict[_Copy, fx.Node] = {}
        places: list[Placeholder] = []
        for copy in (*leaves, *calls):
            node = copy[0]
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda x, c=copy: made[self.reads(c, x)])
            name = self.renamed(copy, node.name, "_")
            made[copy] = new = graph.create_node(node.op, node.target, args, kwargs, name, node.type)
            new.meta = self._meta(copy, turns)
            if node.op == "placeholder":
                new.target = new.name
                place = self.places[node.name]
                places.append(replace(place, node=new.name, name=self.renamed(copy, place.name, ".")))
        graph.lint()
        module = fx.GraphModule(self.captured.graph, graph)
        return replace(self.captured, graph=module, placeholders=tuple(places))

    def _leaves(self) -> Iterator[_Copy]:
        for node in self.captured.graph.graph.find_nodes(op="placeholder"):
            block = self.block_of[node]
            yield from [(node, -1)] if block < 0 else [(node, k) for k, b in enumerate(self.sources) if b == block]

    def _by_first_reader(self, end: _Copy) -> Iterator[_Copy]:
        seen: set[_Copy] = {end}
        stack = [(end, iter([self.reads(end, n) for n in end[0].all_input_nodes]))]
        while stack:
            copy, operands = stack[-1]
            following = next((operand for operand in operands if operand not in seen), None)
            if following is None:
                stack.pop()
                yield copy
            else:
                seen.add(following)
                stack.append((following, iter([self.reads(following, n) for n in following[0].all_input_nodes])))

    def _rank(self, order: Mapping[fx.Node, int]) -> Any:
        """Sorts copies: those of the blocks of a fold stand where its first one does, in their new order."""
        firsts: dict[int, int] = {}
        for block, nodes in self.members.items():
            fold = self.fold_of.get(block)
            head = block if fold is None else fold.first
            least = min(order[node] for node in nodes if node in order) if any(n in order for n in nodes) else 0
            firsts[head] = min(firsts.get(head, least), least)

        def key(copy: _Copy) -> tuple[int, int, int]:
            node, at = copy
            fold = self.fold_of.get(self.block_of[node])
            return (order[node], -1, 0) if fold is None else (firsts[fold.first], at, order[node])

        return key

    def _turns(self, calls: Sequence[_Copy]) -> Mapping[_Copy, int]:
        turns = {node: int(node.meta.get("turn", 0)) for node, _ in calls}
        ranked = sorted(calls, key=self._rank(turns))
        first = len(self.captured.placeholders) * len(self.wanted.paths)
        return {copy: first + k for k, copy in enumerate(ranked)}

    def renamed(self, copy: _Copy, name: str, dot: str) -> str:
        """The name that something of a block has in another one."""
        node, at = copy
        if at < 0:
            return name
        before, after = (blocks.paths[k].replace(".", dot) for blocks, k in
                         ((self.blocks, self.block_of[node]), (self.wanted, at)))  # fmt: skip
        return after + name.removeprefix(before) if name.startswith(before) else name

    def _meta(self, copy: _Copy, turns: Mapping[_Copy, int]) -> dict[str, Any]:
        node, at = copy
        meta = dict(node.meta)
        if copy in turns and "turn" in meta:
            meta["turn"] = turns[copy]
        if node.op != "call_function":
            return meta
        path, stack = module_of(node), meta.get("nn_module_stack")
        now = (self.wanted.paths[at] if at >= 0 else "") if path is None else self.renamed(copy, path, ".")
        if stack and path is not None:
            *rest, (key, (_, kind)) = stack.items()
            meta["nn_module_stack"] = {**dict(rest), key: (f"model.{now}" if now else "model", kind)}
        meta["scope"] = remember(self._chain(now))
        return meta

    def _chain(self, path: str) -> list[Primitive]:
        parents = [path[:k] for k, letter in enumerate(path) if letter == "."]
        return list(dict.fromkeys(p for at in dict.fromkeys(["", *parents, path]) for p in self.scopes.get(at, ())))


@dataclass(frozen=True)
class _Operand:
    """An operand as those of another operator are compared with it."""

    of: object


def _target(node: fx.Node) -> object:
    return "" if node.op == "placeholder" else node.target
