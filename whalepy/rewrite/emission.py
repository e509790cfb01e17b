"""The new node of each operator: its local kernel, or itself with local sizes.

Before:  reshape(x, [batch, 12, 64])            x sharded by heads
After:   reshape(x, [size_0, size_1, 64])       every size argument from the axes of the result
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from whalepy.errors import PlanError
from whalepy.program.axes import Size, as_size
from whalepy.program.call import Call, is_tensor, tensor_operands
from whalepy.program.layout import Layout, Mode, operand_type, result_type
from whalepy.program.rules_nn import FOURIER
from whalepy.program.rules_shape import CREATES, CREATES_LIKE, RESHAPES
from whalepy.rewrite import kernels
from whalepy.rewrite.bindings import First, GlobalSize, Reducer, Start, Stream
from whalepy.rewrite.causal import is_causal, positions_whole, without_mask
from whalepy.rewrite.microbatches import KERNEL_IN_TIME

if TYPE_CHECKING:
    from whalepy.rewrite.rewrite import Rewriter

Emit = Callable[["Rewriter", int, fx.Node, list[fx.Node], tuple[Mode, ...]], fx.Node]


def emit(rewriter: Rewriter, i: int, node: fx.Node, operands: list[fx.Node], modes: tuple[Mode, ...]) -> fx.Node:
    """The new node of one operator: its local kernel, or itself with local sizes."""
    op = rewriter.program.operators[i]
    names = {mode.option.kernel for mode in modes if mode.option is not None and mode.option.kernel}
    names |= {node.meta[KERNEL_IN_TIME]} if KERNEL_IN_TIME in node.meta else set()
    if len(names) > 1:
        raise PlanError(f"{op.name} would need two local kernels at once: {sorted(names)}", at=op.where)
    maker = KERNELS[names.pop()] if names else SHAPED.get(op.target, _emit_same)
    new = maker(rewriter, i, node, operands, modes)
    if op.random:
        _seed(rewriter, i, new, modes)
    return new


def _seed(rewriter: Rewriter, i: int, new: fx.Node, modes: tuple[Mode, ...]) -> None:
    levels = tuple(level for level, mode in enumerate(modes) if mode.kind == "S")
    stream = rewriter.bind(Stream(i, levels))
    new.args = (stream, *new.args)
    new.target = kernels.Seeded(new.target)  # type: ignore[arg-type]


def _emit_same(rewriter: Rewriter, i: int, node: fx.Node, operands: list[fx.Node], modes: tuple[Mode, ...]) -> fx.Node:
    """The operator itself on local operands; numbers it computes with are those of the local model."""
    args, kwargs = _with_operands(rewriter, node, operands)
    return rewriter.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]


def _with_operands(
    rewriter: Rewriter, node: fx.Node, operands: list[fx.Node]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with the k-th tensor operand replaced by operands[k] (the same value may come in two layouts)."""
    queue = list(operands)
    values = {argument.name: _is_value(argument) for argument in _schema_arguments(node)}
    names = [argument.name for argument in _schema_arguments(node)]

    def swap(value: Any, step: bool) -> Any:
        if isinstance(value, fx.Node):
            return queue.pop(0) if is_tensor(value) else rewriter.argument(value, {}, step=step)
        if isinstance(value, list | tuple):
            return [swap(item, step) for item in value]
        return value

    args = tuple(
        swap(value, values.get(names[k], False) if k < len(names) else False) for k, value in enumerate(node.args)
    )
    kwargs = {name: swap(value, values.get(name, False)) for name, value in node.kwargs.items()}
    return args, kwargs


def _schema_arguments(node: fx.Node) -> list[Any]:
    target = node.target
    return list(target._schema.arguments) if isinstance(target, torch._ops.OpOverload) else []


_SIZED_BY_SCALAR = {"aten.arange", "aten.linspace", "aten.logspace"}


def _is_value(argument: Any) -> bool:
    """Whether a number given for this argument is computed with, and so is that of the whole step."""
    return str(argument.type) in ("number", "Scalar", "Tensor", "float")


