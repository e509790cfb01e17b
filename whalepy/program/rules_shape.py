"""Rules of operators that move, cut or repeat elements and compute nothing."""

from __future__ import annotations

import torch

from whalepy.program.axes import as_size
from whalepy.program.call import Call
from whalepy.program.rules import Rule
from whalepy.program.rules_write import ONE, Maker, along, is_count, letters, overload, result_sizes, write

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)


def _reshape(call: Call) -> Rule | None:
    one_to_one = len(call.operands) == 1 and len(call.results) == 1
    if not one_to_one or overload(call) == "dtype" or call.ranks[0] == call.results[0].ndim == 0:
        return None
    return Rule((("_",) * call.ranks[0],), (("_",) * call.results[0].ndim,), linear=ONE, flat=True)


def _permuted(call: Call) -> Rule | None:
    """Any reordering of dims: where each goes is read off a tensor whose sizes all differ."""
    rank = call.ranks[0]
    source = letters(rank)
    probe = torch.empty(PRIMES[:rank], device="meta")
    moved = call.node.target(probe, *call.node.args[1:], **call.node.kwargs)  # type: ignore[operator]
    return write([source], [[source[PRIMES.index(size)] for size in moved.shape]], linear=ONE)


def _expand(call: Call) -> Rule:
    """Dims of size 1 are lacking in the operand; `expand_as` reads its second operand for the shape."""
    rank, out = call.ranks[0], letters(call.results[0].ndim)
    lead = len(out) - rank
    before, after = call.sizes(0), result_sizes(call)
    source = [out[lead + d] if before[d] == after[lead + d] or before[d] != 1 else "_" for d in range(rank)]
    return write([source, *[out] * (len(call.operands) - 1)], [out], linear=ONE)


def _slice(call: Call) -> Rule | None:
    same = result_sizes(call) == call.sizes(0)
    return along(call, [call.dim()], fresh=not same, linear=True)


def _flip(call: Call) -> Rule | None:
    return along(call, call.dims("dims"), fresh=True, linear=True)


def _pad(call: Call) -> Rule | None:
    """Padded dims are whole; zero padding is linear, and so are reflection, replication and circular padding."""
    amounts = call["pad"] if "pad" in call.arguments else call["padding"]
    padded = {call.ranks[0] - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0}
    constant = call.name == "aten.constant_pad_nd" or call["mode"] == "constant"
    return along(call, sorted(padded), fresh=True, linear=not constant or not call["value"])


def _select(call: Call) -> Rule:
    source, d = letters(call.ranks[0]), call.dim()
    out = source[:d] + source[d + 1 :]
    return write([[*source[:d], source[d].upper(), *source[d + 1 :]]], [out] * len(call.results), linear=ONE)


def _split(call: Call) -> Rule:
    """Into equal parts: the dim is (n p), n whole. Into unequal ones: a concatenation."""
    source: list[object] = list(letters(call.ranks[0]))
    d = call.dim()
    sizes = [as_size(result.shape[d]) for result in call.results]
    if all(size == sizes[0] for size in sizes):
        product = [*source[:d], ("N", source[d]), *source[d + 1 :]]
        return write([product], [source] * len(sizes), linear=ONE, sizes={"N": len(sizes)})
    source = [*source[:d], "_", *source[d + 1 :]]
    return write([source], [source] * len(sizes), linear=ONE, concatenated=d)


def _cat(call: Call) -> Rule | None:
    rank = call.results[0].ndim
    if any(r != rank for r in call.ranks):
        return None
    tokens = letters(rank)
    tokens[call.dim(rank=rank)] = "_"
    return write([tokens] * len(call.operands), [tokens])


def _stack(call: Call) -> Rule:
    rank = call.results[0].ndim
    tokens, d = letters(rank - 1), call.dim(rank=rank)
    return write([tokens] * len(call.operands), [[*tokens[:d], "_", *tokens[d:]]])


def _repeat(call: Call) -> Rule | None:
    """Each repeated dim x becomes (R x); new leading dims are unrelated."""
    counts = list(call["repeats"] if "repeats" in call.arguments else call["dims"])
    counts = [1] * (call.ranks[0] - len(counts)) + counts
    if not all(is_count(count) and count > 0 for count in counts):
        return None
    source = letters(call.ranks[0])
    lead = len(counts) - len(source)
    sizes = {f"R{d}": count for d, count in enumerate(counts[lead:]) if count > 1}
    out = [(f"R{d}", letter) if f"R{d}" in sizes else letter for d, letter in enumerate(source)]
    return write([source], [["_"] * lead + out], linear=ONE, sizes=sizes)


