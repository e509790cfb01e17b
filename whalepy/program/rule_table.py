"""The table of sharding rules: one line or one small maker per operator.

A line's entries stand for the tensor arguments of the operator's schema, in order; entries of absent optional operands
are dropped. A maker reads dims and flags off the call and returns a rule, or None: then the operator runs replicated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from whalepy.program.axes import as_size
from whalepy.program.call import Call, sizes_of
from whalepy.program.rules import Rule, Tokens, at_ranks, parse_rule

Maker = Callable[[Call], "Rule | None"]
LETTERS = "abcdefghijklmnopqrstuvw"

LINES: dict[str, tuple[str, tuple[tuple[int, ...], ...]]] = {
    # operator: (rule, groups of operands in which it is jointly linear)
    "aten.linear": ("...k, nk, +n -> ...n", ((0,), (1,))),
    "aten.mm": ("mk, kn -> mn", ((0,), (1,))),
    "aten.bmm": ("bmk, bkn -> bmn", ((0,), (1,))),
    "aten.baddbmm": ("+bmn, bmk, bkn -> bmn", ((1,), (2,))),
    "aten.mv": ("mk, k -> m", ((0,), (1,))),
    "aten.dot": ("k, k -> ", ((0,), (1,))),
    "aten.outer": ("m, n -> mn", ((0,), (1,))),
    "aten.embedding": ("vd, ... -> ...d  !v=masked_embedding", ((0,),)),
    "aten.t": ("ab -> ba", ((0,),)),
}

# Operators that treat every element alike; torch tags most pointwise operators, these it does not.
POINTWISE = {
    *("aten.to", "aten._to_copy", "aten.clone", "aten.contiguous", "aten.detach", "aten.alias", "aten.lift_fresh_copy"),
    *("aten.dropout", "aten.alpha_dropout", "aten.masked_fill", "whalepy.program.functional_ops.first_only"),
    *("aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.empty_like", "aten.rand_like", "aten.randn_like"),
    *("aten.where", "aten.float", "aten.lift_fresh", "aten.bernoulli", "aten.gelu", "aten.softplus", "aten.where"),
    *("aten.sigmoid", "aten.log_sigmoid", "aten.prelu_", "aten.__and__", "aten.__or__", "aten.bitwise_not"),
    *("aten.hardtanh", "aten.relu6", "aten.selu", "aten.celu", "aten.square", "aten.clamp", "aten.nan_to_num"),
    *("aten.mse_loss", "aten.l1_loss", "aten.smooth_l1_loss", "aten.huber_loss", "aten.binary_cross_entropy"),
    *("aten.binary_cross_entropy_with_logits", "aten.kl_div", "aten.soft_margin_loss"),
}
RANDOM = {
    *("aten.dropout", "aten.bernoulli", "aten.rand_like", "aten.randn_like", "aten.rand", "aten.randn", "aten.randint"),
    *("aten.randperm", "aten.multinomial", "aten.normal", "aten.feature_dropout", "aten.alpha_dropout", "aten.rrelu"),
    *("aten.feature_alpha_dropout", "aten.native_dropout", "aten.poisson", "aten.randint_like", "aten.exponential"),
    *("aten.uniform", "aten.cauchy", "aten.geometric", "aten.log_normal", "aten.rrelu_with_noise", "aten.binomial"),
    *("aten.rrelu_with_noise_functional", "aten.randn_like", "aten.fractional_max_pool2d", "aten.lstm", "aten.gru"),
}
LOSSES_WITH_REDUCTION = {
    *("aten.mse_loss", "aten.l1_loss", "aten.smooth_l1_loss", "aten.huber_loss", "aten.binary_cross_entropy"),
    *("aten.binary_cross_entropy_with_logits", "aten.kl_div", "aten.soft_margin_loss"),
}

# Joint linearity of operators without a line: by operand position. "all": jointly in all tensor operands.
LINEAR: dict[str, tuple[tuple[int, ...], ...] | str] = {
    **dict.fromkeys(("aten.add", "aten.sub", "aten.rsub", "aten.cat", "aten.stack"), "all"),
    **dict.fromkeys(("aten.neg", "aten.to", "aten._to_copy", "aten.clone", "aten.contiguous", "aten.alias"), ((0,),)),
    **dict.fromkeys(("aten.detach", "aten.lift_fresh_copy"), ((0,),)),
    "whalepy.program.functional_ops.first_only": ((0,),),
    "aten.mul": ((0,), (1,)),
    "aten.div": ((0,),),
    "aten.where": ((1, 2),),
}


def _letters(rank: int, skip: str = "") -> list[str]:
    return [letter for letter in LETTERS if letter not in skip][:rank]


def _rule(inputs: Sequence[Sequence[object]], outputs: Sequence[Sequence[object]], **more: object) -> Rule:
    def tokens(entry: Sequence[object]) -> Tokens:
        return tuple(entry)  # type: ignore[arg-type]

    return Rule(tuple(map(tokens, inputs)), tuple(map(tokens, outputs)), **more)  # type: ignore[arg-type]


ONE = (frozenset({0}),)


def _pointwise(call: Call) -> Rule | None:
    if call["reduction"] not in (None, 0) and call.name in LOSSES_WITH_REDUCTION:
        return None
    if any(result.ndim < max(call.ranks, default=0) for result in call.results) or not _broadcasts(call):
        return None
    return parse_rule(", ".join(["..."] * len(call.operands)) + " -> " + ", ".join(["..."] * len(call.results)))


def _broadcasts(call: Call) -> bool:
    """Whether every operand has the result's sizes or 1, as far as they are known."""
    for i in range(len(call.operands)):
        for result in call.results:
            pairs = zip(reversed(call.sizes(i)), reversed(sizes_of(result)), strict=False)
            if any(isinstance(a, int) and isinstance(b, int) and a not in (1, b) for a, b in pairs):
                return False
    return True


