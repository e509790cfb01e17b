"""The same graph without writes: in-place operators and writes through views become pure ones."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from whalepy.errors import CaptureError
from whalepy.program import functional_ops
from whalepy.program.capture_aliases import Alias, fresh
from whalepy.program.capture_gradients import is_differentiable
from whalepy.program.capture_memory import does_nothing
from whalepy.program.capture_replay import Replay
from whalepy.program.capture_scatter import Emit, Step, overwritten, same_shape, sizes
from whalepy.program.capture_schema import Op, by_name, call_of, pure_form, writes, writes_silently, written_names
from whalepy.program.dead_code import drop_unused

aten = torch.ops.aten


@dataclass(frozen=True)
class Functional:
    """A pure graph; the values of the placeholders which the old one wrote to are its last outputs."""

    graph: fx.GraphModule
    written: dict[str, str | None]  # node names of these placeholders, in graph order -> where the last write is


def functionalise(module: fx.GraphModule) -> Functional:
    """The same computation without writes.

    Before: `s = select(h, 1, 0); s.fill_(1); y = sum(h)`
    After:  `s = select(h, 1, 0); f = fill(s, 1); h1 = select_scatter(h, f, 1, 0); y = sum(h1)`

    The program is replayed on fake tensors, so that memory is shared exactly where it was in the capture. `view`
    becomes `reshape`; dropout that does nothing vanishes. Every node has meta val, where, scope and no_grad.
    CaptureError: a write that has no pure form.
    """
    replay = Replay(module)
    places: dict[int, str | None] = {}  # by storage
    for node in module.graph.nodes:
        for alias in _visit(replay, node):
            places[id(alias.storage)] = node.meta.get("where")
    written = _finish(replay, module, places)
    pure = fx.GraphModule(module, replay.graph)
    drop_unused(pure.graph)
    pure.recompile()
    pure.graph.lint()
    _check_pure(pure.graph)
    return Functional(pure, written)


def _visit(replay: Replay, node: fx.Node) -> list[Alias]:
    """Adds what `node` does to the new graph; returns the tensors it writes to."""
    if node.op == "output" or replay.pick(node):
        return []
    if node.op != "call_function":
        replay.copy(node)
    elif does_nothing(node):
        replay.values[node] = replay.values[node.args[0]]  # pyright: ignore[reportArgumentType]
    elif writes_silently(node):
        return _write_statistics(replay, node)
    elif writes(node):
        return _write(replay, node)
    else:
        replay.read(node)
    return []


def _finish(replay: Replay, module: fx.GraphModule, places: dict[int, str | None]) -> dict[str, str | None]:
    """Adds the output: the old results, then the values of the placeholders that were written to."""
    output = module.graph.output_node()
    emit = replay.emitting(output)
    results = list(replay.current(output.args[0], emit))
    written: dict[str, str | None] = {}
    for node in module.graph.find_nodes(op="placeholder"):
        alias = replay.values[node]
        if isinstance(alias, Alias) and id(alias.storage) in places:
            written[node.name] = places[id(alias.storage)]
            results.append(alias.current(emit))
    replay.graph.output(tuple(results)).meta = dict(output.meta)
    return written


def _check_pure(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if writes(node):
            raise CaptureError(f"{node.target} writes to its arguments", at=node.meta.get("where"), fix=_PURE)


_PURE = "write the pure form: a result instead of a write"


def _write(replay: Replay, node: fx.Node) -> list[Alias]:
    """A call that writes to arguments: a pure call, whose results they become."""
    assert isinstance(node.target, Op)
    if torch.Tag.inplace_view in node.target.tags:
        return _become_view(replay, node)
    emit = replay.emitting(node)
    arguments = by_name(node)
    written = [_written(replay, node, arguments[name]) for name in written_names(node.target)]
    values = {name: replay.current(value, emit) for name, value in arguments.items()}
    own, new = _pure_results(emit, node.target, values)
    for alias, value in zip(written, new, strict=True):
        if alias is not None:
            alias.write(emit, _fitted(emit, node, alias, value))
    results = [fresh(result.meta["val"], result) for result in own] or written
    replay.values[node] = results[0] if len(results) == 1 else results
    return [alias for alias in written if alias is not None]


def _written(replay: Replay, node: fx.Node, argument: Any) -> Alias | None:
    """The tensor which the call writes to; None if no tensor was given."""
    if argument is None:
        return None
    alias = replay.values.get(argument) if isinstance(argument, fx.Node) else None
    if not isinstance(alias, Alias):
        raise CaptureError(f"{node.target} writes to a list of tensors", at=node.meta.get("where"), fix=_PURE)
    return alias


def _pure_results(emit: Emit, op: Op, values: dict[str, Any]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The results of a pure call: those of its own, and the new value of each argument that `op` writes to."""
    rewrite, pure, names = _REWRITES.get(op), pure_form(op), written_names(op)
    if rewrite is not None:
        return [], [rewrite(emit, **values)]
    if pure is not None and len(pure._schema.returns) == len(names):
        args, kwargs = call_of(pure, values)
        return [], _results(emit, emit(pure, *args, **kwargs))
    positions = tuple(i for i, argument in enumerate(op._schema.arguments) if argument.name in names)
    args, kwargs = call_of(op, values)
    results = _results(emit, emit(functional_ops.WritesReturned(op, positions), *args, **kwargs))
    returned = zip(results, op._schema.returns, strict=False)
    return [r for r, schema in returned if schema.alias_info is None], results[len(results) - len(names) :]


