"""Rules of operators that read or write at indices."""

from __future__ import annotations

import torch

from whalepy.program.axes import as_size
from whalepy.program.call import Call
from whalepy.program.rules import Rule, parse_rule
from whalepy.program.rules_write import ONE, Maker, is_count, letters, result_sizes, write

BOTH = (frozenset({0, 1}),)


def _embedding(call: Call) -> Rule | None:
    """Rows of a table. Gradients scaled by frequency count the whole batch; sparse ones have no layout: no rule."""
    if call["sparse"] or call["scale_grad_by_freq"]:
        return None
    return parse_rule("vd, ... -> ...d  !v=masked_embedding", linear=((0,),))


def _bags(call: Call) -> Rule:
    return parse_rule("vd, bL -> bd  !v=masked_bags", linear=((0,),))


def _index(call: Call) -> Rule | None:
    """Dims not indexed are free; an index that counts along its own axis links the dim it reads to that axis."""
    entries = call["indices"]
    tensors = [entry for entry in entries if entry is not None]
    if not tensors or any(entry.meta["val"].dtype in (torch.bool, torch.uint8) for entry in tensors):
        return None
    spread = max(entry.meta["val"].ndim for entry in tensors)
    shared = [f"i{k}" for k in range(spread)]
    source: list[str] = letters(call.ranks[0])
    free = [letter for d, letter in enumerate(source) if d >= len(entries) or entries[d] is None]
    at = [d for d, entry in enumerate(entries) if entry is not None]
    kernels: dict[str, str] = {}
    tokens: list[list[str]] = []
    for d in at:
        tensor = entries[d].meta["val"]
        own = shared[spread - tensor.ndim :]
        tokens.append(own)
        counted = entries[d].meta.get("iota")
        source[d] = source[d].upper()
        if counted is not None and as_size(tensor.shape[counted]) == call.sizes(0)[d] and own[counted] not in kernels:
            source[d] = own[counted]
            kernels[own[counted]] = "local_index"
    adjacent = at == list(range(at[0], at[-1] + 1))
    before = at[0] if adjacent else 0
    return write([source, *tokens], [[*free[:before], *shared, *free[before:]]], kernels=kernels)


def _index_select(call: Call) -> Rule | None:
    if call.ranks != (max(call.ranks[0], 1), 1):
        return None
    source, d = letters(call.ranks[0]), call.dim()
    out = [*source[:d], "i", *source[d + 1 :]]
    return write([[*source[:d], "_", *source[d + 1 :]], ["i"]], [out], linear=ONE)


def _gather(call: Call) -> Rule | None:
    """One element per index; a dim of which the index takes a part only is unrelated."""
    if call.ranks[0] != call.ranks[1] or not call.ranks[0] or call["dim"] is None or call["sparse_grad"]:
        return None
    d = call.dim()
    index = letters(call.ranks[0])
    sizes = list(zip(call.sizes(0), call.sizes(1), strict=True))
    for k, (ours, theirs) in enumerate(sizes):
        if k != d and ours != theirs:
            index[k] = "_"
    source = [letter if k != d else "_" for k, letter in enumerate(index)]
    return write([source, index], [index], linear=ONE)


def _scatter(added: bool) -> Maker:
    """Writing at indices along a dim, which is whole; other dims are free where all tensors have them whole."""

    def make(call: Call) -> Rule | None:
        rank, d = call.ranks[0], call.dim()
        if not rank or any(r != rank for r in call.ranks):
            return None
        whole = [all(call.sizes(i)[k] == call.sizes(0)[k] for i in range(len(call.ranks))) for k in range(rank)]
        free = [letter if whole[k] and k != d else "_" for k, letter in enumerate(letters(rank))]
        target = [letter if k != d else "D" for k, letter in enumerate(free)]
        # Entries along the dim may be cut where writes add up: the operand counts once.
        entry = [letter if k != d or not added else "i" for k, letter in enumerate(free)]
        same = call.sizes(1) == call.sizes(len(call.ranks) - 1)
        entries = [entry if same else free] * (len(call.ranks) - 1)
        linear = (frozenset({0, 2}),) if added else ()
        additive = frozenset({0}) if added else frozenset[int]()
        return write([target, *entries], [target], linear=linear, additive=additive)

    return make


def _index_add(call: Call) -> Rule | None:
    """Adding rows at indices: the rows may be cut, then the operand counts once."""
    rank, d = call.ranks[0], call.dim()
    if call.ranks != (rank, 1, rank) or not rank:
        return None
    source = letters(rank)
    target = [*source[:d], "D", *source[d + 1 :]]
    rows = [*source[:d], "i", *source[d + 1 :]]
    return write([target, ["i"], rows], [target], additive=frozenset({0}), linear=(frozenset({0, 2}),))


def _index_along(call: Call) -> Rule | None:
    """index_fill and index_copy: the dim is whole."""
    rank, d = call.ranks[0], call.dim()
    source = letters(rank)
    target = [*source[:d], "D", *source[d + 1 :]]
    entry = [*source[:d], "_", *source[d + 1 :]]
    rest = [entry] if call.name == "aten.index_copy" else [[]] * (len(call.operands) - 2)
    if not rank or call.ranks[1:] != (1, *map(len, rest)):
        return None
    return write([target, ["_"], *rest], [target])


def _slice_scatter(call: Call) -> Rule:
    """A stretch of a dim is replaced; the dim is whole."""
    source, d = letters(call.ranks[0]), call.dim()
    target = [*source[:d], "D", *source[d + 1 :]]
    replaced = [*source[:d], *(["_"] if call.name == "aten.slice_scatter" else []), *source[d + 1 :]]
    return write([target, replaced], [target], linear=BOTH)


def _one_hot(call: Call) -> Rule | None:
    return parse_rule("... -> ..._") if is_count(call["num_classes"]) and call["num_classes"] > 0 else None


def _searchsorted(call: Call) -> Rule | None:
    return parse_rule("_, ... -> ...") if call.ranks[0] == 1 and len(call.operands) == 2 and call.ranks[1] else None


def _take_along_dim(call: Call) -> Rule | None:
    return _gather(call) if call["dim"] is not None and result_sizes(call) == call.sizes(1) else None


MAKERS: dict[str, Maker] = {
    "aten.embedding": _embedding,
    "whalepy.program.functional_ops.bags": _bags,
    "aten.index": _index,
    "aten.index_select": _index_select,
    "aten.gather": _gather,
    "aten.take_along_dim": _take_along_dim,
    "aten.scatter": _scatter(False),
    "aten.scatter_add": _scatter(True),
    "aten.index_add": _index_add,
    **dict.fromkeys(("aten.index_fill", "aten.index_copy"), _index_along),
    **dict.fromkeys(("aten.slice_scatter", "aten.select_scatter"), _slice_scatter),
    "aten.one_hot": _one_hot,
    "aten.searchsorted": _searchsorted,
}