def _repeat_interleave(call: Call) -> Rule | None:
    """`(x) -> (x R)`; with a tensor of counts, or flattened, no rule."""
    count = call["repeats"]
    if len(call.operands) != 1 or call["dim"] is None or not is_count(count) or count < 1:
        return None
    source, d = letters(call.ranks[0]), call.dim()
    out = [*source[:d], (source[d], "R") if count > 1 else source[d], *source[d + 1 :]]
    return write([source], [out], linear=ONE, sizes={"R": count})


def _unfold(call: Call) -> Rule:
    source, d = letters(call.ranks[0]), call.dim("dimension")
    out = [*source[:d], "_", *source[d + 1 :], "_"]
    return write([[*source[:d], "_", *source[d + 1 :]]], [out], linear=ONE)


def _diagonal(call: Call) -> Rule:
    source = letters(call.ranks[0])
    taken = {call.dim("dim1"), call.dim("dim2")}
    out = [letter for d, letter in enumerate(source) if d not in taken]
    return write([["_" if d in taken else letter for d, letter in enumerate(source)]], [[*out, "_"]], linear=ONE)


def _diag_embed(call: Call) -> Rule:
    source, rank = letters(call.ranks[0] - 1), call.results[0].ndim
    new = {call.dim("dim1", rank), call.dim("dim2", rank)}
    rest = iter(source)
    return write([[*source, "_"]], [["_" if d in new else next(rest) for d in range(rank)]], linear=ONE)


def _triangle(call: Call) -> Rule:
    source = letters(call.ranks[0])
    source[-2:] = ["M", "N"]
    return write([source], [source], linear=ONE)


def _meshgrid(call: Call) -> Rule | None:
    """One dim per operand, in order; `xy` exchanges the first two."""
    if any(rank > 1 for rank in call.ranks) or 0 in call.ranks:
        return None
    axes = letters(len(call.operands))
    out = axes if call["indexing"] in (None, "ij") else [*axes[:2][::-1], *axes[2:]]
    return write([[axis] for axis in axes], [out] * len(call.results))


def _create(call: Call) -> Rule | None:
    return write([["_"] * rank for rank in call.ranks], [letters(call.results[0].ndim)])


RESHAPES = tuple(
    f"aten.{name}"
    for name in [
        "view",
        "reshape",
        "_unsafe_view",
        "_reshape_alias",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "ravel",
    ]
)
CREATES = tuple(f"aten.{name}" for name in ["full", "zeros", "ones", "empty", "rand", "randn"])
CREATES_LIKE = tuple(f"aten.new_{name}" for name in ["full", "zeros", "ones", "empty"])

MAKERS: dict[str, Maker] = {
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(("aten.permute", "aten.transpose", "aten.swapaxes", "aten.swapdims", "aten.t"), _permuted),
    **dict.fromkeys(("aten.numpy_T", "aten.mT", "aten.movedim", "aten.moveaxis"), _permuted),
    **dict.fromkeys(("aten.expand", "aten.expand_as", "aten.broadcast_to"), _expand),
    **dict.fromkeys(("aten.slice", "aten.narrow"), _slice),
    **dict.fromkeys(("aten.flip", "aten.roll"), _flip),
    **dict.fromkeys(("aten.constant_pad_nd", "aten.pad", "aten.reflection_pad1d", "aten.reflection_pad2d"), _pad),
    **dict.fromkeys(("aten.reflection_pad3d", "aten.replication_pad1d", "aten.replication_pad2d"), _pad),
    "aten.replication_pad3d": _pad,
    **dict.fromkeys(("aten.select", "aten.unbind"), _select),
    **dict.fromkeys(("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split"), _split),
    **dict.fromkeys(("aten.unsafe_split", "aten.unsafe_split_with_sizes", "aten.unsafe_chunk"), _split),
    **dict.fromkeys(("aten.cat", "aten.concat", "aten.concatenate"), _cat),
    "aten.stack": _stack,
    **dict.fromkeys(("aten.repeat", "aten.tile"), _repeat),
    "aten.repeat_interleave": _repeat_interleave,
    "aten.unfold": _unfold,
    "aten.diagonal": _diagonal,
    "aten.diag_embed": _diag_embed,
    **dict.fromkeys(("aten.tril", "aten.triu"), _triangle),
    "aten.meshgrid": _meshgrid,
    **dict.fromkeys((*CREATES, *CREATES_LIKE), _create),
}