def _reshape(call: Call) -> Rule | None:
    if len(call.operands) != 1 or len(call.results) != 1:
        return None
    return Rule((("_",) * call.ranks[0],), (("_",) * call.results[0].ndim,), linear=ONE, flat=True)


def _permute(call: Call) -> Rule:
    letters = _letters(call.ranks[0])
    order = call.dims("dims") if call["dims"] else tuple(reversed(range(call.ranks[0])))
    return _rule([letters], [[letters[d] for d in order]], linear=ONE)


def _transpose(call: Call) -> Rule:
    letters = _letters(call.ranks[0])
    out = list(letters)
    if letters:
        a, b = call.dim("dim0"), call.dim("dim1")
        out[a], out[b] = out[b], out[a]
    return _rule([letters], [out], linear=ONE)


def _expand(call: Call) -> Rule:
    rank, out_rank = call.ranks[0], call.results[0].ndim
    out = _letters(out_rank)
    sizes, out_sizes = call.sizes(0), tuple(map(as_size, call.results[0].shape))
    lead = out_rank - rank
    source = [out[lead + d] if sizes[d] == out_sizes[lead + d] or sizes[d] != 1 else "_" for d in range(rank)]
    return _rule([source], [out], linear=ONE)


def _whole_dims(call: Call, dims: Sequence[int], *, fresh: bool = False, linear: bool = False) -> Rule | None:
    """Same shape in and out, `dims` whole; `fresh` where the result's dims are other axes than the operand's."""
    letters: list[str] = list(_letters(call.ranks[0]))
    out = list(letters)
    for d in dims:
        letters[d] = letters[d].upper()
        out[d] = "_" if fresh else letters[d]
    if any(result.ndim != call.ranks[0] for result in call.results) or len(call.operands) != 1:
        return None
    return _rule([letters], [out] * len(call.results), linear=ONE if linear else ())


def _along_dim(call: Call) -> Rule | None:
    return _whole_dims(call, [call.dim()]) if call.ranks[0] else None


