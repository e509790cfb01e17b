"""Rules of layers: norms, attention, pooling, resampling, recurrent layers, losses of several dims."""

from __future__ import annotations

from whalepy.program.call import Call
from whalepy.program.rules import Rule, parse_rule
from whalepy.program.rules_write import ONE, Maker, along, is_count, letters, write


def _normalised(call: Call) -> Rule:
    """layer_norm and rms_norm: the trailing dims are whole."""
    trailing = [f"N{d}" for d in range(len(call["normalized_shape"]))]
    return write([["...", *trailing]] + [trailing] * (len(call.operands) - 1), [["...", *trailing]])


def _space(call: Call) -> list[str]:
    return [f"S{d}" for d in range(call.ranks[0] - 2)]


def _per_channel(call: Call, channel: str, row: str = "n") -> Rule:
    x = [row, channel, *_space(call)]
    return write([x] + [[channel]] * (len(call.operands) - 1), [x])


def _group_norm(call: Call) -> Rule:
    return _per_channel(call, "C")


def _instance_norm(call: Call) -> Rule | None:
    return _per_channel(call, "c") if call["use_input_stats"] and call["running_mean"] is None else None


def _batch_norm(call: Call) -> Rule:
    """With given statistics an affine map per channel; with those of the batch, rows and space are whole."""
    if call["training"] or call["running_mean"] is None:
        return _per_channel(call, "c", "N")
    x = ["n", "c", *letters(call.ranks[0] - 2, skip="nc")]
    return write([x] + [["c"]] * (len(call.operands) - 1), [x])


def _batch_norm_training(call: Call) -> Rule:
    """Statistics over rows; sharded by rows they are each device's own unless synchronised."""
    x = ["n", "c", *_space(call)]
    rest = [["c"]] * (len(call.operands) - 1)
    return write([x, *rest], [x] + [["c"]] * (len(call.results) - 1), kernels={"n": "batch_statistics"})


def _weight_norm(call: Call) -> Rule:
    d = call.dim()
    v = [letter if k == d else letter.upper() for k, letter in enumerate(letters(call.ranks[0]))]
    return write([v, [letter if k == d else "_" for k, letter in enumerate(v)]], [v])


def _attention(call: Call) -> Rule | None:
    """Heads and rows free, keys whole; queries free unless the mask is implied by their position."""
    rank = call.ranks[0]
    if max(call.ranks[:3]) != min(call.ranks[:3]) or rank < 3:
        return None
    lead = letters(rank - 2)
    query: list[object] = list(lead)
    repeated = _head_ratio(call) if call["enable_gqa"] else 1
    if repeated is None:
        return None
    if repeated > 1:
        query[-1] = (lead[-1], "r")  # consecutive query heads read the same key head
    rows = "Q" if call["is_causal"] else "q"
    operands: list[list[object]] = [[*query, rows, "D"], [*lead, "K", "D"], [*lead, "K", "E"]]
    if len(call.operands) > 3:
        operands.append(_mask(call, [*query, rows, "K"]))
    return write(operands, [[*query, rows, "E"]], sizes={"r": repeated})


def _head_ratio(call: Call) -> int | None:
    heads, shared = call.sizes(0)[-3], call.sizes(1)[-3]
    if not (isinstance(heads, int) and isinstance(shared, int)) or shared == 0 or call.sizes(2)[-3] != shared:
        return None
    return heads // shared if heads % shared == 0 else None


def _mask(call: Call, scores: list[object]) -> list[object]:
    """A mask broadcasts to the scores from the right; dims of size 1 lack the factor."""
    rank = call.ranks[3]
    aligned = scores[len(scores) - rank :]
    return ["_" if size == 1 else token for token, size in zip(aligned, call.sizes(3), strict=True)]


def _pool(space: int, *, linear: bool = False) -> Maker:
    """Rows and channels free, with or without a dim of rows; indices count within a channel."""

    def make(call: Call) -> Rule | None:
        if call.ranks[0] not in (space + 1, space + 2) or len(call.operands) != 1:
            return None
        tokens = [*"nc"[-(call.ranks[0] - space) :], *["_"] * space]
        return write([tokens], [tokens] * len(call.results), linear=ONE if linear else ())

    return make


def _shuffle(factor: str, *, up: bool) -> Maker:
    """pixel_shuffle and back: channels (c R), R the square of the factor."""

    def make(call: Call) -> Rule | None:
        scale = call[factor]
        if not is_count(scale) or call.ranks[0] < 3:
            return None
        lead = letters(call.ranks[0] - 3, skip="c")
        many = [*lead, ("c", "R") if scale > 1 else "c", "_", "_"]
        few = [*lead, "c", "_", "_"]
        sides = ([many], [few]) if up else ([few], [many])
        return write(*sides, linear=ONE, sizes={"R": scale * scale})

    return make


def _recurrent(call: Call) -> Rule | None:
    """lstm, gru and plain cells over padded sequences: only rows are free."""
    if call["batch_first"] is None or call.ranks[0] != 3 or (call["dropout"] and call["train"]):
        return None
    x = ["n", "_", "_"] if call["batch_first"] else ["_", "n", "_"]
    states = len(call["hx"]) if isinstance(call["hx"], list | tuple) else 1
    state = ["_", "n", "_"]
    parameters = [["_"] * rank for rank in call.ranks[1 + states :]]
    return write([x, *[state] * states, *parameters], [x, *[state] * (len(call.results) - 1)])


