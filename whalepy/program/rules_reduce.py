"""Rules of reductions, scans, sorting and normalisations over a dim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from whalepy.program.call import Call
from whalepy.program.rules import Rule
from whalepy.program.rules_pointwise import pointwise
from whalepy.program.rules_write import ONE, Maker, along, is_count, letters, overload, write

Kind = Literal["sum", "count", "mean", "whole"]


def _reduce(kind: Kind) -> Maker:
    """`sum`, `count`: partial results add up; `mean`: once divided by the global size; `whole`: reduced dims whole."""

    def make(call: Call) -> Rule | None:
        dims = _reduced(call)
        if dims is None or len(call.operands) != 1:
            return None
        source = letters(call.ranks[0])
        out = [("_" if call["keepdim"] else None) if d in dims else letter for d, letter in enumerate(source)]
        kernels = {source[d]: "global_mean" for d in dims} if kind == "mean" else {}
        if kind == "whole":
            source = [letter.upper() if d in dims else letter for d, letter in enumerate(source)]
        result = [token for token in out if token is not None]
        if any(r.ndim != len(result) for r in call.results):
            return None
        return write([source], [result] * len(call.results), kernels=kernels, linear=_linear(kind, call))

    return make


def _linear(kind: Kind, call: Call) -> tuple[frozenset[int], ...]:
    floats = all(value.dtype.is_floating_point for value in (call.operands[0].meta["val"], *call.results))
    return ONE if kind in ("sum", "mean") and floats else ()


def _reduced(call: Call) -> tuple[int, ...] | None:
    """Dims that are reduced; None where the call leaves that in doubt."""
    if "dim" not in call.arguments:
        return tuple(range(call.ranks[0]))
    if call.name in ("aten.any", "aten.all", "aten.prod") and call["dim"] == []:
        return None
    return call.dims()


def _max(call: Call) -> Rule | None:
    return pointwise(call) if overload(call) == "other" else _reduce("whole")(call)


def _along_dim(call: Call) -> Rule | None:
    """The dim is whole, in and out."""
    return along(call, [call.dim()]) if call.ranks[0] and is_count(call["dim"]) else None


def _scan(call: Call) -> Rule | None:
    return (
        along(call, [call.dim()], linear=all(v.dtype.is_floating_point for v in call.results))
        if call.ranks[0]
        else None
    )


def _halved(call: Call) -> Rule | None:
    """glu: the result's dim is half of the operand's."""
    return along(call, [call.dim()], fresh=True)


def _differences(call: Call) -> Rule | None:
    """Between neighbours along a dim, of what is put before and behind too."""
    if any(rank != call.ranks[0] for rank in call.ranks) or not call.ranks[0]:
        return None
    tokens = letters(call.ranks[0])
    tokens[call.dim()] = "_"
    return write([tokens] * len(call.operands), [tokens])


def _first_dim(call: Call) -> Rule | None:
    return along(call, [0]) if call.ranks[0] else None


def _compared(call: Call) -> Rule | None:
    """Two tensors of equal shape compared along a dim, which goes."""
    if call.sizes(0) != call.sizes(1):
        return None
    d = call.dim() if "dim" in call.arguments else call.ranks[0] - 1
    source = letters(call.ranks[0])
    out = [("_" if call["keepdim"] else None) if i == d else letter for i, letter in enumerate(source)]
    source[d] = source[d].upper()
    return write([source, source], [[token for token in out if token is not None]])


def _named(text: str) -> Sequence[str]:
    return tuple(f"aten.{name}" for name in text.split())


MAKERS: dict[str, Maker] = {
    "aten.sum": _reduce("sum"),
    "aten.count_nonzero": _reduce("count"),
    "aten.mean": _reduce("mean"),
    **dict.fromkeys(("aten.max", "aten.min"), _max),
    **dict.fromkeys(
        _named("amax amin aminmax argmax argmin var std var_mean std_mean prod any all norm"), _reduce("whole")
    ),
    **dict.fromkeys(_named("linalg_vector_norm logsumexp special_logsumexp median nanmedian mode"), _reduce("whole")),
    **dict.fromkeys(_named("nansum nanmean kthvalue frobenius_norm"), _reduce("whole")),
    **dict.fromkeys(
        _named("softmax _softmax log_softmax _log_softmax special_softmax special_log_softmax"), _along_dim
    ),
    **dict.fromkeys(_named("_safe_softmax sort argsort cumprod logcumsumexp cummax cummin"), _along_dim),
    "aten.topk": _halved,
    "aten.glu": _halved,
    "aten.cumsum": _scan,
    "aten.msort": _first_dim,
    "aten.diff": _differences,
    **dict.fromkeys(_named("cosine_similarity pairwise_distance"), _compared),
}