def _emit_sized(position: int) -> Emit:
    """An operator whose argument at `position` is the shape of its result."""

    def make(rewriter: Rewriter, i: int, node: fx.Node, operands: list[fx.Node], modes: tuple[Mode, ...]) -> fx.Node:
        args, kwargs = _with_operands(rewriter, node, operands)
        shape = rewriter.local_shape(i, 0, result_layout(rewriter, i, modes))
        args = (*args[:position], shape, *args[position + 1 :])
        return rewriter.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]

    return make


def result_layout(rewriter: Rewriter, i: int, modes: tuple[Mode, ...], r: int = 0) -> Layout:
    """The layout of a result under these modes."""
    return tuple(result_type(rewriter.program.operators[i], mode, r) for mode in modes)


def _emit_reshape(
    rewriter: Rewriter, i: int, node: fx.Node, operands: list[fx.Node], modes: tuple[Mode, ...]
) -> fx.Node:
    if node.target is torch.ops.aten.view.dtype:
        return _emit_same(rewriter, i, node, operands, modes)
    shape = rewriter.local_shape(i, 0, result_layout(rewriter, i, modes))
    return rewriter.graph.call_function(torch.ops.aten.reshape.default, (operands[0], shape))


def _emit_expand(
    rewriter: Rewriter, i: int, node: fx.Node, operands: list[fx.Node], modes: tuple[Mode, ...]
) -> fx.Node:
    shape = rewriter.local_shape(i, 0, result_layout(rewriter, i, modes))
    return rewriter.graph.call_function(torch.ops.aten.expand.default, (operands[0], shape))


def _emit_split(rewriter: Rewriter, i: int, node: fx.Node, operands: list[fx.Node], modes: tuple[Mode, ...]) -> fx.Node:
    call = Call(node)
    d = call.dim()
    count = len(call.results)
    sizes = [rewriter.local_shape(i, r, result_layout(rewriter, i, modes, r))[d] for r in range(count)]
    return rewriter.graph.call_function(torch.ops.aten.split_with_sizes.default, (operands[0], sizes, d))


def _emit_arange(
    rewriter: Rewriter, i: int, node: fx.Node, operands: list[fx.Node], modes: tuple[Mode, ...]
) -> fx.Node:
    args, kwargs = rewriter.argument((node.args, dict(node.kwargs)), {}, step=False)
    return rewriter.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]


def _emit_guarded(
    rewriter: Rewriter, i: int, node: fx.Node, operands: list[fx.Node], modes: tuple[Mode, ...]
) -> fx.Node:
    """An operator that torch cannot run on empty operands, which a shard may be."""
    new = _emit_same(rewriter, i, node, operands, modes)
    if any(mode.kind == "S" for mode in modes):
        results = Call(node).results
        shapes = [rewriter.local_shape(i, r, result_layout(rewriter, i, modes, r)) for r in range(len(results))]
        new.args = (shapes, *new.args)
        new.target = kernels.Guarded(new.target, tuple(result.dtype for result in results))  # type: ignore[arg-type]
    return new


def _emit_convolution(
    rewriter: Rewriter, i: int, node: fx.Node, operands: list[fx.Node], modes: tuple[Mode, ...]
) -> fx.Node:
    """Itself where no channel is cut; else with the groups and the empty case of this device."""
    new = _emit_same(rewriter, i, node, operands, modes)
    if not any(mode.option is not None and mode.option.inputs[1] is not None for mode in modes):
        return new
    names = [argument.name for argument in _schema_arguments(node)]
    arguments = Call(node).arguments
    given = [new.kwargs.get(name, arguments[name]) for name in names[len(new.args) :]]
    shape = rewriter.local_shape(i, 0, result_layout(rewriter, i, modes))
    groups_at = names.index("groups") - 3 if arguments["groups"] != 1 else None
    new.args, new.kwargs = (shape, *new.args, *given), {}
    new.target = kernels.Convolution(new.target, groups_at)  # type: ignore[arg-type]
    return new


def _emit_repeat_interleave(
    rewriter: Rewriter, i: int, node: fx.Node, operands: list[fx.Node], modes: tuple[Mode, ...]
) -> fx.Node:
    """Without the size of the result, which is only a hint."""
    new = _emit_same(rewriter, i, node, operands, modes)
    new.kwargs = {name: value for name, value in new.kwargs.items() if name != "output_size"}
    return new


