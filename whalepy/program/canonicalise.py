"""Fewer forms for the rules to know: identities go, means of losses become sums over counts.

Before:  cross_entropy(slice(x, 0, 0, max), t)             mean over the counted targets
After:   cross_entropy(x, t, reduction=sum) / (t != ignore_index).sum()
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from whalepy.program import functional_ops
from whalepy.program.axes import as_size
from whalepy.program.call import Call, operator_name, sizes_of
from whalepy.program.capture_sizes import fake_mode_of
from whalepy.program.dead_code import drop_unused
from whalepy.program.grouped_rows import unsorted
from whalepy.program.rule_table import LOSSES_WITH_REDUCTION

aten = torch.ops.aten
NONE, MEAN, SUM = 0, 1, 2


def canonicalise(module: fx.GraphModule) -> fx.GraphModule:
    """The same computation in fewer forms, changed in place."""
    graph = module.graph
    build = _Builder(graph)
    _slices_to_splits(graph, build)
    unsorted(graph, build.at)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        rewrite = _REWRITES.get(operator_name(node.target))
        new = rewrite(build.at(node), Call(node)) if rewrite is not None else None
        if new is not None:
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    drop_unused(graph)
    module.recompile()
    return module


class _Builder:
    """Adds operators before a node, with their fake values and the node's place and scope."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.mode = fake_mode_of(graph)
        self.node: fx.Node | None = None

    def at(self, node: fx.Node) -> _Builder:
        self.node = node
        return self

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        assert self.node is not None
        with self.graph.inserting_before(self.node):
            new = self.graph.call_function(target, args, kwargs)
        new.meta.update({k: v for k, v in self.node.meta.items() if k in ("where", "scope", "no_grad", "turn")})
        values = map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode, torch.no_grad():
            new.meta["val"] = target(*values[0], **values[1])
        return new


def _slice(build: _Builder, call: Call) -> fx.Node | None:
    same = sizes_of(call.results[0]) == call.sizes(0)
    return call.operands[0] if same and call["step"] in (None, 1) else None


def _cat(build: _Builder, call: Call) -> fx.Node | None:
    """torch lets an empty tensor of one dim stand among the operands; it adds nothing."""
    rank = call.results[0].ndim
    kept = [o for o in call.operands if not (o.meta["val"].ndim == 1 and rank > 1)]
    if len(kept) == len(call.operands) or not kept:
        return None
    return kept[0] if len(kept) == 1 else build(aten.cat.default, kept, call["dim"])