def _cell(call: Call) -> Rule | None:
    """One step of such a layer."""
    states = len(call["hx"]) if isinstance(call["hx"], list | tuple) else 1
    if any(rank != 2 for rank in call.ranks[: 1 + states]):
        return None
    parameters = [["_"] * rank for rank in call.ranks[1 + states :]]
    return write([["n", "_"]] * (1 + states) + parameters, [["n", "_"]] * len(call.results))


def _cross_entropy(call: Call) -> Rule | None:
    """Summed or per row; the mean has become a sum over a count by now. Targets are class indices or probabilities."""
    if call["reduction"] not in (0, 2) or call.ranks[0] < 2:
        return None
    summed, by_class = call["reduction"] == 2, call.ranks[0] != call.ranks[1]
    space = [f"s{d}" for d in range(call.ranks[0] - 2)]
    plain = call["weight"] is None and not call["label_smoothing"] and not space
    parallel = call.name == "aten.cross_entropy_loss" and summed and by_class and plain
    classes = "c" if parallel else "C"
    logits = ["n", classes, *space]
    rows = ["n", *space]
    weight = [[classes]] if call["weight"] is not None else []
    kernels = {"c": "class_parallel"} if parallel else {}
    return write([logits, rows if by_class else logits, *weight], [[] if summed else rows], kernels=kernels)


def _triplet(call: Call) -> Rule | None:
    return parse_rule("...D, ...D, ...D -> ...") if call["reduction"] == 0 and call.ranks[0] == 2 else None


def _cosine_embedding(call: Call) -> Rule | None:
    return parse_rule("nD, nD, n -> n") if call["reduction"] == 0 and call.ranks == (2, 2, 1) else None


def _fourier(call: Call) -> Rule | None:
    """The dims that are transformed are whole, and others afterwards."""
    if "dim" not in call.arguments or (call["dim"] is None and call["s"] is not None):
        return None
    dims = [call.dim()] if isinstance(call["dim"], int) else call.dims()
    return along(call, dims, fresh=True)


FOURIER = [f"aten.fft_{way}{kind}{dims}" for way in ("", "i") for kind in ("fft", "rfft") for dims in ("", "2", "n")]


def _margins(call: Call) -> Rule | None:
    """Each class against the right ones: the classes of a row are whole."""
    target = "n" if call.name == "aten.multi_margin_loss" else "nC"
    weight = [", C"] * (len(call.operands) - 2)
    whole = call["reduction"] == 0 and call.ranks[0] == 2
    return parse_rule(f"nC, {target}{''.join(weight)} -> n") if whole else None


LINES: dict[str, tuple[str, tuple[tuple[int, ...], ...]]] = {
    "aten.im2col": ("n___ -> n__", ((0,),)),
    "aten.col2im": ("n__ -> n___", ((0,),)),
    "aten.grid_sampler": ("ncHW, n___ -> nc__", ((0,),)),
    "aten.grid_sampler_2d": ("ncHW, n___ -> nc__", ((0,),)),
    "aten.grid_sampler_3d": ("ncDHW, n____ -> nc___", ((0,),)),
    "aten.affine_grid_generator": ("n__ -> n___", ((0,),)),
    "aten.channel_shuffle": ("n_hw -> n_hw", ((0,),)),
}
_RESAMPLE = ["upsample_nearest1d", "_upsample_nearest_exact1d", "upsample_linear1d"]
_RESAMPLE_2D = [
    "upsample_nearest2d",
    "_upsample_nearest_exact2d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
]
_RESAMPLE_3D = ["upsample_nearest3d", "_upsample_nearest_exact3d", "upsample_trilinear3d"]


def _spatial(names: list[str], space: int) -> dict[str, Maker]:
    return dict.fromkeys((f"aten.{name}" for name in names), _pool(space, linear=True))


MAKERS: dict[str, Maker] = {
    **dict.fromkeys(("aten.layer_norm", "aten.rms_norm"), _normalised),
    "aten.group_norm": _group_norm,
    "aten.instance_norm": _instance_norm,
    "aten.batch_norm": _batch_norm,
    "aten._weight_norm": _weight_norm,
    "whalepy.program.functional_ops.batch_norm": _batch_norm_training,
    "aten.scaled_dot_product_attention": _attention,
    **{
        f"aten.{kind}_pool{space}d{more}": _pool(space, linear="avg" in kind)
        for kind in ("max", "avg", "adaptive_avg", "adaptive_max")
        for space in (1, 2, 3)
        for more in (("", "_with_indices") if kind == "max" else ("",))
    },
    **_spatial(_RESAMPLE, 1),
    **_spatial(_RESAMPLE_2D, 2),
    **_spatial(_RESAMPLE_3D, 3),
    "aten.pixel_shuffle": _shuffle("upscale_factor", up=True),
    "aten.pixel_unshuffle": _shuffle("downscale_factor", up=False),
    **dict.fromkeys(("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu"), _recurrent),
    **dict.fromkeys(("aten.lstm_cell", "aten.gru_cell", "aten.rnn_tanh_cell", "aten.rnn_relu_cell"), _cell),
    **dict.fromkeys(("aten.cross_entropy_loss", "aten.nll_loss_nd", "aten.nll_loss"), _cross_entropy),
    "aten.triplet_margin_loss": _triplet,
    "aten.cosine_embedding_loss": _cosine_embedding,
    **dict.fromkeys(FOURIER, _fourier),
    **dict.fromkeys(("aten.multi_margin_loss", "aten.multilabel_margin_loss"), _margins),
}
