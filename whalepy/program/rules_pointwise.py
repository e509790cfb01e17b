"""Operators that treat every element alike, one by one by name: nothing is assumed to be elementwise."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from whalepy.program.axes import Size
from whalepy.program.call import Call, sizes_of
from whalepy.program.rules import Rule, parse_rule
from whalepy.program.rules_write import Maker, write


def _names(text: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" for name in text.split())


UNARY = _names("""
    abs absolute acos arccos acosh arccosh angle asin arcsin asinh arcsinh atan arctan atanh arctanh bitwise_not ceil
    celu conj _conj conj_physical _conj_physical cos cosh deg2rad digamma elu erf erfc erfinv exp exp2 expm1 fix floor
    frac gelu hardshrink hardsigmoid hardswish hardtanh i0 isfinite isinf isnan isneginf isposinf isreal leaky_relu
    lgamma log log10 log1p log2 log_sigmoid logical_not logit mish nan_to_num neg negative polygamma positive rad2deg
    real imag reciprocal relu relu6 resolve_conj resolve_neg round rsqrt selu sgn sigmoid sign signbit silu sin sinc
    sinh softplus softshrink sqrt square tan tanh threshold trunc mvlgamma
    special_digamma special_entr special_erf special_erfc special_erfcx special_erfinv special_exp2 special_expit
    special_expm1 special_gammaln special_i0 special_i0e special_i1 special_i1e special_log1p special_log_ndtr
    special_logit special_ndtr special_ndtri special_psi special_round special_sinc
    alias clone contiguous detach lift lift_fresh lift_fresh_copy _to_copy to
    zeros_like ones_like full_like empty_like frexp
""")
BINARY = _names("""
    add arctan2 atan2 bitwise_and bitwise_left_shift bitwise_or bitwise_right_shift bitwise_xor __and__ __or__ __xor__
    __lshift__ __rshift__ copysign div divide true_divide floor_divide eq float_power fmax fmin fmod gcd ge greater
    greater_equal gt heaviside hypot igamma igammac isclose lcm ldexp le less less_equal logaddexp logaddexp2
    logical_and logical_or logical_xor lt maximum minimum mul multiply ne not_equal nextafter pow remainder rsub sub
    subtract xlogy special_xlogy special_xlog1py special_zeta
""")
MORE = _names("addcdiv addcmul clamp clamp_max clamp_min clip lerp masked_fill where fill complex polar copy")

LOSSES_WITH_REDUCTION = _names("""
    mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div
    soft_margin_loss hinge_embedding_loss margin_ranking_loss poisson_nll_loss
