"""Operators that write to their arguments, and the pure operators they correspond to."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
from torch import fx

Op = torch._ops.OpOverload
aten = torch.ops.aten

_INPLACE_DUNDER = re.compile(r"__i(\w+)__")
_OTHER_NAMES = {"normal_": "normal_functional"}  # where the pure name is not the in-place one without its underscore

# Position of the flag that makes them write to running statistics, of which their schemas say nothing.
_SILENT_WRITERS = {aten.batch_norm.default: 5, aten.instance_norm.default: 5}
_RUNNING_MEAN = 3


def writes(node: fx.Node) -> bool:
    """Whether the call writes to one of its arguments."""
    return isinstance(node.target, Op) and (node.target._schema.is_mutable or writes_silently(node))


def writes_silently(node: fx.Node) -> bool:
    """Whether the call writes to running statistics without its schema saying so."""
    flag = _SILENT_WRITERS.get(node.target) if isinstance(node.target, Op) else None
    return flag is not None and bool(node.args[flag]) and node.args[_RUNNING_MEAN] is not None


def written_names(op: Op) -> tuple[str, ...]:
    """The names of the arguments which the operator writes to."""
    return tuple(argument.name for argument in op._schema.arguments if _is_written(argument))


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def returned_argument(node: fx.Node) -> fx.Node | None:
    """The argument which the call writes to and returns; None if it does not."""
    schema: Any = node.target._schema if isinstance(node.target, Op) else None
    if schema is None or len(schema.returns) != 1 or not _is_written(schema.returns[0]):
        return None
    memory = schema.returns[0].alias_info.before_set
    for value, argument in zip(by_name(node).values(), schema.arguments, strict=True):
        if _is_written(argument) and argument.alias_info.before_set == memory:
            return value
    return None


def by_name(node: fx.Node) -> dict[str, Any]:
    """All arguments of the call by name, in the order of the schema, defaults filled in."""
    assert isinstance(node.target, Op)
    values: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            values[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        else:
            values[argument.name] = argument.default_value if argument.has_default_value() else None
    return values


def call_of(op: Op, values: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """args and kwargs of a call of `op` with values by name; keyword-only ones that are None are left out."""
    arguments = op._schema.arguments
    args = tuple(values[argument.name] for argument in arguments if not argument.kwarg_only)
    kwargs = {a.name: values[a.name] for a in arguments if a.kwarg_only and values[a.name] is not None}
    return args, kwargs


@cache
def pure_form(op: Op) -> Op | None:
    """The operator that returns what `op` writes: `add_` -> `add`, `add.out` -> `add.Tensor`. None if there is none."""
    namespace, _, name = op._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), _pure_name(name), None)
    wanted = _signature(op)
    for overload in packet.overloads() if packet is not None else ():
        candidate = getattr(packet, overload)
        if not candidate._schema.is_mutable and _signature(candidate) == wanted:
            return candidate
    return None


def _pure_name(name: str) -> str:
    dunder = _INPLACE_DUNDER.fullmatch(name)
    return f"__{dunder[1]}__" if dunder else _OTHER_NAMES.get(name, name.removesuffix("_"))


def _signature(op: Op) -> list[tuple[str, str]]:
    """Names and types of the arguments, without those of `out=`."""
    return [(arg.name, str(arg.type)) for arg in op._schema.arguments if not (arg.kwarg_only and _is_written(arg))]
