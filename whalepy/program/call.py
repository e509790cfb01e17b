"""One operator call of a captured graph, read through its schema."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from whalepy.program.axes import Size, as_size


def nodes_in(argument: object) -> Iterator[fx.Node]:
    """The nodes in an argument, depth first, with repetition."""
    if isinstance(argument, fx.Node):
        yield argument
    elif isinstance(argument, list | tuple):
        for item in argument:
            yield from nodes_in(item)
    elif isinstance(argument, dict):
        for item in argument.values():
            yield from nodes_in(item)


def is_tensor(node: fx.Node) -> bool:
    """Whether the node's value is one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def tensor_operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """Tensor operands in the order of the call, with repetition."""
    return tuple(n for n in nodes_in((node.args, node.kwargs)) if is_tensor(n))


def results(node: fx.Node) -> tuple[torch.Tensor, ...]:
    """The tensors a node yields: one, or the members of a list; other members are left out."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return (value,)
    if isinstance(value, list | tuple):
        return tuple(v for v in value if isinstance(v, torch.Tensor))
    return ()


def sizes_of(value: torch.Tensor) -> tuple[Size, ...]:
    """Sizes per dim, ints or expressions over free sizes."""
    return tuple(as_size(size) for size in value.shape)


def operator_name(target: object) -> str:
    """`aten.linear` for `aten.linear.default`; the dotted name of a python function."""
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[-1]}"
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"


@dataclass(frozen=True)
class Call:
    """A call with its arguments by schema name, defaults filled in."""

    node: fx.Node

    @cached_property
    def name(self) -> str:
        """Qualified operator name, without overload."""
        return operator_name(self.node.target)

    @cached_property
    def operands(self) -> tuple[fx.Node, ...]:
        """Tensor operands in call order."""
        return tensor_operands(self.node)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Number of dims per operand."""
        return tuple(operand.meta["val"].ndim for operand in self.operands)

    @cached_property
    def results(self) -> tuple[torch.Tensor, ...]:
        """Tensors the call yields."""
        return results(self.node)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Arguments by name; empty for a target without a schema and for positional arguments of python functions."""
        target = self.node.target
        if not isinstance(target, torch._ops.OpOverload):
            return dict(self.node.kwargs)
        bound: dict[str, Any] = {}
        for i, argument in enumerate(target._schema.arguments):
            if i < len(self.node.args):
                bound[argument.name] = self.node.args[i]
            else:
                default = argument.default_value if argument.has_default_value() else None
                bound[argument.name] = self.node.kwargs.get(argument.name, default)
        return bound

    @cached_property
    def tensor_arguments(self) -> list[str]:
        """Names of the single-tensor arguments of the schema, present or not, in order."""
        target = self.node.target
        if not isinstance(target, torch._ops.OpOverload):
            return []
        return [a.name for a in target._schema.arguments if str(a.type) in ("Tensor", "Optional[Tensor]")]

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def sizes(self, operand: int) -> tuple[Size, ...]:
        """Sizes of an operand."""
        return sizes_of(self.operands[operand].meta["val"])

    def dim(self, name: str = "dim", rank: int | None = None) -> int:
        """A dim argument, counted from the front."""
        rank = self.ranks[0] if rank is None else rank
        value = self[name]
        return int(value) % max(rank, 1)

    def dims(self, name: str = "dim", rank: int | None = None) -> tuple[int, ...]:
        """A dim-list argument, counted from the front; all dims where it is None or empty."""
        rank = self.ranks[0] if rank is None else rank
        value = self[name]
        if value is None or value == []:
            return tuple(range(rank))
        listed = value if isinstance(value, list | tuple) else [value]
        return tuple(int(d) % max(rank, 1) for d in listed)