def _results(emit: Emit, call: fx.Node) -> list[fx.Node]:
    value = call.meta["val"]
    if isinstance(value, torch.Tensor):
        return [call]
    return [emit(operator.getitem, call, i) for i in range(len(value))]


def _fitted(emit: Emit, node: fx.Node, alias: Alias, result: fx.Node) -> fx.Node:
    """`result` in the dtype of what it is written to. CaptureError: it has another shape."""
    if not same_shape(result.meta["val"], alias.fake):
        shapes = f"{list(result.meta['val'].shape)} to one of shape {list(alias.fake.shape)}"
        raise CaptureError(f"{node.target} writes a result of shape {shapes}", at=node.meta.get("where"), fix=_PURE)
    dtype = alias.fake.dtype
    if result.meta["val"].dtype == dtype:
        return result
    fitted = emit(aten.to.dtype, result, dtype)
    return fitted if is_differentiable(result.meta["val"]) else overwritten(emit, alias.current(emit), fitted)


def _become_view(replay: Replay, node: fx.Node) -> list[Alias]:
    """`transpose_` and its like: the tensor itself becomes a view of what it was."""
    assert isinstance(node.target, Op)
    pure, alias = pure_form(node.target), replay.values[node.args[0]]  # pyright: ignore[reportArgumentType]
    if pure is None or not isinstance(alias, Alias) or node.target in _RESIZES:
        raise CaptureError(f"{node.target} has no pure form", at=node.meta.get("where"), fix=_PURE)
    if any(other.fake is alias.fake for other in alias.storage.tensors if other is not alias):
        # `y = x.contiguous()` may be x itself, which then turns as well.
        raise CaptureError(f"{node.target} turns a tensor that may be another", at=node.meta.get("where"), fix=_PURE)
    args, kwargs = call_of(pure, replay.current(by_name(node), replay.emitting(node)))
    replay.run_fake(node)
    alias.become(Step(pure, (0,), args, kwargs))
    replay.values[node] = alias
    return []


_RESIZES = (aten.resize_.default, aten.resize_as_.default)


def _write_statistics(replay: Replay, node: fx.Node) -> list[Alias]:
    """batch_norm in training: the statistics come out as results, and are written then."""
    emit = replay.emitting(node)
    y, mean, var = _results(emit, emit(_STATISTICS[node.target], *replay.current(node.args, emit)))
    replay.values[node] = fresh(y.meta["val"], y)
    written = [replay.values[argument] for argument in node.args[3:5]]  # pyright: ignore[reportArgumentType]
    for alias, result in zip(written, (mean, var), strict=True):
        alias.write(emit, result)
    return written


_STATISTICS: dict[Any, Callable[..., Any]] = {
    aten.batch_norm.default: functional_ops.batch_norm,
    aten.instance_norm.default: functional_ops.instance_norm,
}


def _copied(emit: Emit, self: fx.Node, src: fx.Node, non_blocking: bool) -> fx.Node:
    value, old = src, self.meta["val"]
    if src.meta["val"].dtype != old.dtype:
        value = emit(aten.to.dtype, value, old.dtype)
    if not same_shape(src.meta["val"], old):
        value = emit(aten.expand.default, value, sizes(emit, self))
    return overwritten(emit, self, value)


def _zeroed(emit: Emit, self: fx.Node) -> fx.Node:
    return emit(aten.fill.Scalar, self, 0)


def _dropped(pure: Op) -> Callable[..., fx.Node]:
    """The operator names its argument otherwise than its in-place form."""
    return lambda emit, self, p, train: emit(pure, self, p, train)


# `aten.copy` and `aten.zero` exist, but autograd does not know them, or rules read them worse.
_REWRITES: dict[Op, Callable[..., fx.Node]] = {
    aten.copy_.default: _copied,
    aten.zero_.default: _zeroed,
    aten.dropout_.default: _dropped(aten.dropout.default),
    aten.alpha_dropout_.default: _dropped(aten.alpha_dropout.default),
    aten.feature_dropout_.default: _dropped(aten.feature_dropout.default),
    aten.feature_alpha_dropout_.default: _dropped(aten.feature_alpha_dropout.default),
}