""")
"""Losses of one term per element, which their `reduction` then sums or averages."""

FUNCTIONS = "whalepy_function"
"""Namespace of the operators that stand for a torch.autograd.Function."""
POINTWISE_FUNCTIONS: set[str] = set()
"""Those of them that were seen to treat every element alike."""
_RANDOM_POINTWISE = _names("dropout alpha_dropout native_dropout rrelu bernoulli rand_like randn_like randint_like")

POINTWISE = UNARY | BINARY | MORE | LOSSES_WITH_REDUCTION | _RANDOM_POINTWISE

# Joint linearity, by operand position; "all": jointly in all tensor operands.
LINEAR: dict[str, tuple[tuple[int, ...], ...] | str] = {
    **dict.fromkeys(_names("add sub subtract rsub cat concat concatenate stack"), "all"),
    **dict.fromkeys(_names("neg negative positive to _to_copy clone contiguous alias detach lift_fresh_copy"), ((0,),)),
    **dict.fromkeys(_names("deg2rad rad2deg"), ((0,),)),
    **dict.fromkeys(_names("mul multiply"), ((0,), (1,))),
    **dict.fromkeys(_names("div divide true_divide"), ((0,),)),
    "aten.where": ((1, 2),),
}


def linear_groups(call: Call) -> tuple[frozenset[int], ...]:
    """Groups of operands through which partial sums may wait, from the table and the flags of the call."""
    listed = LINEAR.get(call.name, ())
    count = len(call.operands)
    # add(x, 1) is affine; with rounding nothing is linear; where(c, x, 1) and where(c, 1, x) are affine.
    affine = count < {"aten.add": 2, "aten.sub": 2, "aten.subtract": 2, "aten.rsub": 2, "aten.where": 3}.get(
        call.name, 1
    )
    if not listed or affine or call["rounding_mode"] is not None or not _floats(call):
        return ()
    groups: Sequence[tuple[int, ...]] = (tuple(range(count)),) if isinstance(listed, str) else listed
    return tuple(frozenset(group) for group in groups if max(group) < count)


def _floats(call: Call) -> bool:
    """Whether results are floating, and operands too but for masks."""
    operands = [operand.meta["val"].dtype for operand in call.operands]
    return all(r.dtype.is_floating_point for r in call.results) and all(
        dtype.is_floating_point or (dtype is torch.bool and call.name == "aten.where") for dtype in operands
    )


def pointwise(call: Call) -> Rule | None:
    """Operands broadcast to the shape of the results; None where they do not, or where a loss is reduced."""
    if call["reduction"] not in (None, 0) and call.name in LOSSES_WITH_REDUCTION:
        return None
    if any(result.ndim < max(call.ranks, default=0) for result in call.results) or not _broadcasts(call):
        return None
    return parse_rule(", ".join(["..."] * len(call.operands)) + " -> " + ", ".join(["..."] * len(call.results)))


def _broadcasts(call: Call) -> bool:
    """Whether every operand has the result's size or 1 in each dim."""
    return all(
        a in (1, b) or not (isinstance(a, int) and isinstance(b, int))
        for i in range(len(call.operands))
        for result in call.results
        for a, b in _aligned(call.sizes(i), sizes_of(result))
    )


def _aligned(operand: tuple[Size, ...], result: tuple[Size, ...]) -> list[tuple[Size, Size]]:
    return list(zip(reversed(operand), reversed(result), strict=False))


def _cast(call: Call) -> Rule | None:
    """`to(x, other)` and `type_as`: the other operand lends its type only."""
    if len(call.operands) == 1:
        return pointwise(call)
    return parse_rule(f"..., {'_' * call.ranks[1]} -> ...") if call.ranks[1] else parse_rule("..., -> ...")


def _prelu(call: Call) -> Rule | None:
    """One weight per channel (dim 1), or one in all."""
    rank = call.ranks[0]
    space = "".join("abdefgh"[: max(rank - 2, 0)])
    if call.sizes(1) in ((1,), ()):
        return parse_rule(f"..., {'_' * call.ranks[1]} -> ...") if call.ranks[1] else pointwise(call)
    return parse_rule(f"nc{space}, c -> nc{space}") if rank >= 2 and call.ranks[1] == 1 else None


def _channel_dropout(call: Call) -> Rule | None:
    """Whole channels are dropped: what lies within a channel stays together."""
    if call.ranks[0] < 2:
        return None
    tokens = ["n", "c", *(f"S{d}" for d in range(call.ranks[0] - 2))]
    return write([tokens], [tokens])


MAKERS: dict[str, Maker] = {
    **dict.fromkeys(("aten.to", "aten.type_as"), _cast),
    "aten.prelu": _prelu,
    "aten._prelu_kernel": pointwise,
    **dict.fromkeys(("aten.feature_dropout", "aten.feature_alpha_dropout"), _channel_dropout),
    "aten.bucketize": lambda call: parse_rule("..., _ -> ...") if len(call.operands) == 2 else None,
    "aten.view_as_real": lambda call: parse_rule("... -> ..._"),
    "aten.view_as_complex": lambda call: parse_rule("..._ -> ..."),
    "aten.broadcast_tensors": pointwise,
}