def _emit_attention(
    rewriter: Rewriter, i: int, node: fx.Node, operands: list[fx.Node], modes: tuple[Mode, ...]
) -> fx.Node:
    """Where it is cut, an operator that can do without rows and heads; a causal mask is left out where it may be."""
    new = _emit_same(rewriter, i, node, operands, modes)
    tensors = tensor_operands(node)
    if len(tensors) == 4 and is_causal(tensors[3]):
        op = rewriter.program.operators[i]
        layouts: list[Layout] = [tuple(operand_type(op, mode, k) for mode in modes) for k in range(4)]
        if positions_whole(layouts, [tensor.meta["val"].ndim for tensor in tensors]):
            without_mask(new)
    if any(mode.kind == "S" for mode in modes):
        new.target = kernels.attention
    return new


def _emit_affine_grid(
    rewriter: Rewriter, i: int, node: fx.Node, operands: list[fx.Node], modes: tuple[Mode, ...]
) -> fx.Node:
    """The size argument is that of an image, of which the result has the rows."""
    new = _emit_same(rewriter, i, node, operands, modes)
    theta, size, *rest = new.args
    rows = rewriter.local_shape(i, 0, result_layout(rewriter, i, modes))[0]
    new.args = (theta, [rows, *size[1:]], *rest)  # type: ignore[index]
    return new