def _slices_to_splits(graph: fx.Graph, build: _Builder) -> None:
    """Slices that tile a dim are one split: a fused projection comes apart by heads.

    Before:  x[..., :8], x[..., 8:12], x[..., 12:]
    After:   split_with_sizes(x, [8, 4, 4], -1)
    """
    found: dict[tuple[fx.Node, int], list[tuple[int, int, fx.Node]]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and operator_name(node.target) == "aten.slice":
            stretch = _stretch(Call(node))
            if stretch is not None:
                found.setdefault((node.args[0], stretch[0]), []).append((*stretch[1:], node))
    parts: dict[fx.Node, fx.Node] = {}
    for (read, d), stretches in found.items():
        source = parts.get(read, read)
        edges = sorted({(start, end) for start, end, _ in stretches})
        tiles = len(edges) > 1 and all(a[1] == b[0] for a, b in itertools.pairwise(edges))
        if tiles and (edges[0][0], edges[-1][1]) == (0, sizes_of(source.meta["val"])[d]):
            parts.update(_split(build, source, d, edges, stretches))


def _stretch(call: Call) -> tuple[int, int, int] | None:
    """(dim, start, end) of a slice with known ends and step 1; None for another."""
    d = call.dim()
    size = call.sizes(0)[d]
    bounds = (call["start"] or 0, size if call["end"] is None else call["end"])
    if call["step"] not in (None, 1) or not isinstance(size, int) or not all(isinstance(b, int) for b in bounds):
        return None
    start, end, _ = slice(*bounds).indices(size)
    return (d, start, end) if start < end else None


def _split(
    build: _Builder,
    source: fx.Node,
    d: int,
    edges: Sequence[tuple[int, int]],
    stretches: Sequence[tuple[int, int, fx.Node]],
) -> dict[fx.Node, fx.Node]:
    """Replaces the slices; the part that stands for each."""
    order = {node: k for k, node in enumerate(build.graph.nodes)}
    first = min((node for *_, node in stretches), key=order.__getitem__)
    split = build.at(first)(aten.split_with_sizes.default, source, [end - start for start, end in edges], d)
    parts = [build(operator.getitem, split, k) for k in range(len(edges))]
    stands = {node: parts[edges.index((start, end))] for start, end, node in stretches}
    for node, part in stands.items():
        node.replace_all_uses_with(part)
        build.graph.erase_node(node)
    return stands


def _like(build: _Builder, call: Call) -> fx.Node | None:
    """view_as, reshape_as, expand_as: the shape is taken from the other operand's sizes."""
    other = call["other"]
    target = aten.expand.default if call.name == "aten.expand_as" else aten.reshape.default
    sizes = [_size_of(build, other, d) for d in range(other.meta["val"].ndim)]
    return build(target, call["self"], sizes)


def _repeat(build: _Builder, call: Call) -> fx.Node | None:
    """Copies of a dim of size 1, or along a new one, are an expansion, which can be cut along them; so are those of a
    dim as often as only a step tells, made along a dim of their own.

    Before:  repeat(x, [n, 1, 1])           repeat(y, [n, 1])        x of one row, y of more
    After:   expand(x, [n, -1, -1])         reshape(expand(unsqueeze(y, 0), [n, -1, -1]), [-1, 8])
    """
    x, own = call["self"], call.sizes(0)
    counts = list(call["repeats"] if "repeats" in call.arguments else call["dims"])
    counts = [1] * (len(own) - len(counts)) + counts
    lead = len(counts) - len(own)
    wide = [d for d, count in enumerate(counts) if d >= lead and own[d - lead] != 1 and count != 1]
    kept = [-1 if d >= lead and count == 1 else count for d, count in enumerate(counts)]
    if not wide:
        return build(aten.expand.default, x, kept)
    if len(wide) > 1 or not isinstance(counts[wide[0]], fx.Node):
        return None
    (at,) = wide
    apart = build(aten.unsqueeze.default, x, at - lead)
    copies = build(aten.expand.default, apart, [*kept[: at + 1], -1, *kept[at + 1 :]])
    sizes = [_size_of(build, x, d - lead) if d >= lead and count == 1 else count for d, count in enumerate(counts)]
    return build(aten.reshape.default, copies, [*sizes[:at], -1, *sizes[at + 1 :]])


def _size_of(build: _Builder, x: fx.Node, d: int) -> Any:
    size = sizes_of(x.meta["val"])[d]
    return size if isinstance(size, int) else build(aten.sym_size.int, x, d)


def _cast_like(build: _Builder, call: Call) -> fx.Node | None:
    """type_as and to(other): the other operand lends its type only."""
    other = call["other"]
    if other is None or other.meta["val"].device != call["self"].meta["val"].device:
        return None
    return build(aten.to.dtype, call["self"], other.meta["val"].dtype)


def _created(build: _Builder, call: Call) -> fx.Node:
    """`x.new_zeros(shape)` and its like read nothing of x but type and device.

    Before:  new_zeros(x, [n, 3])
    After:   zeros([n, 3], dtype=f32, device=cpu)
    """
    made = call.results[0]
    value = (call["fill_value"],) if call.name == "aten.new_full" else ()
    return build(_CREATES[call.name], call["size"], *value, dtype=made.dtype, device=made.device)


_CREATES: dict[str, Any] = {
    "aten.new_zeros": aten.zeros.default,
    "aten.new_ones": aten.ones.default,
    "aten.new_full": aten.full.default,
    "aten.new_empty": aten.empty.memory_format,
}


def _loss(build: _Builder, call: Call) -> fx.Node | None:
    """Elementwise losses: the mean (or sum) taken apart from the loss."""
    reduction = call["reduction"]
    if reduction not in (MEAN, SUM):
        return None
    arguments = {**call.arguments, "reduction": NONE}
    target: Any = call.node.target
    positional = [arguments[a.name] for a in target._schema.arguments if not a.kwarg_only]
    keywords = {a.name: arguments[a.name] for a in target._schema.arguments if a.kwarg_only}
    each = build(target, *positional, **keywords)
    return build(aten.mean.default if reduction == MEAN else aten.sum.default, each)


def _cross_entropy(build: _Builder, call: Call) -> fx.Node | None:
    logits, target = call["self"], call["target"]
    wide = call.results[0].dtype in (torch.float32, torch.float64)
    by_class = not target.meta["val"].dtype.is_floating_point
    if call["reduction"] != MEAN or not by_class:
        return None
    source = logits if wide else build(aten.to.dtype, logits, torch.float32)
    weight = call["weight"]
    if weight is not None and not wide:
        weight = build(aten.to.dtype, weight, torch.float32)
    ignore = call["ignore_index"]
    rest = () if operator_name(call.node.target) != "aten.cross_entropy_loss" else (call["label_smoothing"],)
    total = build(call.node.target, source, target, weight, SUM, ignore, *rest)
    loss = build(aten.div.Tensor, total, _count(build, target, weight, ignore, total.meta["val"].dtype))
    return loss if wide else build(aten.to.dtype, loss, call.results[0].dtype)


def _count(build: _Builder, target: fx.Node, weight: fx.Node | None, ignore: int, dtype: torch.dtype) -> fx.Node:
    """The sum of the class weights of the targets that count, or their number."""
    counted = build(aten.ne.Scalar, target, ignore)
    if weight is None:
        return build(aten.to.dtype, build(aten.sum.default, counted), dtype)
    classes = build(aten.masked_fill.Scalar, target, build(aten.eq.Scalar, target, ignore), 0)
    weights = build(aten.index.Tensor, build(aten.detach.default, weight), [classes])
    return build(aten.sum.default, build(aten.mul.Tensor, weights, counted))


def _embedding_bag(build: _Builder, call: Call) -> fx.Node | None:
    """Bags of one length: a table and rows of indices, without the offsets at which the bags begin.

    Before:  embedding_bag(w, reshape(x, [-1]), arange(0, x.numel(), x.size(1)))[0]
    After:   bags(w, x)
    """
    rows = _rows_of_bags(call)
    plain = call["per_sample_weights"] is None and call["padding_idx"] is None
    counts = call["scale_grad_by_freq"] or call["sparse"] or call["include_last_offset"]
    uses = list(call.node.users)
    read = all(use.target is operator.getitem and use.args[1] == 0 for use in uses)
    if rows is None or not plain or counts or not read or call["mode"] not in _BAG_MODES:
        return None
    found = build(functional_ops.bags, call["weight"], rows, _BAG_MODES[call["mode"]])
    for use in uses:
        use.replace_all_uses_with(found)
    return None  # what is left of it is dead


_BAG_MODES = {0: False, 1: True}  # sum and mean


def _rows_of_bags(call: Call) -> fx.Node | None:
    """The matrix of indices whose rows are the bags, if the offsets say so."""
    indices, offsets = call["indices"], call["offsets"]
    if operator_name(indices.target) != "aten.reshape" or operator_name(offsets.target) != "aten.arange":
        return None
    rows, counted = indices.args[0], Call(offsets)
    sizes = sizes_of(rows.meta["val"])
    ends = [_number(counted[name]) for name in ("start", "end", "step")]
    return rows if len(sizes) == 2 and ends == [0, sizes[0] * sizes[1], sizes[1]] else None


def _number(value: Any) -> Any:
    """A size argument, known or not."""
    return as_size(value.meta["val"] if isinstance(value, fx.Node) else value or 0)


def _shifted(build: _Builder, call: Call) -> fx.Node | None:
    """A sum that starts at zero is what is added; a number beside a scalar is a term of its own, which counts once
    where the scalar is added up of parts. So is one in the place of the first tensor.

    Before:  add(x, 0.0)        rsub(loss, 1)                  sub(2.0, x)           add(0.5, mask, alpha=3)
    After:   x                  sub(full([], 1), loss)         rsub(x, 2.0)          add(full([], 0.5), mask, alpha=3)
    """
    x, number, result = call["self"], call["other"], call.results[0]
    if not isinstance(x, fx.Node):
        if call["alpha"] in (None, 1) and number.meta["val"].ndim:
            return build(_TURNED[call.name], number, x)
        term = build(aten.full.default, [], x, dtype=result.dtype, device=result.device)
        return build(_SUMS[call.name], term, number, alpha=call["alpha"])
    value = x.meta["val"]
    if not isinstance(number, int | float) or not result.dtype.is_floating_point:
        return None
    if number == 0 and call.name != "aten.rsub" and value.dtype == result.dtype:
        return x
    if value.ndim:
        return None
    term = build(aten.full.default, [], number, dtype=result.dtype, device=result.device)
    terms = (term, x) if call.name == "aten.rsub" else (x, term)
    return build(_SUMS[call.name], *terms, alpha=call["alpha"])


_SUMS: dict[str, Any] = {
    "aten.add": aten.add.Tensor,
    "aten.sub": aten.sub.Tensor,
    "aten.rsub": aten.sub.Tensor,
}


_TURNED: dict[str, Any] = {
    "aten.add": aten.add.Tensor,
    "aten.sub": aten.rsub.Scalar,
}
"""The same with the number behind the tensor."""


_REWRITES: dict[str, Callable[[_Builder, Call], fx.Node | None]] = {
    "aten.slice": _slice,
    **dict.fromkeys(("aten.view_as", "aten.reshape_as", "aten.expand_as"), _like),
    **dict.fromkeys(("aten.type_as", "aten.to"), _cast_like),
    **dict.fromkeys(_CREATES, _created),
    **dict.fromkeys(("aten.repeat", "aten.tile"), _repeat),
    "aten.cat": _cat,
    "aten.embedding_bag": _embedding_bag,
    **dict.fromkeys(_SUMS, _shifted),
    "aten.cross_entropy_loss": _cross_entropy,
    "aten.nll_loss": _cross_entropy,
    "aten.nll_loss_nd": _cross_entropy,
    **dict.fromkeys((*LOSSES_WITH_REDUCTION, "aten.triplet_margin_loss", "aten.cosine_embedding_loss"), _loss),
    **dict.fromkeys(("aten.multi_margin_loss", "aten.multilabel_margin_loss"), _loss),
}
