from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.rule_cases import Row, call, grad, ints, letters_of, mask, name_of, t, u
from whalepy.program import functional_ops
from whalepy.program.call import Call
from whalepy.program.layout import Mode
from whalepy.program.rule_table import rule_of
from whalepy.runtime.check_rule import SHARES, letter_of, refuse_difference
from whalepy.runtime.one_operator import Trial, one_operator

a = torch.ops.aten


def recurrent(kind: str, batch_first: bool = True, n: int = 3, layers: int = 1, bi: bool = False) -> tuple[Any, ...]:
    """Arguments of the operator behind nn.LSTM, nn.GRU or nn.RNN."""
    cell = getattr(torch.nn, kind)(4, 5, layers, batch_first=batch_first, bidirectional=bi).double()
    parameters = [p.detach() for p in cell._flat_weights]
    state = t(layers * (2 if bi else 1), n, 5)
    x = t(n, 6, 4) if batch_first else t(6, n, 4)
    states = [state, state.clone()] if kind == "LSTM" else state
    return x, states, parameters, True, layers, 0.0, True, bi, batch_first


# call -> letters that its rule leaves free; None: no rule, so it runs replicated
ROWS: list[Row] = [
    (lambda: call(a.cosine_embedding_loss.default, t(4, 5), t(4, 5), t(4).sign(), 0.1, 0), "n"),
    (lambda: call(a.cosine_embedding_loss.default, t(5), t(5), torch.tensor(1), 0.1, 0), None),
    (lambda: call(a.layer_norm.default, t(4, 6, 5), [5], t(5), t(5)), ".1 .0"),
    (lambda: call(a.layer_norm.default, t(4, 6, 5), [6, 5]), ".0"),
    (lambda: call(a.rms_norm.default, t(4, 6, 5), [5], t(5)), ".1 .0"),
    (lambda: call(a.group_norm.default, t(4, 6, 3), 2, t(6), t(6)), "n"),
    (lambda: call(a.group_norm.default, t(4, 6, 3, 3), 3), "n"),
    (
        lambda: call(
            a.batch_norm.default, grad(t(4, 6, 3)), grad(t(6)), grad(t(6)), t(6), u(6), False, 0.1, 1e-05, True
        ),
        "n c a",
    ),
    (lambda: call(a.batch_norm.default, t(4, 6, 3), t(6), t(6), None, None, True, 0.1, 1e-05, True), "c"),
    (lambda: call(a.batch_norm.default, grad(t(4, 6)), None, None, t(6), u(6), False, 0.1, 1e-05, True), "n c"),
    (lambda: call(a.instance_norm.default, t(4, 6, 3), t(6), t(6), None, None, True, 0.1, 1e-05, True), "n c"),
    (lambda: call(a._weight_norm.default, t(4, 5, 3), t(4, 1, 1), 0), "a"),
    (lambda: call(a.scaled_dot_product_attention.default, t(2, 4, 5, 3), t(2, 4, 6, 3), t(2, 4, 6, 2)), "a b q"),
    (
        lambda: call(
            a.scaled_dot_product_attention.default, t(2, 4, 5, 3), t(2, 4, 6, 3), t(2, 4, 6, 2), is_causal=True
        ),
        "a b",
    ),
    (
        lambda: call(
            a.scaled_dot_product_attention.default,
            t(2, 4, 5, 3),
            t(2, 4, 6, 3),
            t(2, 4, 6, 2),
            mask(5, 6) | torch.eye(5, 6, dtype=bool),
        ),
        "a b q",
    ),
    (
        lambda: call(a.scaled_dot_product_attention.default, t(2, 4, 5, 3), t(2, 4, 6, 3), t(2, 4, 6, 2), t(4, 5, 6)),
        "a b q",
    ),
    (
        lambda: call(
            a.scaled_dot_product_attention.default, t(2, 4, 5, 3), t(2, 4, 6, 3), t(2, 4, 6, 2), t(2, 1, 5, 6)
        ),
        "a b q",
    ),
    (
        lambda: call(
            a.scaled_dot_product_attention.default, t(2, 4, 5, 3), t(2, 4, 6, 3), t(2, 4, 6, 2), t(2, 4, 1, 6)
        ),
        "a b q",
    ),
    (
        lambda: call(
            a.scaled_dot_product_attention.default, t(2, 4, 5, 3), t(2, 4, 6, 3), t(2, 4, 6, 2), t(1, 1, 5, 6)
        ),
        "a b q",
    ),
    (
        lambda: call(a.scaled_dot_product_attention.default, t(2, 4, 5, 3), t(2, 4, 6, 3), t(2, 4, 6, 2), None, 0.5),
        "a b q",
    ),
    (lambda: call(a.scaled_dot_product_attention.default, t(4, 5, 3), t(4, 6, 3), t(4, 6, 3)), "a q"),
    (lambda: call(a.scaled_dot_product_attention.default, t(4, 5, 3), t(4, 6, 3), t(4, 6, 3), t(4, 5, 6)), "a q"),
    (lambda: call(a.scaled_dot_product_attention.default, t(4, 5, 3), t(4, 6, 3), t(4, 6, 3), t(5, 6)), "a q"),
    (
        lambda: call(
            a.scaled_dot_product_attention.default, t(2, 6, 5, 3), t(2, 3, 6, 3), t(2, 3, 6, 3), enable_gqa=True
        ),
        "a b b r q",
    ),
    (
        lambda: call(
            a.scaled_dot_product_attention.default,
            t(2, 6, 5, 3),
            t(2, 3, 5, 3),
            t(2, 3, 5, 3),
            None,
            0.0,
            True,
            enable_gqa=True,
        ),
        "a b b r",
    ),
    (
        lambda: call(
            a.scaled_dot_product_attention.default,
            t(2, 6, 5, 3),
            t(2, 3, 6, 3),
            t(2, 3, 6, 3),
            t(2, 6, 5, 6),
            enable_gqa=True,
        ),
        "a b b r q",
    ),
    (
        lambda: call(
            a.scaled_dot_product_attention.default,
            t(2, 6, 5, 3),
            t(2, 3, 6, 3),
            t(2, 3, 6, 3),
            t(2, 1, 5, 6),
            enable_gqa=True,
        ),
        "a b b r q",
    ),
    (
        lambda: call(
            a.scaled_dot_product_attention.default, t(2, 6, 5, 3), t(2, 1, 6, 3), t(2, 1, 6, 3), enable_gqa=True
        ),
        "a b r q",
    ),
    (lambda: call(a.scaled_dot_product_attention.default, t(2, 4, 5, 3), t(1, 4, 6, 3), t(1, 4, 6, 3)), "a b q"),
    (lambda: call(a.scaled_dot_product_attention.default, t(5, 3), t(6, 3), t(6, 3)), None),
    (lambda: call(a.scaled_dot_product_attention.default, t(2, 4, 5, 3), t(2, 1, 6, 3), t(2, 1, 6, 3)), "a b q"),
    (lambda: call(a.max_pool1d.default, t(3, 4, 6), [2]), "n c"),
    (lambda: call(a.max_pool2d.default, t(3, 4, 6, 6), [2, 2]), "n c"),
    (lambda: call(a.max_pool2d_with_indices.default, t(3, 4, 6, 6), [2, 2]), "n c"),
    (lambda: call(a.max_pool2d.default, t(4, 6, 6), [2, 2]), "c"),
    (lambda: call(a.avg_pool1d.default, t(3, 4, 6), [2]), "n c"),
    (lambda: call(a.avg_pool2d.default, t(3, 4, 6, 6), [2, 2]), "n c"),
    (lambda: call(a.avg_pool3d.default, t(3, 4, 4, 4, 4), [2, 2, 2]), "n c"),
    (lambda: call(a.adaptive_avg_pool1d.default, t(3, 4, 6), [2]), "n c"),
    (lambda: call(a.adaptive_avg_pool2d.default, t(3, 4, 6, 6), [1, 1]), "n c"),
    (lambda: call(a.adaptive_avg_pool2d.default, t(4, 6, 6), [2, 2]), "c"),
    (lambda: call(a.adaptive_avg_pool3d.default, t(3, 4, 4, 4, 4), [2, 1, 1]), "n c"),
    (lambda: call(a.adaptive_max_pool1d.default, t(3, 4, 6), [2]), "n c"),
    (lambda: call(a.adaptive_max_pool2d.default, t(3, 4, 6, 6), [2, 2]), "n c"),
    (lambda: call(a.max_pool3d.default, t(3, 4, 4, 4, 4), [2, 2, 2]), "n c"),
    (lambda: call(a.upsample_nearest2d.vec, t(3, 4, 6, 6), [12, 12], None), "n c"),
    (lambda: call(a.upsample_nearest2d.vec, t(3, 4, 6, 6), None, [2.0, 2.0]), "n c"),
    (lambda: call(a.upsample_bilinear2d.vec, t(3, 4, 6, 6), [9, 9], False, None), "n c"),
    (lambda: call(a.upsample_bicubic2d.vec, t(3, 4, 6, 6), [9, 9], True, None), "n c"),
    (lambda: call(a.upsample_linear1d.vec, t(3, 4, 6), [9], False, None), "n c"),
    (lambda: call(a.upsample_trilinear3d.vec, t(3, 4, 4, 4, 4), [6, 6, 6], False, None), "n c"),
    (lambda: call(a.upsample_nearest1d.vec, t(3, 4, 6), [9], None), "n c"),
    (lambda: call(a.pixel_shuffle.default, t(2, 12, 3, 3), 2), "a c"),
    (lambda: call(a.pixel_unshuffle.default, t(2, 3, 4, 4), 2), "a c"),
    (lambda: call(a.pixel_shuffle.default, t(12, 3, 3), 2), "c"),
    (lambda: call(a.channel_shuffle.default, t(2, 6, 3, 3), 2), "n h w"),
    (lambda: call(a.im2col.default, t(3, 4, 6, 6), [2, 2], [1, 1], [0, 0], [1, 1]), "n"),
    (lambda: call(a.col2im.default, t(3, 16, 25), [6, 6], [2, 2], [1, 1], [0, 0], [1, 1]), "n"),
    (lambda: call(a.grid_sampler.default, t(3, 4, 6, 6), u(3, 5, 5, 2), 0, 0, False), "n c"),
    (lambda: call(a.affine_grid_generator.default, t(3, 2, 3), [3, 4, 5, 5], False), "n"),
    (lambda: call(a.lstm.input, *recurrent("LSTM")), "n"),
    (lambda: call(a.lstm.input, *recurrent("LSTM", False, layers=2, bi=True)), "n"),
    (lambda: call(a.gru.input, *recurrent("GRU")), "n"),
    (lambda: call(a.gru_cell.default, t(3, 4), t(3, 5), t(15, 4), t(15, 5), t(15), t(15)), "n"),
    (lambda: call(a.rnn_relu_cell.default, t(3, 4), t(3, 5), t(5, 4), t(5, 5)), "n"),
    (lambda: call(a.lstm_cell.default, t(3, 4), [t(3, 5), t(3, 5)], t(20, 4), t(20, 5), t(20), t(20)), "n"),
    (lambda: call(a.rnn_tanh.input, *recurrent("RNN")), "n"),
    (lambda: call(a.cross_entropy_loss.default, t(6, 9), torch.tensor([1, 2, -100, 5, 8, 0]), None, 2), "n c"),
    (lambda: call(a.cross_entropy_loss.default, t(6, 9), torch.tensor([1, 2, -100, 5, 8, 0]), None, 0), "n"),
    (lambda: call(a.cross_entropy_loss.default, t(6, 9), torch.tensor([1, 2, -100, 5, 8, 0]), None, 2, -100, 0.1), "n"),
    (lambda: call(a.cross_entropy_loss.default, t(6, 9, 4), ints(9, 6, 4), None, 2), "n s0"),
    (lambda: call(a.cross_entropy_loss.default, t(6, 9), t(6, 9).softmax(1), None, 2), "n"),
    (lambda: call(a.cross_entropy_loss.default, t(6, 9), t(6, 9).softmax(1), u(9), 0, -100, 0.1), "n"),
    (lambda: call(a.cross_entropy_loss.default, t(9), torch.tensor(3), None, 2), None),
    (lambda: call(a.cross_entropy_loss.default, t(6, 9), torch.tensor([1, 2, -100, 5, 8, 0]), None, 1), None),
    (lambda: call(a.nll_loss_nd.default, t(6, 9), torch.tensor([1, 2, -100, 5, 8, 0]), None, 2), "n"),
    (lambda: call(a.fft_fft.default, t(3, 4, 5)), "a b"),
    (lambda: call(a.fft_rfft.default, t(3, 4, 5), None, 1), "a c"),
    (lambda: call(a.fft_fftn.default, t(3, 4, 5), None, [1, 2]), "a"),
    (lambda: call(a.fft_rfft2.default, t(3, 4, 5)), "a"),
    (lambda: call(a.fft_rfftn.default, t(3, 4)), ""),
    (lambda: call(a.fft_fftn.default, t(3, 4, 5), [4]), None),
    (lambda: call(a.multi_margin_loss.default, t(5, 4), ints(4, 5), 1, 1.0, None, 0), "n"),
    (lambda: call(a.multi_margin_loss.default, t(5, 4), ints(4, 5)), None),
    (lambda: call(a.multilabel_margin_loss.default, t(5, 4), ints(4, 5, 4), 0), "n"),
    (lambda: call(a.triplet_margin_loss.default, t(4, 5), t(4, 5), t(4, 5), 1.0, 2.0, 1e-06, False, 0), ".0"),
    (lambda: call(a.mse_loss.default, t(4, 5), t(4, 5), 0), ".1 .0"),
    (lambda: call(a.l1_loss.default, t(4, 5), t(4, 5), 0), ".1 .0"),
    (lambda: call(a.smooth_l1_loss.default, t(4, 5), t(4, 5), 0), ".1 .0"),
    (lambda: call(a.huber_loss.default, t(4, 5), t(4, 5), 0), ".1 .0"),
    (lambda: call(a.binary_cross_entropy.default, u(4, 5), u(4, 5), None, 0), ".1 .0"),
    (lambda: call(a.kl_div.default, t(4, 5), u(4, 5), 0), ".1 .0"),
    (lambda: call(a.hinge_embedding_loss.default, t(4, 5), t(4, 5).sign(), 1.0, 0), ".1 .0"),
    (lambda: call(a.margin_ranking_loss.default, t(4), t(4), t(4).sign(), 0.0, 0), ".0"),
    (lambda: call(a.poisson_nll_loss.default, t(4, 5), u(4, 5), True, False, 1e-08, 0), ".1 .0"),
    (lambda: call(a.mse_loss.default, t(4, 5), t(4, 5), 2), None),
    (lambda: call(a.cross_entropy_loss.default, grad(t(6, 9)), torch.tensor([1, 2, -100, 5, 8, 0]), u(9), 2), "n"),
    (lambda: call(a.nll_loss_nd.default, grad(t(6, 9)), torch.tensor([1, 2, -100, 5, 8, 0]), u(9), 0), "n"),
    (lambda: call(a.soft_margin_loss.default, grad(t(4, 5)), t(4, 5).sign(), 0), ".1 .0"),
    (lambda: call(a.binary_cross_entropy_with_logits.default, grad(t(4, 5)), u(4, 5), None, u(5), 0), ".1 .0"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("row", "letters"), ROWS, ids=name_of)
def test_split_run_and_recombined_equals_the_operator(row: Callable[[], Any], letters: str | None) -> None:
    assert letters_of(row) == letters


def test_batch_norm_in_training_is_free_in_its_channels() -> None:
    torch.manual_seed(0)
    x, weight, bias = grad(t(4, 6, 3)), grad(t(6)), grad(t(6))
    one = one_operator(functional_ops.batch_norm, (x, weight, bias, t(6), u(6), True, 0.1, 1e-5, True), {})
    rule = rule_of(Call(one.program.nodes[one.index]))
    assert rule is not None
    free = {letter_of(rule, option): option for option in one.operator.options}
    assert list(free) == ["n", "c"]  # by rows each device has statistics of its own: not the whole operator's
    for shares in SHARES:
        refuse_difference(Trial(one, (shares,), (Mode("S", free["c"]),)), rule, "cut along 'c'")