def _slice(call: Call) -> Rule | None:
    return _whole_dims(call, [call.dim()], fresh=True, linear=True)


def _flip(call: Call) -> Rule | None:
    return _whole_dims(call, call.dims("dims"), fresh=True, linear=True)


def _pad(call: Call) -> Rule | None:
    changed = [d for d, (a, b) in enumerate(zip(call.sizes(0), call.results[0].shape, strict=True)) if a != as_size(b)]
    padded = {call.ranks[0] - 1 - i // 2 for i, amount in enumerate(call["pad"]) if amount != 0}
    constant = call.name == "aten.constant_pad_nd" or call["mode"] == "constant"
    zero = not call["value"]
    return _whole_dims(call, sorted({*changed, *padded}), fresh=True, linear=constant and zero)


def _select(call: Call) -> Rule:
    letters = _letters(call.ranks[0])
    d = call.dim()
    return _rule([[*letters[:d], letters[d].upper(), *letters[d + 1 :]]], [letters[:d] + letters[d + 1 :]], linear=ONE)


def _unbind(call: Call) -> Rule:
    letters = _letters(call.ranks[0])
    d = call.dim()
    out = letters[:d] + letters[d + 1 :]
    return _rule([[*letters[:d], letters[d].upper(), *letters[d + 1 :]]], [out] * len(call.results), linear=ONE)


def _split(call: Call) -> Rule:
    """Into equal parts: the dim is (n p), n whole. Into unequal ones: a concatenation."""
    letters: list[object] = list(_letters(call.ranks[0]))
    d = call.dim()
    sizes = [as_size(result.shape[d]) for result in call.results]
    if all(size == sizes[0] for size in sizes):
        source = [*letters[:d], ("N", letters[d]), *letters[d + 1 :]]
        return _rule([source], [letters] * len(sizes), linear=ONE, sizes={"N": len(sizes)})
    source = [*letters[:d], "_", *letters[d + 1 :]]
    return _rule([source], [source] * len(sizes), linear=ONE, concatenated=d)


def _cat(call: Call) -> Rule | None:
    rank = call.results[0].ndim
    if any(r != rank for r in call.ranks):
        return None
    letters = _letters(rank)
    letters[call.dim(rank=rank)] = "_"
    return _rule([letters] * len(call.operands), [letters])


def _stack(call: Call) -> Rule:
    rank = call.results[0].ndim
    letters = _letters(rank - 1)
    d = call.dim(rank=rank)
    return _rule([letters] * len(call.operands), [[*letters[:d], "_", *letters[d:]]])


def _reduce(kind: str) -> Maker:
    """`sum`: partial sums add up; `mean`: they do after dividing by the global size; `whole`: reduced dims are whole."""

    def make(call: Call) -> Rule | None:
        if call["other"] is not None:  # max and min of two tensors
            return _pointwise(call)
        rank = call.ranks[0]
        dims = call.dims() if "dim" in call.arguments else tuple(range(rank))
        if len(call.operands) != 1:
            return None
        letters = _letters(rank)
        source = [letter.upper() if kind == "whole" and d in dims else letter for d, letter in enumerate(letters)]
        keep = bool(call["keepdim"])
        out = [("_" if keep else None) if d in dims else letter for d, letter in enumerate(letters)]
        kernels = {letters[d]: "global_mean" for d in dims} if kind == "mean" else {}
        results = [[token for token in out if token is not None]] * len(call.results)
        if any(result.ndim != len(results[0]) for result in call.results):
            return None
        return _rule([source], results, kernels=kernels, linear=() if kind == "whole" else ONE)

    return make


def _matmul(call: Call) -> Rule | None:
    a, b = call.ranks
    left = "...mk" if a > 1 else "k"
    right = "...kn" if b > 1 else "k"
    out = "..." * (max(a, b) > 1) + "m" * (a > 1) + "n" * (b > 1)
    if a == 1 and b > 2:
        return None
    return parse_rule(f"{left}, {right} -> {out}", linear=((0,), (1,)))


def _addmm(call: Call) -> Rule:
    bias = ["", "+n", "+mn"][call.ranks[0]]
    return parse_rule(f"{bias}, mk, kn -> mn", linear=((1,), (2,)))


def _einsum(call: Call) -> Rule | None:
    equation = str(call["equation"]).replace(" ", "")
    if "." in equation or "->" not in equation or any(len(set(e)) != len(e) for e in equation.split("->")[0].split(",")):
        return None
    linear = tuple((i,) for i in range(len(call.operands)))
    return parse_rule(equation.lower().replace(",", ", "), linear=linear) if equation.islower() else None


def _normalised(call: Call) -> Rule:
    """layer_norm and rms_norm: the trailing dims are whole."""
    count = len(call["normalized_shape"])
    trailing = "".join(_letters(count)).upper()
    return parse_rule(", ".join([f"...{trailing}"] + [trailing] * (len(call.operands) - 1)) + f" -> ...{trailing}")


def _group_norm(call: Call) -> Rule:
    spatial = "".join(_letters(call.ranks[0] - 2, skip="nc")).upper()
    return parse_rule(", ".join([f"nC{spatial}"] + ["C"] * (len(call.operands) - 1)) + f" -> nC{spatial}")


def _batch_norm(call: Call) -> Rule | None:
    """Evaluation: an affine map per channel. In training without running statistics all rows must be there."""
    if call["training"]:
        return None
    spatial = "".join(_letters(call.ranks[0] - 2, skip="nc"))
    return parse_rule(", ".join([f"nc{spatial}"] + ["c"] * (len(call.operands) - 1)) + f" -> nc{spatial}")


def _batch_norm_training(call: Call) -> Rule:
    """Training: statistics over rows; sharded by rows they are each device's own unless synchronised."""
    spatial = "".join(_letters(call.ranks[0] - 2, skip="nc")).upper()
    entries = [f"nc{spatial}"] + ["c"] * (len(call.operands) - 1)
    outputs = [f"nc{spatial}"] + ["c"] * (len(call.results) - 1)
    return parse_rule(", ".join(entries) + " -> " + ", ".join(outputs) + " !n=batch_statistics")


def _attention(call: Call) -> Rule | None:
    """Heads and rows free, keys whole; queries free unless the mask is implied by their position."""
    if max(call.ranks[:3]) != min(call.ranks[:3]) or call.ranks[0] < 3:
        return None
    q = "Q" if call["is_causal"] else "q"
    grouped = bool(call["enable_gqa"])
    lead = "...h" if call.ranks[0] > 3 else "..."
    keys = "...G" if grouped else lead
    queries = "...H" if grouped else lead
    mask = ", ...qK" if len(call.operands) > 3 else ""
    if mask and call.ranks[3] >= 3 and call.ranks[0] > 3:
        mask = ", ..." + ("H" if grouped else "h") + "qK"
    return parse_rule(f"{queries}{q}D, {keys}KD, {keys}KE{mask} -> {queries}{q}E")


def _convolution(call: Call) -> Rule | None:
    spatial = call.ranks[1] - 2
    if call.ranks[0] != spatial + 2:
        return None
    space = "_" * spatial
    transposed = "transpose" in call.name or bool(call["transposed"])
    bias = ", +o" if len(call.operands) > 2 else ""
    if call["groups"] != 1:
        bias = ", _" if bias else ""
        return parse_rule(f"n_{space}, __{space}{bias} -> n_{space}")
    weight = "co" if transposed else "oc"
    return parse_rule(f"nc{space}, {weight}{space}{bias} -> no{space}", linear=((0,), (1,)))


def _pool(spatial: int) -> Maker:
    def make(call: Call) -> Rule | None:
        if call.ranks[0] != spatial + 2:
            return None
        space = "_" * spatial
        return parse_rule(f"nc{space} -> " + ", ".join([f"nc{space}"] * len(call.results)))

    return make


def _index(call: Call) -> Rule | None:
    """Dims that are not indexed are free; an index that counts along its own axis links the dim it reads to that axis."""
    entries = call["indices"]
    tensors = [entry for entry in entries if entry is not None]
    if any(not entry.meta["val"].dtype.is_floating_point and entry.meta["val"].dtype is torch.bool for entry in tensors):
        return None
    spread = max(entry.meta["val"].ndim for entry in tensors)
    shared = [f"i{k}" for k in range(spread)]
    source: list[str] = _letters(call.ranks[0])
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
        if counted is not None and as_size(tensor.shape[counted]) == call.sizes(0)[d]:
            source[d] = own[counted]
            kernels[own[counted]] = "local_index"
    adjacent = at == list(range(at[0], at[-1] + 1))
    before = at[0] if adjacent else 0
    return _rule([source, *tokens], [[*free[:before], *shared, *free[before:]]], kernels=kernels)


def _create(call: Call) -> Rule | None:
    letters = _letters(call.results[0].ndim)
    return _rule([["_"] * rank for rank in call.ranks], [letters])


def _cross_entropy(call: Call) -> Rule | None:
    """Cross entropy over class indices, summed or per row; the mean has become a sum over a count by now."""
    if call["reduction"] not in (0, 2) or call.ranks[0] < 2 or call.ranks[0] == call.ranks[1]:
        return None
    space = "".join(_letters(call.ranks[0] - 2, skip="nc"))
    summed = call["reduction"] == 2
    whole_loss = call.name == "aten.cross_entropy_loss"
    plain = whole_loss and summed and call["weight"] is None and not call["label_smoothing"] and not space
    classes = "c" if plain else "C"
    weight = ", C" if call["weight"] is not None else ""
    kernel = " !c=class_parallel" if plain else ""
    return parse_rule(f"n{classes}{space}, n{space}{weight} -> {'' if summed else 'n' + space}{kernel}")


MAKERS: dict[str, Maker] = {
    **dict.fromkeys(("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten"), _reshape),
    **dict.fromkeys(("aten.squeeze", "aten.unsqueeze", "aten.view_as", "aten.reshape_as", "aten.ravel"), _reshape),
    "aten.permute": _permute,
    "aten.numpy_T": _permute,
    **dict.fromkeys(("aten.transpose", "aten.swapaxes", "aten.swapdims"), _transpose),
    **dict.fromkeys(("aten.expand", "aten.expand_as", "aten.broadcast_to"), _expand),
    **dict.fromkeys(("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax"), _along_dim),
    **dict.fromkeys(("aten.cumsum", "aten.cumprod", "aten.sort", "aten.logcumsumexp", "aten.glu"), _along_dim),
    **dict.fromkeys(("aten.slice", "aten.narrow"), _slice),
    "aten.flip": _flip,
    "aten.roll": _flip,
    **dict.fromkeys(("aten.constant_pad_nd", "aten.pad"), _pad),
    "aten.select": _select,
    "aten.index": _index,
    "aten.unbind": _unbind,
    **dict.fromkeys(("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split"), _split),
    **dict.fromkeys(("aten.cat", "aten.concat", "aten.concatenate"), _cat),
    "aten.stack": _stack,
    "aten.sum": _reduce("sum"),
    "aten.mean": _reduce("mean"),
    **dict.fromkeys(("aten.amax", "aten.amin", "aten.max", "aten.min", "aten.argmax", "aten.argmin"), _reduce("whole")),
    **dict.fromkeys(("aten.var", "aten.std", "aten.prod", "aten.any", "aten.all", "aten.norm"), _reduce("whole")),
    **dict.fromkeys(("aten.linalg_vector_norm", "aten.logsumexp", "aten.var_mean", "aten.median"), _reduce("whole")),
    "aten.matmul": _matmul,
    "aten.addmm": _addmm,
    "aten.einsum": _einsum,
    **dict.fromkeys(("aten.layer_norm", "aten.rms_norm"), _normalised),
    "aten.group_norm": _group_norm,
    "aten.batch_norm": _batch_norm,
    "whalepy.program.functional_ops.batch_norm": _batch_norm_training,
    "aten.scaled_dot_product_attention": _attention,
    **dict.fromkeys(("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution"), _convolution),
    **dict.fromkeys(("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d"), _convolution),
    **dict.fromkeys(("aten.max_pool1d", "aten.avg_pool1d", "aten.adaptive_avg_pool1d"), _pool(1)),
    **dict.fromkeys(("aten.max_pool2d", "aten.avg_pool2d", "aten.adaptive_avg_pool2d"), _pool(2)),
    **dict.fromkeys(("aten.adaptive_max_pool2d", "aten.upsample_nearest2d", "aten.upsample_bilinear2d"), _pool(2)),
    **dict.fromkeys(("aten.full", "aten.zeros", "aten.ones", "aten.empty", "aten.rand", "aten.randn"), _create),
    **dict.fromkeys(("aten.new_full", "aten.new_zeros", "aten.new_ones", "aten.new_empty"), _create),
    **dict.fromkeys(("aten.cross_entropy_loss", "aten.nll_loss_nd", "aten.nll_loss"), _cross_entropy),
}

USER_RULES: dict[str, str] = {}
"""Rules added by `whalepy.rule`, by qualified operator name."""


def rule_of(call: Call) -> Rule | None:
    """The rule of a call at its ranks, or None: it runs replicated."""
    made = _find(call)
    if made is None:
        return None
    linear = LINEAR.get(call.name) if _keeps_sums(call) else None
    if linear is not None and not made.linear:
        groups = (tuple(range(len(call.operands))),) if linear == "all" else linear
        usable = tuple(frozenset(g) for g in groups if max(g) < len(call.operands))  # type: ignore[arg-type]
        made = _with_linear(made, usable)  # type: ignore[arg-type]
    return at_ranks(made, call.ranks, [result.ndim for result in call.results])


def _keeps_sums(call: Call) -> bool:
    """Whether the flags of a listed operator leave it linear: no constant added, no rounding, floats throughout."""
    if call.name in ("aten.add", "aten.sub", "aten.rsub") and len(call.operands) < 2:
        return False
    if call["rounding_mode"] is not None:
        return False
    values = [*(operand.meta["val"] for operand in call.operands), *call.results]
    return all(value.dtype.is_floating_point or value.dtype is torch.bool for value in values)


def _with_linear(rule: Rule, linear: tuple[frozenset[int], ...]) -> Rule:
    return Rule(
        rule.inputs, rule.outputs, rule.additive, rule.kernels, linear, rule.sizes, rule.flat, rule.concatenated
    )


def _find(call: Call) -> Rule | None:
    name = call.name.replace("aten.", "aten.", 1)
    if name in USER_RULES:
        return parse_rule(USER_RULES[name])
    if name in LINES:
        return _from_line(call, *LINES[name])
    if name in MAKERS:
        return MAKERS[name](call)
    tags = getattr(call.node.target, "tags", ())
    if name in POINTWISE or torch.Tag.pointwise in tags:
        return _pointwise(call)
    return None


def _from_line(call: Call, line: str, linear: tuple[tuple[int, ...], ...]) -> Rule | None:
    """The line without the entries of absent operands."""
    rule = parse_rule(line, linear=linear)
    present = [i for i, name in enumerate(call.tensor_arguments) if call[name] is not None]
    if len(present) != len(call.operands) or (present and present[-1] >= len(rule.inputs)):
        return None
    position = {old: new for new, old in enumerate(present)}
    return Rule(
        tuple(rule.inputs[i] for i in present),
        rule.outputs,
        frozenset(position[i] for i in rule.additive if i in position),
        rule.kernels,
        tuple(frozenset(position[i] for i in g) for g in rule.linear if g <= set(present)),
        rule.sizes,
    )
