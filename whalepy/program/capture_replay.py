"""The program replayed on fake tensors while its pure graph is built: reads, and the memory results lie in."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.utils import _pytree as pytree

from whalepy.errors import CaptureError
from whalepy.program.capture_aliases import Alias, fresh, share_memory, view
from whalepy.program.capture_memory import may_view, near_writes
from whalepy.program.capture_scatter import Emit, Step, same_shape
from whalepy.program.capture_schema import Op
from whalepy.program.capture_sizes import fake_mode_of

aten = torch.ops.aten

# Without shared memory a view is a reshape, and strides, which writes made pure may change, mean nothing.
_ANY_STRIDES = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}
_KEPT_META = ("where", "scope", "no_grad", "stack_trace", "nn_module_stack", "custom")


class Replay:
    """The new graph as far as it has been built, and what each node of the old one became."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.graph = fx.Graph()
        self.mode = fake_mode_of(module.graph)
        self.tracked = near_writes(module.graph)  # whether others share memory has no effect
        self.values: dict[fx.Node, Any] = {}  # an Alias, a list of such, or (sizes, submodules) a new node

    def copy(self, node: fx.Node) -> None:
        """A placeholder or a submodule: the same node."""
        copy = self.graph.node_copy(node)
        value = node.meta.get("val")
        self.values[node] = fresh(value, copy) if isinstance(value, torch.Tensor) else copy

    def read(self, node: fx.Node) -> None:
        """A call that writes nothing: the same call on current values."""
        emit = self.emitting(node)
        target: Any = node.target
        target = _ANY_STRIDES.get(target, target)
        args, kwargs = self.current(node.args, emit), self.current(node.kwargs, emit)
        copy = self.graph.create_node("call_function", target, args, kwargs, node.name)
        copy.meta = dict(node.meta)
        step = Step(target, (), args, kwargs)
        result = self._replayed(node)
        if isinstance(result, torch.Tensor) and not same_shape(result, copy.meta["val"]):
            copy.meta["val"] = self._value_of(target, args, kwargs)  # what it reads was turned by `transpose_`
        if isinstance(result, (list, tuple)):
            self.values[node] = [
                self._tracked(node, item, emit(operator.getitem, copy, i), replace(step, index=i))
                for i, item in enumerate(result)
            ]
        else:
            self.values[node] = self._tracked(node, result, copy, step)

    def pick(self, node: fx.Node) -> bool:
        """Whether `node` takes one of several results; its value is that result."""
        arguments: Any = node.args
        results = self.values.get(arguments[0]) if node.target is operator.getitem else None
        if isinstance(results, list):
            self.values[node] = results[arguments[1]]
        return isinstance(results, list)

    def _tracked(self, node: fx.Node, fake: Any, copy: fx.Node, step: Step) -> Any:
        """The result `copy` as a view of the argument whose memory it lies in, or in memory of its own."""
        if not isinstance(fake, torch.Tensor):
            return copy
        for path, parent in self._aliases_in(node.args) if node in self.tracked else ():
            if share_memory(fake, parent.fake):
                return view(fake, copy, parent, replace(step, path=path))
        return fresh(fake, copy)

    def _aliases_in(self, values: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Alias]]:
        """The tensors among arguments, and where they stand."""
        for i, value in enumerate(values):
            if isinstance(value, (list, tuple)):
                yield from self._aliases_in(value, (*path, i))
            elif isinstance(value, fx.Node) and isinstance(self.values[value], Alias):
                yield (*path, i), self.values[value]

    def _replayed(self, node: fx.Node) -> Any:
        """What the call returns in the replay, in the memory it would have."""
        value = node.meta.get("val")
        has_tensor = any(isinstance(item, torch.Tensor) for item in pytree.tree_leaves(value))
        if not (has_tensor and isinstance(node.target, Op) and node in self.tracked):
            return value
        if not node.meta.get("unbacked_bindings"):
            return self.run_fake(node)
        if may_view(node.target):
            raise CaptureError(
                f"a view ({node.target}) whose size depends on values lies in memory that is written to",
                at=node.meta.get("where"),
                fix="write a pure form: a result instead of a write",
            )
        return value

    def run_fake(self, node: fx.Node) -> Any:
        """Runs the call of the old graph on the tensors of the replay."""
        assert callable(node.target)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._fake)
        with self.mode, torch.no_grad(), enable_python_dispatcher():  # else composites fix sizes
            return node.target(*args, **kwargs)

    def _fake(self, node: fx.Node) -> Any:
        value = self.values[node]
        return value.fake if isinstance(value, Alias) else node.meta.get("val")

    def current(self, values: Any, emit: Emit) -> Any:
        """Arguments of the old graph as arguments of the new one."""
        return fx.map_arg(values, lambda node: _node_of(self.values[node], emit))

    def emitting(self, like: fx.Node) -> Emit:
        """Adds calls on behalf of `like`."""
        kept = {key: like.meta[key] for key in _KEPT_META if key in like.meta}

        def emit(target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
            node = self.graph.call_function(target, args, kwargs)
            node.meta = dict(kept, val=self._value_of(target, args, kwargs))
            return node

        return emit

    def _value_of(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        args, kwargs = fx.map_arg((args, kwargs), lambda arg: arg.meta["val"])
        with self.mode, torch.no_grad(), enable_python_dispatcher():  # else composites fix sizes
            return target(*args, **kwargs)


def _node_of(value: Any, emit: Emit) -> Any:
    if isinstance(value, list):
        return [_node_of(item, emit) for item in value]
    return value.current(emit) if isinstance(value, Alias) else value