GUARDED = (
    *("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "pad", "reflection_pad1d"),
    *("reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d"),
    *("batch_norm", "instance_norm", "group_norm", "_weight_norm", "lstm", "gru", "rnn_tanh", "rnn_relu"),
    *("grid_sampler", "grid_sampler_2d", "grid_sampler_3d", "affine_grid_generator", "im2col", "col2im"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d"),
    *("upsample_bicubic2d", "upsample_trilinear3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d"),
    *("_upsample_nearest_exact3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "channel_shuffle"),
    *("pixel_shuffle", "pixel_unshuffle"),
    *(name.removeprefix("aten.") for name in FOURIER),
)
"""Operators that torch does not run on empty operands."""
CONVOLUTIONS = (
    *("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
)

SHAPED: dict[str, Emit] = {
    **dict.fromkeys((*RESHAPES, "aten.view_as", "aten.reshape_as"), _emit_reshape),
    **dict.fromkeys(("aten.expand", "aten.broadcast_to", "aten.expand_as"), _emit_expand),
    **dict.fromkeys(("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split"), _emit_split),
    **dict.fromkeys(("aten.unsafe_split", "aten.unsafe_split_with_sizes", "aten.unsafe_chunk"), _emit_split),
    **dict.fromkeys(CREATES, _emit_sized(0)),
    **dict.fromkeys(CREATES_LIKE, _emit_sized(1)),
    **dict.fromkeys(tuple(_SIZED_BY_SCALAR), _emit_arange),
    **{f"aten.{name}": _emit_guarded for name in GUARDED},
    **{f"aten.{name}": _emit_convolution for name in CONVOLUTIONS},
    "whalepy.program.functional_ops.batch_norm": _emit_guarded,
    "aten.repeat_interleave": _emit_repeat_interleave,
    "aten.affine_grid_generator": _emit_affine_grid,
    "aten.scaled_dot_product_attention": _emit_attention,
}


def _start(rewriter: Rewriter, i: int, operand: int, modes: tuple[Mode, ...], dim: int) -> int | fx.Node:
    """First index along `dim` of an operand that this rank holds."""
    op = rewriter.program.operators[i]
    layout: Layout = tuple(operand_type(op, mode, operand) for mode in modes)
    source, r = op.operands[operand]
    terms = rewriter.terms(source, r, layout)[dim]
    return rewriter.bind(Start(terms)) if any(term.chain for term in terms) else 0


def _kernel_places(i: int, modes: tuple[Mode, ...], operand: int, kernel: str) -> list[int]:
    """Dims of an operand that options with this kernel cut."""
    found: list[int] = []
    for mode in modes:
        place = mode.option.inputs[operand] if mode.option is not None and mode.option.kernel == kernel else None
        if place is not None:
            found.append(place.dim)
    return found


def _emit_masked_embedding(
    rewriter: Rewriter, i: int, node: fx.Node, operands: list[fx.Node], modes: tuple[Mode, ...]
) -> fx.Node:
    padding = Call(node)["padding_idx"]
    start = _start(rewriter, i, 0, modes, 0)
    args = (operands[0], operands[1], start, -1 if padding is None else padding)
    return rewriter.graph.call_function(kernels.masked_embedding, args)


def _emit_masked_bags(
    rewriter: Rewriter, i: int, node: fx.Node, operands: list[fx.Node], modes: tuple[Mode, ...]
) -> fx.Node:
    start = _start(rewriter, i, 0, modes, 0)
    return rewriter.graph.call_function(kernels.masked_bags, (operands[0], operands[1], node.args[2], start))


def _emit_local_index(
    rewriter: Rewriter, i: int, node: fx.Node, operands: list[fx.Node], modes: tuple[Mode, ...]
) -> fx.Node:
    entries = Call(node)["indices"]
    cut_dims = set(_kernel_places(i, modes, 0, "local_index"))
    queue = list(operands[1:])
    indices: list[fx.Node | None] = []
    starts: list[int | fx.Node | None] = []
    for d, entry in enumerate(entries):
        indices.append(None if entry is None else queue.pop(0))
        starts.append(_start(rewriter, i, 0, modes, d) if entry is not None and d in cut_dims else None)
    return rewriter.graph.call_function(kernels.local_index, (operands[0], indices, starts))


def _emit_global_mean(
    rewriter: Rewriter, i: int, node: fx.Node, operands: list[fx.Node], modes: tuple[Mode, ...]
) -> fx.Node:
    call = Call(node)
    dims = call.dims() if "dim" in call.arguments else ()
    sizes = call.sizes(0)
    count: Size = 1
    for d in dims or range(len(sizes)):
        count = count * sizes[d]
    total = count if isinstance(count, int) else rewriter.bind(GlobalSize(sympy.sympify(count), True))
    args = (operands[0], list(dims), bool(call["keepdim"]), total, call["dtype"])
    return rewriter.graph.call_function(kernels.global_mean, args)


def _emit_class_parallel(
    rewriter: Rewriter, i: int, node: fx.Node, operands: list[fx.Node], modes: tuple[Mode, ...]
) -> fx.Node:
    level = next(k for k, mode in enumerate(modes) if mode.option is not None and mode.option.kernel)
    start = _start(rewriter, i, 0, modes, 1)
    ignore = Call(node)["ignore_index"]
    ignored = -100 if ignore is None else rewriter.argument(ignore, {}, step=True)  # a length, in question answering
    args = (operands[0], operands[1], ignored, start, rewriter.bind(Reducer(level)))
    return rewriter.graph.call_function(kernels.class_parallel, args)


def _emit_batch_statistics(
    rewriter: Rewriter, i: int, node: fx.Node, operands: list[fx.Node], modes: tuple[Mode, ...]
) -> fx.Node:
    op = rewriter.program.operators[i]
    layout: Layout = tuple(operand_type(op, mode, 0) for mode in modes)
    source, r = op.operands[0]
    rows = rewriter.local_size(rewriter.terms(source, r, layout)[0])
    whole = as_size(node.meta["val"][0].shape[0])
    total = whole if isinstance(whole, int) else rewriter.bind(GlobalSize(whole, True))
    args, kwargs = _with_operands(rewriter, node, operands)
    return rewriter.graph.call_function(kernels.batch_statistics, (args[0], rows, total, *args[1:]), kwargs)


def _emit_first_only(
    rewriter: Rewriter, i: int, node: fx.Node, operands: list[fx.Node], modes: tuple[Mode, ...]
) -> fx.Node:
    return rewriter.graph.call_function(torch.ops.aten.mul.Tensor, (operands[0], rewriter.bind(First())))


SHAPED["whalepy.program.functional_ops.first_only"] = _emit_first_only

KERNELS: dict[str, Emit] = {
    "masked_embedding": _emit_masked_embedding,
    "masked_bags": _emit_masked_bags,
    "local_index": _emit_local_index,
    "global_mean": _emit_global_mean,
    "class_parallel": _emit_class_parallel,
    "batch_statistics": _emit_batch_statistics,
}
