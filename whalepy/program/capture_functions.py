"""A torch.autograd.Function becomes one operator of the captured graph, which runs it with its own backward.

Export would record the operators of its forward and drop its backward without a word. Such an operator is cut only if
it is seen to treat every element alike; else every rank runs it whole. What may reach beyond its arguments stays as it
is, and is refused.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from types import CodeType
from typing import Any
from unittest import mock

import torch
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from whalepy.program.capture_places import frames_within, place_of_frames
from whalepy.program.capture_pointwise import is_pointwise
from whalepy.program.rules_pointwise import FUNCTIONS, POINTWISE_FUNCTIONS

_LIBRARY = torch.library.Library(FUNCTIONS, "FRAGMENT")
_APPLY: Callable[..., Any] = Function.__dict__["apply"].__func__
_PLAIN = (int, float, str, type(None), torch.dtype, torch.device)
_MARK = "whalepy_function"  # in the metadata of autograd nodes whose function is an operator of the graph

Schema = tuple[str | None, ...]
"""Per argument of `apply`: its type if it varies, None for a constant."""


@dataclass(frozen=True)
class _Result:
    """What `apply` returns, without its tensors."""

    spec: pytree.TreeSpec
    others: tuple[Any, ...]
    is_tensor: tuple[bool, ...]

    def of(self, tensors: list[torch.Tensor]) -> Any:
        remaining = iter(tensors)
        pairs = zip(self.is_tensor, self.others, strict=True)
        return pytree.tree_unflatten([next(remaining) if is_tensor else o for is_tensor, o in pairs], self.spec)


class _Operator:
    """One class of functions, with the constants of a call, as an operator of its tensors and free sizes."""

    def __init__(self, function: type[Function], schema: Schema, constants: tuple[Any, ...], name: str) -> None:
        self.function = function
        self.schema = schema
        self.constants = constants
        self.result: _Result | None = None  # of the last call
        arguments = ", ".join(f"{kind} a{i}" for i, kind in enumerate(schema) if kind is not None)
        _LIBRARY.define(f"{name}({arguments}) -> Tensor[]")
        for key in ("Autograd", "CompositeExplicitAutograd"):
            _LIBRARY.impl(name, self._run, key)
        self.operator: Callable[..., list[torch.Tensor]] = getattr(getattr(torch.ops, FUNCTIONS), name)

    def __call__(self, arguments: tuple[Any, ...]) -> Any:
        tensors = self.operator(*(a for a, kind in zip(arguments, self.schema, strict=True) if kind is not None))
        assert self.result is not None
        return self.result.of(tensors)

    def _run(self, *values: Any) -> list[torch.Tensor]:
        remaining = iter(values)
        pairs = zip(self.schema, self.constants, strict=True)
        result = _APPLY(self.function, *(next(remaining) if kind is not None else c for kind, c in pairs))
        leaves, spec = pytree.tree_flatten(result)
        is_tensor = tuple(isinstance(leaf, torch.Tensor) for leaf in leaves)
        self.result = _Result(spec, tuple(None if t else o for t, o in zip(is_tensor, leaves, strict=True)), is_tensor)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        for tensor in tensors:
            metadata: Any = {} if tensor.grad_fn is None else tensor.grad_fn.metadata
            metadata[_MARK] = True
        return tensors


_OPERATORS: dict[Any, _Operator] = {}


@contextlib.contextmanager
def functions_kept(outermost: CodeType, lost: dict[str, str | None]) -> Generator[None]:
    """Until it ends, applying a torch.autograd.Function calls an operator that stands for it, where one can.

    `lost` gets the others by name, each with the user's line that applies it first; frames from `outermost` outwards
    are not the user's model.
    """

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        operator = _operator_of(cls, args) if not kwargs else None
        if operator is not None:
            return operator(args)
        lost.setdefault(cls.__name__, place_of_frames(frames_within(sys._getframe(1), outermost)))
        return _APPLY(cls, *args, **kwargs)

    with mock.patch.object(Function, "apply", classmethod(apply)):
        yield


def is_kept(node: Any) -> bool:
    """Whether the function of an autograd node is an operator of the graph."""
    return _MARK in node.metadata


def _operator_of(cls: type[Function], args: tuple[Any, ...]) -> _Operator | None:
    schema = tuple(map(_kind_of, args))
    constants = tuple(None if kind is not None else arg for kind, arg in zip(schema, args, strict=True))
    if _reaches_out(cls) or not all(isinstance(constant, _PLAIN) for constant in constants):
        return None
    key = (cls, schema, tuple((type(constant), constant) for constant in constants))
    if key not in _OPERATORS:
        if _touches_others(cls, args):
            return None
        base = re.sub(r"\W+", "_", cls.__name__)
        taken = sum(name.__name__ == cls.__name__ for name, *_ in _OPERATORS)
        _OPERATORS[key] = _Operator(cls, schema, constants, f"{base}_{taken}")
        if is_pointwise(lambda *values: _APPLY(cls, *values), args):
            POINTWISE_FUNCTIONS.add(f"{FUNCTIONS}.{base}_{taken}")
    return _OPERATORS[key]


def _kind_of(argument: Any) -> str | None:
    kinds = ((torch.Tensor, "Tensor"), (torch.SymInt, "SymInt"), (torch.SymFloat, "float"), (torch.SymBool, "bool"))
    return next((kind for of_type, kind in kinds if isinstance(argument, of_type)), None)


def _reaches_out(cls: Any) -> bool:
    """Whether torch itself keeps the function, or its code reads variables around its class."""
    methods = [getattr(cls, name, None) for name in ("forward", "backward", "setup_context")]
    return cls.__module__.startswith("torch.") or any(getattr(method, "__closure__", None) for method in methods)


def _touches_others(cls: type[Function], args: tuple[Any, ...]) -> bool:
    """Whether the forward reads a tensor that is no argument, or writes to one that is."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    versions = [tensor._version for tensor in tensors]
    watch = _Watch(tensors)
    with watch, torch.no_grad():
        _APPLY(cls, *args)
    return watch.foreign or [tensor._version for tensor in tensors] != versions


class _Watch(TorchFunctionMode):
    """Sees whether torch functions get a tensor that is neither known nor made by one of them."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {id(tensor): tensor for tensor in known}
        self.foreign = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = (leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        self.foreign |= any(id(tensor) not in self.known for tensor in given)
        result = func(*args, **(kwargs or {}))
        made = (leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor))
        self.known.update({id(tensor): tensor for tensor in made})
        return result
